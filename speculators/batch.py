"""Convert many checkpoints: what is to be done, as a file says it, and doing it on any executor."""

from __future__ import annotations

import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from speculators import writer
from speculators.convert import convert_model, require_dtype
from speculators.errors import (
    ENVIRONMENT,
    CheckpointError,
    OptionError,
    OutputError,
    SpeculatorsError,
    described,
    explained,
    reading,
)
from speculators.executors import Processes
from speculators.registry import AUTO
from speculators.resume import look
from speculators.sources import Access, LocalLocation, local_path, parse
from speculators.sources.locations import redacted_text
from speculators.validation import require_level

LARGEST = 1 << 20
"""Bytes of a file of jobs, which is some thousand of them."""

CONVERTED, SKIPPED, FAILED = "converted", "skipped", "failed"
"""What becomes of a job."""

UNSENT = frozenset({"token", "progress", "registry"})
"""Arguments of `convert_model` that no job has: a secret, and what cannot be written down."""


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _held_to(require: Callable[[Any], object]) -> AfterValidator:
    def check(value: Any) -> Any:
        try:
            if value is not None:
                require(value)
        except OptionError as error:
            raise ValueError(str(error)) from error
        return value

    return AfterValidator(check)


def _require_no_clash(algorithm_kwargs: Mapping[str, Any]) -> None:
    if clash := sorted(algorithm_kwargs.keys() & (UNSENT | keys())):
        raise OptionError(f"no algorithm may have an option that is called {', '.join(clash)}")


Place = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]


class Job(BaseModel):
    """One conversion: the arguments of `convert_model` that can be written down, with the same meaning and defaults.

    Python calls ``validate`` by that name, too, where a job is made; the attribute is called ``validation``.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: Place
    verifier: Place
    output_path: Place
    algorithm: str = AUTO
    algorithm_kwargs: Annotated[dict[str, Any], _held_to(_require_no_clash)] = {}
    validate_device: str = "cpu"
    validation: bool = Field(default=True, alias="validate")
    validate_level: Annotated[str, _held_to(require_level)] = "forward"
    dtype: Annotated[str | None, _held_to(require_dtype)] = None
    max_shard_size: Annotated[str | int | None, _held_to(writer.parse_size)] = None
    overwrite: bool = False
    self_contained: bool = False
    cache_dir: Annotated[str | None, BeforeValidator(_as_text)] = None
    offline: bool = False

    @property
    def source(self) -> str:
        """What messages call the checkpoint, without secrets."""
        try:
            return parse(self.model).name
        except SpeculatorsError:
            return redacted_text(self.model)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `convert_model`."""
        own = self.model_dump(by_alias=True, exclude={"algorithm_kwargs"})
        return {**own, **self.algorithm_kwargs}


