"""Throw bytes at everything that reads a stranger's files: nothing but a `SpeculatorsError` may come of them.

`target.py` has them made up, and ``test_fuzz_corpus.py`` takes those that are kept in ``corpus``.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event

from speculators.checkpoint import FORMATS, Checkpoint
from speculators.errors import SpeculatorsError, printable
from speculators.sources.parts import Pieces
from speculators.sources.remote import Stat
from speculators.verifier import Verifier
from speculators.weights import WeightFile, pieces

MOST_READ = 1 << 20
"""Bytes of a tensor that are read; a header may promise more than a test should wait for."""


def read_config(path: Path) -> None:
    """Read a file as the config of a verifier."""
    Verifier(path.parent)


def read_index(path: Path) -> None:
    """Read a file as an index, whose shards are not there."""
    (path.parent / "config.json").write_text("{}")
    _ = Checkpoint(path.parent).tensors


class Served:
    """A file as a server has it."""

    name = "served"

    def __init__(self, path: Path) -> None:
        self.path = path

    def stat(self) -> Stat:
        """Say how long it is."""
        return Stat(self.path.stat().st_size, "1")

    def read(self, start: int, stop: int | None) -> Iterator[bytes]:
        """Send a part of it."""
        yield self.path.read_bytes()[start:stop]


def read_tensors(file: WeightFile) -> None:
    """Read the beginning of each tensor of a file."""
    for name, info in file.tensors.items():
        for piece in pieces(file.stretch(name, 0, min(info.nbytes, MOST_READ))):
            bytes(piece)


def read_weights(path: Path) -> None:
    """Read a file as weights: its header, the beginning of each tensor, and its checksums."""
    kind = FORMATS[path.suffix]
    read_tensors(kind.read(path))
    kind.digest(path, Event())


def read_parts(path: Path) -> None:
    """Read a file as weights that lie elsewhere, whose header and tensors are fetched in parts."""
    kind = FORMATS[path.suffix]
    file = Pieces(Served(path), Served.name, path.with_name("pieces"))
    read_tensors(kind.read_partly(file, path.stat().st_size, lambda why: kind.read(path)))


READERS: Mapping[str, Callable[[Path], None]] = {
    "config.json": read_config,
    "model.safetensors.index.json": read_index,
    "model.safetensors": read_weights,
    "pytorch_model.bin": read_weights,
    "parts.safetensors": read_parts,
    "parts.bin": read_parts,
}
"""Name of a file → what reads it."""


def read_all(data: bytes, folder: Path) -> dict[str, str]:
    """Read bytes as every kind of file.

    Returns:
        Name of the file → why it was refused; nothing for those that can be read.
    """
    refused = {}
    for name, reader in READERS.items():
        place = folder / "input"
        place.mkdir()
        (place / name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader(place / name)
        except SpeculatorsError as error:
            refused[name] = printable(str(error))
            refused[name].encode()  # what cannot be printed would end the command line with a traceback
        finally:
            shutil.rmtree(place)
    return refused
