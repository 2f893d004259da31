"""A folder that one run has for itself: by a lock of the system's or, where a filesystem has none, by a file.

Two runs, perhaps of two machines that share the disk, may not find the same. So whoever has the system's lock leaves a
file that says so, for those that have none, and looks for theirs.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK, LOCKED, SOFT_LOCK = "lock", "locked", "soft-lock"
"""The file that the system locks, the one that says so, and the one that stands for a lock while it is there."""

FILES = frozenset((LOCK, LOCKED, SOFT_LOCK))

UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
"""What filesystems without locks answer."""

PAUSE = 0.05
"""Seconds between two looks at a file that another run may remove."""

WINDOWS = os.name == "nt"


class HeldError(Exception):
    """Another run has the folder; ``file`` is what to remove if that is known to be over."""

    def __init__(self, file: Path) -> None:
        self.file = file
        super().__init__(str(file))


def take(folder: Path, patience: float) -> BaseFileLock:
    """Have a folder that is there for this run alone, until `remove` or the end of the process.

    Args:
        folder: The folder.
        patience: Seconds to wait for another run.

    Raises:
        HeldError: Another run has it.
        OSError: It is gone, or the disk refuses.
    """
    from filelock import FileLock, SoftFileLock

    lock: BaseFileLock = FileLock(folder / LOCK, timeout=patience, fallback_to_soft=False)
    try:
        _acquire(lock)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return _take_softly(folder, patience)
    try:
        locked = (folder / LOCK).stat().st_ino
        (folder / LOCKED).touch()
        if (folder / SOFT_LOCK).exists():
            soft = SoftFileLock(folder / SOFT_LOCK, timeout=0)
            _acquire(soft)  # if it can be had, it is a dead run's; a living one waits for this to give way
            soft.release()
        if (folder / LOCK).stat().st_ino != locked:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder / LOCK)  # it was removed meanwhile
    except BaseException:
        with suppress(OSError):
            (folder / LOCKED).unlink()
        lock.release()
        raise
    return lock


def _take_softly(folder: Path, patience: float) -> BaseFileLock:
    from filelock import SoftFileLock

    soft = SoftFileLock(folder / SOFT_LOCK, timeout=patience)
    _acquire(soft)
    try:
        until = time.monotonic() + patience
        while (folder / LOCKED).exists():
            if time.monotonic() >= until:
                raise HeldError(folder / LOCKED)
            time.sleep(PAUSE)
    except BaseException:
        soft.release()
        raise
    return soft


def _acquire(lock: BaseFileLock) -> None:
    from filelock import Timeout

    try:
        lock.acquire()
    except Timeout:
        raise HeldError(Path(lock.lock_file)) from None


def remove(folder: Path, lock: BaseFileLock) -> None:
    """Give a folder up, and remove it if it holds nothing else."""
    from filelock import SoftFileLock

    soft = isinstance(lock, SoftFileLock)
    with suppress(OSError):
        if not soft:
            (folder / LOCKED).unlink(missing_ok=True)
    if WINDOWS and not soft:
        lock.release()  # an open file cannot be removed there
    with suppress(OSError):
        if {entry.name for entry in folder.iterdir()} <= {LOCK, SOFT_LOCK}:
            (folder / LOCK).unlink(missing_ok=True)  # nobody can have it, or will notice
            if soft:
                lock.release()  # which removes its file
            folder.rmdir()
    with suppress(OSError):
        lock.release()
