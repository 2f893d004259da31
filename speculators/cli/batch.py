"""``speculators convert --from-file``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from speculators.cli.options import FILE, with_options
from speculators.cli.screen import Block, Line, Screen, Table, tell
from speculators.errors import printable
from speculators.executors import CLUSTERS, LOCAL, default_workers

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from speculators.batch import BatchResult, JobOutcome

Command = TypeVar("Command", bound=Callable[..., Any])

OWN = frozenset({"from_file", "jobs", "executor", "scheduler"})
"""Options that are for a file of jobs alone."""

BESIDE = frozenset({"quiet", "verbose", "as_json", "token"})
"""Options of a conversion that may stand beside a file of jobs, and are no key in it."""

GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
"""Where options come from that somebody gave."""


def from_file(command: Command) -> Command:
    """Add the options for a file of jobs to a command that is given a `Screen`; where there is a file, it runs that."""

    @wraps(command)
    def either(screen: Screen, *arguments: Any, **options: Any) -> Any:
        own = {name: options.pop(name) for name in OWN}
        if own["from_file"] is not None:
            return _run(screen, **own, token=options["token"])
        if stray := sorted(_given(ParameterSource.COMMANDLINE) & OWN):
            raise click.UsageError(f"{_flags(stray)} belongs beside --from-file")
        return command(screen, *arguments, **options)

    return with_options(
        cast("Command", either),
        click.option(
            "--from-file", type=FILE, metavar="FILE", help="Convert what a YAML file of jobs names, many at a time."
        ),
        click.option("--jobs", type=click.IntRange(min=1), help="Jobs at a time; half the processors, at most 4."),
        click.option(
            "--executor",
            type=click.Choice((*LOCAL, *CLUSTERS)),
            default="processes",
            show_default=True,
            help="What runs the jobs of --from-file.",
        ),
        click.option("--scheduler", metavar="ADDRESS", help="Dask scheduler, as tcp://host:8786."),
    )


def _given(*sources: ParameterSource) -> set[str]:
    context = click.get_current_context()
    return {name for name in context.params if context.get_parameter_source(name) in sources}


def _flags(names: list[str]) -> str:
    params = {each.name: each for each in click.get_current_context().command.params}
    return ", ".join(each.opts[0] if isinstance(each := params[name], click.Option) else name.upper() for name in names)


def _run(
    screen: Screen, from_file: str, jobs: int | None, executor: str, scheduler: str | None, token: str | None
) -> None:
    from speculators import batch

    given, params = _given(*GIVEN), click.get_current_context().params
    common = batch.keys() - {"model", "output_path"}
    if stray := sorted(_given(ParameterSource.COMMANDLINE) - common - OWN - BESIDE):
        raise click.UsageError(f"{_flags(stray)} does not go with --from-file")
    todo = batch.read_jobs(from_file, {name: params[name] for name in given & common})
    with _executor(executor, scheduler, jobs) as running, _told(screen, len(todo)) as heard:
        result = batch.run_jobs(todo, running, token=token, heard=heard)
    screen.show("batch/1", as_json(result), blocks(result))
    if result.exit_code:
        raise SystemExit(result.exit_code)


def _executor(name: str, scheduler: str | None, jobs: int | None) -> AbstractContextManager[Executor]:
    if name in CLUSTERS:
        if scheduler is None:
            raise click.UsageError(f"--scheduler is missing; it is where --executor {name} finds its cluster")
        if jobs is not None:
            raise click.UsageError(f"--jobs does not go with --executor {name}; the cluster's workers decide")
        return CLUSTERS[name](scheduler)
    if scheduler is not None:
        raise click.UsageError(f"--scheduler does not go with --executor {name}")
    return LOCAL[name](jobs or default_workers())


@contextmanager
def _told(screen: Screen, total: int) -> Iterator[Callable[[JobOutcome], object]]:
    """Show on standard error how many jobs are done: a bar on a terminal, lines where each step was asked for."""
    from speculators.progress import counted_on_terminal

    def say(outcome: JobOutcome) -> None:
        done = f"{outcome.outcome} {outcome.output_path} in {outcome.seconds:.1f} s"
        tell(printable(f"job {outcome.number} of {total}: {done}"))

    if screen.verbose:
        yield say
        return
    with counted_on_terminal("converting", total, screen.quiet) as advance:
        yield lambda outcome: advance()


def as_json(result: BatchResult) -> dict[str, Any]:
    """Return the document of a result."""
    return {"jobs": [asdict(each) for each in result.outcomes], "counts": _counts(result)}


def blocks(result: BatchResult) -> Iterator[Block]:
    """Say what became of each job, then what else is to be known of it, then how many ended how."""
    rows = [
        (str(each.number), each.outcome, f"{each.seconds:.1f} s", each.output_path, each.source)
        for each in result.outcomes
    ]
    yield Table("", ("job", "", "took", "output", "source"), rows, padded=3, indented=False, right=frozenset({0, 2}))
    for each in result.outcomes:
        yield from (Line(f"job {each.number}: note: {note}") for note in each.notes)
    for each in result.outcomes:
        if each.message:
            yield Line(f"job {each.number}: {each.message}", style="red")
    yield Line(", ".join(f"{count} {outcome}" for outcome, count in _counts(result).items()))


def _counts(result: BatchResult) -> dict[str, int]:
    from speculators.batch import CONVERTED, FAILED, SKIPPED

    return {outcome: result.count(outcome) for outcome in (CONVERTED, SKIPPED, FAILED)}
