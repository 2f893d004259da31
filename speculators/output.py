"""Write a converted model: all of it or nothing.

Everything is written into a hidden folder beside the target, synced, and put in its place in one step. What a
run that was killed has left there is removed by the next one.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from speculators import locks
from speculators.config import MODEL_TYPE_KEY
from speculators.errors import OutputError
from speculators.locks import WINDOWS
from speculators.sources import LocalLocation, local_path, parse

if TYPE_CHECKING:
    from filelock import BaseFileLock

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PROVENANCE_FILE = "provenance.json"
NATIVE_CONFIG_FILE = "native_config.json"
CARD_FILE = "README.md"
OWN_FILES = re.compile(
    r"(native_)?config\.json|provenance\.json|README\.md"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
"""Every file that a conversion may write; nothing else is ever replaced, and no card that somebody has changed."""

MARK = b"<!-- Written by speculators, which replaces this file only as long as nobody has changed it: "
"""What the last line of a card begins with; the digest of all that stands above it follows."""

WORK_SUFFIX = ".speculators"
"""What the name of the hidden folder beside an output ends in."""

NEW, OLD = "new", "old"
"""What lies in it, beside a lock: the output as it grows, and the one that it replaces."""

KEPT = "kept"
"""What names begin with of what was replaced by mistake and could not be put back; only its owner removes it."""

PATIENCE, ATTEMPTS = 1.0, 20
"""Seconds for which a run waits for another to let go of its hidden folder, and how often it tries to make it."""

LONGEST_NAME = 255
"""Bytes that the name of a file may have nearly everywhere."""

EXCHANGE, HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of renameat2(2)."""

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)
"""What filesystems answer that cannot sync the names in a folder, and folders that may be written but not read."""


def check_target(path: Path, sources: Iterable[Path]) -> None:
    """Refuse an output path that no output may take, before any work is done.

    Args:
        path: The output.
        sources: Folders and files that the conversion reads, which nothing may be written to.

    Raises:
        OutputError: The path is no folder, or is one of the sources, or holds one, or lies in one.
    """
    try:
        target = path.resolve()
        for source in sources:
            _refuse_overlap(path, target, source)
        working = target == Path.cwd()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"{path} is no path that this system knows: {error}") from error
    if working:
        raise OutputError(f"the output {path} is the working folder, which cannot be replaced; name a folder in it")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path} exists and is no folder; choose another --output-path")
    if not path.name or os.path.ismount(path):
        raise OutputError(f"{path} is where a disk is mounted, which cannot be replaced; name a folder in it")


def target_of(output_path: str | Path, read: Iterable[str | Path]) -> Path:
    """Return the folder that a user means by an output path, which no output of what is read may lie in or hold.

    Args:
        output_path: As the user gave it.
        read: What is read, as the user gave it.

    Raises:
        OutputError: As `check_target` says.
        CheckpointError: One of ``read`` is no place.
    """
    target = local_path(output_path)
    target = target.resolve() if ".." in target.parts else target  # what is hidden lies beside the folder that is meant
    places = [parse(each) for each in read]
    check_target(target, [place.path for place in places if isinstance(place, LocalLocation)])
    return target


def check_vacant(path: Path) -> None:
    """Refuse a path at which something stands that nothing may replace, before any work is done.

    Raises:
        OutputError: There is a file or a folder that is not empty, or the path is none.
    """
    check_target(path, [])
    if path.exists() and any(path.iterdir()):
        raise OutputError(f"{path} exists and is not empty; choose another --output-path")


def _refuse_overlap(path: Path, target: Path, source: Path) -> None:
    """Compare places, not names: links, mounts and other spellings may lead to the same one."""
    read = [source]
    with suppress(OSError):  # reading it will tell
        read += [each for each in source.iterdir() if each.is_symlink() and each.exists()] if source.is_dir() else []
    if replaced := next((each for each in read if _is_in(each.resolve(), target)), None):
        raise OutputError(f"the output {path} would replace its own source {replaced}; choose another --output-path")
    if source.is_dir() and _is_in(target, source.resolve()):
        raise OutputError(f"the output {path} would lie in its own source {source}; choose another --output-path")


def _is_in(path: Path, folder: Path) -> bool:
    """Tell whether a path is a folder or lies in it, whatever both are called."""
    if path.is_relative_to(folder):
        return True
    if not folder.exists():
        return False
    place = folder.stat()
    return any(os.path.samestat(each.stat(), place) for each in (path, *path.parents) if each.exists())


