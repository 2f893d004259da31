"""Where a checkpoint's files lie, here or elsewhere, so that its reader need not know which."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache as cache_calls
from functools import cached_property
from pathlib import Path
from typing import Protocol

from speculators.errors import CheckpointError, UnavailableError, reading
from speculators.sources.access import Access
from speculators.sources.cache import download, download_anew, note
from speculators.sources.locations import LocalLocation
from speculators.sources.parts import Pieces, Whole
from speculators.sources.remote import (
    ForbiddenError,
    NoRangesError,
    NotFoundError,
    RemoteFile,
    Stat,
    UnreachableError,
    patiently,
)
from speculators.weights import WeightFile


class Opener(Protocol):
    """How a kind of weight file is opened."""

    @property
    def read(self) -> Callable[[Path], WeightFile]:
        """Opens one that lies here."""

    @property
    def read_partly(self) -> Callable[[Pieces, int, Whole], WeightFile]:
        """Opens one of some size that lies elsewhere, of which parts are fetched, or all where parts are not enough."""


class Folder(ABC):
    """A folder with ``config.json`` and weights.

    Attributes:
        name: What messages call it; holds no secrets.
        file: The one weight file that was named, if one was.
    """

    name: str
    file: str | None

    @property
    def local(self) -> Path | None:
        """The folder itself if it lies here."""
        return None

    @property
    def remark(self) -> str:
        """What a message adds about a listing that is not all there is."""
        return ""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Tell whether a file is in it."""

    @abstractmethod
    def listing(self) -> Collection[str]:
        """Return the names of all files, as far as the place tells them."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """Return where a file lies whole, fetched first if it must be.

        Raises:
            FileNotFoundError: It is not in the folder.
            CheckpointError: It cannot be had.
        """

    @abstractmethod
    def open(self, name: str, opener: Opener) -> WeightFile:
        """Open a weight file; where parts are enough and can be had, only they are fetched.

        Raises:
            FileNotFoundError: It is not in the folder.
            CheckpointError: It cannot be had, or is damaged.
        """

    @contextmanager
    def gathered(self, names: Collection[str]) -> Iterator[Path]:
        """Bring files together in a folder of links, for a library that reads whole folders; it goes with the block.

        Raises:
            CheckpointError: A file cannot be had.
            UnavailableError: There is no room for temporary files.
        """
        kept = {name: self.path(name).absolute() for name in names}
        with ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="speculators-")))
                for name, path in kept.items():
                    _link(folder / name, path)
            except OSError as error:
                raise UnavailableError(f"no temporary folder can be made: {error.strerror or error}") from error
            yield folder

    @property
    @abstractmethod
    def reference(self) -> str:
        """What an inference engine finds it under; names no revision."""

    @property
    @abstractmethod
    def loadable(self) -> bool:
        """Tell whether inference engines load models from what `reference` names."""

    @property
    def revision(self) -> str | None:
        """The revision that the user asked for, which engines must be told beside `reference`."""
        return None

    def require_unchanged(self) -> None:  # noqa: B027 - what was fetched does not change
        """Refuse what was not read from one version of the folder.

        Raises:
            CheckpointError: A file was changed since it was first asked for.
        """

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """What the output's provenance says about it: the same for the same content."""


def _link(place: Path, path: Path) -> None:
    try:
        place.symlink_to(path)
    except OSError:  # not every system lets everyone make links
        shutil.copyfile(path, place)


