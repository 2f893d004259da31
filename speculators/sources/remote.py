"""Files on other machines, read as a whole or in parts, patiently, and kept.

A transport (`RemoteFile`) makes one attempt at a time; here it is tried again with growing pauses, resumed
where it broke off, and checked: every byte that is used has come from one version of the file.
"""

from __future__ import annotations

import errno
import hashlib
import math
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from speculators.errors import CheckpointError
from speculators.progress import Progress, unheard
from speculators.weights import Extent, SafetensorsHeader, WeightFile

Answer = TypeVar("Answer")

RETRIES = 5
"""How often in a row a connection may fail before a download is given up."""

FIRST_RETRIES = 2
"""How often a server may fail to answer at all, before anything was read."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0
"""Seconds before the first retry, doubled before each further one, and the most that they become."""

PIECE = 16 << 20
"""Bytes of a tensor that are fetched and kept at a time, where much of it is needed."""

SMALL = 256 << 10
"""Up to this many bytes, such as rows of an embedding, just what is needed is fetched."""

MOST_JSON = 100 << 20
"""The most bytes of a config or an index; those of the largest models have some MB."""

HEAD = 64 << 10
"""Bytes fetched of a safetensors file at first, which hold most headers."""


class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes) -> object:
        """Take more bytes."""


class TransientError(Exception):
    """One attempt failed in a way that may pass; ``pause`` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class UnreachableError(CheckpointError):
    """A server does not answer, or not for long enough."""


