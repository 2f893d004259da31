"""A checkpoint: its ``config.json`` and its tensors, in whatever files and wherever these lie.

Reads the layouts that training code leaves behind: one safetensors file, sharded safetensors, one
pickled PyTorch file, sharded pickles.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from speculators import companions, digests, dtypes, json_files, pickles, weights
from speculators.digests import Digest
from speculators.errors import CheckpointError, reading
from speculators.pickles import PickleFile
from speculators.sources import Access, Folder, LocalFolder, LocalLocation, find
from speculators.sources.locations import is_name
from speculators.sources.outlines import open_pickle_partly
from speculators.sources.parts import Pieces, RemoteSafetensors, Whole
from speculators.weights import CHUNK, Extent, SafetensorsFile, TensorInfo, WeightFile, read

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """A kind of weight file.

    Attributes:
        stem: What the conventional name begins with; empty where there is none.
        read: Opens one that lies here.
        read_partly: Opens one that lies elsewhere, of which parts are fetched.
        digest: Reads one for its digest, and compares it with the checksums that it holds.
        checked: Tells whether one holds any.
        screen: Refuses one that no other library should load.
    """

    stem: str
    read: Callable[[Path], WeightFile]
    read_partly: Callable[[Pieces, int, Whole], WeightFile]
    digest: Callable[[Path, Event], Digest]
    checked: Callable[[Path], bool]
    screen: Callable[[Path], None]


def _pickled(stem: str) -> Format:
    return Format(stem, PickleFile, open_pickle_partly, pickles.digest, pickles.is_archive, pickles.screen)


FORMATS: Mapping[str, Format] = {
    ".safetensors": Format(
        "model", SafetensorsFile, RemoteSafetensors, weights.digest, lambda path: False, lambda path: None
    ),
    ".bin": _pickled("pytorch_model"),
    ".pt": _pickled(""),
    ".pth": _pickled(""),
}
"""Suffix of a weight file → its format; in order of preference."""


MOST_SHARDS = 10_000
"""Files that an index may name; the largest models have some hundred."""

INDEX = ".index.json"
"""What the name of a sharded checkpoint's index ends in, after that of the whole."""

VERIFIER_FORMATS = (".safetensors", ".bin")
"""Those of a verifier, which transformers loads; an original release may lie beside them, in files of other kinds."""

FOREIGN = re.compile(
    r"adapter_.*|(optimizer|scheduler|scaler|sampler|rng_state|training_args|training_state)(_\d+)?\.(bin|pt|pth)"
)
"""Names of files that hold no draft: an adapter of another model, and what trainers resume from (transformers'
``trainer.py``, accelerate's ``utils/constants.py``, SpecForge)."""

Indexed = tuple[str, set[str]]
"""Name of an index, and the tensors that it says a file holds."""

_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


