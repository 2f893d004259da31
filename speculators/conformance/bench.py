"""What a plugin is checked on: one tiny native checkpoint, its verifier, and a folder to work in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators import examples
from speculators.checkpoint import Checkpoint
from speculators.convert import ConversionResult, convert_model, prepare
from speculators.errors import CheckpointError
from speculators.output import CONFIG_FILE
from speculators.registry import Algorithm, Registry
from speculators.spec import ConverterSpec
from speculators.table import Shared
from speculators.verifier import Verifier
from speculators.weights import TensorInfo, read
from speculators.writer import Payload, write_safetensors

if TYPE_CHECKING:
    from speculators.config import SpeculatorConfig
    from speculators.convert import Conversion

Tensors = Mapping[str, tuple[TensorInfo, bytes]]

LARGEST = 64 << 20
"""Bytes of a checkpoint that is still tiny."""

PATIENCE = 600
"""Seconds that a process of its own may take."""


class NonconformanceError(AssertionError):
    """A plugin does not keep a promise; the message says which, and what to do."""


@dataclass
class Bench:
    """A plugin, a native checkpoint that it should convert, and a place to work.

    Args:
        name: The algorithm.
        folder: An empty folder.
        checkpoint: The native checkpoint; what the plugin's `ConverterSpec.example` describes by default.
        verifier: Its base model; the one that examples are made for by default.
        options: Keyword arguments of the algorithm.
        reference: A safetensors file with outputs of the original code.
        optional: Source names of tensors without each of which the checkpoint is another draft, but a valid one.
        dropped: Source names of tensors that are no part of the draft.
        registry: Where to look for algorithms; the installed plugins by default.

    Raises:
        TypeError: Names are given as one string.
    """

    name: str
    folder: Path
    checkpoint: Path | None = None
    verifier: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Path | None = None
    optional: Collection[str] = ()
    dropped: Collection[str] = ()
    registry: Registry = field(default_factory=Registry)

    def __post_init__(self) -> None:
        """Keep the folder's real name, as faults are told by paths, and paths that hold wherever a test goes."""
        self.folder = Path(self.folder).resolve()
        self.checkpoint, self.verifier, self.reference = (
            None if path is None else Path(path).absolute() for path in (self.checkpoint, self.verifier, self.reference)
        )
        for what in ("optional", "dropped"):
            if isinstance(names := getattr(self, what), str):
                raise TypeError(f"{what} is {names!r}, expected a tuple of names")

    @cached_property
    def algorithm(self) -> Algorithm:
        """The plugin, loaded."""
        return self.registry.get(self.name)

    @property
    def spec(self) -> ConverterSpec:
        """What the plugin brings."""
        return self.algorithm.spec

    @cached_property
    def _example(self) -> tuple[Path, Path, frozenset[str]]:
        draft, base, example = examples.write_example(self.spec, self.place("example") / "files")
        return draft, base, example.optional

    @cached_property
    def places(self) -> tuple[Path, Path]:
        """Folders of the native checkpoint and its verifier, which are made if none were given."""
        if self.checkpoint is None:
            draft, base, _ = self._example
            return draft, self.verifier or base
        return self.checkpoint, self.verifier or examples.write_verifier(self.place("verifier") / "files")

    @cached_property
    def lacking(self) -> set[str]:
        """Source names of tensors without each of which there is a valid draft, as where the verifier's stand in."""
        moves = self.prepare().context.matching.moves.values()
        shared = {
            found.source
            for found in moves
            if isinstance(found.row, Shared) and self.source.info(found.source).shape in self.base.shapes.values()
        }
        said = {*self.optional, *(() if self.checkpoint else self._example[2])}
        return (said | shared) & self.tensors.keys()

    @cached_property
    def has_checkpoint(self) -> bool:
        """Whether there is a native checkpoint to check with."""
        if self.checkpoint is not None:
            return True
        base = examples.write_verifier(self.place("verifier") / "files")
        return self.spec.example(Verifier(base)) is not None

    def place(self, name: str) -> Path:
        """Make a new folder to work in, whatever was done before."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    @cached_property
    def source(self) -> Checkpoint:
        """The native checkpoint."""
        return Checkpoint(self.places[0])

    @cached_property
    def base(self) -> Verifier:
        """The verifier."""
        return Verifier(self.places[1])

    def prepare(self, dtype: str | None = None, **options: Any) -> Conversion:
        """Decide everything about the conversion, perhaps with other options, and write nothing."""
        return prepare(
            self.source,
            self.base,
            algorithm=self.name,
            dtype=dtype,
            registry=self.registry,
            algorithm_kwargs={**self.options, **options},
        )

    def convert(self, output: Path, source: Path | None = None, **more: Any) -> ConversionResult:
        """Convert the checkpoint, or another one, without validation."""
        return convert_model(
            source or self.places[0],
            verifier=self.places[1],
            algorithm=self.name,
            output_path=output,
            validate=False,
            registry=self.registry,
            **more,
            **self.options,
        )

    @cached_property
    def converted(self) -> ConversionResult:
        """The checkpoint, converted."""
        return self.convert(self.place("converted") / "out")

    @cached_property
    def output(self) -> Checkpoint:
        """What was written."""
        return Checkpoint(self.converted.output_path)

    @cached_property
    def config(self) -> SpeculatorConfig:
        """The config that was written, read back."""
        written = self.output.config
        try:
            config: SpeculatorConfig = self.spec.config.read(written)
        except CheckpointError as error:
            raise NonconformanceError(f"{self.spec.config.__name__} does not read what it wrote: {error}") from error
        return config

    @cached_property
    def tensors(self) -> dict[str, tuple[TensorInfo, bytes]]:
        """All tensors of the native checkpoint."""
        size = sum(info.nbytes for info in self.source.tensors.values())
        if size > LARGEST:
            raise NonconformanceError(
                f"{self.source.name} holds {size >> 20} MiB of tensors, and is written again and again here; give a "
                f"checkpoint of {LARGEST >> 20} MiB or less"
            )
        return contents(self.source)

    def damaged(self, folder: Path, tensors: Tensors) -> Path:
        """Write the native checkpoint with other tensors into a new folder."""
        folder.mkdir()
        shutil.copyfile(self.source.place.path(CONFIG_FILE), folder / CONFIG_FILE)
        write_safetensors(folder, (Payload(name, info, [memoryview(data)]) for name, (info, data) in tensors.items()))
        return folder

    def variant(self, tensors: Tensors) -> Bench:
        """Return a bench for the native checkpoint with other tensors, without reference outputs."""
        place = self.place("variant")
        draft = self.damaged(place / "draft", tensors)
        lost = self.tensors.keys() - tensors.keys()
        dropped = {*self.dropped} - lost
        return Bench(self.name, place, draft, self.places[1], self.options, dropped=dropped, registry=self.registry)

    def in_a_new_process(self, code: str, *arguments: str, **environment: str) -> str:
        """Run Python code that sees the same packages, and return what it prints."""
        path = os.pathsep.join(filter(None, sys.path))
        ran = subprocess.run(  # noqa: S603 - this interpreter, and code from this module
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"} | environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=PATIENCE,
        )
        if ran.returncode:
            said = ran.stderr.strip().splitlines() or [f"it ends with {ran.returncode} and says nothing"]
            raise NonconformanceError(f"in a process of its own: {said[-1]}")
        return ran.stdout


def contents(checkpoint: Checkpoint) -> dict[str, tuple[TensorInfo, bytes]]:
    """Read every tensor of a small checkpoint."""
    return {name: (info, bytes(read(checkpoint.stretch(name)))) for name, info in checkpoint.tensors.items()}


def require(fits: bool, message: str) -> None:
    """Raise what is wrong.

    Raises:
        NonconformanceError: Where something does not fit.
    """
    if not fits:
        raise NonconformanceError(message)


def files(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder; none where there is none."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