def check_replaceable(path: Path, overwrite: bool, name: Path | None = None) -> None:
    """Refuse to replace a folder, unless it is empty, or is a converted model and may be overwritten.

    Args:
        path: The folder.
        overwrite: Whether a converted model may be replaced.
        name: What messages call it; its path by default.

    Raises:
        OutputError: Names what would be lost.
    """
    name = name or path
    found = sorted(path.iterdir()) if path.exists() else []
    if not found:
        return
    if not overwrite:
        raise OutputError(f"{name} exists and is not empty; choose another --output-path or pass --overwrite")
    others = [file.name for file in found if not _is_own(file)]
    if others:
        raise OutputError(
            f"{name} has {', '.join(others[:3])} beside a converted model and is not overwritten; move it away first"
        )
    config = b""
    with suppress(OSError):
        config = (path / CONFIG_FILE).read_bytes()
    if not is_converted(config):
        raise OutputError(
            f"{name} holds something other than a converted model and is not overwritten; move it away first"
        )


def is_converted(config: bytes) -> bool:
    """Tell whether the content of a ``config.json`` is that of a converted model."""
    try:
        found = json.loads(config)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and MODEL_TYPE_KEY in found


def check_writable(path: Path, overwrite: bool) -> None:
    """Refuse, without changing anything, a place in which `staged` could not put an output.

    Whether another run writes to it just now is not looked at.

    Raises:
        OutputError: Something would be lost, or nothing can be written there.
    """
    with writing(path):
        work = work_folder(path)
        _require_folder(work)
        old = work / OLD
        returns = old.exists() and _returns(work, path)
        check_replaceable(old if returns else path, overwrite, path)
        missing = [path.absolute(), *_missing_parents(path)] if not path.exists() else []
        parent = missing[-1].parent if missing else path.absolute().parent
        if not parent.is_dir() or (missing and missing[-1].is_symlink()):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        for each in missing:
            with suppress(FileNotFoundError):
                (parent / each.name).lstat()  # or the filesystem says that it can have no such name
        if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _is_own(file: Path) -> bool:
    """Tell whether a file is one that a conversion wrote, as far as its name tells; of a card, its content does."""
    if not OWN_FILES.fullmatch(file.name) or file.is_dir():
        return False
    try:
        return file.name != CARD_FILE or is_unchanged(file.read_bytes())
    except OSError:
        return False


def marked(card: str) -> str:
    """Return a card with the line at its end that tells whether it was changed since."""
    return f"{card}{MARK.decode()}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def is_unchanged(card: bytes) -> bool:
    """Tell whether a card is one that was written by a conversion, and by nobody since."""
    body, found, line = card.replace(b"\r\n", b"\n").rpartition(MARK)  # as a checkout may have them
    return bool(found) and line == f"{hashlib.sha256(body).hexdigest()} -->\n".encode()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what kept an output from being written.

    Raises:
        OutputError: In place of any `OSError`: the disk is full, read-only, or otherwise refuses.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; nothing was kept") from error


@contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh folder that becomes ``path`` when the block ends, and vanishes when it raises.

    At every moment ``path`` is what it was, or all of what it becomes. Neither what is there nor what appears
    meanwhile is replaced unless ``overwrite`` allows it. No other run may write to the same path before the
    block ends.

    Raises:
        OutputError: Something would be lost; the disk is full, read-only, or otherwise refuses; or another run
            writes to the path.
    """
    created = _missing_parents(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _workplace(path) as work:
            with writing(path):
                check_replaceable(path, overwrite)
                (work / NEW).mkdir()
                if path.exists():  # as private as before, but a folder must be writable to be moved
                    (work / NEW).chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IRWXU)
            yield work / NEW
            with writing(path):
                for parent in created:
                    _sync_names(parent.parent)
                _publish(work, path, overwrite)
    except BaseException:
        for parent in created:
            _remove_if_empty(parent)
        raise


def work_folder(path: Path) -> Path:
    """Return the hidden folder in which an output grows before it is put at ``path``."""
    name = f".{path.name}{WORK_SUFFIX}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}{WORK_SUFFIX}"
    return path.with_name(name)


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """Hold the hidden folder of an output for this run alone, free of what dead ones left.

    Raises:
        OutputError: Another run holds it, or it cannot be made.
    """
    work = work_folder(path)
    with writing(path):
        lock = _hold(work, path)
    try:
        with writing(path):
            _settle(work, path)
            _clean_others(work)
        yield work
    finally:
        _leave(work, path, lock)


def _hold(work: Path, path: Path) -> BaseFileLock:
    """Make a hidden folder, if it is not there, and have it for this run alone."""
    for _ in range(ATTEMPTS):
        _require_folder(work)
        try:
            work.mkdir(parents=True, exist_ok=True)
            return locks.take(work, PATIENCE)
        except (FileNotFoundError, FileExistsError):  # another run was about to remove it
            time.sleep(PATIENCE / ATTEMPTS)
        except locks.HeldError as held:
            raise OutputError(
                f"another conversion is writing to {path}; wait for it or choose another --output-path "
                f"(if there is none, remove {held.file})"
            ) from held
        except BaseException:
            _remove_if_empty(work)
            raise
    raise OutputError(f"other conversions to {path} come and go; try again, or choose another --output-path")


def _require_folder(work: Path) -> None:
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise OutputError(f"{work} is no folder, and a conversion writes there what is not complete; remove it")


def _returns(work: Path, path: Path) -> bool:
    """Tell whether the previous output that a dead run moved aside belongs in its place again.

    Raises:
        OutputError: Something else is in its place.
    """
    if not (work / NEW).exists() and path.exists():
        return False  # the new one was put in its place, so this one is of no use
    if _is_filled(path):
        raise OutputError(
            f"{path} should hold the previous output, which is in {work / OLD}; move one of them away first"
        )
    return True


def _settle(work: Path, path: Path) -> None:
    """Bring what a run did to an end, or back, and remove what it wrote; a previous output is never removed for it.

    Where a previous output was moved aside (`OLD`) and the new one is not in its place, it is put back.

    Raises:
        OutputError: Something else is in its place.
    """
    new, old = work / NEW, work / OLD
    if old.exists():
        if _returns(work, path):
            old.rename(path)
            _sync_names(path.parent)
        else:
            old.rename(new)
        _sync_names(work)
    if new.exists():
        shutil.rmtree(new)


def _clean_others(work: Path) -> None:
    """Remove what dead runs to other outputs beside this one left, but never a previous output."""
    for other in work.parent.glob(f".*{WORK_SUFFIX}"):
        if other == work or other.is_symlink():
            continue
        with suppress(OSError, locks.HeldError):
            if not _is_filled(other):
                other.rmdir()  # a run that died at once left it; one that has just made it makes it again
            elif _holds_no_output(other):
                lock = locks.take(other, 0)
                if _holds_no_output(other):
                    shutil.rmtree(other / NEW, ignore_errors=True)
                locks.remove(other, lock)


def _holds_no_output(work: Path) -> bool:
    """Tell whether nothing lies in a hidden folder but locks and what a run had begun to write."""
    return {entry.name for entry in work.iterdir()} <= {NEW, *locks.FILES}


def _leave(work: Path, path: Path, lock: BaseFileLock) -> None:
    """Settle everything and remove a hidden folder; what cannot be settled now waits there for the next run."""
    try:
        with suppress(OSError, OutputError):
            _settle(work, path)
    except BaseException:  # a signal; without this, the rest would wait as well
        with suppress(OSError, OutputError):
            _settle(work, path)
        raise
    finally:
        locks.remove(work, lock)
        if (work / OLD).exists():
            warnings.warn(
                f"the previous output is in {work / OLD}; the next conversion to {path} puts it back", stacklevel=2
            )


def _is_filled(path: Path) -> bool:
    return path.exists() and any(path.iterdir())


def _missing_parents(path: Path) -> list[Path]:
    return [parent for parent in path.absolute().parents if not parent.exists()]


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def _publish(work: Path, path: Path, overwrite: bool) -> None:
    """Put a complete output in its place. Each step is on the disk before one that relies on it is taken."""
    new = work / NEW
    for file in new.iterdir():
        _sync(file)
    _sync_names(new)
    check_replaceable(path, overwrite)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    undo = _put(work, path)
    try:
        if mode is not None:
            path.chmod(mode)
        check_replaceable(new if new.exists() else work / OLD, overwrite, path)  # it may have changed just before
        _sync_names(path.parent)
        _sync_names(work)
    except BaseException:
        _take_back(undo, work)
        raise


def _take_back(undo: Callable[[], object], work: Path) -> None:
    """Undo a publication; where that fails, too, keep what was replaced under a name that nobody removes."""
    with suppress(OSError):
        if undo():
            return
    kept = next(each for number in count() if not (each := work / f"{KEPT}-{number}").exists())
    for name in (NEW, OLD):
        if (work / name).exists():
            (work / name).rename(kept)
            warnings.warn(f"what was replaced is kept in {kept}; move it back", stacklevel=2)


def _put(work: Path, path: Path) -> Callable[[], object]:
    """Move the new output to ``path``, in one step where that is possible.

    What was there goes to `NEW`, or where two steps are needed to `OLD`, so that `_settle` can tell between them.

    Returns:
        What takes it back to `NEW`; false if it cannot.
    """
    new = work / NEW
    if not _is_filled(path):
        if WINDOWS and path.exists():
            path.rmdir()  # elsewhere a folder takes the place of an empty one in one step
        new.rename(path)
        return lambda: path.rename(new)
    if _exchange(new, path):
        return lambda: _exchange(new, path)
    path.rename(work / OLD)
    _sync_names(work)
    _sync_names(path.parent)
    new.rename(path)
    return lambda: path.rename(new)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders take each other's place in one step, where the system and the filesystem can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done: int = renameat2(HERE, os.fsencode(one.absolute()), HERE, os.fsencode(other.absolute()), EXCHANGE)
    return done == 0


def _sync_names(folder: Path) -> None:
    """Have the disk hold the names in a folder, where the system and the filesystem can be asked for that."""
    try:
        if not WINDOWS:
            _sync(folder)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
