"""Files on other machines: what a transport offers, what may go wrong, and how it is asked again.

A transport (`RemoteFile`) makes one attempt at a time; here it is tried again with growing pauses, and resumed
where it broke off. What arrives is kept by `speculators.sources.cache` and `speculators.sources.parts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from speculators.errors import CheckpointError, UnavailableError

Answer = TypeVar("Answer")

RETRIES = 5
"""How often in a row a connection may fail before a download is given up."""

FIRST_RETRIES = 2
"""How often a server may fail to answer at all, before anything was read."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0
"""Seconds before the first retry, doubled before each further one, and the most that they become."""


class TransientError(Exception):
    """One attempt failed in a way that may pass; ``pause`` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class UnreachableError(UnavailableError):
    """A server does not answer, or not for long enough."""


class ForbiddenError(CheckpointError):
    """A server does not hand out a file to us; some do not tell this from a file that they do not have."""


class ContradictionError(CheckpointError):
    """A server sends what does not fit what it said before; nothing of it is trusted."""


class NotFoundError(Exception):
    """There is no such file."""


class NoRangesError(Exception):
    """The server sends whole files only; the argument is said of the file's name."""

    def __init__(self) -> None:
        super().__init__("is on a server that sends whole files only")


@dataclass(frozen=True)
class Stat:
    """What a server says about a file.

    Attributes:
        size: Bytes; ``None`` when it does not say.
        version: What changes when the file changes, such as an ETag; ``None`` when the server has nothing like it.
        ranges: Whether it sends parts.
    """

    size: int | None
    version: str | None
    ranges: bool = True


class RemoteFile(Protocol):
    """One file of a server. Every method makes one attempt.

    Raises:
        TransientError: It may work later.
        NotFoundError: There is no such file.
        CheckpointError: It will not work.
    """

    @property
    def name(self) -> str:
        """What messages call it; holds no secrets."""

    def stat(self) -> Stat:
        """Ask what the file is."""

    def read(self, start: int, stop: int | None) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to ``stop``, or to the end.

        Raises:
            NoRangesError: The server would send all of it, and that was not asked for.
        """


def patiently(ask: Callable[[], Answer], what: str, advice: str, retries: int = FIRST_RETRIES) -> Answer:
    """Ask a server something, again where that may help.

    Args:
        ask: Makes one attempt.
        what: What messages call that which is asked.
        advice: What to check when it does not answer.
        retries: How often to ask again.

    Raises:
        UnreachableError: It does not answer.
    """
    tries = 0
    while True:
        try:
            return ask()
        except TransientError as error:
            if tries >= retries:
                more = f", also in {retries} more attempts" if retries else ""
                raise UnreachableError(f"{what} cannot be reached ({error}){more}; check {advice}") from error
            tries = _pause(tries, error)


def stream(file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes from ``start`` to ``stop``, going on after each break where it was.

    Raises:
        CheckpointError: The connection was lost too often, or the server sends something else.
        NoRangesError: The server sends whole files only.
    """
    position, tries = start, 0
    while position < stop:
        before = position
        try:
            for chunk in file.read(position, stop):
                position += len(chunk)
                tries = 0
                if position > stop:
                    raise ContradictionError(f"{file.name}: the server sent more bytes than it was asked for")
                yield chunk
            if position == before:
                raise TransientError("it was closed at once")
        except NotFoundError as error:
            raise ContradictionError(f"{file.name} was removed from the server while it was read") from error
        except TransientError as error:
            tries = again(file, tries, error, position - start, kept=True)


def again(file: RemoteFile, tries: int, error: TransientError, done: int, *, kept: bool) -> int:
    """Wait before a download goes on after ``done`` bytes; returns how many attempts there were.

    Raises:
        UnreachableError: There were too many; ``kept`` says whether the next run can go on from here.
    """
    if tries >= RETRIES:
        advice = "what has arrived is kept" if kept else "it begins anew, as the server cannot continue"
        raise UnreachableError(
            f"{file.name}: the connection was lost after {done} bytes ({error}), also in {RETRIES} more attempts. "
            f"Run the command again when the network works: {advice}."
        ) from error
    return _pause(tries, error)


def _pause(tries: int, error: TransientError) -> int:
    """Wait before the next attempt; returns how many there were before it."""
    time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**tries) if error.pause is None else error.pause)
    return tries + 1
