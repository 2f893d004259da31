"""``speculators plugins``: what is installed, and what authors of plugins are given."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from speculators.cli import screen as screens
from speculators.cli.options import FOLDER, AlgorithmName, examples
from speculators.cli.running import InOrder
from speculators.cli.screen import Block, Line, Screen, Table
from speculators.errors import ValidationError, printable

if TYPE_CHECKING:
    from speculators.conformance import Verdict
    from speculators.registry import Registry, Standing

STYLES = {"ready": "bold", "broken": "bold red", "not loaded": "dim"}
"""State of a plugin → how a terminal shows its name."""


@click.group(
    cls=InOrder,
    invoke_without_command=True,
    short_help="List the installed plugins, check one, write a new one.",
    epilog=examples(
        """
        speculators plugins
        speculators plugins check eagle3
        speculators plugins new my-heads
        """
    ),
)
@click.option("--json", "as_json", is_flag=True, envvar="SPECULATORS_JSON", help="Print the list as JSON.")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List all installed plugins, also broken ones, and where they come from."""
    if ctx.invoked_subcommand is not None:
        if as_json and ctx.get_parameter_source("as_json") is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--json belongs behind {ctx.invoked_subcommand}, where that takes it")
        return
    from speculators.discovery import unreadable
    from speculators.registry import Registry

    registry, damaged = Registry(), list(unreadable())
    facts = {
        "plugins": [asdict(standing) for standing in registry.standings],
        "contested": {alias: [one.spec.name for one in known] for alias, known in registry.contested.items()},
        "not_installed": registry.not_installed,
        "damaged": damaged,
    }
    Screen(as_json=as_json).show("plugins/1", facts, [*_listing(registry), *map(Line, damaged)])


@plugins.command(
    epilog=examples(
        """
        speculators plugins check eagle3
        speculators plugins check eagle3 --json
        """
    )
)
@click.argument("name", type=AlgorithmName())
@screens.manners
def check(screen: Screen, name: str) -> None:
    """Check whether the plugin NAME keeps what it must.

    It is held to what the interface promises, on the example that it brings.
    """
    import tempfile
    from pathlib import Path

    from speculators import conformance
    from speculators.registry import Registry

    registry = Registry()
    plugin = registry.standing(name)
    with tempfile.TemporaryDirectory() as folder:
        bench = conformance.Bench(plugin.name, Path(folder), registry=registry)
        findings = conformance.judge(bench)
        passed = all(finding.passed for finding in findings)
        complete = passed and bench.has_checkpoint
    facts = {
        "plugin": asdict(plugin),
        "passed": passed,
        "complete": complete,
        "checks": [asdict(finding) for finding in findings],
    }
    incomplete = [Line("it brings no example, so nothing was converted")] if passed and not complete else []
    screen.show("plugin-check/1", facts, [*_verdict(plugin, findings), *incomplete])
    if not passed:
        raise SystemExit(ValidationError.exit_code)


@plugins.command(
    epilog=examples(
        """
        speculators plugins example eagle3 --output-path tiny
        """
    )
)
@click.argument("name", type=AlgorithmName())
@click.option("--output-path", type=FOLDER, default="example", show_default=True, help="Where draft and verifier go.")
def example(name: str, output_path: str) -> None:
    """Write the tiny checkpoint that the plugin NAME brings.

    It is an example to try conversions on, and comes with its verifier.
    """
    from speculators.examples import place_example
    from speculators.registry import Registry

    draft, verifier = place_example(Registry().get(name).spec, output_path)
    command = shlex.join(["speculators", "convert", str(draft), "--verifier", str(verifier)])
    click.echo(printable(f"Wrote {draft} and {verifier}; convert them with\n    {command}"))


@plugins.command(
    epilog=examples(
        """
        speculators plugins new my-heads
        """
    )
)
@click.argument("name")
@click.option("--output-path", type=FOLDER, help="Where the package goes; speculators-NAME by default.")
def new(name: str, output_path: str | None) -> None:
    """Write a package that adds the algorithm NAME.

    It is complete and tested, and to be changed step by step.
    """
    from pathlib import Path

    from speculators import scaffold

    folder = scaffold.write(name, Path(output_path) if output_path else None)
    package = shlex.quote(f"{folder}[test]")
    text = f"Wrote {folder}; go on with\n    pip install -e {package}\n    speculators plugins check {name}\n"
    click.echo(printable(f"{text}and read {folder / 'README.md'}"))


@plugins.command(
    epilog=examples(
        """
        speculators plugins page eagle3
        """
    )
)
@click.argument("name", type=AlgorithmName())
def page(name: str) -> None:
    """Print a page in Markdown about the plugin NAME.

    It is what the plugin says about itself: table, options, quirks.
    """
    from speculators.pages import page as described_page
    from speculators.registry import Registry

    click.echo(printable(described_page(Registry().get(name))), nl=False)


def _listing(registry: Registry) -> Iterator[Block]:
    from speculators.registry import describe_contested

    for each in registry.standings:
        known_as = f" (also {', '.join(each.aliases)})" if each.aliases else ""
        yield Line(
            f"{each.name}{known_as}: {each.state}{f', {each.reason}' if each.reason else ''}", STYLES[each.state]
        )
        yield Line(f"    from {each.package} {each.version}{f' in {each.folder}' if each.folder else ''}")
        yield Line(f"    entry point {each.entry_point}")
    if not registry.standings:
        message = registry.describe_installed()
        yield Line(message[0].upper() + message[1:])
    elif registry.not_installed:
        yield Line(registry.describe_not_installed())
    yield from (Line(describe_contested(alias, known)) for alias, known in registry.contested.items())


def _verdict(plugin: Standing, findings: list[Verdict]) -> Iterator[Block]:
    yield Line(f"{plugin.name}, from {plugin.package} {plugin.version}")
    rows = [(finding.check, "passed" if finding.passed else "FAILED", finding.detail) for finding in findings]
    yield Table("", ("check", "", "what was found"), rows, padded=1)
    failed = sum(not finding.passed for finding in findings)
    yield Line(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
