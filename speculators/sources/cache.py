"""What was fetched, on disk: whole files, resumed and checked, and small things that are good to know later.

Every byte that is kept under one name has come from one version of a file. Any number of processes may share a
cache: things appear in one step.
"""

from __future__ import annotations

import errno
import hashlib
import math
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from speculators.errors import CheckpointError, UnavailableError
from speculators.progress import Progress, unheard
from speculators.sources.remote import (
    ContradictionError,
    NoRangesError,
    NotFoundError,
    RemoteFile,
    Stat,
    TransientError,
    again,
    stream,
)

MOST_JSON = 100 << 20
"""The most bytes of a config or an index; those of the largest models have some MB."""


class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes) -> object:
        """Take more bytes."""


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


def download_anew(
    file: RemoteFile, stat: Stat, folder: Path, place: Callable[[str], Path], *, progress: Progress = unheard
) -> str:
    """Fetch a whole file of which nothing tells whether it is still the same, in one response.

    Args:
        file: What to fetch.
        stat: What the server said about it.
        folder: Where it is kept while it arrives.
        place: Returns where a version of it is kept, in ``folder``.
        progress: Told about the bytes.

    Returns:
        The version, which is the SHA-256 of the content.

    Raises:
        CheckpointError: No space, or a lost connection.
    """
    with storing(folder, stat.size):
        folder.mkdir(parents=True, exist_ok=True)
        _require_space(folder / "file", stat.size or 0)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as made:
            fresh, content = Path(made) / "file", hashlib.sha256()
            _fetch(file, replace(stat, ranges=False), fresh, progress)
            feed(fresh, content)
            version = f"sha256 {content.hexdigest()}"
            target = place(version)
            target.parent.mkdir(exist_ok=True)
            fresh.replace(target)
    return version


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
            tries = again(file, tries, error, done, kept=False)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require_space(target: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(target.parent).free):
        raise OSError(errno.ENOSPC, f"needs {size} bytes, {free} are free")


@contextmanager
def storing(target: Path, size: int | None) -> Iterator[None]:
    """Say what to do when the cache cannot take something.

    Raises:
        UnavailableError: In place of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = f" for {size} bytes" if size else ""
            raise UnavailableError(
                f"no space{needed} in the cache {target.parent} ({error.strerror}); "
                "make some, or choose another place with --cache-dir or HF_HOME"
            ) from error
        raise UnavailableError(
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
