"""How a command ends: every error has one message and one exit code, and a signal tidies up."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from speculators.cli.screen import COMMAND, MANNERS, tell
from speculators.errors import BUG, explained, printable, traced

BY_SIGNAL = 128
"""The exit code of a run that a signal ended, with its number added."""


class _Ended(KeyboardInterrupt):
    """Somebody asked the program to end; raised where it is, so that what it holds is tidied up."""

    def __init__(self, number: int) -> None:
        self.number = number


def _end(number: int, frame: object) -> None:
    raise _Ended(number)


@contextmanager
def _ending_tidily() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does, unless they are ignored already (as under nohup)."""
    asked = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handled = [number for number in asked if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        handled = []
    for number in handled:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


class InOrder(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names."""
        return list(self.commands)


class Group(InOrder):
    """Turns every expected error into one message and its exit code."""

    def main(self, *arguments: Any, **more: Any) -> Any:
        """Escape what the encoding of standard output lacks, as Python does on standard error, and run."""
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().main(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        with warnings.catch_warnings(), _telling_logs(), _ending_tidily():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except click.UsageError as error:
                from speculators.sources.locations import redacted_text

                message = redacted_text(error.format_message())
                if isinstance(error, click.BadParameter):
                    message = "; ".join([message, *_from_environment(error.ctx, error.param)])
                raise click.UsageError(message, error.ctx) from None
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except BrokenPipeError:  # who read the output has gone; what was done is done
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for what is still to be flushed
                ctx.exit(BY_SIGNAL + 13)
            except KeyboardInterrupt as error:
                tell("Interrupted; nothing half-written is left, and what was downloaded is kept")
                ctx.exit(BY_SIGNAL + (error.number if isinstance(error, _Ended) else signal.SIGINT))
            except Exception as error:  # noqa: BLE001 - every error has its exit code
                message, code = explained(error)
                running: click.Context | None = ctx.meta.get(COMMAND)
                if running is not None and running.params["verbose"] and code != BUG:
                    click.echo(traced(error), nl=False, err=True)
                tell("\n".join([message, *(f"note: {said}" for said in _from_environment(running))]))
                ctx.exit(code)


def _from_environment(ctx: click.Context | None, only: click.Parameter | None = None) -> Iterator[str]:
    """Say which options of a command, or whether one of them, come from variables, if any do."""
    if ctx is None:
        return
    options = [only] if only else [each for each in ctx.command.params if each.name not in MANNERS]
    found = [
        f"{option.opts[-1]} is taken from {variable}"
        for option in options
        if option.name and ctx.get_parameter_source(option.name) is click.core.ParameterSource.ENVIRONMENT
        for variable in _variables(ctx, option)[:1]
    ]
    if found:
        yield ", ".join(found)


def _variables(ctx: click.Context, option: click.Parameter) -> list[str]:
    """Name the variables of an option that are set; the first one counts."""
    named = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    return [name for name in (*named, f"{ctx.auto_envvar_prefix}_{option.name}".upper()) if os.environ.get(name)]


class _Handler(logging.Handler):
    """Tells what is logged, but for libraries that print their logs themselves."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger(record.name.partition(".")[0]).handlers:
            tell(printable(self.format(record)))


@contextmanager
def _telling_logs() -> Iterator[None]:
    handler = _Handler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    tell(f"Warning: {printable(str(message))}")
