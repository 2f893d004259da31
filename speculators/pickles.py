"""A ``pytorch_model.bin``: a pickled dict of tensors, none of which is read before it is needed.

What the pickle asks for is read first, without carrying it out, and anything but tensors is refused. Then torch
opens it with ``weights_only=True`` and maps it into memory, so that nothing in it is executed and
nothing is loaded. Where the kernel tells which byte of the file an address is mapped to, tensors are read
from the file itself, and can be copied unread.
"""

from __future__ import annotations

import mmap
import os
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader, BytesIO, FileIO
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from speculators import digests, dtypes
from speculators.digests import Digest
from speculators.errors import CheckpointError, is_out_of_memory, reading
from speculators.weights import Extent, TensorInfo, read

if TYPE_CHECKING:
    import torch

LARGEST_PICKLE = 4 << 20
"""Bytes of a pickle without its tensors, or of an archive's directory; each tensor takes some hundred of both."""

LOCAL_HEADER, LOCAL_HEADER_SIZE = b"PK\x03\x04", 30
"""What stands before the content of each entry of a zip file begins with, and how long it is without names."""

MOST_OPERATIONS = 1_000_000
"""Steps of a pickle; each tensor takes some thirty, and any may make an object of some hundred bytes."""

LARGEST_EXPANSION = 16
"""How many times its size a file may hold, compressed or in tensors that repeat elements; weights hardly shrink."""

PICKLES = 5
"""How many pickles a file of before PyTorch 1.6 begins with; the last two are content and names of storages."""

TENSORS = re.compile(
    r"collections OrderedDict|torch\.nn\.parameter Parameter|torch\._utils _rebuild_\w+|torch\._tensor "
    r"_rebuild_from_type_v2|torch(\.cuda|\.storage)? \w+Storage|torch\.serialization _get_layout|torch (Size|[a-z]\w*)"
)
"""What pickles of tensors by name ask for: module and name. torch allows a little more, such as arrays of any size."""

OLD = "in PyTorch's format of before 1.6"
"""What messages call a file that is no archive."""

MAPPINGS = Path("/proc/self/maps")
"""Where Linux lists what is mapped into a process (proc(5)); other systems have no such file."""


class WholeOnlyError(Exception):
    """An outline of a file is not enough; says what the file is or does, which stands in the way."""


Fetch = Callable[["Entry", int, int], memoryview]
"""Returns bytes of an entry of an archive, from one position in its content to another."""


