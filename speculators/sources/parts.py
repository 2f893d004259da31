"""Parts of remote files, kept as they are fetched, and weight files of which no more is read."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from speculators.errors import UnavailableError
from speculators.pickles import WholeOnlyError
from speculators.sources.cache import keep
from speculators.sources.remote import ContradictionError, NoRangesError, RemoteFile, stream
from speculators.weights import Extent, SafetensorsHeader, TensorInfo, WeightFile

PIECE = 16 << 20
"""Bytes of a tensor that are fetched and kept at a time, where much of it is needed."""

SMALL = 256 << 10
"""Up to this many bytes, such as rows of an embedding, just what is needed is fetched."""

HEAD = 64 << 10
"""Bytes fetched of a weight file at first, which hold most headers."""

Whole = Callable[[str], WeightFile]
"""Fetches and opens all of a weight file; is told what is in the way of parts, as in "NAME is compressed"."""


class Pieces:
    """Parts of one version of a remote file, kept on disk as they are fetched.

    Each is a file of its own, whose name says which bytes it holds and their CRC-32. It appears in one
    step, so that any number of processes may share the folder.

    Args:
        file: Where they come from; ``None`` when nothing may be fetched.
        name: What messages call the file.
        folder: Where they are kept.
    """

    def __init__(self, file: RemoteFile | None, name: str, folder: Path) -> None:
        self.name = name
        self._file = file
        self._folder = folder
        self._last: tuple[int, int, memoryview] | None = None

    def read(self, start: int, stop: int) -> memoryview:
        """Return bytes ``start`` to ``stop``, fetched unless they are here.

        Raises:
            CheckpointError: They are not here, and cannot be fetched.
            NoRangesError: The server sends whole files only.
        """
        if self._last is not None and self._last[0] <= start and stop <= self._last[1]:
            first, _, data = self._last
        else:
            first, data = start, self._kept(start, stop)
            self._last = (start, stop, data)
        return data[start - first : stop - first]

    def stretch(self, first: int, size: int, start: int, stop: int) -> memoryview:
        """Return bytes ``start`` to ``stop`` of the ``size`` bytes at ``first``, in pieces where they are many.

        Raises:
            CheckpointError: They are not here, and cannot be fetched.
            NoRangesError: The server sends whole files only.
        """
        grid = [(begin, min(begin + PIECE, size)) for begin in range(start - start % PIECE, stop, PIECE)]
        if stop - start <= SMALL and not all(self._has(first + begin, first + end) for begin, end in grid):
            return self.read(first + start, first + stop)
        found = [self.read(first + begin, first + end)[max(start - begin, 0) : stop - begin] for begin, end in grid]
        return found[0] if len(found) == 1 else memoryview(bytearray().join(found))

    def _has(self, start: int, stop: int) -> bool:
        return any(True for _ in self._folder.glob(f"{start}-{stop}-*"))

    def _kept(self, start: int, stop: int) -> memoryview:
        for path in self._folder.glob(f"{start}-{stop}-*"):
            with suppress(OSError):
                data = path.read_bytes()
                if len(data) == stop - start and path.name == _piece_name(start, stop, data):
                    return memoryview(data)
                path.unlink()  # damaged in the cache
        if self._file is None:
            raise UnavailableError(
                f"{self.name}: bytes {start} to {stop} are not in the cache, and offline nothing can be fetched; "
                "run once without --offline"
            )
        data = b"".join(stream(self._file, start, stop))
        keep(self._folder / _piece_name(start, stop, data), data)
        return memoryview(data)


def _piece_name(start: int, stop: int, data: bytes) -> str:
    return f"{start}-{stop}-{zlib.crc32(data):08x}"


class PartlyFetched(ABC):
    """A weight file of which only what tells its tensors, and what is asked for, is fetched.

    Args:
        pieces: Its parts.
        size: Its size in bytes.
        whole: Fetches and opens all of it, for when parts turn out not to be enough.
    """

    tensors: Mapping[str, TensorInfo]

    def __init__(self, pieces: Pieces, size: int, whole: Whole) -> None:
        self.size = size
        self._pieces = pieces
        self._fetch_whole = whole
        self._whole: WeightFile | None = None

    def stretch(self, name: str, start: int, stop: int) -> Extent | memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor, fetched in pieces where they are many."""
        if self._whole is None:
            try:
                return self._stretch(name, start, stop)
            except (NoRangesError, WholeOnlyError) as error:
                self._whole = self._fetch_whole(str(error))
                if self._whole.tensors != self.tensors:
                    name = self._pieces.name
                    raise ContradictionError(f"{name} was changed on the server while it was read") from None
        return self._whole.stretch(name, start, stop)

    @abstractmethod
    def _stretch(self, name: str, start: int, stop: int) -> Extent | memoryview:
        """Fetch bytes ``start`` to ``stop`` of a tensor."""


class RemoteSafetensors(PartlyFetched):
    """A safetensors file of which only the header and what is asked for is fetched.

    Args:
        pieces: Its parts.
        size: Its size in bytes.
        whole: Fetches and opens all of it.

    Raises:
        CheckpointError: It is no whole, well-formed safetensors file.
        NoRangesError: The server sends whole files only.
    """

    def __init__(self, pieces: Pieces, size: int, whole: Whole) -> None:
        super().__init__(pieces, size, whole)
        head = min(HEAD, size)

        def read(start: int, stop: int) -> memoryview:
            return pieces.read(0, head)[start:stop] if stop <= head else pieces.read(start, stop)

        self._header = SafetensorsHeader(pieces.name, size, read)
        self.tensors = self._header.tensors

    def _stretch(self, name: str, start: int, stop: int) -> memoryview:
        return self._pieces.stretch(self._header.start(name), self.tensors[name].nbytes, start, stop)