class LocalFolder(Folder):
    """A folder of this machine, or one weight file in it.

    Raises:
        CheckpointError: It does not exist.
    """

    def __init__(self, location: LocalLocation) -> None:
        self.name = location.name
        path = location.path
        try:
            folder, exists = path.is_dir(), path.exists()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no path that this system knows: {error}") from error
        if not exists:
            raise CheckpointError(f"{location.name} does not exist; expected a folder with config.json and weights")
        if _undecodable(path):
            raise CheckpointError(f"{path} has a name that is no UTF-8, which no output can say; rename it")
        self._whole = folder
        self._folder = path if folder else path.parent
        self.file = None if folder or path.name == "config.json" else path.name
        self._seen: dict[str, tuple[int, ...]] = {}

    @property
    def local(self) -> Path:
        """The folder."""
        return self._folder

    def has(self, name: str) -> bool:
        """Tell whether a file is in it."""
        return (self._folder / name).is_file()

    def listing(self) -> Collection[str]:
        """Return the names of everything in it."""
        with reading(self._folder):
            return sorted(entry.name for entry in self._folder.iterdir())

    def path(self, name: str) -> Path:
        """Return where a file lies."""
        if not self.has(name):
            raise FileNotFoundError(name)
        path = self._folder / name
        with reading(path):
            self._require_inside(path)
            self._seen.setdefault(name, _stamp(path))
        return path

    def _require_inside(self, path: Path) -> None:
        """Refuse a link to somewhere else: what a stranger packed does not choose what is read here."""
        place = path.resolve()
        inside = path.name == self.file or place.is_relative_to(self._folder.resolve())
        if not (inside or (place.parent.name == "blobs" and place.parents[1].name.startswith("models--"))):
            raise CheckpointError(
                f"{path} is a link to {place}, outside its folder; if that is meant, copy the file or make a hard link"
            )

    def require_unchanged(self) -> None:
        """Compare size, time and place of every file that was asked for with what they were."""
        for name, seen in self._seen.items():
            path = self._folder / name
            with reading(path):
                if _stamp(path) != seen:
                    raise CheckpointError(f"{path} was changed while it was read; convert again when it is complete")

    def open(self, name: str, opener: Opener) -> WeightFile:
        """Open a weight file."""
        return opener.read(self.path(name))

    @property
    def reference(self) -> str:
        """Its path as the user gave it, or that of the folder of a file."""
        return self.name if self._whole else str(Path(self.name).parent)

    @property
    def loadable(self) -> bool:
        """Folders are."""
        return True

    @property
    def identity(self) -> Mapping[str, object]:
        """Its name; the rest of its path is the machine's business."""
        return {"folder": self._folder.resolve().name} | ({"file": self.file} if self.file else {})


def _undecodable(path: Path) -> bool:
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        return True
    return False


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def open_partly(file: RemoteFile, stat: Stat, kept: Path, opener: Opener, path: Callable[[], Path]) -> WeightFile:
    """Open a remote weight file for parts of it, or whole where server or format leave no choice.

    Args:
        file: The transport.
        stat: What the server says about it.
        kept: Where its parts are kept.
        opener: How its kind is opened.
        path: Fetches all of it, and returns where it lies.
    """

    def whole(why: str) -> WeightFile:
        size = "" if stat.size is None else f" of {stat.size / 1e6:.0f} MB"
        warnings.warn(f"{file.name} {why}; all{size} is downloaded although less is needed", stacklevel=2)
        return opener.read(path())

    if stat.version is None:
        return whole("is on a server that does not say when a file changes")
    if stat.size is None:
        return whole("is on a server that does not say how long a file is")
    try:
        if not stat.ranges:
            raise NoRangesError
        return opener.read_partly(Pieces(file, file.name, kept), stat.size, whole)
    except NoRangesError as error:
        return whole(str(error))


class Server(Protocol):
    """Where the files of a folder come from."""

    def file(self, name: str) -> RemoteFile:
        """Return a file in the folder."""

    def names(self) -> Collection[str]:
        """Return the names of all files, nothing where the server does not list them."""


