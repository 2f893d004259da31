"""How a command ends: every error has one message and one exit code, and a signal tidies up."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from speculators.errors import explained, printable

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


class Group(click.Group):
    """Turns every expected error into one message and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        with warnings.catch_warnings(), _ending_tidily():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except click.UsageError as error:
                from speculators.sources.locations import redacted_text

                raise click.UsageError(redacted_text(error.format_message()), error.ctx) from None
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except BrokenPipeError:  # who read the output has gone; what was done is done
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for what is still to be flushed
                ctx.exit(BY_SIGNAL + 13)
            except KeyboardInterrupt as error:
                click.echo("Interrupted; nothing half-written is left, and what was downloaded is kept", err=True)
                ctx.exit(BY_SIGNAL + (error.number if isinstance(error, _Ended) else signal.SIGINT))
            except Exception as error:  # noqa: BLE001 - every error has its exit code
                message, code = explained(error)
                click.echo(message, err=True)
                ctx.exit(code)


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    click.echo(f"Warning: {printable(str(message))}", err=True)