class RefusedError(CheckpointError):
    """A server does not hand out a file; some do not tell this from a file that they do not have."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ContradictionError(CheckpointError):
    """A server sends what does not fit what it said before; nothing of it is trusted."""


class NotFoundError(Exception):
    """There is no such file."""


class NoRangesError(Exception):
    """The server sends whole files only."""


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
            tries = _again(file, tries, error, position - start, kept=True)


def _again(file: RemoteFile, tries: int, error: TransientError, done: int, *, kept: bool) -> int:
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


def download(
    file: RemoteFile,
    stat: Stat,
    target: Path,
    *,
    check: Callable[[Path], bool] = lambda path: True,
    progress: Progress = unheard,
) -> None:
    """Fetch a whole file of known size and version to ``target``, going on where an earlier run was interrupted.

    What has arrived lies beside the target until all of it is there. Of two processes that want one file,
    the second waits.

    Args:
        file: What to fetch.
        stat: What the server said about it.
        target: Where it is kept, a place of this version alone.
        check: Tells whether what arrived is what was meant.
        progress: Told about the bytes.

    Raises:
        CheckpointError: No space, a lost connection, or something else arrived.
    """
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")
    with storing(target, stat.size):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, file, progress):
            if target.exists():
                return
            _require_space(target, (stat.size or 0) - _size(partial))
            try:
                _fetch(file, stat, partial, progress)
                if not check(partial):
                    # A part of an earlier run may have been damaged; one fresh attempt tells.
                    partial.unlink()
                    _fetch(file, stat, partial, progress)
                    if not check(partial):
                        raise ContradictionError(
                            f"{file.name}: what arrived has another checksum than the server names; nothing was kept. "
                            "Try again, or another mirror."
                        )
            except ContradictionError:
                partial.unlink(missing_ok=True)
                raise
            partial.replace(target)
        with suppress(OSError):
            _lock(target).unlink()  # whoever still waits for it finds the target


def download_anew(file: RemoteFile, stat: Stat, folder: Path, *, progress: Progress = unheard) -> str:
    """Fetch a whole file of which nothing tells whether it is still the same, in one response.

    Args:
        file: What to fetch.
        stat: What the server said about it.
        folder: Where it is kept, as ``folder/VERSION/NAME``.
        progress: Told about the bytes.

    Returns:
        The version: the SHA-256 of the content.

    Raises:
        CheckpointError: No space, or a lost connection.
    """
    with storing(folder, stat.size):
        folder.mkdir(parents=True, exist_ok=True)
        _require_space(folder / "file", stat.size or 0)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as made:
            fresh = Path(made) / file.name.rpartition("/")[2]
            _fetch(file, replace(stat, ranges=False), fresh, progress)
            version = hashlib.sha256()
            feed(fresh, version)
            target = folder / version.hexdigest() / fresh.name
            target.parent.mkdir(exist_ok=True)
            fresh.replace(target)
    return version.hexdigest()


def feed(path: Path, *digests: Digest) -> None:
    """Compute checksums of a file."""
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            for digest in digests:
                digest.update(chunk)


def _lock(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


@contextmanager
def _locked(target: Path, file: RemoteFile, progress: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(_lock(target))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        progress(f"waiting for another program that downloads {file.name}", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _most(file: RemoteFile, stat: Stat) -> float:
    """Return the most bytes that a file can have.

    Raises:
        ContradictionError: The server says that it has more.
    """
    most = MOST_JSON if file.name.endswith(".json") else math.inf
    if stat.size is not None and stat.size > most:
        raise ContradictionError(f"{file.name} has {stat.size} bytes, more than any config or index")
    return most if stat.size is None else stat.size


def _fetch(file: RemoteFile, stat: Stat, partial: Path, progress: Progress) -> None:
    if _size(partial) > _most(file, stat):
        partial.unlink()
    try:
        if stat.ranges and stat.size is not None:
            _continue(file, stat.size, partial, progress)
        else:
            _fetch_whole(file, stat, partial, progress)
    except NoRangesError:
        _fetch_whole(file, stat, partial, progress)
    if stat.size is not None and (arrived := _size(partial)) != stat.size:
        raise ContradictionError(f"{file.name}: {arrived} bytes arrived, expected {stat.size}; nothing was kept")


def _continue(file: RemoteFile, size: int, partial: Path, progress: Progress) -> None:
    done = _size(partial)
    with partial.open("ab", buffering=0) as out:
        for chunk in stream(file, done, size):
            out.write(chunk)
            done += len(chunk)
            progress(f"downloading {file.name}", done, size)


def _fetch_whole(file: RemoteFile, stat: Stat, partial: Path, progress: Progress) -> None:
    tries, limit = 0, _most(file, stat)
    while True:
        done = 0
        try:
            with partial.open("wb") as out:
                for chunk in file.read(0, None):
                    out.write(chunk)
                    done += len(chunk)
                    if done > limit:
                        raise ContradictionError(f"{file.name}: more than {limit} bytes arrived, which it cannot have")
                    progress(f"downloading {file.name}", done, stat.size or 0)
            if stat.size is None or done >= stat.size:
                return
            raise TransientError("it was closed early")
        except NotFoundError as error:
            raise ContradictionError(f"{file.name} was removed from the server while it was read") from error
        except TransientError as error:
            tries = _again(file, tries, error, done, kept=False)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require_space(target: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(target.parent).free):
        raise OSError(errno.ENOSPC, f"needs {size} bytes, {free} are free")


@contextmanager
def storing(target: Path, size: int | None) -> Iterator[None]:
    """Say what to do when the cache cannot take something.

    Raises:
        CheckpointError: In place of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = f" for {size} bytes" if size else ""
            raise CheckpointError(
                f"no space{needed} in the cache {target.parent} ({error.strerror}); "
                "make some, or choose another place with --cache-dir or HF_HOME"
            ) from error
        raise CheckpointError(
            f"the cache {target.parent} cannot be written: {error.strerror or error}; "
            "choose another place with --cache-dir or HF_HOME"
        ) from error


def keep(path: Path, data: bytes) -> None:
    """Write a small file into the cache in one step.

    Raises:
        CheckpointError: The cache cannot take it.
    """
    with storing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_space(path, len(data))
        fresh = path.with_name(f".new-{uuid.uuid4().hex}")
        try:
            fresh.write_bytes(data)
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def note(path: Path, data: bytes) -> None:
    """Keep something that is good to know later, unless it is known or the cache cannot be written."""
    with suppress(OSError, CheckpointError):
        if not path.exists() or path.read_bytes() != data:
            keep(path, data)


