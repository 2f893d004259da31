"""The command line: parse, call one library function, print its result."""

from __future__ import annotations

from copy import copy

import click

import speculators
from speculators.cli.completion import completion
from speculators.cli.convert import convert
from speculators.cli.diff import diff
from speculators.cli.export import export
from speculators.cli.inspect import inspect
from speculators.cli.options import examples
from speculators.cli.plugins import plugins
from speculators.cli.running import Group
from speculators.cli.validate import validate

VARIABLES = "SPECULATORS"
"""What the names of environment variables for options begin with, as in ``SPECULATORS_CONVERT_OUTPUT_PATH``."""


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": VARIABLES},
    epilog=examples(
        """
        speculators convert ./head --verifier ./base --output-path converted
        speculators validate converted --level acceptance
        """
    )
    + "\n\nEvery option can be set by a variable, as --output-path of convert by SPECULATORS_CONVERT_OUTPUT_PATH.",
)
@click.version_option(speculators.__version__, prog_name="speculators", allow_from_autoenv=False)
def cli() -> None:
    """Turn draft models of speculative decoding into one format that inference engines serve."""


for command in (convert, validate, inspect, diff, export, plugins, completion):  # in the order in which help lists them
    cli.add_command(command)

_single = copy(plugins)
_single.hidden = True
cli.add_command(_single, "plugin")  # as one says with the name of one plugin behind it
