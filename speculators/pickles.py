"""A ``pytorch_model.bin``: a pickled dict of tensors, none of which is read before it is needed.

torch opens it with ``weights_only=True`` and maps it into memory, so that nothing in it is executed and
nothing is loaded. Where the kernel tells which byte of the file an address is mapped to, tensors are read
from the file itself, and can be copied unread.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from speculators import dtypes
from speculators.errors import CheckpointError
from speculators.weights import Extent, TensorInfo

if TYPE_CHECKING:
    import torch

VERIFIED = 16 << 20
"""Bytes whose checksum is computed at a time, for which no other thread has to wait."""

MAPPINGS = Path("/proc/self/maps")
"""Where Linux lists what is mapped into a process (proc(5)); other systems have no such file."""


class PickleFile:
    """One pickled weight file, or a `CheckpointError` that says why it cannot be used.

    A strided tensor is laid out in memory, by itself, when it is asked for. A file that cannot be mapped,
    as it is compressed or in the format of before PyTorch 1.6, is read into memory whole, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            archive = _read_archive(self._file) if _is_archive(self._file) else None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        mapped = archive is not None and archive.mappable
        if not mapped:
            kind = "in PyTorch's format of before 1.6" if archive is None else "compressed"
            warnings.warn(f"{path} is {kind} and is read into memory whole", stacklevel=2)
        self._tensors = _load(path, mapped)
        self.tensors = {name: _describe(tensor, name, path) for name, tensor in self._tensors.items()}
        self._starts = _storage_starts(self._file, self._tensors, archive) if archive and mapped else {}
        self._flat: tuple[str, memoryview] | None = None

    def stretch(self, name: str, start: int, stop: int) -> Extent | memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor."""
        stored = self._stored(name)
        if stored is not None and self._tensors[name].is_contiguous():
            return stored.part(start, stop)
        if self._flat is None or self._flat[0] != name:
            self._flat = None  # no two at a time
            self._flat = (name, self._lay_out(name, stored))
        return self._flat[1][start:stop]

    def _stored(self, name: str) -> Extent | None:
        """Return where the file holds all elements of a tensor, perhaps with others between them."""
        tensor = self._tensors[name]
        start = self._starts.get(tensor.untyped_storage().data_ptr())
        if start is None or tensor.is_neg():
            return None
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        first = start + int(tensor.storage_offset()) * tensor.element_size()
        return Extent(self.path, self._file, first, span * tensor.element_size() if tensor.numel() else 0)

    def _lay_out(self, name: str, stored: Extent | None) -> memoryview:
        import torch

        tensor = self._tensors[name]
        if stored is not None:  # pages of a mapping would stay in memory
            elements = dtypes.tensor(stored.read(), self.tensors[name].dtype)
            tensor = elements.as_strided(tensor.shape, tensor.stride())
        laid = tensor.resolve_neg().contiguous()
        # One element may have any stride and still count as contiguous, but not be viewed as bytes.
        flat = laid.as_strided((laid.numel(),), (1,), laid.storage_offset())
        return flat.view(torch.uint8).numpy().data


def verify(path: Path, stopped: Event) -> None:
    """Check the checksums of an archive, which torch does not look at when it maps one.

    Args:
        path: The file.
        stopped: Ends the work early when it is set, as nobody waits for the outcome any more.

    Raises:
        CheckpointError: The content was changed after it was written.
    """
    try:
        with path.open("rb") as file:
            if not _is_archive(file):
                return
            archive = zipfile.ZipFile(file)
            for entry in archive.infolist():
                with archive.open(entry) as content:
                    while content.read(VERIFIED):
                        if stopped.is_set():
                            return
    except Exception as error:  # a damaged archive fails in many ways
        raise CheckpointError(f"{path} is damaged: {error}. Download it again.") from error


@dataclass(frozen=True)
class _Archive:
    """A zip file as torch writes them.

    Attributes:
        entries: Where the content of each storage starts → its size.
        mappable: Whether all entries are stored as they are.
        swapped: Whether numbers are stored with their bytes in reverse.
    """

    entries: Mapping[int, int]
    mappable: bool
    swapped: bool

    def holds(self, start: int, size: int) -> bool:
        """Tell whether a storage of ``size`` bytes starts there; bytes that fill no element may follow it."""
        return 0 <= self.entries.get(start, -1) - size < max(dtypes.SIZES.values())


def _is_archive(file: BufferedReader) -> bool:
    return file.read(4) == b"PK\x03\x04"


def _read_archive(file: BufferedReader) -> _Archive:
    entries = {}
    try:
        archive = zipfile.ZipFile(file)
        listed = archive.infolist()
        for entry in listed:
            file.seek(entry.header_offset + 26)  # where a local header tells its own length (APPNOTE 4.3.7)
            name, extra = struct.unpack("<HH", file.read(4))
            if "/data/" in entry.filename:
                entries[entry.header_offset + 30 + name + extra] = entry.file_size
        order = next((entry for entry in listed if entry.filename.endswith("/byteorder")), None)
        swapped = order is not None and archive.read(order) == b"big"
    except OSError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        raise CheckpointError(f"{file.name} is damaged or no PyTorch file: {error}. Download it again.") from error
    return _Archive(entries, all(entry.compress_type == zipfile.ZIP_STORED for entry in listed), swapped)


def _load(path: Path, mapped: bool) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
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
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise CheckpointError(
            f"{path} holds {_summary(content)}, expected a flat dict of names and tensors. "
            "Save the module's state_dict() by itself."
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def _storage_starts(file: BufferedReader, tensors: Mapping[str, torch.Tensor], archive: _Archive) -> dict[int, int]:
    """Find out where in the file each mapped storage lies: its address → the offset of its first byte.

    Raises:
        CheckpointError: A storage is larger or smaller than what the file holds of it.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    storages.pop(0, None)  # an empty one lies nowhere
    mappings = _mappings(os.fstat(file.fileno()).st_ino)
    starts = {
        address: address - first + offset
        for address in storages
        for first, last, offset in mappings
        if first <= address < last
    }
    # Where the system does not tell, some address at which files are mapped must put every storage into its entry.
    anywhere = next(iter(storages), 0)
    bases = [address - start for address, start in starts.items()] or [anywhere - start for start in archive.entries]
    if storages and not any(
        base % mmap.ALLOCATIONGRANULARITY == 0
        and all(archive.holds(address - base, size) for address, size in storages.items())
        for base in bases
    ):
        raise CheckpointError(
            f"{file.name} is damaged: it does not hold as many bytes of each tensor as its pickle says. "
            "Download it again."
        )
    return {} if archive.swapped else starts


def _mappings(inode: int) -> list[tuple[int, int, int]]:
    """List where a file is mapped, as first and last address and offset; nothing where the system does not tell."""
    found = []
    try:
        for line in MAPPINGS.read_text(errors="replace").splitlines():
            span, _, offset, _, mapped, *_ = line.split()
            if int(mapped) == inode:
                first, last = (int(address, 16) for address in span.split("-"))
                found.append((first, last, int(offset, 16)))
    except (OSError, ValueError):
        return []
    return found


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
