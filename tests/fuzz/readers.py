"""Throw bytes at everything that reads a stranger's files: nothing but a `SpeculatorsError` may come of them.

`target.py` has them made up, and ``test_fuzz_corpus.py`` takes those that are kept in ``corpus``.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

from speculators.checkpoint import FORMATS, Checkpoint
from speculators.errors import SpeculatorsError, printable
from speculators.verifier import Verifier
from speculators.weights import pieces

MOST_READ = 1 << 20
"""Bytes of a tensor that are read; a header may promise more than a test should wait for."""


def read_config(path: Path) -> None:
    """Read a file as the config of a verifier."""
    Verifier(path.parent)


def read_index(path: Path) -> None:
    """Read a file as an index, whose shards are not there."""
    (path.parent / "config.json").write_text("{}")
    _ = Checkpoint(path.parent).tensors


def read_weights(path: Path) -> None:
    """Read a file as weights: its header, the beginning of each tensor, and its checksums."""
    kind = FORMATS[path.suffix]
    file = kind.read(path)
    for name, info in file.tensors.items():
        for piece in pieces(file.stretch(name, 0, min(info.nbytes, MOST_READ))):
            bytes(piece)
    kind.digest(path, Event())


READERS: Mapping[str, Callable[[Path], None]] = {
    "config.json": read_config,
    "model.safetensors.index.json": read_index,
    "model.safetensors": read_weights,
    "pytorch_model.bin": read_weights,
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
