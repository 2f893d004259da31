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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from speculators.cli.options import with_options
from speculators.errors import printable
from speculators.json_files import strict
from speculators.progress import Progress, on_terminal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Command = TypeVar("Command", bound=Callable[..., Any])

INDENT = "    "

LEFT = 2
"""Columns by which a terminal shows rows further right than their title."""

GAP = 3
"""Columns between cells on a terminal."""

LEAST = 30
"""Columns that the widest cells of a table need on a terminal, to be read beside the others."""

STYLES: Mapping[str, str] = {
    "passed": "green",
    "ready": "green",
    "converted": "green",
    "skipped": "dim",
    "FAILED": "bold red",
    "failed": "bold red",
    "broken": "bold red",
}
"""Words that a cell may consist of, and how a terminal shows them."""

LABELS: Mapping[str, str] = {"Error:": "bold red", "Warning:": "yellow", "note:": "bold"}
"""Words that a line may begin with, and how a terminal shows them."""

COMMAND = "speculators.command"
"""Under which a click context's ``meta`` holds the context of the command that runs."""

MANNERS = frozenset({"quiet", "verbose", "as_json"})
"""Names of the options that change what is seen, and nothing else."""

TALKATIVE = ("speculators", "huggingface_hub")
"""Loggers of what is told where each step was asked for."""


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
            click.echo(json.dumps(strict({"schema": f"speculators.{document}", **content}), indent=2, allow_nan=False))
        elif _is_terminal(sys.stdout):
            _print(blocks)
        else:
            click.echo("\n".join(line for block in blocks for line in plain(block)))

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show on standard error what is being done: bars on a terminal, lines where each step was asked for."""
        if self.verbose:
            steps = _Steps()
            yield steps
            steps.end_last()
        else:
            with on_terminal(self.quiet) as shown:
                yield shown


class _Steps:
    """Says on standard error when a step begins, and how long it took."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._last = ""

    def __call__(self, task: str, done: int, total: int) -> None:
        if task not in self._began:
            self.end_last()
            self._last = "" if total else task
            self._began[task] = time.monotonic()
            tell(printable(f"{task} ..."))
        if total and done >= total:
            self._end(task, f"{size(total)} in ")

    def end_last(self) -> None:
        """End the step of which nobody knew how much there is to do, if there is one: another one begins."""
        if self._last:
            self._end(self._last)
            self._last = ""

    def _end(self, task: str, amount: str = "") -> None:
        tell(printable(f"{task}: {amount}{time.monotonic() - self._began.pop(task):.1f} s"))