class Checkpoint:
    """A draft or verifier as its training code left it.

    Opening one reads ``config.json``; a weight file is opened when a tensor of it is first asked for.

    Args:
        place: The folder with its files, or a local path: a folder, or one weight file with its
            ``config.json`` beside it.
        formats: Which of `FORMATS` its weights may have, in order of preference.

    Attributes:
        name: What messages call it.
        config: What ``config.json`` holds: keys and values of any kind, as a stranger wrote them.
        config_bytes: The file itself.
        place: Where its files lie.

    Raises:
        CheckpointError: There is no readable ``config.json``.
    """

    def __init__(self, place: Path | Folder, formats: Collection[str] = tuple(FORMATS)) -> None:
        self._formats = formats
        self.place = LocalFolder(LocalLocation(place, str(place))) if isinstance(place, Path) else place
        self.name = self.place.name
        self._opened: dict[str, WeightFile] = {}
        self._read: dict[str, Digest] = {}
        self.config_bytes = self._read_whole("config.json")
        self.config = parse_json(self.config_bytes, self._described("config.json"))

    @classmethod
    def at(
        cls,
        location: str | Path,
        access: Access,
        *,
        partly: bool = False,
        formats: Collection[str] = tuple(FORMATS),
    ) -> Checkpoint:
        """Open the checkpoint that a user means by a path, a Hugging Face ID or a URL.

        Args:
            location: As the user gave it.
            access: How to reach it.
            partly: Whether just parts of its weights will be asked for: then no more is fetched than what tells its
                tensors (`tensors`, `info`), and of each what is asked for (`stretch`, `rows`).
            formats: Which of `FORMATS` its weights may have.

        Raises:
            CheckpointError: There is none, or it may not be read.
        """
        return cls(find(location, access, partly=partly, suffixes=(*formats, INDEX)), formats)

    @cached_property
    def _located(self) -> dict[str, Indexed | None]:
        """Its weight files, and what an index says about each, if there is one."""
        if self.place.file is not None:
            file = self.place.file
        else:
            files = next(self._candidates(), [])
            if not files:
                raise CheckpointError(
                    f"{self.name} holds no weights: expected *{', *'.join(self._formats)}, found {self._found()}"
                    f"{self.place.remark}"
                )
            if len(files) > 1:
                names = ", ".join(files[:5])
                raise CheckpointError(f"{self.name} holds alternative weight files ({names}); name the one to convert")
            (file,) = files
        suffix = Path(file.removesuffix(INDEX)).suffix
        if suffix not in self._formats:
            raise CheckpointError(
                f"{self._described(file)} is no weight file; expected one that ends in {', '.join(self._formats)}"
            )
        if _SHARD.search(file):
            raise CheckpointError(
                f"{self._described(file)} is one shard of several, and their index is missing. Download it again."
            )
        return self._locate_shards(file) if file.endswith(INDEX) else {file: None}

    def _candidates(self) -> Iterator[list[str]]:
        """Yield alternative sets of weight files: those with conventional names first, then any others."""
        for suffix in self._formats:
            stem = FORMATS[suffix].stem
            named = [f"{stem}{suffix}", f"{stem}{suffix}{INDEX}"] if stem else []
            if present := [name for name in named if self.place.has(name)]:
                yield present
        for suffix in self._formats:
            files = [name for name in self.place.listing() if name.endswith(suffix) and self.place.has(name)]
            if others := sorted(filter(may_hold_draft, files)):
                yield others

    def _locate_shards(self, index: str) -> dict[str, Indexed | None]:
        weight_map = self._read_json(index).get("weight_map")
        named = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
        if not weight_map or not named:
            raise CheckpointError(f"{self._described(index)} has no weight_map of tensor names to file names")
        if (count := len({*weight_map.values()})) > MOST_SHARDS:
            raise CheckpointError(f"{self._described(index)} names {count} shards, at most {MOST_SHARDS} are expected")
        homes: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            homes.setdefault(shard, set()).add(name)
        shards: dict[str, Indexed | None] = {}
        for shard, names in sorted(homes.items()):
            said = f"{self._described(index)} names the shard {shard!r}"
            if not is_name(shard):
                raise CheckpointError(f"{said}; shards must lie beside their index")
            if Path(shard).suffix not in FORMATS:
                raise CheckpointError(f"{said}, which is no weight file")
            shards[shard] = (index, names)
        return shards

    @cached_property
    def _homes(self) -> Mapping[str, str]:
        """Name of a tensor → its file, from the index alone where there is one."""
        homes: dict[str, str] = {}
        for file, indexed in self._located.items():
            homes |= dict.fromkeys(self._file(file).tensors if indexed is None else indexed[1], file)
        return homes

    def _file(self, name: str) -> WeightFile:
        if name not in self._opened:
            indexed = self._located[name]
            try:
                file = self.place.open(name, FORMATS[Path(name).suffix])
            except FileNotFoundError as error:
                raise self._lacks(name, indexed) from error
            if indexed is not None and indexed[1] != set(file.tensors):
                odd = sorted(indexed[1] ^ set(file.tensors))[0]
                raise CheckpointError(f"{self._described(indexed[0])} and {name} disagree about tensor {odd!r}")
            self._opened[name] = file
        return self._opened[name]

    def _lacks(self, name: str, indexed: Indexed | None) -> CheckpointError:
        if indexed is None:
            return CheckpointError(f"{self.name} has no {name}")
        return CheckpointError(
            f"{self._described(indexed[0])} names the shard {name!r}, which is missing. Download it again."
        )

    def _found(self) -> str:
        return ", ".join(list(self.place.listing())[:8]) or "nothing"

    def _described(self, name: str) -> str:
        return f"{self.place.reference}/{name}" if self.place.local is None else str(self.place.local / name)

    def _read_json(self, name: str) -> dict[str, Any]:
        return parse_json(self._read_whole(name), self._described(name))

    def _read_whole(self, name: str) -> bytes:
        try:
            path = self.place.path(name)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.name} is no checkpoint: it has no {name} (found: {self._found()}){self.place.remark}"
            ) from None
        with reading(self._described(name)):
            data = read_bytes(path)
        self._read[name] = digests.of_bytes(data)
        return data

    def fetch(self) -> None:
        """Bring all weight files here, where they lie elsewhere.

        Raises:
            CheckpointError: There are none, or they cannot be had.
        """
        for name, indexed in self._located.items():
            self._whole(name, indexed)

    def _whole(self, name: str, indexed: Indexed | None) -> Path:
        try:
            return self.place.path(name)
        except FileNotFoundError as error:
            raise self._lacks(name, indexed) from error

    @contextmanager
    def gathered(self, weights: bool = True) -> Iterator[Path]:
        """Bring the files that transformers reads together in one folder here.

        Args:
            weights: Whether the weights are among them, or just config and tokenizer.

        Raises:
            CheckpointError: A file cannot be had, or asks for what nobody should do.
        """
        names = companions.choose(self.place.listing(), self.place.has, weights=weights)
        for name, indexed in self._located.items() if weights else ():
            names |= {name, *(indexed or ())[:1]}
            FORMATS[Path(name).suffix].screen(self._whole(name, indexed))
        with self.place.gathered(sorted(names)) as folder:
            companions.clean(folder)
            yield folder

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every stored tensor by name; opens every weight file.

        Raises:
            CheckpointError: There is none, there are several alternatives, or one is damaged.
        """
        return {name: self.info(name) for name in sorted(self._homes)}

    def holds(self, name: str) -> bool:
        """Tell whether a tensor is stored, without opening the files that an index speaks for.

        Raises:
            CheckpointError: There are no weights, or a file is damaged.
        """
        return name in self._homes

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of one tensor, opening just the file that holds it.

        Raises:
            KeyError: There is no such tensor.
            CheckpointError: The file is missing or damaged.
        """
        return self._file(self._homes[name]).tensors[name]

    def digests(self, stopped: Event) -> dict[str, Digest]:
        """Return the digest of each weight file, and of each JSON file that was read; may run beside anything else.

        Args:
            stopped: Ends the work early when it is set.

        Raises:
            CheckpointError: A weight file does not fit the checksums in it: it was damaged after it was written.
        """
        found = {name: FORMATS[Path(name).suffix].digest(self.place.path(name), stopped) for name in self._located}
        return self._read | found

    @property
    def checked(self) -> bool:
        """Tell whether any weight file holds checksums, which `digests` compares."""
        return any(FORMATS[Path(name).suffix].checked(self.place.path(name)) for name in self._located)

    @property
    def files_read(self) -> dict[str, dict[str, Any]]:
        """Name → size of every file that was opened so far, and the SHA-256 of those that were read whole."""
        opened = {name: {"size": file.size} for name, file in self._opened.items()}
        return opened | {name: asdict(digest) for name, digest in self._read.items()}

    @property
    def has_weights(self) -> bool:
        """Whether there is a weight file; a verifier may consist of its config alone."""
        return self.place.file is not None or any(True for _ in self._candidates())

    def stretch(self, name: str, start: int = 0, stop: int | None = None) -> Extent | memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor, or where they lie if a file holds them in one piece.

        They are in row-major little-endian order. An operation (`Derive`) may yield what this returns as a chunk.

        Args:
            name: The tensor.
            start: First byte.
            stop: First byte that is not meant; the end of the tensor by default.

        Raises:
            KeyError: There is no such tensor.
            CheckpointError: The file is missing or damaged.
        """
        file = self._file(self._homes[name])
        return file.stretch(name, start, file.tensors[name].nbytes if stop is None else stop)

    def chunks(self, name: str, start: int, stop: int) -> Iterator[Extent | memoryview]:
        """Yield bytes ``start`` to ``stop`` of a tensor in pieces, each of which is fetched when it is asked for.

        Raises:
            KeyError: There is no such tensor.
            CheckpointError: The file is missing or damaged.
        """
        for first in range(start, stop, CHUNK):
            yield self.stretch(name, first, min(first + CHUNK, stop))

    def rows(self, name: str, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes of rows ``start`` to ``stop`` of a tensor, those along its first dimension.

        Raises:
            KeyError: There is no such tensor.
            CheckpointError: The file is missing or damaged.
        """
        info = self.info(name)
        size = info.nbytes // max(1, info.shape[0])
        return read(self.stretch(name, start * size, stop * size))

    def array(self, name: str) -> NDArray[Any]:
        """Return a small tensor as a numpy array of its shape; bfloat16 becomes the equal float32 values.

        Raises:
            KeyError: There is no such tensor.
            ValueError: It holds eight-bit floats, which numpy does not know.
            CheckpointError: The file is missing or damaged.
        """
        info = self.info(name)
        return dtypes.array(read(self.stretch(name)), info.dtype).reshape(info.shape)

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a tensor, or its rows from ``rows[0]`` to ``rows[1]``, in the dtype it is stored in; imports torch.

        Raises:
            KeyError: There is no such tensor.
            CheckpointError: The file is missing or damaged.
        """
        info = self.info(name)
        start, stop = rows or (0, info.shape[0] if info.shape else 1)
        data = self.rows(name, start, stop) if info.shape else read(self.stretch(name))
        return dtypes.tensor(data, info.dtype).view((stop - start, *info.shape[1:]) if info.shape else ())


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most floating tensors of a checkpoint, in torch's spelling."""
    stored = Counter(info.dtype for info in checkpoint.tensors.values() if info.dtype in dtypes.FLOATS)
    return dtypes.TORCH_NAMES[stored.most_common(1)[0][0]]


def read_json(path: Path, name: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        name: What messages call it; its path by default.

    Raises:
        CheckpointError: It cannot be read, or holds something else.
    """
    with reading(name or path):
        return parse_json(read_bytes(path), name or str(path))


def may_hold_draft(name: str) -> bool:
    """Tell whether a weight file may be a draft's, by its name."""
    return not name.startswith(".") and not FOREIGN.fullmatch(name)


def read_bytes(path: Path) -> bytes:
    """Read a JSON file, or as much of it as shows that it is none."""
    with path.open("rb") as file:
        return file.read(json_files.LARGEST + 1)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: It is something else.
    """
    try:
        return json_files.parse(data)
    except ValueError as error:
        raise CheckpointError(f"{name} is no JSON object: {error}") from error