class PickleFile:
    """One pickled weight file, or a `CheckpointError` that says why it cannot be used.

    A strided tensor is laid out in memory, by itself, when it is asked for. A file that cannot be mapped,
    as it is compressed or in the format of before PyTorch 1.6, is read into memory whole, with a warning.

    Args:
        path: Where it lies.
        name: What messages call it; its path by default.
        fetch: Returns what is missing in the file, where ``path`` is an outline: of the same size as a file that lies
            elsewhere, with nothing in the place of its tensors.

    Raises:
        WholeOnlyError: An outline does not tell where each tensor lies.
    """

    def __init__(self, path: Path, name: str = "", fetch: Fetch | None = None) -> None:
        self.path = path
        self._fetch = fetch
        called = name or str(path)
        self._file, archive = _open(path, called)
        self.size = os.fstat(self._file.fileno()).st_size
        mapped = archive is not None and archive.mappable
        if fetch is not None:
            _require_outlined(archive)
        elif not mapped:
            kind = OLD if archive is None else "compressed"
            warnings.warn(f"{called} is {kind} and is read into memory whole", stacklevel=2)
        self._tensors = _load(path, mapped, called)
        self.tensors = {each: _describe(tensor, each, called) for each, tensor in self._tensors.items()}
        _check_size(self.tensors, self.size, called)
        self._entries = {entry.start: entry for entry in archive.entries} if archive else {}
        self._starts = _storage_starts(self._file, self._tensors, archive, called) if archive and mapped else {}
        self._flat: tuple[str, memoryview] | None = None

    def stretch(self, name: str, start: int, stop: int) -> Extent | memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor.

        Raises:
            WholeOnlyError: They cannot be found from an outline.
        """
        stored = self._stored(name)
        if self._fetch is not None and stored is None and start < stop:
            raise WholeOnlyError("does not show from outside where it holds a tensor")
        if stored is not None and self._tensors[name].is_contiguous():
            return self._found(name, stored.part(start, stop))
        if self._flat is None or self._flat[0] != name:
            self._flat = None  # no two at a time
            self._flat = (name, self._lay_out(name, stored))
        return self._flat[1][start:stop]

    def _found(self, name: str, stored: Extent) -> Extent | memoryview:
        """Return what lies at a place in the file, fetched where the file is an outline."""
        if self._fetch is None:
            return stored
        start = self._starts[self._tensors[name].untyped_storage().data_ptr()]
        return self._fetch(self._entries[start], stored.start - start, stored.start - start + stored.size)

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
            elements = dtypes.tensor(read(self._found(name, stored)), self.tensors[name].dtype)
            tensor = elements.as_strided(tensor.shape, tensor.stride())
        laid = tensor.resolve_neg().contiguous()
        # One element may have any stride and still count as contiguous, but not be viewed as bytes.
        flat = laid.as_strided((laid.numel(),), (1,), laid.storage_offset())
        return flat.view(torch.uint8).numpy().data


def is_archive(path: Path) -> bool:
    """Tell whether a file is a zip file, which holds checksums; older ones are not."""
    with reading(path), path.open("rb") as file:
        return starts_archive(file)


def digest(path: Path, stopped: Event) -> Digest:
    """Read a file once for its digest and for the checksums in it, which torch does not look at when it maps one.

    Args:
        path: The file.
        stopped: Ends the work early when it is set, as nobody waits for the outcome any more.

    Raises:
        CheckpointError: The content was changed after it was written.
    """
    with reading(path), BoundedReader(FileIO(path)) as file:
        stored = _Checksums(_read_archive(file, str(path)).entries if starts_archive(file) else ())
        found = digests.of_file(path, stopped.is_set, stored.add)
    if not stopped.is_set() and (wrong := stored.wrong):
        raise CheckpointError(f"{path} is damaged: Bad CRC-32 for file {wrong!r}. Download it again.")
    return found


class _Checksums:
    """Compare the CRC-32 of stretches of a file while it is read from its beginning to its end.

    Of compressed ones torch does so itself, as it reads them whole.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = [entry for entry in entries if entry.stored]
        self._position = self._index = self._sum = 0
        self.wrong = ""

    def add(self, data: memoryview) -> None:
        """Take the next bytes of the file."""
        start, self._position = self._position, self._position + len(data)
        while self._index < len(self._entries):
            entry = self._entries[self._index]
            part = data[max(entry.start - start, 0) : max(entry.stop - start, 0)]
            self._sum = zlib.crc32(part, self._sum)
            if self._position < entry.stop:
                return
            if self._sum != entry.crc and not self.wrong:
                self.wrong = entry.name
            self._index, self._sum = self._index + 1, 0