def manners(command: Command) -> Command:
    """Add the options that every command has, and hand it the `Screen` that they make as its first argument."""

    @wraps(command)
    def polite(*arguments: Any, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> Any:
        ctx = click.get_current_context()
        if quiet and verbose:
            quiet, verbose = map(was_typed, ("quiet", "verbose"))
            if quiet == verbose:
                raise click.UsageError("--quiet and --verbose contradict each other; take one of them")
        ctx.params |= {"quiet": quiet, "verbose": verbose}
        ctx.meta[COMMAND] = ctx
        with _talkative() if verbose else nullcontext():
            return command(Screen(quiet, verbose, as_json), *arguments, **options)

    return with_options(
        cast("Command", polite),
        click.option(
            "--quiet", is_flag=True, envvar="SPECULATORS_QUIET", help="Show no progress; warnings and errors stay."
        ),
        click.option(
            "--verbose", is_flag=True, envvar="SPECULATORS_VERBOSE", help="Say each step, and where errors come from."
        ),
        click.option("--json", "as_json", is_flag=True, envvar="SPECULATORS_JSON", help="Print the result as JSON."),
    )


def was_typed(option: str) -> bool:
    """Tell whether an option of the command stands on the command line, rather than in a variable."""
    return click.get_current_context().get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


@contextmanager
def _talkative() -> Iterator[None]:
    import huggingface_hub  # noqa: F401 - it sets its level when it is imported

    levels = {logging.getLogger(name): logging.getLogger(name).level for name in TALKATIVE}
    for logger in levels:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


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


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _print(blocks: Iterable[Block], err: bool = False) -> None:
    """Print blocks on a terminal, tables set apart by blank lines; those without rows are left out."""
    from rich.console import Console

    console = Console(stderr=err, highlight=False)
    apart, blank = False, True
    for block in blocks:
        table = isinstance(block, Table)
        shown = _table(block, console.width) if isinstance(block, Table) else _line(block)
        if shown is None:
            continue
        empty = block == Line()
        if (table or apart) and not blank and not empty:
            console.print()
        typed = isinstance(block, Line) and block.text.startswith(INDENT)  # to be copied, so the terminal breaks it
        console.print(shown, soft_wrap=typed)
        apart, blank = table, empty


def _line(block: Line) -> Text:
    from rich.text import Text

    shown = Text(printable(block.text), style=block.style)
    label = next((label for label in LABELS if block.text.startswith(label)), "")
    shown.stylize(LABELS.get(label, ""), 0, len(label))
    return shown


def _table(block: Table, width: int) -> RenderableType | None:
    """Lay out a table in a terminal of some width, or return nothing where it has no rows."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    used = [number for number in range(len(block.columns)) if any(row[number] for row in block.rows)]
    if not used:
        return None
    cells = [[printable(block.columns[number]), *(printable(row[number]) for row in block.rows)] for number in used]
    widths = [max(map(len, column)) for column in cells]
    widest = widths.index(max(widths))
    room = width - (LEFT if block.title else 0) - sum(each + GAP for each in widths) + widths[widest] + GAP
    word = max((len(word) for cell in cells[widest] for word in cell.split()), default=0)
    cramped = len(used) > 1 and room < max(word, min(LEAST, widths[widest]))
    shown = _stack(block, used, used[widest]) if cramped else _grid(block, used)
    if not block.title:
        return shown
    return Group(Text(printable(block.title), style="bold"), Padding(shown, (0, 0, 0, LEFT)))


def _grid(block: Table, used: Sequence[int]) -> RenderableType:
    from rich import box
    from rich.table import Table as Grid

    headed = any(block.columns[number] for number in used) and not (block.title and len(used) == 1)
    grid = Grid(box=box.SIMPLE_HEAD if headed else None, show_header=headed, show_edge=False, pad_edge=False)
    for number in used:
        justify: Literal["left", "right"] = "right" if number in block.right else "left"
        grid.add_column(printable(block.columns[number]), justify=justify, overflow="fold")
    for row in block.rows:
        grid.add_row(*(_cell(row[number]) for number in used))
    return grid


def _stack(block: Table, used: Sequence[int], widest: int) -> RenderableType:
    """Give the widest cell of each row a line of its own, where little room is left for it beside the others."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    others = [number for number in used if number != widest]
    rows = [block.columns, *block.rows] if any(block.columns[number] for number in used) else block.rows
    widths = {number: max(len(printable(row[number])) for row in rows) for number in others}
    lines: list[RenderableType] = []
    for row in rows:
        cells = [_cell(row[number]) for number in others]
        for cell, number in zip(cells, others, strict=True):
            cell.align("right" if number in block.right else "left", widths[number])
        line, own = Text(" " * GAP).join(cells), _cell(row[widest])
        line.rstrip()
        first, second = (own, line) if widest == used[0] else (line, own)
        if row is block.columns:
            first.style = second.style = "bold"
        lines += [first, *([Padding(second, (0, 0, 0, len(INDENT)))] if second.plain else [])]
    return Group(*lines)


def _cell(text: str) -> Text:
    from rich.text import Text

    return Text(printable(text), style=STYLES.get(text, ""))


def tell(text: str) -> None:
    """Print a message on standard error; on a terminal it breaks between words, and its label is coloured."""
    if hasattr(sys.stderr, "rich_proxied_file"):  # bars are shown, which make room; click.echo would pass them by
        sys.stderr.write(f"{text}\n")
    elif _is_terminal(sys.stderr):
        _print([Line(text)], err=True)
    else:
        click.echo(text, err=True)


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
