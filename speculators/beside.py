"""Work that goes on in a thread beside other work, and never keeps a run from ending.

A signal may raise anywhere in the main thread, also within the locks of `concurrent.futures`, which would then
stay locked. What is used here has none that are written in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from types import TracebackType
from typing import Generic, TypeVar

Outcome = TypeVar("Outcome")


class Beside(Generic[Outcome]):
    """Do ``work`` in a thread from now on; leaving its block waits for the end of it, not for its outcome."""

    def __init__(self, work: Callable[[], Outcome]) -> None:
        self._work = work
        self._outcome: list[Outcome] = []
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self._work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the outcome is asked for
            self._error = error

    def __enter__(self) -> Beside[Outcome]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join()

    def result(self) -> Outcome:
        """Wait for the work and return its outcome, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome[0]