class BoundedReader(BufferedReader):
    """A file of which no more is read at a time than an honest one needs."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, or refuse what no honest file asks for."""
        if size is not None and size > LARGEST_PICKLE:
            raise ValueError(f"{size} bytes in one piece, which no PyTorch file has")
        return super().read(LARGEST_PICKLE if size is None or size < 0 else size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read a line, or as much of it as any has."""
        return super().readline(LARGEST_PICKLE if size is None or size < 0 else size)


@dataclass(frozen=True)
class Entry:
    """A file in an archive: where its content lies, and what it is.

    Attributes:
        name: Its name.
        header: Where its local header starts.
        start: Where its content starts.
        size: Bytes of the content.
        stop: Where it ends, before that if it is compressed.
        stored: Whether it is not compressed.
        crc: Its CRC-32.
    """

    name: str
    header: int
    start: int
    size: int
    stop: int
    stored: bool
    crc: int


@dataclass(frozen=True)
class _Archive:
    """A zip file as torch writes them.

    Attributes:
        entries: What it holds, in the order in which it lies there.
        pickled: The pickle that says which tensors there are.
        swapped: Whether numbers are stored with their bytes in reverse.
    """

    entries: Sequence[Entry]
    pickled: bytes
    swapped: bool

    @property
    def mappable(self) -> bool:
        """Whether all entries are stored as they are."""
        return all(entry.stored for entry in self.entries)

    @cached_property
    def storages(self) -> Mapping[int, int]:
        """Where the content of each storage starts → its size."""
        return {entry.start: entry.size for entry in self.entries if "/data/" in entry.name}

    def holds(self, start: int, size: int) -> bool:
        """Tell whether a storage of ``size`` bytes starts there; bytes that fill no element may follow it."""
        return 0 <= self.storages.get(start, -1) - size < max(dtypes.SIZES.values())


def screen(path: Path) -> None:
    """Refuse a file that no library should load, without loading it.

    Raises:
        CheckpointError: It asks for something else than tensors, or is no PyTorch file.
    """
    _open(path, str(path))[0].close()


def _open(path: Path, name: str) -> tuple[BufferedReader, _Archive | None]:
    with reading(name):
        file = BoundedReader(FileIO(path))
        archive = _read_archive(file, name) if starts_archive(file) else None
        _screen(file, archive, name)
    return file, archive


def starts_archive(file: BufferedReader) -> bool:
    """Tell whether what comes next is the beginning of a zip file."""
    return file.read(4) == LOCAL_HEADER


def _read_archive(file: BufferedReader, name: str) -> _Archive:
    try:
        archive = zipfile.ZipFile(file)
        _require_one_meaning(file, archive)
        entries = sorted((_entry(file, each) for each in archive.infolist()), key=lambda entry: entry.start)
        _check_entries(entries, os.fstat(file.fileno()).st_size)
        pickled = read_small(archive, "/data.pkl", LARGEST_PICKLE)
        swapped = read_small(archive, "/byteorder", 16) == b"big"
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged archive fails in many ways
        raise CheckpointError(
            f"{name} is damaged or no PyTorch file: {error}. Download it again, or have torch save it anew."
        ) from error
    return _Archive(entries, pickled, swapped)


def _require_one_meaning(file: BufferedReader, archive: zipfile.ZipFile) -> None:
    """Refuse an archive in whose directory torch's reader may see something else than Python's.

    Python takes the directory that ends where the end record starts, torch's the one that the end record points to.
    Both are where the record says in what torch and zip tools write (APPNOTE 4.3.14 to 4.3.16).
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - 98))
    tail = file.read(98)
    end, locator, wide = tail[-22:], tail[-42:-22], tail[-98:-42]
    if not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
        raise ValueError("something follows its end record")
    (start,) = struct.unpack("<I", end[16:20])
    if locator.startswith(b"PK\6\7"):
        (place,), (start,) = struct.unpack("<Q", locator[8:16]), struct.unpack("<Q", wide[48:56])
        if place != size - 98 or not wide.startswith(b"PK\6\6"):
            raise ValueError("its end records do not follow each other")
    if start != archive.start_dir:
        raise ValueError(f"its directory starts at byte {archive.start_dir}, its end record says {start}")
    for each in archive.infolist():
        if each.filename != each.orig_filename:
            raise ValueError(f"it holds {each.orig_filename!r}, which it also calls {each.filename!r}")


def _entry(file: BufferedReader, info: zipfile.ZipInfo) -> Entry:
    file.seek(info.header_offset)
    start = info.header_offset + header_length(file.read(LOCAL_HEADER_SIZE))
    stored = info.compress_type == zipfile.ZIP_STORED
    return Entry(info.filename, info.header_offset, start, info.file_size, start + info.compress_size, stored, info.CRC)


def header_length(header: bytes | memoryview) -> int:
    """Return how long a local header says that it is, of which the first 30 bytes are given (APPNOTE 4.3.7)."""
    name, extra = struct.unpack_from("<HH", header, 26)
    return LOCAL_HEADER_SIZE + int(name) + int(extra)


def _require_outlined(archive: _Archive | None) -> None:
    if archive is None:
        raise WholeOnlyError(f"is {OLD}")
    if not archive.mappable:
        raise WholeOnlyError("is compressed")
    if archive.swapped:  # which torch puts in order in memory
        raise WholeOnlyError("stores numbers with their bytes in reverse")


def _check_entries(entries: Sequence[Entry], size: int) -> None:
    """Refuse what would unfold to much more than there is, or mean different things to different readers."""
    for name, count in Counter(entry.name for entry in entries).items():
        if count > 1:
            raise ValueError(f"it holds {name!r} twice")
    for entry, following in pairwise(entries):
        if entry.stop > following.start:
            raise ValueError(f"{entry.name!r} and {following.name!r} overlap in it")
    if (unfolded := sum(entry.size for entry in entries)) > LARGEST_EXPANSION * size:
        raise ValueError(f"it is compressed and would take {unfolded} bytes, {unfolded // size} times its size")