class UrlFolder(Folder):
    """A folder on a server, of which only those names are known that it was asked for.

    Args:
        name: What messages call it.
        file: The one weight file that was named, if one was.
        cache: Where what is fetched of it is kept.
        server: Where its files come from.
        access: How to reach it.
        partly: Whether weights are to be fetched in parts.
    """

    def __init__(
        self,
        name: str,
        file: str | None,
        *,
        cache: Path,
        server: Server,
        access: Access,
        partly: bool,
    ) -> None:
        self.name = name
        self.file = file
        self._cache = cache
        self._server = server
        self._remote = cache_calls(server.file)  # a file compares what the server says from one answer to the next
        self._progress = access.progress
        self._offline = access.is_offline
        self._partly = partly
        self._stats: dict[str, Stat | None] = {}
        self._listed: Collection[str] | None = None
        self._paths: dict[str, Path] = {}
        self._read: set[str] = set()
        self._refused: list[str] = []

    @property
    def reference(self) -> str:
        """Its address."""
        return self.name

    @property
    def loadable(self) -> bool:
        """Addresses are not."""
        return False

    def has(self, name: str) -> bool:
        """Tell whether the server has a file."""
        return self._stat(name) is not None

    def listing(self) -> Collection[str]:
        """Return the names that the server lists, or those that it was asked for and has."""
        if self._listed is None:
            self._listed = self._noted.listing if self._offline else self._server.names()
            self._note()
        return sorted(self._listed or (name for name, stat in self._stats.items() if stat))

    @property
    def remark(self) -> str:
        """What was tried of a server that lists nothing."""
        if self._listed:
            return ""
        refused = f", of which it refused {', '.join(self._refused)}" if self._refused else ""
        return f"; the server lists no files, so only the usual names were tried{refused}"

    def path(self, name: str) -> Path:
        """Return where a file is kept, fetched first unless the same version is here."""
        if name not in self._paths:
            stat = self._required(name)
            if self._offline:
                if not self._place(name, stat).exists():
                    raise self._not_cached(name)
            elif stat.version is None or stat.size is None:
                asked, folder = stat, self._cache / name

                def place(version: str) -> Path:
                    return self._place(name, replace(asked, version=version))

                version = download_anew(self._remote(name), asked, folder, place, progress=self._progress)
                stat = self._stats[name] = replace(asked, version=version)
                self._note()
            else:
                download(self._remote(name), stat, self._place(name, stat), progress=self._progress)
            self._paths[name] = self._place(name, stat)
        return self._paths[name]

    def open(self, name: str, opener: Opener) -> WeightFile:
        """Open a weight file, in parts where that was asked for and the format allows it."""
        stat = self._required(name)
        place = self._place(name, stat)
        if name in self._paths or place.exists() or not self._partly:
            return opener.read(self.path(name))
        kept = place.with_name("pieces")
        if self._offline:
            if stat.version is None or stat.size is None:
                raise self._not_cached(name)
            pieces = Pieces(None, f"{self.name}/{name}", kept)
            return opener.read_partly(pieces, stat.size, lambda why: opener.read(self.path(name)))
        return open_partly(self._remote(name), stat, kept, opener, lambda: self.path(name))

    @property
    def identity(self) -> Mapping[str, object]:
        """The address, and the version of each file that was read."""
        versions = {name: stat.version for name in sorted(self._read) if (stat := self._stats[name]) and stat.version}
        return {"url": self.name, "versions": versions}

    def _required(self, name: str) -> Stat:
        stat = self._stat(name)
        if stat is None:
            raise FileNotFoundError(name)
        self._read.add(name)
        return stat

    def _stat(self, name: str) -> Stat | None:
        if name not in self._stats:
            self._stats[name] = self._known(name) if self._offline else self._asked(name)
            self._note()
        return self._stats[name]

    def _asked(self, name: str) -> Stat | None:
        try:
            file = self._remote(name)
            return patiently(file.stat, file.name, "the address and the network")
        except NotFoundError:
            return None
        except ForbiddenError:
            # Stores that list nothing to strangers say so of what they do not have, too.
            if not any(self._stats.values()):
                raise
            self._refused.append(name)
            return None
        except UnreachableError as error:
            if self._noted.files:
                raise UnreachableError(f"{error}; --offline takes what the cache has of it") from error
            raise

    def _known(self, name: str) -> Stat | None:
        if name not in self._noted.files:
            raise self._not_cached(name)
        return self._noted.files[name]

    @cached_property
    def _noted(self) -> Noted:
        """What earlier runs learnt about the folder, all of it at one time."""
        try:
            content = json.loads((self._cache / "known.json").read_bytes())
            files = {name: None if stat is None else Stat(**stat) for name, stat in content["files"].items()}
            return Noted(files, content["listing"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return Noted({}, [])

    def _note(self) -> None:
        """Note what this run learnt; what earlier ones did, unless anything has changed since."""
        if self._offline:
            return
        known, earlier = self._stats, self._noted
        if all(earlier.files[name] == stat for name, stat in known.items() if name in earlier.files):
            known = {**earlier.files, **known}
        files = {name: None if stat is None else vars(stat) for name, stat in sorted(known.items())}
        content = {"files": files, "listing": sorted(self._listed or earlier.listing)}
        note(self._cache / "known.json", json.dumps(content).encode())

    def _place(self, name: str, stat: Stat) -> Path:
        return self._cache / name / hashlib.sha256(f"{stat.version}\n{stat.size}".encode()).hexdigest()[:16] / name

    def _not_cached(self, name: str) -> UnavailableError:
        files = ", ".join(file.name for file in sorted(self._cache.glob("*/*/*")) if file.is_file())
        return UnavailableError(
            f"{self.name}/{name} is not in the cache, and offline nothing can be fetched "
            f"(of it the cache has {files or 'nothing'}); run once without --offline"
        )


@dataclass(frozen=True)
class Noted:
    """What is known of a folder on a server.

    Attributes:
        files: Name → what the server said, ``None`` where it has no such file.
        listing: The names that it lists, if it does.
    """

    files: Mapping[str, Stat | None]
    listing: Collection[str]
