"""Write the files of a converted model: safetensors, whole or in shards, and small ones beside them.

Bytes that lie in a file as they are wanted are copied by the kernel, unread. Every file is synced, and has its digest
taken, while it grows.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

from speculators import digests, dtypes
from speculators.beside import Beside
from speculators.digests import Digest
from speculators.errors import OptionError
from speculators.output import INDEX_FILE, WEIGHTS_FILE
from speculators.weights import CHUNK, Chunk, Extent, TensorInfo

SHARD_FILE = "model{suffix}.safetensors"

COPY = 16 << 20
"""Bytes that the kernel is asked to copy at a time."""

Report = Callable[[int], object]


def _unheard(count: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Payload:
    """One tensor to write and where its bytes come from."""

    name: str
    info: TensorInfo
    chunks: Iterable[Chunk]


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
    return write_bytes(folder, name, text.encode())


def write_bytes(folder: Path, name: str, data: bytes) -> dict[str, Digest]:
    """Write a small file and return its digest by its name."""
    (folder / name).write_bytes(data)
    return {name: digests.of_bytes(data)}


@dataclass(frozen=True)
class Arrangement:
    """Which files hold which tensors.

    Attributes:
        files: Name of each weight file → its tensors, in the order in which they lie there.
        index: Content of the index that says so; empty where one file holds all.
    """

    files: Mapping[str, Sequence[Payload]]
    index: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        """Name → bytes of every file, the index among them."""
        sizes = {
            name: len(_header(held)) + sum(payload.info.nbytes for payload in held) for name, held in self.files.items()
        }
        return sizes | ({INDEX_FILE: len(self.index.encode())} if self.index else {})


def arrange(payloads: Iterable[Payload], max_shard_size: int | None = None) -> Arrangement:
    """Divide tensors among files, as `write_safetensors` does it; reads none of them."""
    ordered = {
        payload.name: payload
        for payload in sorted(payloads, key=lambda payload: (-dtypes.SIZES[payload.info.dtype], payload.name))
    }
    if max_shard_size is None or not ordered:
        return Arrangement({WEIGHTS_FILE: list(ordered.values())})
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda payload: payload.info.nbytes,
        filename_pattern=SHARD_FILE,
        max_shard_size=max_shard_size,
    )
    files = {name: [ordered[tensor] for tensor in held] for name, held in split.filename_to_tensors.items()}
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return Arrangement(files, json.dumps(index, indent=2, sort_keys=True) + "\n" if split.is_sharded else "")


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
    arranged = arrange(payloads, max_shard_size)
    written = {name: _write_file(folder / name, held, report) for name, held in arranged.files.items()}
    return written | (write_text(folder, INDEX_FILE, arranged.index) if arranged.index else {})


def _header(payloads: Sequence[Payload]) -> bytes:
    """Return all that a safetensors file holds before the first byte of a tensor."""
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
    return struct.pack("<Q", len(text)) + text


def _write_file(path: Path, payloads: Sequence[Payload], report: Report) -> Digest:
    with (
        path.open("wb", buffering=0) as file,
        digests.following(path) as (follow, digest),
        _syncing(file, report) as syncing,
    ):

        def written(count: int) -> None:
            follow(count)
            syncing(count)

        follow(_write(file, _header(payloads)))
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
