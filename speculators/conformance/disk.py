"""A disk that is full at one change of a folder, for the code that writes there in this process.

Python tells of each change before it makes it, by audit events (https://docs.python.org/3/library/audit_events.html),
so this works on every system. Hooks for these cannot be taken back: there is one, which asks the disks that there are.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")
"""Events of calls that change a folder; opening for writing is told by its flags."""


@dataclass
class Disk:
    """A disk that refuses one change of a folder.

    Attributes:
        folder: The folder; a relative path in an event counts as in it.
        full_at: Which change is refused, from 1; none by default.
        changed: Paths of those that were tried so far.
    """

    folder: Path
    full_at: int | None = None
    changed: list[str] = field(default_factory=list)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count a change, and refuse it if it is the one.

        Raises:
            OSError: No space is left.
        """
        writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not writes and event not in CHANGING:
            return
        if not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = Path(os.fsdecode(arguments[0]))
        if path.is_absolute() and not path.is_relative_to(self.folder):
            return
        self.changed.append(str(path))
        if len(self.changed) == self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


_disks: list[Disk] = []


@cache
def _listen() -> None:
    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        for disk in _disks:
            disk.hear(event, arguments)

    sys.addaudithook(hear)


@contextmanager
def full_disk(folder: Path, full_at: int | None = None) -> Iterator[Disk]:
    """Refuse change number ``full_at`` of what is below ``folder``, if any, and keep which there are."""
    _listen()
    disk = Disk(folder, full_at)
    _disks.append(disk)
    try:
        yield disk
    finally:
        _disks.remove(disk)