class Pieces:
    """Parts of one version of a remote file, kept on disk as they are fetched.

    Each is a file of its own, whose name says which bytes it holds and their CRC-32. It appears in one
    step, so that any number of processes may share the folder.

    Args:
        file: Where they come from; ``None`` when nothing may be fetched.
        name: What messages call the file.
        folder: Where they are kept.
    """

    def __init__(self, file: RemoteFile | None, name: str, folder: Path) -> None:
        self.name = name
        self._file = file
        self._folder = folder
        self._last: tuple[int, int, memoryview] | None = None

    def read(self, start: int, stop: int) -> memoryview:
        """Return bytes ``start`` to ``stop``, fetched unless they are here.

        Raises:
            CheckpointError: They are not here, and cannot be fetched.
            NoRangesError: The server sends whole files only.
        """
        if self._last is not None and self._last[0] <= start and stop <= self._last[1]:
            first, _, data = self._last
        else:
            first, data = start, self._kept(start, stop)
            self._last = (start, stop, data)
        return data[start - first : stop - first]

    def has(self, start: int, stop: int) -> bool:
        """Tell whether a piece was fetched already."""
        return any(True for _ in self._folder.glob(f"{start}-{stop}-*"))

    def _kept(self, start: int, stop: int) -> memoryview:
        for path in self._folder.glob(f"{start}-{stop}-*"):
            with suppress(OSError):
                data = path.read_bytes()
                if len(data) == stop - start and path.name == _piece_name(start, stop, data):
                    return memoryview(data)
                path.unlink()  # damaged in the cache
        if self._file is None:
            raise CheckpointError(
                f"{self.name}: bytes {start} to {stop} are not in the cache, and offline nothing can be fetched; "
                "run once without --offline"
            )
        data = b"".join(stream(self._file, start, stop))
        keep(self._folder / _piece_name(start, stop, data), data)
        return memoryview(data)


def _piece_name(start: int, stop: int, data: bytes) -> str:
    return f"{start}-{stop}-{zlib.crc32(data):08x}"


class RemoteSafetensors:
    """A safetensors file of which only the header and what is asked for is fetched.

    Args:
        pieces: Its parts.
        size: Its size in bytes.
        whole: Fetches and opens all of it, for when the server stops sending parts.

    Raises:
        CheckpointError: It is no whole, well-formed safetensors file.
        NoRangesError: The server sends whole files only.
    """

    def __init__(self, pieces: Pieces, size: int, whole: Callable[[], WeightFile] | None = None) -> None:
        self.path = Path(pieces.name)
        self._pieces = pieces
        self._fetch_whole = whole
        self._whole: WeightFile | None = None
        head = min(HEAD, size)

        def read(start: int, stop: int) -> memoryview:
            return pieces.read(0, head)[start:stop] if stop <= head else pieces.read(start, stop)

        self._header = SafetensorsHeader(pieces.name, size, read)
        self.tensors = self._header.tensors

    def stretch(self, name: str, start: int, stop: int) -> Extent | memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor, fetched in pieces where they are many."""
        if self._whole is None:
            try:
                return self._stretch(name, start, stop)
            except NoRangesError:
                if self._fetch_whole is None:
                    raise
                self._whole = self._fetch_whole()
                if self._whole.tensors != self.tensors:
                    name = self._pieces.name
                    raise ContradictionError(f"{name} was changed on the server while it was read") from None
        return self._whole.stretch(name, start, stop)

    def _stretch(self, name: str, start: int, stop: int) -> memoryview:
        first, size = self._header.start(name), self.tensors[name].nbytes
        grid = [(begin, min(begin + PIECE, size)) for begin in range(start - start % PIECE, stop, PIECE)]
        if stop - start <= SMALL and not all(self._pieces.has(first + begin, first + end) for begin, end in grid):
            return self._pieces.read(first + start, first + stop)
        found = [
            self._pieces.read(first + begin, first + end)[max(start - begin, 0) : stop - begin] for begin, end in grid
        ]
        return found[0] if len(found) == 1 else memoryview(bytearray().join(found))
