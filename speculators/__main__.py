"""Run the command line as ``python -m speculators``."""

from speculators.cli import cli

cli(prog_name="speculators")
