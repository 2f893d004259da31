"""Write a converted model: all of it or nothing.

Everything is written into a hidden folder beside the target, synced, and renamed into place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from pathlib import Path

from speculators import dtypes
from speculators.config import MODEL_TYPE_KEY
from speculators.errors import OptionError, OutputError
from speculators.weights import CHUNK, Chunk, Extent, TensorInfo

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_FILE = "model{suffix}.safetensors"
PROVENANCE_FILE = "provenance.json"
OWN_FILES = re.compile(
    r"config\.json|provenance\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
"""Every file that a conversion may write; nothing else is ever replaced."""

COPY = 64 << 20
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


def check_target(path: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """Refuse an output path at which something would be lost, before any work is done.

    Raises:
        OutputError: The path is taken, or is one of the sources, or holds one.
    """
    try:
        target = path.resolve()
        inside = [source for source in sources if source.resolve().is_relative_to(target)]
        working = target == Path.cwd()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"{path} is no path that this system knows: {error}") from error
    if inside:
        raise OutputError(f"the output {path} would replace its own source {inside[0]}; choose another --output-path")
    if working:
        raise OutputError(f"the output {path} is the working folder, which cannot be replaced; name a folder in it")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path} exists and is no folder; choose another --output-path")
    check_replaceable(path, overwrite)


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse to replace a folder, unless it is empty, or is a converted model and may be overwritten.

    Raises:
        OutputError: Names what would be lost.
    """
    found = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if not found:
        return
    if not overwrite:
        raise OutputError(f"{path} exists and is not empty; choose another --output-path or pass --overwrite")
    others = [name for name in found if not OWN_FILES.fullmatch(name)]
    if others:
        raise OutputError(
            f"{path} has {', '.join(others[:3])} beside a converted model and is not overwritten; move it away first"
        )
    try:
        config = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or MODEL_TYPE_KEY not in config:
        raise OutputError(
            f"{path} holds something other than a converted model and is not overwritten; move it away first"
        )


@contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh folder that becomes ``path`` when the block ends, and vanishes when it raises.

    What appeared at ``path`` meanwhile is not replaced unless ``overwrite`` allows it.

    Raises:
        OutputError: The disk is full, read-only, or otherwise refuses.
    """
    created = _missing_parents(path)
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:32]}.", suffix=".partial", dir=path.parent))
        yield folder
        _publish(folder, path, overwrite)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            _remove_if_empty(parent)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {path}: {error.strerror or error}; nothing was kept") from error
        raise


def _missing_parents(path: Path) -> list[Path]:
    return [parent for parent in path.absolute().parents if not parent.exists()]


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def _publish(folder: Path, path: Path, overwrite: bool) -> None:
    folder.chmod(0o777 & ~_umask())
    for file in folder.iterdir():
        _sync(file)
    _sync_names(folder)
    check_replaceable(path, overwrite)
    if path.exists() and any(path.iterdir()):
        previous = Path(tempfile.mkdtemp(prefix=f".{path.name[:32]}.", suffix=".previous", dir=path.parent))
        path.rename(previous)
        try:
            folder.rename(path)
        except BaseException:
            previous.rename(path)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    else:
        if WINDOWS and path.exists():
            path.rmdir()  # elsewhere a folder takes the place of an empty one in one step
        folder.rename(path)
    _sync_names(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_names(folder: Path) -> None:
    """Have the disk hold the names in a folder, where the system and the filesystem can be asked for that."""
    if not WINDOWS:
        with suppress(OSError):
            _sync(folder)


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


def write_safetensors(
    folder: Path, payloads: Iterable[Payload], *, max_shard_size: int | None = None, report: Report = _unheard
) -> None:
    """Write tensors as one safetensors file, or as shards with an index, as the Hugging Face Hub names them.

    Files carry the ``format: pt`` metadata that loaders ask for. Wide dtypes come first, so that every
    tensor is aligned, then names in order: the same tensors give the same bytes.

    Args:
        folder: Where to write.
        payloads: The tensors.
        max_shard_size: Bytes of tensors per file; a larger tensor has a file of its own. One file by default.
        report: Called with the number of bytes each time some were written.
    """
    ordered = {
        payload.name: payload
        for payload in sorted(payloads, key=lambda payload: (-dtypes.SIZES[payload.info.dtype], payload.name))
    }
    if max_shard_size is None or not ordered:
        _write_file(folder / WEIGHTS_FILE, list(ordered.values()), report)
        return
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda payload: payload.info.nbytes,
        filename_pattern=SHARD_FILE,
        max_shard_size=max_shard_size,
    )
    for name, held in split.filename_to_tensors.items():
        _write_file(folder / name, [ordered[tensor] for tensor in held], report)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, payloads: list[Payload], report: Report) -> None:
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
    with path.open("wb", buffering=0) as file, _syncing(file, report) as written:
        _write(file, struct.pack("<Q", len(text)) + text)
        for payload in payloads:
            _write_tensor(file, payload, written)


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
    syncing: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as beside:

        def written(count: int) -> None:
            nonlocal syncing
            report(count)
            if syncing is not None and not syncing.done():
                return
            if syncing is not None:
                syncing.result()  # an error is told once
            syncing = beside.submit(os.fsync, file.fileno())

        yield written
        if syncing is not None:
            syncing.result()


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
