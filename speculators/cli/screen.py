"""What is seen: results on standard output, messages and progress on standard error.

A command says what it found as blocks. On a terminal they become coloured tables that fit its width; in a pipe they
become lines of plain text, each of which depends on nothing but its own content, so that they can be compared and cut.
With ``--json`` a document is printed in their place; `docs/json.md` describes each.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from speculators.errors import printable
from speculators.progress import Progress, on_terminal, unheard

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

Command = TypeVar("Command", bound=Callable[..., Any])

INDENT = "    "

STYLES: Mapping[str, str] = {
    "passed": "green",
    "converted": "green",
    "skipped": "dim",
    "ready": "green",
    "FAILED": "bold red",
    "failed": "bold red",
    "broken": "bold red",
}
"""Words that a cell may consist of, and how a terminal shows them."""


@dataclass(frozen=True)
class Line:
    """A line of text."""

    text: str = ""
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a title.

    Attributes:
        title: What the rows are; empty for none.
        columns: Their headings on a terminal; empty ones where cells explain themselves.
        rows: Their cells.
        joint: What stands between cells in a pipe, where empty cells are passed over.
        padded: How many of the first columns are padded in a pipe, because a few fixed words stand in them.
        indented: Whether rows are indented in a pipe.
        right: Columns of numbers, which are aligned right on a terminal.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    joint: str = "  "
    padded: int = 0
    indented: bool = True
    right: frozenset[int] = frozenset()


Block = Line | Table


@dataclass(frozen=True)
class Screen:
    """How much a command says, and in which form.

    Attributes:
        quiet: Whether nobody wants to know how far it is.
        verbose: Whether somebody wants to know each step.
        as_json: Whether the result is for a program.
    """

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False

    def show(self, document: str, content: Mapping[str, Any], blocks: Iterable[Block]) -> None:
        """Print a result: as JSON under the name and version of its document, or as blocks."""
        if self.as_json:
            click.echo(json.dumps({"schema": f"speculators.{document}", **content}, indent=2))
        elif _is_terminal(sys.stdout):
            console = _console()
            for block in blocks:
                console.print(_rich(block), soft_wrap=isinstance(block, Line))
        else:
            click.echo("\n".join(line for block in blocks for line in plain(block)))

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show on standard error what is being done: bars on a terminal, lines where each step was asked for."""
        if self.verbose and not self.quiet:
            yield _Steps()
        else:
            with on_terminal(self.quiet) as shown:
                yield shown if not self.quiet else unheard


class _Steps:
    """Says on standard error when a step begins, and how long it took."""

    def __init__(self) -> None:
        self._task = ""
        self._began = time.monotonic()

    def __call__(self, task: str, done: int, total: int) -> None:
        if task != self._task:
            self._task, self._began = task, time.monotonic()
            click.echo(printable(f"{task} ..."), err=True)
        if total and done >= total:
            size = f"{total / 1e6:.1f} MB"
            click.echo(printable(f"{task}: {size} in {time.monotonic() - self._began:.1f} s"), err=True)
            self._task = ""


def manners(command: Command) -> Command:
    """Add the options that every command has, and hand it the `Screen` that they make as its first argument."""

    @wraps(command)
    def polite(*arguments: Any, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> Any:
        if verbose:
            logging.getLogger().setLevel(logging.INFO)
        return command(Screen(quiet, verbose, as_json), *arguments, **options)

    decorated: Any = polite
    options = (
        click.option("--quiet", is_flag=True, envvar="SPECULATORS_QUIET", help="Show no progress."),
        click.option("--verbose", is_flag=True, envvar="SPECULATORS_VERBOSE", help="Say what is done, step by step."),
        click.option("--json", "as_json", is_flag=True, envvar="SPECULATORS_JSON", help="Print the result as JSON."),
    )
    for option in reversed(options):
        decorated = option(decorated)
    result: Command = decorated
    return result


def plain(block: Block) -> list[str]:
    """Return a block as lines of text without any control character."""
    if isinstance(block, Line):
        return [printable(line) for line in block.text.split("\n")]
    rows = [[printable(cell) for cell in row] for row in block.rows]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(block.padded)]
    lines = [f"{printable(block.title)}:"] if block.title and rows else []
    for row in rows:
        padded = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        cells = [*padded, *(cell for cell in row[block.padded :] if cell)]
        lines.append(f"{INDENT if block.indented else ''}{block.joint.join(cells)}".rstrip())
    return lines


def _rich(block: Block) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table as Grid
    from rich.text import Text

    if isinstance(block, Line):
        return Text(printable(block.text), style=block.style)
    if not block.rows:
        return Text(end="")
    headed = any(block.columns)
    grid = Grid(box=box.SIMPLE_HEAD if headed else None, show_header=headed, pad_edge=False, header_style="bold")
    for number, heading in enumerate(block.columns):
        grid.add_column(heading, justify="right" if number in block.right else "left", overflow="fold")
    for row in block.rows:
        grid.add_row(*(_cell(cell) for cell in row))
    return Group(Text(printable(block.title), style="bold"), grid) if block.title else grid


def _cell(text: str) -> Text:
    from rich.text import Text

    return Text(printable(text), style=STYLES.get(text, ""))


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def count(number: int, noun: str) -> str:
    """Return a number of things in words: ``1 tensor``, ``2 tensors``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(count: int) -> str:
    """Return a number of bytes as people read it, in powers of 1000 as on the Hub."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
