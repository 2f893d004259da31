"""Weight files: what they hold, and the bytes of each tensor, without decoding either.

A safetensors file is read with the standard library alone. A pickled PyTorch file is opened by
torch with ``weights_only=True``, memory-mapped, so that its tensors stay on disk until read.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from speculators import dtypes
from speculators.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CHUNK = 8 << 20
"""Bytes moved at a time; large enough to keep a disk busy, small enough not to matter."""

MAX_HEADER = 100_000_000
"""The limit that the safetensors library itself puts on a header, in bytes."""


@dataclass(frozen=True)
class TensorInfo:
    """What a weight file says about one tensor, with the dtype named as safetensors does."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * dtypes.SIZES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Extent:
    """A stretch of a file that holds exactly a tensor's bytes, so that they can be copied unread."""

    path: Path
    start: int
    size: int


class WeightFile(Protocol):
    """One opened weight file."""

    @property
    def path(self) -> Path:
        """Where the file lies."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each tensor by name."""

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor, in row-major little-endian order."""

    def extent(self, name: str) -> Extent | None:
        """Return where the file holds a tensor's bytes in one piece and in order, if it does."""

    def verify(self) -> None:
        """Compare the file with the checksums that it holds, if its format has any."""


class SafetensorsFile:
    """A ``.safetensors`` file, whole and well-formed, or a `CheckpointError` that says why not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            self._base, header = _read_header(self._file, path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                self.tensors[name], self._offsets[name] = _header_entry(name, entry, path)
        self._check_offsets()

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor."""
        offset = self._base + self._offsets[name][0]
        self._file.seek(offset + start)
        data = bytearray(stop - start)
        if self._file.readinto(data) != stop - start:
            raise CheckpointError(
                f"{self.path} ended inside tensor {name!r} while it was read; was it changed meanwhile?"
            )
        return memoryview(data)

    def extent(self, name: str) -> Extent:
        """Return where the file holds a tensor's bytes."""
        start, stop = self._offsets[name]
        return Extent(self.path, self._base + start, stop - start)

    def verify(self) -> None:
        """Do nothing: the format has no checksums."""

    def _check_offsets(self) -> None:
        expected = 0
        for name, (start, stop) in sorted(self._offsets.items(), key=lambda item: item[1]):
            if start != expected:
                raise CheckpointError(
                    f"{self.path} is damaged: tensor {name!r} starts at byte {start} of the data, expected {expected}"
                )
            expected = stop
        size = os.fstat(self._file.fileno()).st_size - self._base
        if size != expected:
            raise CheckpointError(
                f"{self.path} is damaged or incomplete: it holds {size} bytes of data, its header names {expected}. "
                "Download or copy it again."
            )


def _read_header(file: Any, path: Path) -> tuple[int, dict[str, Any]]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path} is no safetensors file: {len(prefix)} bytes long")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
        raise CheckpointError(
            f"{path} is no complete safetensors file: its first bytes promise a header of {length} bytes"
        )
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has an unreadable safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a safetensors header that is no JSON object")
    return 8 + length, header


def _header_entry(name: str, entry: Any, path: Path) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
        start, stop = entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*info.shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a malformed header entry for tensor {name!r}") from error
    if not isinstance(info.dtype, str) or info.dtype not in dtypes.SIZES:
        raise CheckpointError(f"{path} stores tensor {name!r} as {info.dtype!r}, a dtype that is not supported")
    if not whole or stop - start != info.nbytes:
        raise CheckpointError(f"{path} is damaged: tensor {name!r} is {info} but spans bytes {start} to {stop}")
    return info, (start, stop)


class PickleFile:
    """A ``pytorch_model.bin``: a pickled dict of tensors, read with ``weights_only=True``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _load_pickle(path)
        self.tensors = {name: _describe(tensor, name, path) for name, tensor in self._tensors.items()}
        self._base = _mapping_base(path, self._tensors.values()) if _is_zip(path) else None
        self._flat: tuple[str, memoryview] | None = None

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor; a strided one is laid out in memory first."""
        if self._flat is None or self._flat[0] != name:
            import torch

            flat = self._tensors[name].resolve_neg().contiguous().view(-1).view(torch.uint8).numpy()
            self._flat = (name, flat.data)
        return self._flat[1][start:stop]

    def extent(self, name: str) -> Extent | None:
        """Return where the file holds a tensor's bytes; ``None`` for a strided one, or an old file."""
        tensor = self._tensors[name]
        if self._base is None or not tensor.is_contiguous() or tensor.is_neg():
            return None
        return Extent(self.path, tensor.data_ptr() - self._base, self.tensors[name].nbytes)

    def verify(self) -> None:
        """Check the checksums of a zip file, which torch does not look at when it maps one.

        Raises:
            CheckpointError: The content was changed after it was written.
        """
        if not _is_zip(self.path):
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}. Download it again.") from error
        if damaged is not None:
            raise CheckpointError(f"{self.path} is damaged: the checksum of {damaged} is wrong. Download it again.")


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        mapped = _is_zip(path)
        if not mapped:
            warnings.warn(f"{path} is in PyTorch's format of before 1.6 and is read into memory whole", stacklevel=2)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"its pickle asks for {found.group(1)}" if found else "its pickle is damaged or asks for more than tensors"
        )
        raise CheckpointError(
            f"{path} is refused, {reason}. Nothing in it was executed. Ask its author for a safetensors file."
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path} is damaged or no PyTorch file: {type(error).__name__}: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} holds {_summary(content)}, expected a flat dict of tensors. "
            "Save the module's state_dict() by itself."
        )
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _mapping_base(path: Path, tensors: Iterable[torch.Tensor]) -> int | None:
    """Return the address at which torch has mapped a zip file, if every storage then lies where an entry does."""
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    if not pointers:
        return None
    starts = _entry_starts(path)
    bases = (min(pointers) - start for start in sorted(starts))
    return next((base for base in bases if all(pointer - base in starts for pointer in pointers)), None)


def _entry_starts(path: Path) -> set[int]:
    """List where the content of each stored entry of a zip file begins (APPNOTE 4.3.7)."""
    starts = set()
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                starts.add(entry.header_offset + 30 + name + extra)
    return starts


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _summary(content: object) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    kinds = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in list(content.items())[:3])
    return f"a dict of {kinds}{', …' if len(content) > 3 else ''}"


def _describe(tensor: torch.Tensor, name: str, path: Path) -> TensorInfo:
    dtype = dtypes.STORED_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise CheckpointError(f"{path} stores tensor {name!r} in a way that is not supported: {kind}")
    return TensorInfo(dtype, tuple(tensor.shape))


def chunks(file: WeightFile, name: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces of at most `CHUNK`."""
    size = file.tensors[name].nbytes
    for start in range(0, size, CHUNK):
        yield file.read(name, start, min(start + CHUNK, size))
