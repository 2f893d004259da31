"""A checkpoint folder: its ``config.json`` and its tensors, wherever they are stored.

Reads the layouts that training code leaves behind: one safetensors file, sharded safetensors, one
pickled PyTorch file, sharded pickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from speculators import dtypes, pickles
from speculators.errors import CheckpointError
from speculators.pickles import PickleFile
from speculators.weights import Extent, SafetensorsFile, TensorInfo, WeightFile, read

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """A kind of weight file.

    Attributes:
        stem: What the conventional name begins with.
        read: Opens one.
        verify: Compares one with the checksums that it holds, if the format has any.
    """

    stem: str
    read: Callable[[Path], WeightFile]
    verify: Callable[[Path, Event], None] | None = None


FORMATS: Mapping[str, Format] = {
    ".safetensors": Format("model", SafetensorsFile),
    ".bin": Format("pytorch_model", PickleFile, pickles.verify),
}
"""Suffix of a weight file → its format; in order of preference."""


INDEX = ".index.json"
"""What the name of a sharded checkpoint's index ends in, after that of the whole."""

_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


def local_path(location: str | Path) -> Path:
    """Return the path that a user means, with ``~`` expanded.

    Raises:
        CheckpointError: There is no such home directory.
    """
    try:
        return Path(location).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{location}: {error}") from error


class Checkpoint:
    """A draft or verifier as its training code left it.

    Opening one reads ``config.json``; the weight files are opened when a tensor is first asked for.

    Args:
        path: The folder, or one weight file with its ``config.json`` beside it.

    Raises:
        CheckpointError: There is no readable ``config.json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.folder = path if path.is_dir() else path.parent
            exists = path.exists()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no path that this system knows: {error}") from error
        if not exists:
            raise CheckpointError(f"{path} does not exist; expected a folder with config.json and weights")
        self.config = read_json(self.folder / "config.json")

    @cached_property
    def files(self) -> tuple[WeightFile, ...]:
        """The opened weight files.

        Raises:
            CheckpointError: None, several alternatives, or a damaged one.
        """
        return tuple(_open(path, listing) for path, listing in self._located.items())

    @cached_property
    def _located(self) -> dict[Path, Listing | None]:
        return _locate(self.path)

    @cached_property
    def _homes(self) -> dict[str, WeightFile]:
        homes: dict[str, WeightFile] = {}
        for file in self.files:
            for name in file.tensors:
                if name in homes:
                    raise CheckpointError(f"tensor {name!r} is stored twice, in {homes[name].path} and {file.path}")
                homes[name] = file
        return homes

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every stored tensor by name."""
        return {name: file.tensors[name] for name, file in sorted(self._homes.items())}

    def verify(self, stopped: Event) -> None:
        """Compare the weight files with the checksums that they hold; may run beside anything else.

        Args:
            stopped: Ends the work early when it is set.

        Raises:
            CheckpointError: One was damaged after it was written.
        """
        for path in self._located:
            if check := FORMATS[path.suffix].verify:
                check(path, stopped)

    @property
    def has_weights(self) -> bool:
        """Whether a weight file lies in the folder; a verifier may consist of its config alone."""
        return self.path.is_file() or any(True for _ in _candidates(self.path))

    def stretch(self, name: str, start: int = 0, stop: int | None = None) -> Extent | memoryview:
        """Return bytes ``start`` to ``stop`` of a tensor, or where they lie if a file holds them in one piece."""
        return self._homes[name].stretch(name, start, self.tensors[name].nbytes if stop is None else stop)

    def rows(self, name: str, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes of rows ``start`` to ``stop`` of a tensor."""
        info = self.tensors[name]
        size = info.nbytes // max(1, info.shape[0])
        return read(self.stretch(name, start * size, stop * size))

    def array(self, name: str) -> NDArray[Any]:
        """Return a small tensor as a numpy array."""
        info = self.tensors[name]
        return dtypes.array(read(self.stretch(name)), info.dtype).reshape(info.shape)

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a tensor, or its rows from ``rows[0]`` to ``rows[1]``, in the dtype it is stored in."""
        info = self.tensors[name]
        start, stop = rows or (0, info.shape[0] if info.shape else 1)
        data = self.rows(name, start, stop) if info.shape else read(self.stretch(name))
        return dtypes.tensor(data, info.dtype).view((stop - start, *info.shape[1:]) if info.shape else ())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing or holds something else; names what lies beside it.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        found = sorted(entry.name for entry in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        raise CheckpointError(
            f"{path.parent} is no checkpoint: it has no {path.name} (found: {', '.join(found) or 'nothing'})"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def _candidates(folder: Path) -> Iterator[list[Path]]:
    """Yield alternative sets of weight files: those with conventional names first, then any others."""
    for suffix, kind in FORMATS.items():
        named = [folder / f"{kind.stem}{suffix}", folder / f"{kind.stem}{suffix}{INDEX}"]
        if present := [file for file in named if file.is_file()]:
            yield present
    for suffix in FORMATS:
        files = (file for file in folder.glob(f"*{suffix}") if file.is_file())
        if others := sorted(file for file in files if not file.name.startswith("adapter_")):
            yield others


Listing = tuple[Path, set[str]]
"""An index, and the tensors that it says a file holds."""


def _locate(path: Path) -> dict[Path, Listing | None]:
    """Find the weight files of a checkpoint, and what an index says about each, if there is one."""
    if path.is_file():
        files = [path]
    else:
        files = next(_candidates(path), [])
        if not files:
            listing = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
            raise CheckpointError(f"{path} holds no weights: expected *.safetensors or *.bin, found {listing}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(f"{path} holds alternative weight files ({names}); name the one to convert")
    (file,) = files
    suffix = Path(file.name.removesuffix(INDEX)).suffix
    if suffix not in FORMATS:
        raise CheckpointError(f"{file} is no weight file; expected one that ends in {' or '.join(FORMATS)}")
    if _SHARD.search(file.name):
        raise CheckpointError(f"{file} is one shard of several, and their index is missing. Download it again.")
    return _locate_shards(file) if file.name.endswith(INDEX) else {file: None}


def _locate_shards(index: Path) -> dict[Path, Listing | None]:
    weight_map = read_json(index).get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not weight_map or not named:
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    present = {entry.name for entry in index.parent.iterdir()}
    shards: dict[Path, Listing | None] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index} names the shard {shard!r}; shards must lie beside their index")
        if shard not in present:
            raise CheckpointError(f"{index} names the shard {shard!r}, which is missing. Download it again.")
        if Path(shard).suffix not in FORMATS:
            raise CheckpointError(f"{index} names the shard {shard!r}, which is no weight file")
        shards[index.parent / shard] = (index, {name for name, home in weight_map.items() if home == shard})
    return shards


def _open(path: Path, listing: Listing | None) -> WeightFile:
    file = FORMATS[path.suffix].read(path)
    if listing is not None and listing[1] != set(file.tensors):
        odd = sorted(listing[1] ^ set(file.tensors))[0]
        raise CheckpointError(f"{listing[0]} and {path.name} disagree about tensor {odd!r}")
    return file
