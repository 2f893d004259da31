"""Weight files: what they hold, and the bytes of each tensor, without decoding either.

A safetensors file is read with the standard library alone; `speculators.pickles` reads PyTorch's.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from speculators import digests, dtypes, json_files
from speculators.digests import Digest
from speculators.errors import CheckpointError, reading

CHUNK = 4 << 20
"""Bytes read at a time: enough that a buffer costs little beside filling it, too few to weigh in memory."""

MOST_DIMENSIONS, LARGEST_DIMENSION = 16, 2**48
"""More than any tensor has."""


@dataclass(frozen=True)
class TensorInfo:
    """What a weight file says about one tensor.

    Attributes:
        dtype: Its dtype as safetensors names it (``"BF16"``).
        shape: Its shape; empty for a single number.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * dtypes.SIZES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Extent:
    """A stretch of an opened file, so that its bytes can be copied without being read."""

    path: Path
    file: BufferedReader
    start: int
    size: int

    def part(self, start: int, stop: int) -> Extent:
        """Return its bytes ``start`` to ``stop``."""
        return replace(self, start=self.start + start, size=stop - start)

    def read(self) -> memoryview:
        """Return all its bytes, writable.

        Raises:
            CheckpointError: The file is shorter than it was when it was opened, or cannot be read.
        """
        data = bytearray(self.size)
        with reading(self.path):
            self.file.seek(self.start)
            count = self.file.readinto(data)
        if count != self.size:
            raise CheckpointError(f"{self.path} ended while it was read; was it changed meanwhile?")
        return memoryview(data)


Chunk = bytes | memoryview | Extent
"""Bytes, or where they lie."""


def read(chunk: Chunk) -> bytes | memoryview:
    """Return all bytes of a chunk."""
    return chunk.read() if isinstance(chunk, Extent) else chunk


def pieces(chunk: Chunk) -> Iterator[memoryview]:
    """Yield the bytes of a chunk, at most `CHUNK` at a time."""
    whole = chunk if isinstance(chunk, Extent) else memoryview(chunk).cast("B")
    size = whole.size if isinstance(whole, Extent) else len(whole)
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        yield whole.part(start, stop).read() if isinstance(whole, Extent) else whole[start:stop]


class WeightFile(Protocol):
    """One opened weight file.

    Attributes:
        size: Its size in bytes.
    """

    size: int

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each tensor by name."""

    def stretch(self, name: str, start: int, stop: int) -> Extent | memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor, in row-major little-endian order.

        They are an extent where the file holds them like that.
        """


class SafetensorsHeader:
    """What the header of a safetensors file says, well-formed, or a `CheckpointError` that says why not.

    Args:
        name: What messages call the file.
        size: Its size in bytes.
        read: Returns its bytes from one position to another, which are all there.
    """

    def __init__(self, name: object, size: int, read: Callable[[int, int], bytes | memoryview]) -> None:
        self._name = name
        self._base, entries = _read_header(name, size, read)
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        for tensor, entry in entries.items():
            if tensor != "__metadata__":
                self.tensors[tensor], self._offsets[tensor] = _header_entry(tensor, entry, name)
        self._check_offsets(size)

    def start(self, tensor: str) -> int:
        """Return where in the file a tensor starts."""
        return self._base + self._offsets[tensor][0]

    def _check_offsets(self, size: int) -> None:
        expected = 0
        for tensor, (start, stop) in sorted(self._offsets.items(), key=lambda item: item[1]):
            if start != expected:
                raise CheckpointError(
                    f"{self._name} is damaged: tensor {tensor!r} starts at byte {start} of the data, "
                    f"expected {expected}"
                )
            expected = stop
        if size - self._base != expected:
            raise CheckpointError(
                f"{self._name} is damaged or incomplete: it holds {size - self._base} bytes of data, its header names "
                f"{expected}. Download or copy it again."
            )


def digest(path: Path, stopped: Event) -> Digest:
    """Read a file once for its digest; ends early where ``stopped`` is set.

    Raises:
        CheckpointError: It cannot be read.
    """
    with reading(path):
        return digests.of_file(path, stopped.is_set)


class SafetensorsFile:
    """A ``.safetensors`` file, whole and well-formed, or a `CheckpointError` that says why not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self._file = path.open("rb")
            self.size = os.fstat(self._file.fileno()).st_size
            self._header = SafetensorsHeader(path, self.size, self._read)
        self.tensors = self._header.tensors

    def _read(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        return self._file.read(stop - start)

    def stretch(self, name: str, start: int, stop: int) -> Extent:
        """Return where bytes ``start`` to ``stop`` of a tensor lie."""
        return Extent(self.path, self._file, self._header.start(name) + start, stop - start)


def _read_header(name: object, size: int, read: Callable[[int, int], bytes | memoryview]) -> tuple[int, dict[str, Any]]:
    if size < 8:
        raise CheckpointError(f"{name} is no safetensors file: {size} bytes long")
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > min(json_files.LARGEST, size - 8):
        raise CheckpointError(
            f"{name} is no complete safetensors file: its first bytes promise a header of {length} bytes"
        )
    data = bytes(read(8, 8 + length))
    if len(data) != length:
        raise CheckpointError(f"{name} ended while it was read; was it changed meanwhile?")
    try:
        return 8 + length, json_files.parse(data)
    except ValueError as error:
        raise CheckpointError(f"{name} has an unreadable safetensors header: {error}") from error


def _header_entry(name: str, entry: Any, path: object) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
        start, stop = entry["data_offsets"]
        if len(info.shape) > MOST_DIMENSIONS or any(
            number > LARGEST_DIMENSION for number in (*info.shape, start, stop)
        ):
            raise ValueError
        whole = all(type(number) is int and number >= 0 for number in (*info.shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a malformed header entry for tensor {name!r}") from error
    if not isinstance(info.dtype, str) or info.dtype not in dtypes.SIZES:
        raise CheckpointError(f"{path} stores tensor {name!r} as {info.dtype!r}, a dtype that is not supported")
    if not whole or stop - start != info.nbytes:
        raise CheckpointError(f"{path} is damaged: tensor {name!r} is {info} but spans bytes {start} to {stop}")
    return info, (start, stop)
