"""What jobs run on: processes or threads of this machine, or a cluster.

Each is a `concurrent.futures.Executor`, which is all that `speculators.batch` asks for.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from threading import Lock, Thread, local
from typing import TYPE_CHECKING, Any, TypeVar

from speculators.errors import ExecutorError, described

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Outcome = TypeVar("Outcome")

MOST_WORKERS = 4
"""Jobs that run at a time unless more are asked for: a disk is busy with fewer, and each may take gigabytes."""

PATIENCE = 5
"""Seconds for which a scheduler is waited for."""


def default_workers() -> int:
    """Return how many jobs run at a time unless somebody says otherwise: half the processors, at most `MOST_WORKERS`.

    Checking a converted draft keeps several processors busy, and takes the memory of torch and of two copies of
    the draft.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable // 2, MOST_WORKERS))


class Processes(Executor):
    """Runs calls in processes, each of which takes one after another.

    The differences from `concurrent.futures.ProcessPoolExecutor` matter where calls take gigabytes and minutes: a
    process that dies, perhaps because memory was not enough, takes its own call with it and no other; `stop` has those
    that run end tidily; and no process outlives this one.

    Functions, arguments and results must be picklable. Processes are started afresh, not forked, because forks and
    the threads of torch do not go together.

    Args:
        workers: How many processes there are at most; each is started when it is first needed.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, initializer=_leave_signals_to_others)
        self._local = local()
        self._lock = Lock()
        self._workers: set[_Worker] = set()
        self._stopped = False

    def submit(self, fn: Callable[..., Outcome], /, *args: Any, **kwargs: Any) -> Future[Outcome]:
        """Have a process call ``fn`` and return a future of what it returns.

        The future raises what the function did, or `ExecutorError` where the process died.
        """
        return self._threads.submit(self._call, fn, args, kwargs)

    def _call(self, *task: Any) -> Any:
        worker = self._worker()
        try:
            return worker.call(task)
        except _DiedError as error:
            with self._lock:
                self._workers.discard(worker)
            del self._local.worker
            raise ExecutorError(str(error)) from None

    def _worker(self) -> _Worker:
        """Return the process of this thread."""
        with self._lock:
            if self._stopped:
                raise ExecutorError("it was not begun, as everything was to end")
            if not hasattr(self._local, "worker"):
                self._local.worker = _Worker()
                self._workers.add(self._local.worker)
        worker: _Worker = self._local.worker
        return worker

    def stop(self) -> None:
        """Have all processes give up what they do, and tidy up; nothing is begun any more."""
        self._stopped = True
        for worker in list(self._workers):
            worker.process.terminate()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; end the processes when those that were taken are done."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        if wait:
            for worker in list(self._workers):
                worker.close()


class _DiedError(Exception):
    """A process ended without an answer."""


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, task: tuple[Any, ...]) -> Any:
        try:
            self.connection.send(task)
            succeeded, value = self.connection.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise _DiedError(f"the process that did it {_ending(self.process.exitcode)}") from None
        if not succeeded:
            raise value
        return value

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        return f"was killed ({name}); if memory was not enough, have fewer jobs run at a time"
    return f"ended with the exit code {code}"


def _leave_signals_to_others() -> None:
    """Let signals of a terminal reach this program alone, not the processes that this thread starts."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})


def _serve(connection: Connection[Any, Any]) -> None:
    """Be a process of `Processes`: do what comes, until nothing can come any more or the program is gone."""
    signal.signal(signal.SIGTERM, _end)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            connection.send(_attempt(*connection.recv()))
    except (EOFError, ConnectionError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)


def _attempt(function: Callable[..., Any], given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[bool, Any]:
    try:
        return True, function(*given, **named)
    except Exception as error:  # noqa: BLE001 - it is raised where the outcome is asked for
        return False, error


def _end(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def dask(scheduler: str) -> Iterator[Executor]:
    """Run calls on the Dask cluster whose scheduler has this address; what runs there when the block ends goes on.

    Raises:
        ExecutorError: Dask is not installed, or no scheduler answers.
    """
    try:
        distributed: Any = import_module("distributed")
    except ImportError as error:
        raise ExecutorError('dask is not installed here: pip install "speculators[dask]"') from error
    try:
        distributed.comm.get_address_host(scheduler)  # a client that was told nonsense does not end by itself
        client = distributed.Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ExecutorError(
            f"no Dask scheduler answers at {scheduler}: {described(error)}; expected an address like tcp://host:8786"
        ) from error
    with client, _silenced("distributed"):  # what becomes of each job is told anyway
        if not client.scheduler_info()["workers"]:
            warnings.warn(f"the scheduler at {scheduler} has no workers yet; jobs wait for some", stacklevel=2)
        yield client.get_executor()


@contextmanager
def _silenced(library: str) -> Iterator[None]:
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


LOCAL: Mapping[str, Callable[[int], AbstractContextManager[Executor]]] = {
    "processes": Processes,
    "threads": ThreadPoolExecutor,
}
"""Name → what runs so many jobs at a time on this machine."""

CLUSTERS: Mapping[str, Callable[[str], AbstractContextManager[Executor]]] = {"dask": dask}
"""Name → what runs jobs on the cluster whose scheduler has an address."""
