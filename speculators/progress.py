"""How long work tells what it has done so far."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from speculators.errors import printable

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how many bytes of it are done, and how many there are; 0 if nobody knows."""

FIGURES = 34
"""Columns of a terminal that bytes, rate and time left take, with the blanks beside them."""

SHORTEST_BAR, WIDEST_BAR = 8, 40
"""Columns of a terminal that a bar takes; what is left of a line is for the name of the work, which is cut."""


def unheard(task: str, done: int, total: int) -> None:
    """Tell nobody."""


def adding_up(progress: Progress, task: str, total: int) -> Callable[[int], None]:
    """Return what is told how many bytes more of a task are done, and passes on how many are by then."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(task, done, total)

    return report


def _is_shown(quiet: bool) -> bool:
    """Tell whether somebody sees what is shown on standard error, and wants to."""
    return not quiet and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def on_terminal(quiet: bool = False) -> Iterator[Progress]:
    """Show bytes, rate and time left where standard error is a terminal, and nothing in a pipe."""
    if not _is_shown(quiet):
        yield unheard
        return
    from rich import progress as bars
    from rich.console import Console, RenderableType
    from rich.table import Column

    class Known(bars.ProgressColumn):
        """Another column, left empty where nobody knows how much there is to do."""

        def __init__(self, column: bars.ProgressColumn) -> None:
            super().__init__()
            self.column = column

        def render(self, task: bars.Task) -> RenderableType:
            return self.column(task) if task.total else ""

    console = Console(stderr=True)
    bar = min(WIDEST_BAR, max(console.width - FIGURES - WIDEST_BAR, SHORTEST_BAR))
    room = max(console.width - FIGURES - bar, SHORTEST_BAR)
    columns = (
        bars.TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=room)),
        bars.BarColumn(bar),
        *map(Known, (bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())),
    )
    tasks: dict[str, bars.TaskID] = {}
    with bars.Progress(*columns, console=console, transient=True) as shown:

        def show(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = shown.add_task(printable(task), total=total or None)
            shown.update(tasks[task], completed=done)

        yield show


@contextmanager
def counted_on_terminal(task: str, total: int, quiet: bool = False) -> Iterator[Callable[[], object]]:
    """Show on a terminal, as `on_terminal` does, how many of some things are done; yield what is called when one is."""
    if not _is_shown(quiet):
        yield lambda: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        bar = shown.add_task(task, total=total)
        yield lambda: shown.advance(bar)
