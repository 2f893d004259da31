"""``speculators completion``: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from speculators.cli.options import examples

PROGRAM = "speculators"
"""What is typed; Click takes the name of the variable with which a shell asks from it."""

SHELLS = ("bash", "zsh", "fish")


@click.command(
    short_help="Print the script with which a shell completes speculators.",
    epilog=examples(
        """
        speculators completion bash \\
            > ~/.local/share/bash-completion/completions/speculators
        speculators completion zsh > ~/.zfunc/_speculators
        speculators completion fish > ~/.config/fish/completions/speculators.fish
        """
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes commands, options, algorithms and paths.

    Put it where the shell looks, as below, and start the shell anew. For zsh, ~/.zshrc must hold
    "fpath+=~/.zfunc" before "autoload -Uz compinit && compinit". For bash without the package bash-completion,
    let ~/.bashrc read the file.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"the installed version of Click knows nothing of {shell}")
    script = kind(ctx.find_root().command, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source()
    # Click's script for zsh answers the first time it is called from fpath, but not the second time.
    click.echo(script.replace("== loadautofunc ]]", "== (loadautofunc|shfunc) ]]"), nl=False)
