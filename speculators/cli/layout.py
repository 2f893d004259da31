"""How blocks look on a terminal: tables that fit its width, and text that breaks between words.

A table is as wide as its cells. Where that is too wide, the last column breaks between words if it is prose, or goes
below the others if too little is left for it; otherwise the widest columns give way. Names break behind dots, slashes
and underscores. What is indented is there to be typed or copied, and is left to the terminal to break.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

from rich.cells import cell_len, chop_cells
from rich.text import Text

from speculators.cli.screen import INDENT, Block, Line, Table
from speculators.errors import printable

GAP = 2
"""Blanks between columns."""

PROSE = 30
"""Characters that prose must have on a line to be readable; what never needs more is no prose."""

STYLES: Mapping[str, str] = {
    "passed": "green",
    "ready": "green",
    "FAILED": "bold red",
    "failed": "bold red",
    "broken": "bold red",
}
"""Words that a cell may consist of, and how they are shown."""

LABELS: Mapping[str, str] = {"Error:": "bold red", "Warning:": "yellow", "note:": "bold"}
"""Words that a line may begin with, and how they are shown."""

_PIECE = re.compile(r"[^./_:-]*[./_:-]+|[^./_:-]+")


def laid_out(blocks: Iterable[Block], width: int, rule: str) -> Iterator[Text]:
    """Return the lines of all blocks, with a blank one before and after each table.

    Args:
        blocks: What to show; tables without rows are left out.
        width: Characters of a line.
        rule: The character that underlines headings.
    """
    apart, blank = False, True
    for block in blocks:
        table = isinstance(block, Table)
        lines = list(_table(block, width, rule) if isinstance(block, Table) else _line(block, width))
        if not lines:
            continue
        if (table or apart) and not blank and lines[0].plain:
            yield Text()
        yield from lines
        apart, blank = table, not lines[-1].plain


def _line(block: Line, width: int) -> Iterator[Text]:
    for line in printable(block.text).split("\n"):
        for part in [line] if line.startswith(INDENT) else wrapped(line, width, whole=True):
            shown = Text(part, style=block.style)
            label = next((label for label in LABELS if part.startswith(label)), "")
            shown.stylize(LABELS.get(label, ""), 0, len(label))
            yield shown


def _table(table: Table, width: int, rule: str) -> Iterator[Text]:
    rows = [[printable(cell) for cell in row] for row in table.rows]
    used = [number for number in range(len(table.columns)) if any(row[number] for row in rows)]
    rows = [[row[number] for number in used] for row in rows]
    headings = [table.columns[number] for number in used]
    right = {place for place, number in enumerate(used) if number in table.right}
    if not used:
        return
    margin = " " * GAP if table.title else ""
    if table.title:
        yield Text(printable(table.title), style="bold")
    room = max(width - len(margin), len(used) * (GAP + 1))
    natural = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    widths = _widths(natural, room, last_is_prose=len(used) - 1 not in right)
    shown = len(widths)
    if any(headings[:shown]):
        yield from _row(headings[:shown], widths, right, margin, ["bold"] * shown)
        yield Text(margin + (" " * GAP).join(rule * width for width in widths), style="dim")
    for row in rows:
        yield from _row(row[:shown], widths, right, margin, [STYLES.get(cell, "") for cell in row])
        for cell in row[shown:]:
            yield from (Text(margin + INDENT + line) for line in wrapped(cell, room - len(INDENT)))


def _widths(natural: Sequence[int], room: int, last_is_prose: bool) -> list[int]:
    """Return the widths of the columns that stand beside each other: all of them, or all but the last."""
    *others, last = natural
    left = room - sum(others) - GAP * len(others)
    if last <= left:
        return [*others, last]
    if others and last_is_prose and last > PROSE:
        return [*others, left] if left >= PROSE else _widths(others, room, last_is_prose=False)
    widths = list(natural)
    while sum(widths) + GAP * len(others) > room:
        widest = max(range(len(widths)), key=lambda number: (widths[number], number))
        widths[widest] -= 1
    return widths


def _row(
    cells: Sequence[str], widths: Sequence[int], right: Iterable[int], margin: str, styles: Sequence[str]
) -> Iterator[Text]:
    columns = [wrapped(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*columns, fillvalue=""):
        line = Text(margin)
        for number, (part, width, style) in enumerate(zip(parts, widths, styles, strict=False)):
            blanks = " " * (width - cell_len(part))
            line.append(" " * GAP if number else "")
            line.append(blanks + part if number in right else part, style=style)
            line.append("" if number in right else blanks)
        line.rstrip()
        yield line


def wrapped(text: str, width: int, whole: bool = False) -> list[str]:
    """Break a text between words, and words that are longer than a line inside, unless they are to stay whole."""
    lines = [""]
    for number, word in enumerate(text.split(" ")):
        for place, part in enumerate([word] if whole or cell_len(word) <= width else _pieces(word, width)):
            blank = " " if number and not place else ""
            if lines[-1].strip() and cell_len(lines[-1] + blank + part) > width:
                lines.append(part)
            else:
                lines[-1] += blank + part
    return lines


def _pieces(word: str, width: int) -> Iterator[str]:
    for piece in _PIECE.findall(word):
        yield from chop_cells(piece, width)