def _check_size(tensors: Mapping[str, TensorInfo], size: int, path: str) -> None:
    """Refuse tensors that repeat few elements until they are much more than there is."""
    name, info = max(tensors.items(), key=lambda item: item[1].nbytes, default=("", TensorInfo("U8", (0,))))
    if (total := sum(info.nbytes for info in tensors.values())) > LARGEST_EXPANSION * size:
        raise CheckpointError(
            f"{path} is refused: it has {size} bytes, its tensors would take {total}, {name!r} {info} most of them. "
            "Save clones of its tensors."
        )


def read_small(archive: zipfile.ZipFile, ending: str, largest: int) -> bytes:
    """Return the content of the one entry of an archive whose name ends so; nothing where there is none.

    Raises:
        ValueError: There are several, or it is larger than it may be.
    """
    named = [entry for entry in archive.infolist() if entry.filename.lower().endswith(ending)]
    if len(named) > 1:  # of which torch may take another
        raise ValueError(f"it holds both {named[0].filename!r} and {named[1].filename!r}")
    found = named[0] if named else None
    if found is not None and found.file_size > largest:
        raise ValueError(f"{found.filename!r} has {found.file_size} bytes, at most {largest} are expected")
    return archive.read(found) if found is not None else b""


def _screen(file: BufferedReader, archive: _Archive | None, name: str) -> None:
    """Read what a pickle asks for, without carrying it out.

    Raises:
        CheckpointError: It asks for something else than tensors, or is no pickle.
    """
    content: BufferedReader | BytesIO = file if archive is None else BytesIO(archive.pickled)
    content.seek(0)
    most = LARGEST_EXPANSION * os.fstat(file.fileno()).st_size
    try:
        for pickled in range(PICKLES if archive is None else 1):
            start = content.tell()
            for number, (operation, argument, position) in enumerate(pickletools.genops(content)):
                if number > MOST_OPERATIONS or (position is not None and position - start > LARGEST_PICKLE):
                    raise ValueError(f"a pickle of more than {LARGEST_PICKLE} bytes or {MOST_OPERATIONS} steps")
                if operation.name in ("GLOBAL", "INST") and not TENSORS.fullmatch(str(argument)):
                    raise _refusal(name, str(argument).replace(" ", "."))
                # torch makes room for as many elements as an old file says; its first pickle is a magic number.
                if archive is None and pickled and isinstance(argument, int) and argument > most:
                    raise ValueError(f"it says {argument}, more elements than there can be")
    except (ValueError, UnicodeError) as error:
        raise CheckpointError(f"{name} is damaged or no PyTorch file: {error}. Download it again.") from error


def _refusal(path: str, asked: str) -> CheckpointError:
    reason = f"its pickle asks for {asked}" if asked else "its pickle is damaged or asks for more than tensors"
    return CheckpointError(
        f"{path} is refused, {reason}. Nothing in it was executed. Ask its author for a safetensors file."
    )


def _load(path: Path, mapped: bool, called: str) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        with reading(called):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (CheckpointError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise _refusal(called, found[1] if found else "") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{called} is damaged or no PyTorch file: {type(error).__name__}: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise CheckpointError(
            f"{called} holds {_summary(content)}, expected a flat dict of names and tensors. "
            "Save the module's state_dict() by itself."
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def _storage_starts(
    file: BufferedReader, tensors: Mapping[str, torch.Tensor], archive: _Archive, name: str
) -> dict[int, int]:
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
    bases = [address - start for address, start in starts.items()] or [anywhere - start for start in archive.storages]
    if storages and not any(
        base % mmap.ALLOCATIONGRANULARITY == 0
        and all(archive.holds(address - base, size) for address, size in storages.items())
        for base in bases
    ):
        raise CheckpointError(
            f"{name} is damaged: it does not hold as many bytes of each tensor as its pickle says. Download it again."
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


def _describe(tensor: torch.Tensor, name: str, path: str) -> TensorInfo:
    dtype = dtypes.STORED_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise CheckpointError(f"{path} stores tensor {name!r} in a way that is not supported: {kind}")
    return TensorInfo(dtype, tuple(tensor.shape))
