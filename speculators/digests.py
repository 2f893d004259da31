"""Checksums of files, computed while their bytes are at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from speculators.beside import Beside

STEP = 1 << 20
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Digest:
    """What a file holds, in short.

    Attributes:
        size: Its bytes.
        sha256: Their SHA-256, in hexadecimal digits.
    """

    size: int
    sha256: str


def of_bytes(data: bytes) -> Digest:
    """Return the digest of a small file's content."""
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def of_file(
    path: Path, stopped: Callable[[], bool] = lambda: False, heard: Callable[[memoryview], object] = len
) -> Digest:
    """Read a file from its beginning to its end and return its digest.

    Args:
        path: The file.
        stopped: Ends the work early where it is true; the digest is then of what was read.
        heard: Called with all bytes in order, for other checksums of them.

    Raises:
        OSError: It cannot be read.
    """
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(STEP))
    with path.open("rb", buffering=0) as file:
        while not stopped() and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
            heard(buffer[:count])
            size += count
    return Digest(size, digest.hexdigest())


@contextmanager
def following(path: Path) -> Iterator[tuple[Callable[[int], None], Callable[[], Digest]]]:
    """Compute the digest of a file in a thread, right behind what is being written to it.

    The bytes are taken from the system's cache of the file, just after they were put there, in whatever way,
    so that the disk reads nothing for it, unless the copy was made without the cache (as on filesystems that share
    blocks).

    Yields:
        What is to be told how many bytes were appended, and what waits for the digest when all were.
    """
    counts: SimpleQueue[int] = SimpleQueue()

    def follow() -> Digest:
        digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(STEP))
        with path.open("rb", buffering=0) as file:
            while rest := counts.get():
                while rest:
                    count = file.readinto(buffer[:rest])
                    if not count:
                        raise OSError(f"{path.name} ended after {size} bytes, although {rest} more were written to it")
                    digest.update(buffer[:count])
                    size, rest = size + count, rest - count
        return Digest(size, digest.hexdigest())

    with Beside(follow) as beside:

        def finish() -> Digest:
            counts.put(0)
            return beside.result()

        def append(count: int) -> None:
            if count:
                counts.put(count)

        try:
            yield append, finish
        finally:
            counts.put(0)
