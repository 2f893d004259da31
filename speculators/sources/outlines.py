"""PyTorch files that lie elsewhere, of which only what tells the tensors is fetched.

That is written into an outline: a sparse file here, of the same size, with nothing in the place of the tensors.
`speculators.pickles` opens it like any file of a stranger, so that there is one place that decides what is refused; the
worst that a server can have written here is one more file to be refused.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from speculators.errors import CheckpointError, UnavailableError
from speculators.pickles import (
    LARGEST_PICKLE,
    LOCAL_HEADER,
    LOCAL_HEADER_SIZE,
    OLD,
    BoundedReader,
    Entry,
    PickleFile,
    WholeOnlyError,
    header_length,
    read_small,
    starts_archive,
)
from speculators.sources.parts import HEAD, PartlyFetched, Pieces, Whole
from speculators.sources.remote import NoRangesError
from speculators.weights import Extent, WeightFile

PICKLE, LARGEST_NOTE = "/data.pkl", 64
"""What the name of the pickle in an archive ends in, and the most bytes of what says how it was written."""

NOTES = ("byteorder", "version", ".data/version", ".format_version", ".storage_alignment")
"""What torch reads beside the pickle (``torch/serialization.py``, ``caffe2/serialize/inline_container.cc``)."""


def open_pickle_partly(pieces: Pieces, size: int, whole: Whole) -> WeightFile:
    """Open a PyTorch file of which parts are fetched, or all of it where its format leaves no choice.

    Args:
        pieces: Its parts.
        size: Its size in bytes.
        whole: Fetches and opens all of it.

    Raises:
        CheckpointError: It cannot be used, or not be fetched.
        NoRangesError: The server sends whole files only.
    """
    try:
        return RemotePickle(pieces, size, whole)
    except WholeOnlyError as error:
        return whole(str(error))


class RemotePickle(PartlyFetched):
    """A PyTorch file of which only what tells the tensors, and what is asked for, is fetched.

    Args:
        pieces: Its parts.
        size: Its size in bytes.
        whole: Fetches and opens all of it.

    Raises:
        CheckpointError: It cannot be used, or not be fetched.
        NoRangesError: The server sends whole files only.
        WholeOnlyError: Its format leaves no choice but to fetch it whole.
    """

    def __init__(self, pieces: Pieces, size: int, whole: Whole) -> None:
        super().__init__(pieces, size, whole)
        self._starts: dict[str, int] = {}
        with _temporary_folder() as folder:
            path = folder / "outline"
            _draw(path, pieces, size)
            self._file = PickleFile(path, pieces.name, self._content)
        self.tensors = self._file.tensors

    def _stretch(self, name: str, start: int, stop: int) -> Extent | memoryview:
        return self._file.stretch(name, start, stop)

    def _content(self, entry: Entry, start: int, stop: int) -> memoryview:
        if entry.name not in self._starts:
            self._starts[entry.name] = self._start(entry)
        return self._pieces.stretch(self._starts[entry.name], entry.size, start, stop)

    def _start(self, entry: Entry) -> int:
        """Return where the content of an entry starts in the file itself."""
        header = self._pieces.read(entry.header, entry.header + LOCAL_HEADER_SIZE)
        start = entry.header + header_length(header)
        if header[: len(LOCAL_HEADER)] != LOCAL_HEADER or start + entry.size > self.size:
            raise CheckpointError(
                f"{self._pieces.name} is damaged: {entry.name!r} is not where its directory says. Download it again."
            )
        return start


def _draw(path: Path, pieces: Pieces, size: int) -> None:
    """Write the outline of a PyTorch file: its directory, its pickle, and what says how it was written.

    Local headers of tensors are left out. As zeros they say that they hold no name; each tensor then seems to start a
    little early, and fits.

    Raises:
        CheckpointError: It cannot be fetched or written.
        WholeOnlyError: It is in the format of before PyTorch 1.6.
    """
    with BoundedReader(_Window(path, size, pieces.read)) as file:
        if not starts_archive(file):
            raise WholeOnlyError(f"is {OLD}, or no PyTorch file")
        try:
            archive = zipfile.ZipFile(file)
            read_small(archive, PICKLE, LARGEST_PICKLE)
            folder = next(name for name in archive.namelist() if name.lower().endswith(PICKLE))[: -len(PICKLE)]
            for name in (f"{folder}/{note}" for note in NOTES):
                if name in archive.NameToInfo and archive.getinfo(name).file_size <= LARGEST_NOTE:
                    archive.read(name)
        except (CheckpointError, NoRangesError, MemoryError):
            raise
        except Exception:  # noqa: BLE001, S110 - whoever opens the outline finds the same, and says what is wrong
            pass


class _Window(FileIO):
    """A sparse file into which parts of another are written as they are read."""

    def __init__(self, path: Path, size: int, read: Callable[[int, int], memoryview]) -> None:
        self._path = path
        self._size = size
        self._fetch = read
        self._filled: set[int] = set()
        with _storing():
            path.touch()
            super().__init__(path, "r+")
            self.truncate(size)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read on, at most to the end of a part."""
        position = self.tell()
        start, stop = self._part(position)
        if position < stop and start not in self._filled:
            self._fill(start, self._fetch(start, stop))
        return super().readinto(memoryview(buffer)[: max(stop - position, 0)])

    def _part(self, position: int) -> tuple[int, int]:
        """Return the bounds of the part that holds a byte; the last one is full, as directories lie there."""
        last = max(self._size - HEAD, 0)
        if position >= last:
            return last, self._size
        start = position - position % HEAD
        return start, min(start + HEAD, last)

    def _fill(self, start: int, data: memoryview) -> None:
        with _storing(), self._path.open("r+b") as out:
            out.seek(start)
            out.write(data)
        self._filled.add(start)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with _storing():
        folder = tempfile.TemporaryDirectory(prefix="speculators-", ignore_cleanup_errors=True)
    with folder as name:  # some systems keep a file while it is mapped
        yield Path(name)


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnavailableError(
            f"no temporary file can be written to {tempfile.gettempdir()} ({error.strerror or error}); "
            "make room, or choose another place with TMPDIR"
        ) from error
