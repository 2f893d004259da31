"""A folder that one run has for itself: by a lock of the system's or, where a filesystem has none, by a file.

Two runs, perhaps of two machines that share the disk, may not find the same. So whoever has the system's lock leaves a
file that says so, for those that have none, and looks for theirs.
"""

from __future__ import annotations

import errno
import os
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
    soft: BaseFileLock = SoftFileLock(folder / SOFT_LOCK, timeout=patience)
    try:
        _acquire(lock)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return _take_softly(folder, soft)
    try:
        (folder / LOCKED).touch()
        if (folder / SOFT_LOCK).exists():
            _acquire(soft)  # if it can be had, it is a dead run's
            soft.release()
    except BaseException:
        with suppress(OSError):
            (folder / LOCKED).unlink()
        lock.release()
        raise
    return lock


def _take_softly(folder: Path, soft: BaseFileLock) -> BaseFileLock:
    _acquire(soft)
    if (folder / LOCKED).exists():
        soft.release()
        raise HeldError(folder / LOCKED)
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

    with suppress(OSError):
        if not isinstance(lock, SoftFileLock):
            (folder / LOCKED).unlink(missing_ok=True)
    if WINDOWS or isinstance(lock, SoftFileLock):
        lock.release()  # an open file cannot be removed there, and a soft lock is a file that it removes
    with suppress(OSError):
        if {entry.name for entry in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
    with suppress(OSError):
        lock.release()
