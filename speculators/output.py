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
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from speculators import digests, dtypes
from speculators.beside import Beside
from speculators.config import MODEL_TYPE_KEY
from speculators.digests import Digest
from speculators.errors import OptionError, OutputError
from speculators.weights import CHUNK, Chunk, Extent, TensorInfo

if TYPE_CHECKING:
    from filelock import BaseFileLock

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_FILE = "model{suffix}.safetensors"
PROVENANCE_FILE = "provenance.json"
OWN_FILES = re.compile(
    r"config\.json|provenance\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
"""Every file that a conversion may write; nothing else is ever replaced."""

WORK_SUFFIX = ".speculators"
"""What the name of the hidden folder beside an output ends in."""

LOCK, SOFT_LOCK, NEW, OLD = "lock", "soft-lock", "new", "old"
"""What lies in it: the lock of the run that it belongs to, by the system or, where that has none, by a file that is
there; the output as it grows; and the one that it replaces."""

KEPT = "kept"
"""What was replaced by mistake and could not be put back; only its owner removes it."""

PATIENCE, ATTEMPTS = 1.0, 20
"""Seconds for which a run waits for another to let go of its hidden folder, and how often it tries to make it."""

LONGEST_NAME = 255
"""Bytes that the name of a file may have nearly everywhere."""

EXCHANGE, HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of renameat2(2)."""

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)
"""What filesystems answer that cannot sync the names in a folder, and folders that may be written but not read."""

UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What filesystems without locks answer, beside ENOSYS, which filelock knows."""

COPY = 16 << 20
"""Bytes that the kernel is asked to copy at a time."""

WINDOWS = os.name == "nt"

Report = Callable[[int], object]


def _unheard(count: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Payload:
    """One tensor to write and where its bytes come from."""

    name: str
    info: TensorInfo
    chunks: Iterable[Chunk]


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
    found = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if not found:
        return
    if not overwrite:
        raise OutputError(f"{name} exists and is not empty; choose another --output-path or pass --overwrite")
    others = [file for file in found if not OWN_FILES.fullmatch(file)]
    if others:
        raise OutputError(
            f"{name} has {', '.join(others[:3])} beside a converted model and is not overwritten; move it away first"
        )
    try:
        config = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or MODEL_TYPE_KEY not in config:
        raise OutputError(
            f"{name} holds something other than a converted model and is not overwritten; move it away first"
        )


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
    """Make a hidden folder, if it is not there, and take its lock."""
    from filelock import FileLock, SoftFileLock, Timeout

    lock: BaseFileLock = FileLock(work / LOCK, timeout=PATIENCE)
    for _ in range(ATTEMPTS):
        if work.is_symlink():
            raise OutputError(f"{work} is a link, where a conversion writes what is not complete; remove it")
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            return lock
        except (FileNotFoundError, FileExistsError):  # another run was about to remove it
            time.sleep(PATIENCE / ATTEMPTS)
        except Timeout:
            break
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
                _remove_if_empty(work)
                raise
            lock = SoftFileLock(work / SOFT_LOCK, timeout=PATIENCE)
        except BaseException:
            _remove_if_empty(work)
            raise
    raise OutputError(
        f"another conversion is writing to {path}; wait for it or choose another --output-path (if there is none, "
        f"remove {work / SOFT_LOCK})"
    )


def _settle(work: Path, path: Path) -> None:
    """Bring what a run did to an end, or back, and remove what it wrote; a previous output is never removed for it.

    Where a previous output was moved aside (`OLD`) and the new one is not in its place, it is put back.

    Raises:
        OutputError: Something else is in its place.
    """
    new, old = work / NEW, work / OLD
    if old.exists():
        if not new.exists() and path.exists():
            old.rename(new)  # the new one was put in its place, so this one is of no use
        elif path.exists() and any(path.iterdir()):
            raise OutputError(f"{path} should hold the previous output, which is in {old}; move one of them away first")
        else:
            old.rename(path)
            _sync_names(path.parent)
        _sync_names(work)
    if new.exists():
        shutil.rmtree(new)


def _clean_others(work: Path) -> None:
    """Remove what dead runs to other outputs beside this one left, but never a previous output."""
    from filelock import FileLock, Timeout

    for other in work.parent.glob(f".*{WORK_SUFFIX}"):
        with suppress(OSError, NotImplementedError, Timeout):
            if other != work and (other / LOCK).exists() and not other.is_symlink():
                lock = FileLock(other / LOCK, timeout=0)
                lock.acquire()
                if {entry.name for entry in other.iterdir()} <= {LOCK, NEW}:
                    shutil.rmtree(other / NEW, ignore_errors=True)
                    _remove(other, lock)
                else:
                    lock.release()


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
        _remove(work, lock)
        if (work / OLD).exists():
            warnings.warn(
                f"the previous output is in {work / OLD}; the next conversion to {path} puts it back", stacklevel=2
            )


def _remove(work: Path, lock: BaseFileLock) -> None:
    """Remove a hidden folder that holds nothing but its lock, and then give that up."""
    if WINDOWS or (work / SOFT_LOCK).exists():
        lock.release()  # an open file cannot be removed there, and a soft lock is a file that it removes
    with suppress(OSError):
        if {entry.name for entry in work.iterdir()} <= {LOCK, SOFT_LOCK}:
            (work / LOCK).unlink(missing_ok=True)
            work.rmdir()
    with suppress(OSError):
        lock.release()


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
    undo = _put(work, path)
    try:
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
    for name in (NEW, OLD):
        if (work / name).exists():
            (work / name).rename(work / KEPT)
            warnings.warn(f"what was replaced is kept in {work / KEPT}; move it back", stacklevel=2)


def _put(work: Path, path: Path) -> Callable[[], object]:
    """Move the new output to ``path``, in one step where that is possible.

    What was there goes to `NEW`, or where two steps are needed to `OLD`, so that `_settle` can tell between them.

    Returns:
        What takes it back to `NEW`; false if it cannot.
    """
    new = work / NEW
    if not (path.exists() and any(path.iterdir())):
        if WINDOWS and path.exists():
            path.rmdir()  # elsewhere a folder takes the place of an empty one in one step
        new.rename(path)
        return lambda: path.rename(new)
    shutil.copymode(path, new)
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


def parse_size(size: str | int) -> int:
    """Return a number of bytes: ``5_000_000_000``, ``"5GB"`` or ``"500MB"``, in powers of 1000 as on the Hub.

    Raises:
        OptionError: It is no size, or zero.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?B)?", str(size).strip(), re.IGNORECASE | re.ASCII)
    count = int(Fraction(found[1]) * 1000 ** "BKMGT".index((found[2] or "B")[0].upper())) if found else 0
    if not count:
        raise OptionError(f"{size!r} is no size of a shard; write it as '5GB' or '500MB'")
    return count


def write_text(folder: Path, name: str, text: str) -> dict[str, Digest]:
    """Write a small file, the same bytes on every system, and return its digest by its name."""
    data = text.encode()
    (folder / name).write_bytes(data)
    return {name: digests.of_bytes(data)}


def write_safetensors(
    folder: Path, payloads: Iterable[Payload], *, max_shard_size: int | None = None, report: Report = _unheard
) -> dict[str, Digest]:
    """Write tensors as one safetensors file, or as shards with an index, as the Hugging Face Hub names them.

    Files carry the ``format: pt`` metadata that loaders ask for. Wide dtypes come first, so that every
    tensor is aligned, then names in order: the same tensors give the same bytes.

    Args:
        folder: Where to write.
        payloads: The tensors.
        max_shard_size: Bytes of tensors per file; a larger tensor has a file of its own. One file by default.
        report: Called with the number of bytes each time some were written.

    Returns:
        The digest of each file that was written, by its name.
    """
    ordered = {
        payload.name: payload
        for payload in sorted(payloads, key=lambda payload: (-dtypes.SIZES[payload.info.dtype], payload.name))
    }
    if max_shard_size is None or not ordered:
        return {WEIGHTS_FILE: _write_file(folder / WEIGHTS_FILE, list(ordered.values()), report)}
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda payload: payload.info.nbytes,
        filename_pattern=SHARD_FILE,
        max_shard_size=max_shard_size,
    )
    written = {
        name: _write_file(folder / name, [ordered[tensor] for tensor in held], report)
        for name, held in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        written |= write_text(folder, INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def _write_file(path: Path, payloads: list[Payload], report: Report) -> Digest:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for payload in payloads:
        end = offset + payload.info.nbytes
        header[payload.name] = {
            "dtype": payload.info.dtype,
            "shape": list(payload.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (
        path.open("wb", buffering=0) as file,
        digests.following(path) as (follow, digest),
        _syncing(file, report) as syncing,
    ):

        def written(count: int) -> None:
            follow(count)
            syncing(count)

        follow(_write(file, struct.pack("<Q", len(text)) + text))
        for payload in payloads:
            _write_tensor(file, payload, written)
        return digest()


def _write_tensor(file: FileIO, payload: Payload, report: Report) -> None:
    start = file.tell()
    for chunk in payload.chunks:
        if isinstance(chunk, Extent):
            _copy(chunk, file, report)
        else:
            report(_write(file, chunk))
    if file.tell() - start != payload.info.nbytes:
        raise RuntimeError(f"wrote {file.tell() - start} bytes of {payload.name}, expected {payload.info.nbytes}")


@contextmanager
def _syncing(file: FileIO, report: Report) -> Iterator[Report]:
    """Keep the disk busy from the first chunk on; a single sync at the end would wait for all of it."""
    counts: SimpleQueue[int] = SimpleQueue()

    def sync() -> None:
        ended = False
        while not ended:
            ended = not counts.get()
            while not counts.empty():  # one sync is for all that was written before it
                ended = not counts.get() or ended
            os.fsync(file.fileno())

    with Beside(sync) as beside:

        def written(count: int) -> None:
            report(count)
            if count:
                counts.put(count)

        try:
            yield written
            counts.put(0)
            beside.result()
        finally:
            counts.put(0)


def _write(file: FileIO, data: bytes | memoryview) -> int:
    rest = memoryview(data).cast("B")
    size = len(rest)
    while rest:
        rest = rest[file.write(rest) :]
    return size


def _copy(extent: Extent, target: FileIO, report: Report) -> None:
    """Append a stretch of another file, in the kernel where it can."""
    while extent.size:
        copied = _copy_some(extent, target)
        extent = extent.part(copied, extent.size)
        report(copied)


def _copy_some(extent: Extent, target: FileIO) -> int:
    if hasattr(os, "copy_file_range"):
        # Not every pair of filesystems can; what they answer differs between kernels.
        with suppress(OSError):
            size = min(extent.size, COPY)
            if copied := os.copy_file_range(extent.file.fileno(), target.fileno(), size, offset_src=extent.start):
                return copied
    return _write(target, extent.part(0, min(extent.size, CHUNK)).read())