def keys() -> frozenset[str]:
    """Return the keys that a job may have."""
    return frozenset(entry.alias or name for name, entry in Job.model_fields.items())


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job.

    Attributes:
        number: Its place among the jobs, from 1 on.
        source: What was to be converted, without secrets.
        output_path: Where the converted model is, or would be.
        outcome: ``"converted"``, ``"skipped"`` where that was done before, or ``"failed"``.
        seconds: How long it took.
        algorithm: The algorithm that did it; empty where it failed.
        package: The plugin package, with its version; likewise.
        notes: What the user should know, one sentence each, warnings among them.
        message: Why it failed; empty where it did not.
        exit_code: That of the command for one conversion which ends so.
    """

    number: int
    source: str
    output_path: str
    outcome: str
    seconds: float
    algorithm: str = ""
    package: str = ""
    notes: tuple[str, ...] = ()
    message: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class BatchResult:
    """What became of all jobs, in their order."""

    outcomes: tuple[JobOutcome, ...]

    def count(self, outcome: str) -> int:
        """Return how many jobs ended in one way."""
        return sum(each.outcome == outcome for each in self.outcomes)

    @property
    def exit_code(self) -> int:
        """The exit code of the first job that failed; 0 where none did."""
        return next((each.exit_code for each in self.outcomes if each.outcome == FAILED), 0)


def read_jobs(path: str | Path, defaults: Mapping[str, Any] | None = None) -> list[Job]:
    """Read a file of jobs: YAML, or JSON, which is YAML as well.

    It holds a list ``jobs`` of mappings with the arguments of `Job`, and perhaps a mapping ``defaults`` of those that
    hold for each job which does not give its own. Paths mean what they mean on the command line: relative ones
    start at the working folder.

    Args:
        path: The file.
        defaults: What holds where neither a job nor the file's own ``defaults`` say anything.

    Raises:
        OptionError: It is no such file; names every job and key that is wrong, and what was expected.
    """
    document = _parse(path)
    if unknown := sorted(map(str, document.keys() - {"jobs", "defaults"})):
        raise OptionError(f"{path} has {', '.join(unknown)} beside what was expected: defaults and jobs")
    given, listed = document.get("defaults") or {}, document.get("jobs")
    if not isinstance(given, dict):
        raise OptionError(f"{path}: defaults is a {type(given).__name__}, expected keys and values")
    if not isinstance(listed, list) or not listed:
        raise OptionError(f"{path}: jobs is {_kind(listed)}, expected a list of at least one job")
    findings = [f"defaults: {_unknown(str(key))}" for key in given if key not in keys()]
    common = {**(defaults or {}), **{key: value for key, value in given.items() if key in keys()}}
    jobs = []
    for number, job in enumerate(listed, 1):
        if not isinstance(job, dict):
            findings.append(f"job {number} is {_kind(job)}, expected keys and values")
            continue
        try:
            jobs.append(Job.model_validate({**common, **job}))
        except ValidationError as error:
            findings += [f"job {number}: {finding}" for finding in _findings(error, set(job))]
    if findings:
        lines = "\n".join(f"    {finding}" for finding in findings)
        raise OptionError(f"{path} cannot be run (nothing was started):\n{lines}")
    return jobs


def _kind(value: object) -> str:
    return "missing" if value is None else "empty" if value in ([], {}) else f"a {type(value).__name__}"


def _findings(error: ValidationError, own: set[str]) -> list[str]:
    """Say what is wrong with a job, one line for each key."""
    said: dict[str, list[str]] = {}
    for detail in error.errors():
        key = str(detail["loc"][0])
        if detail["type"] == "extra_forbidden":
            said[key] = [_unknown(key)]
        elif detail["type"] == "missing":
            said[key] = [f"{key} is missing"]
        else:
            origin = "" if key in own else " (from the defaults)"
            text = detail["msg"].removeprefix("Value error, ")
            said.setdefault(key, [f"{key}{origin}: "]).append(text[:1].lower() + text[1:])
            if not isinstance(detail["input"], str):
                said[key][-1] += f", not {_kind(detail['input'])}"
    return [f"{first}{' or '.join(dict.fromkeys(more))}" for first, *more in said.values()]


def _unknown(key: str) -> str:
    return f"there is no key {key!r}; expected {', '.join(sorted(keys()))}"


def _parse(path: str | Path) -> dict[Any, Any]:
    """Parse a YAML file with one meaning: without aliases, which could unfold to anything, and without doubled keys."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # it has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.MarkedYAMLError(problem="an alias (*), which is not read", problem_mark=event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise yaml.MarkedYAMLError(problem="a key that occurs twice", problem_mark=node.start_mark)
            return found

    try:
        with reading(path), Path(path).open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise OptionError(f"{path} has more than {LARGEST} bytes, which no file of jobs should have")
        document = Loader(data).get_single_data()
    except CheckpointError as error:
        raise OptionError(str(error)) from error
    except yaml.MarkedYAMLError as error:  # its own text quotes lines, which may hold secrets
        mark = error.problem_mark
        place = f" in line {mark.line + 1}" if mark else ""
        raise OptionError(f"{path} is no YAML that can be read: {error.problem}{place}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"{path} is no YAML that can be read: {type(error).__name__}") from error
    if not isinstance(document, dict):
        raise OptionError(f"{path} is {_kind(document)}, expected defaults and jobs")
    return document


@dataclass(frozen=True, repr=False)
class _Order:
    """What a worker is sent; places may hold secrets, as the token is one, so it is never shown."""

    number: int
    job: Job
    token: str | None
    folder: str | None
    batch: str


_ENDED: set[str] = set()
"""Batches of this process whose jobs are to end as soon as they can; in another process it is empty."""


def _unheard(outcome: JobOutcome) -> None:
    """Tell nobody."""


def run_jobs(
    jobs: Sequence[Job],
    executor: Executor,
    *,
    token: str | None = None,
    heard: Callable[[JobOutcome], object] = _unheard,
) -> BatchResult:
    """Convert many checkpoints; one that fails keeps no other from being converted.

    A job whose output path holds what it would write is skipped, also where ``overwrite`` is set: source, verifier,
    options and versions are the same, the files are complete, and it was validated as far. So a batch that
    ended early is resumed by running it again.

    Args:
        jobs: What to do.
        executor: What does it: threads, processes or machines. Workers must see the same files.
        token: Token for the Hub; that of each worker by default.
        heard: Called with each outcome when it is known.

    Raises:
        OptionError: Two jobs would write to one place; nothing was started.
        KeyboardInterrupt: Somebody interrupted it. Jobs that were not begun are cancelled; those that run end early
            on ``Processes`` and threads, and by themselves elsewhere. What was finished stays.
    """
    _require_apart(jobs)
    batch = uuid.uuid4().hex
    finished: SimpleQueue[Future[JobOutcome]] = SimpleQueue()  # holds no lock that an interruption could leave locked
    orders: dict[Future[JobOutcome], _Order] = {}
    outcomes: dict[int, JobOutcome] = {}

    def note(outcome: JobOutcome) -> None:
        outcomes[outcome.number] = outcome
        heard(outcome)

    try:
        for number, job in enumerate(jobs, 1):
            order = _Order(number, job, token, str(Path.cwd()) if _is_relative(job) else None, batch)
            try:
                future = executor.submit(_work, order)
            except RuntimeError as error:  # it is broken, or was shut down
                note(_lost(order, error))
                continue
            orders[future] = order
            future.add_done_callback(finished.put)
        while len(outcomes) < len(jobs):
            future = finished.get()
            lost = CancelledError() if future.cancelled() else future.exception()
            note(future.result() if lost is None else _lost(orders[future], lost))
    except BaseException:
        _ENDED.add(batch)
        for future in orders:
            future.cancel()
        if isinstance(executor, Processes):
            executor.stop()
        raise
    return BatchResult(tuple(outcomes[number] for number in sorted(outcomes)))


def _require_apart(jobs: Sequence[Job]) -> None:
    """Refuse jobs that would write to one place, or one into the output of another."""
    taken: dict[Path, int] = {}
    places = [_resolved(job.output_path) for job in jobs]
    for number, place in enumerate(places, 1):
        if place in taken:
            raise OptionError(
                f"jobs {taken[place]} and {number} have the same output_path {jobs[number - 1].output_path}; "
                "nothing was started"
            )
        taken[place] = number
    for number, place in enumerate(places, 1):
        if outer := next((each for each in place.parents if each in taken), None):
            raise OptionError(
                f"the output_path {jobs[number - 1].output_path} of job {number} lies in that of job {taken[outer]}; "
                "nothing was started"
            )


def _resolved(path: str) -> Path:
    try:
        return local_path(path).resolve()
    except (SpeculatorsError, OSError, ValueError, RuntimeError):  # which the job will tell
        return Path(path)


def _is_relative(job: Job) -> bool:
    """Tell whether what a job means depends on the working folder."""
    places = [local_path(each) for each in (job.output_path, job.cache_dir) if each]
    for each in (job.model, job.verifier):
        try:
            found = parse(each)
        except SpeculatorsError:
            continue
        places += [found.path] if isinstance(found, LocalLocation) else []
    return not all(place.is_absolute() for place in places)


def _work(order: _Order) -> JobOutcome:
    """Do one job, wherever it may be; never raises an `Exception`, which might not arrive whole."""
    job, began, remarks = order.job, time.monotonic(), list[str]()
    try:
        with _collecting(remarks):
            found = _do(order)
    except Exception as error:  # noqa: BLE001 - every error has its exit code
        message, code = explained(error)
        found = {"outcome": FAILED, "message": message.removeprefix("Error: "), "exit_code": code}
    found["notes"] = (*found.get("notes", ()), *remarks)
    seconds = round(time.monotonic() - began, 3)
    return JobOutcome(order.number, job.source, job.output_path, seconds=seconds, **found)


def _do(order: _Order) -> dict[str, Any]:
    if order.folder not in (None, os.getcwd()):  # noqa: PTH109 - as it was compared
        raise OptionError(
            f"it names relative paths, which start at {order.folder}, but the worker works in {Path.cwd()}; "
            "name absolute ones that all workers see"
        )

    def progress(task: str, done: int, total: int) -> None:
        if order.batch in _ENDED:
            raise KeyboardInterrupt

    progress("", 0, 0)
    job = order.job
    earlier = look(job, Access(order.token, job.cache_dir, job.offline, progress))
    if earlier is not None and earlier.conversion is not None and not earlier.difference:
        done = earlier.conversion
        found = {"algorithm": done.algorithm.spec.name, "package": done.algorithm.origin, "notes": done.notes}
        return {"outcome": SKIPPED, **found}
    try:
        result = convert_model(**job.arguments(), token=order.token, progress=progress)
    except OutputError as error:
        if earlier is None or job.overwrite:
            raise
        raise OutputError(f"{error}. It is not what this job would write: {earlier.difference}") from error
    found = {"algorithm": result.algorithm, "package": result.package, "notes": result.notes}
    return {"outcome": CONVERTED, **found}


@contextmanager
def _collecting(remarks: list[str]) -> Iterator[None]:
    """Collect warnings where no other thread could be disturbed by that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        finally:
            remarks += dict.fromkeys(str(each.message) for each in caught)


def _lost(order: _Order, error: BaseException) -> JobOutcome:
    """Return the outcome of a job that its executor lost."""
    job = order.job
    message = f"its worker failed: {described(error)}"
    if isinstance(error, SpeculatorsError):
        message = str(error)
    elif isinstance(error, CancelledError):
        message = "it was cancelled; its workers may be gone"
    code = error.exit_code if isinstance(error, SpeculatorsError) else ENVIRONMENT
    return JobOutcome(order.number, job.source, job.output_path, FAILED, 0.0, message=message, exit_code=code)
