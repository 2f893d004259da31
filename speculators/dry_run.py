"""Work out a whole conversion, and write nothing.

Everything is done that `convert_model` does, by the same functions, up to where bytes would be written: tensors that
are made or cast are made and cast, and thrown away. What is copied as it is, is
read only where its values are looked at.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators import output, writer
from speculators.checkpoint import Checkpoint
from speculators.convert import (
    Conversion,
    check_arguments,
    find_destination,
    payloads_of,
    prepare,
    require_device,
    require_native,
    verifying,
)
from speculators.errors import ValidationError
from speculators.plan import Derivation
from speculators.progress import Progress, adding_up, unheard
from speculators.registry import AUTO, Registry
from speculators.serving import Instructions, instructions
from speculators.sources import Access
from speculators.spec import Context, StatedAs
from speculators.verifier import Verifier
from speculators.weights import Chunk, Extent, TensorInfo, read
from speculators.writer import Payload

if TYPE_CHECKING:
    from speculators.config import SpeculatorConfig
    from speculators.validation import Report

KWARG, NATIVE, DETECTED, DEFAULT = "kwarg", "native config", "detected", "default"
"""Where the value of an option may come from: the user, the config, the tensors, or none of them."""

RENAMED, KEPT, CUT, JOINED, MADE, COMPLETED, LEFT, DROPPED = (
    "renamed",
    "kept",
    "cut",
    "joined",
    "made",
    "completed",
    "left to the verifier",
    "dropped",
)
"""What becomes of a tensor; see `PlannedTensor`."""


@dataclass(frozen=True)
class ResolvedOption:
    """The value that something has for one conversion.

    Attributes:
        name: An option of the algorithm; ``algorithm`` and ``dtype`` are among them.
        value: What it comes to, in types that JSON knows.
        origin: `KWARG`, `NATIVE`, `DETECTED` or `DEFAULT`.
    """

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class PlannedTensor:
    """What becomes of one tensor of the source, or where one of the output comes from.

    Attributes:
        fate: ``"renamed"`` or ``"kept"`` (its name); ``"cut"`` out of a larger one or ``"joined"`` of several;
            ``"made"`` from others; ``"completed"`` from the verifier; ``"left to the verifier"``, whose tensor engines
            use; ``"dropped"``.
        sources: Names of the tensors that it is made of, in the source; in the verifier where it is completed.
        target: Its name in the output; ``None`` when it is dropped.
        shape: Its shape; ``None`` when it is left to the verifier.
        stored: The dtype in which it is stored, as safetensors names it; ``None`` when it is not.
        dtype: The dtype in which it is written; ``None`` when nothing is written.
        bytes: Size of what is written.
        why: What the conversion says about it.
    """

    fate: str
    sources: tuple[str, ...]
    target: str | None
    shape: tuple[int, ...] | None
    stored: str | None
    dtype: str | None
    bytes: int
    why: str = ""


@dataclass(frozen=True)
class PlannedFile:
    """A file of the output: its name, its size, and how many tensors it holds."""

    name: str
    bytes: int
    tensors: int


@dataclass(frozen=True)
class PlannedConversion:
    """What `convert_model` would do.

    Attributes:
        output_path: The folder that would be written.
        source: What would be converted, as the user named it, without secrets.
        verifier: The base model, likewise.
        algorithm: Name of the algorithm.
        package: The plugin package that would do it, with its version.
        options: The algorithm, its options and the dtype of the config, each with where the value comes from.
        tensors: The fate of every tensor of source and output.
        renamed: As in `ConversionResult`, like the following three.
        reworked: Source name → names of the tensors into which it would be cut or joined.
        dropped: Source name → why it would be left out.
        completed: Output name → what it would be completed with.
        config: The text of ``config.json``.
        files: Every file that would be written but ``provenance.json``, whose size depends on what is read.
        notes: What the user should know, one sentence each.
        serving: How vLLM would serve the output; ``None`` when it does not serve its type.
        validation: The checks that need no written output; ``None`` when validation was switched off.
    """

    output_path: Path
    source: str
    verifier: str
    algorithm: str
    package: str
    options: tuple[ResolvedOption, ...]
    tensors: tuple[PlannedTensor, ...]
    renamed: dict[str, str]
    reworked: dict[str, tuple[str, ...]]
    dropped: dict[str, str]
    completed: dict[str, str]
    config: str
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    serving: Instructions | None
    validation: Report | None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in types that JSON knows."""
        return {
            **asdict(self),
            "output_path": str(self.output_path),
            "config": json.loads(self.config),
            "validation": self.validation.to_dict() if self.validation else None,
        }


def plan_conversion(
    model: str | Path,
    *,
    verifier: str | Path,
    algorithm: str = AUTO,
    output_path: str | Path = "converted",
    validate_device: str = "cpu",
    validate: bool = True,
    validate_level: str = "forward",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    self_contained: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress = unheard,
    registry: Registry | None = None,
    **algorithm_kwargs: Any,
) -> PlannedConversion:
    """Work out what `convert_model` would do with the same arguments, and write nothing.

    It fails where the conversion would fail, with the same error, as far as that can be known beforehand. What cannot:
    whether the draft computes what it should (the levels ``forward`` and ``acceptance``), whether the disk has room,
    and whether another conversion writes to the same place. Checksums are compared where the source lies here.

    Args:
        model: See `convert_model`, like all others.
        verifier: The base model.
        algorithm: Name or alias of an installed algorithm, or ``"auto"``.
        output_path: Folder that would be written.
        validate_device: Torch device on which the converted draft would be run.
        validate: Whether the result would be checked.
        validate_level: How far.
        dtype: Cast floating tensors to this dtype.
        max_shard_size: Most bytes of tensors per file.
        overwrite: Whether a converted model at ``output_path`` may be replaced.
        self_contained: Whether to write what drafts share with their verifier.
        push_to_hub: Repository of the Hub to which the output would be uploaded; whether it may be is asked.
        private: Whether a repository that is made for it would be private.
        token: Token for the Hub.
        cache_dir: Where downloads are kept.
        offline: Whether nothing but the cache may be used.
        progress: Called with what is being done, and how many bytes of it are done of how many.
        registry: Where to look for algorithms.
        **algorithm_kwargs: The algorithm's own options.

    Raises:
        SpeculatorsError: The conversion would raise it.
    """
    registry = registry or Registry()
    target, shard_size = check_arguments(
        model,
        verifier,
        algorithm=algorithm,
        output_path=output_path,
        validate_level=validate_level if validate else None,
        dtype=dtype,
        max_shard_size=max_shard_size,
        registry=registry,
        algorithm_kwargs=algorithm_kwargs,
    )
    output.check_writable(target, overwrite)
    access = Access(token, cache_dir, offline, progress)
    find_destination(push_to_hub, access, private)
    source, base = Checkpoint.at(model, access, partly=True), Verifier(verifier, access)
    require_native(source)
    is_local = source.place.local is not None
    with verifying(source) if is_local else nullcontext(dict) as verified:
        if validate:
            require_device(validate_device)
        conversion = prepare(
            source,
            base,
            algorithm=algorithm,
            dtype=dtype,
            registry=registry,
            algorithm_kwargs=algorithm_kwargs,
            self_contained=self_contained,
            progress=progress,
        )
        spec = conversion.algorithm.spec
        serving = instructions(spec.vllm, conversion.config, target, base) if spec.vllm else None
        config = conversion.config.to_json()
        payloads = list(payloads_of(conversion))
        _try(payloads, conversion, progress, sound=validate and validate_level != "structure" and is_local)
        verified()
    report = _validate(conversion, target, validate_level) if validate else None
    for opened in (source, base.checkpoint):
        opened.place.require_unchanged()
    arranged = writer.arrange(payloads, shard_size)
    counts = {name: len(held) for name, held in arranged.files.items()}
    small = {output.CONFIG_FILE: len(config.encode()), output.NATIVE_CONFIG_FILE: len(source.config_bytes)}
    sizes = {**small, **arranged.sizes}
    return PlannedConversion(
        output_path=target,
        source=source.name,
        verifier=base.name,
        algorithm=spec.name,
        package=conversion.algorithm.origin,
        options=tuple(_resolve(conversion, algorithm)),
        tensors=tuple(_fates(conversion, {payload.name: payload.info for payload in payloads})),
        renamed=conversion.renamed,
        reworked=conversion.reworked,
        dropped=conversion.dropped,
        completed=conversion.completed,
        config=config,
        files=tuple(PlannedFile(name, size, counts.get(name, 0)) for name, size in sorted(sizes.items())),
        notes=conversion.notes,
        serving=serving,
        validation=report,
    )


def _try(payloads: Iterable[Payload], conversion: Conversion, progress: Progress, *, sound: bool) -> None:
    """Make and cast what is made and cast, and throw it away.

    Args:
        payloads: What would be written.
        conversion: What it is written by.
        progress: Told about the bytes.
        sound: Whether all values are looked at, also those that are copied, as the validation would.

    Raises:
        SpeculatorsError: Something cannot be made or cast, or is no number.
    """
    from speculators.validation import unsound

    copied = {move.target: move.info for move in conversion.moves}
    tried = [payload for payload in payloads if sound or payload.info is not copied.get(payload.name)]
    report, found = adding_up(progress, "trying", sum(payload.info.nbytes for payload in tried)), []
    for payload in tried:
        chunks = _reported(payload.chunks, report)
        if sound:
            found.append(unsound(payload.name, payload.info.dtype, chunks))
        else:
            deque(chunks, maxlen=0)
    if any(found):
        raise ValidationError(f"the converted model would fail validation: {'; '.join(filter(None, found))}")


def _reported(chunks: Iterable[Chunk], report: Callable[[int], object]) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        report(chunk.size if isinstance(chunk, Extent) else memoryview(chunk).nbytes)


def _validate(conversion: Conversion, target: Path, level: str) -> Report:
    """Check what can be checked of an output that is not written.

    Raises:
        ValidationError: A check fails.
        CheckpointError: The verifier lacks what the level needs.
    """
    from speculators.validation import check

    spec, verifier = conversion.algorithm.spec, conversion.context.verifier
    report = check(_Unwritten(conversion, target), spec, verifier, level="structure")
    report.raise_on_failure()
    if level == "acceptance":
        verifier.require_weights()
    return report


class _Unwritten(Checkpoint):
    """The output of a conversion before it is written; it has tensors and a config, and lies nowhere."""

    def __init__(self, conversion: Conversion, target: Path) -> None:
        self.name = str(target)
        self.config = json.loads(conversion.config.to_json())
        self.place = conversion.context.source.place
        self._opened = {output.WEIGHTS_FILE: _Made(conversion)}
        self._located = {output.WEIGHTS_FILE: None}
        self._read = {}


class _Made:
    """A weight file whose tensors are made each time they are asked for."""

    size = 0

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        self.tensors = {payload.name: payload.info for payload in payloads_of(conversion)}

    def stretch(self, name: str, start: int, stop: int) -> memoryview:
        payload = next(payload for payload in payloads_of(self._conversion) if payload.name == name)
        return memoryview(b"".join(map(read, payload.chunks)))[start:stop]


def _fates(conversion: Conversion, written: Mapping[str, TensorInfo]) -> Iterator[PlannedTensor]:
    stored = conversion.context.source.tensors

    def to(target: str, fate: str, sources: tuple[str, ...], dtype: str | None, why: str = "") -> PlannedTensor:
        info = written[target]
        return PlannedTensor(fate, sources, target, info.shape, dtype, info.dtype, info.nbytes, why)

    for move in conversion.moves:
        yield to(move.target, KEPT if move.source == move.target else RENAMED, (move.source,), move.info.dtype)
    for made in conversion.derivations:
        fate = _fate(made)
        yield to(made.target, fate, made.sources, None if fate == MADE else stored[made.sources[0]].dtype, made.why)
    for each in conversion.completions:
        yield to(each.target, COMPLETED, (each.source,), each.info.dtype, conversion.completed[each.target])
    for target in sorted(conversion.from_verifier):
        yield PlannedTensor(LEFT, (), target, None, None, None, 0, conversion.completed[target])
    for name, why in sorted(conversion.dropped.items()):
        yield PlannedTensor(DROPPED, (name,), None, stored[name].shape, stored[name].dtype, None, 0, why)


def _fate(made: Derivation) -> str:
    if not made.reworks:
        return MADE
    return CUT if len(made.sources) == 1 else JOINED


def _resolve(conversion: Conversion, algorithm: str) -> Iterator[ResolvedOption]:
    context, config = conversion.context, conversion.config
    yield ResolvedOption("algorithm", conversion.algorithm.spec.name, DETECTED if algorithm == AUTO else KWARG)
    yield ResolvedOption("dtype", config.dtype, _dtype_origin(context, config.dtype))
    for name in sorted(type(context.options).model_fields):
        yield _resolve_option(name, conversion)


def _dtype_origin(context: Context, dtype: str) -> str:
    if context.dtype is not None:
        return KWARG
    said = context.stated("dtype") or context.stated("torch_dtype")
    return NATIVE if said and str(said[0]).removeprefix("torch.") == dtype else DETECTED


def _resolve_option(name: str, conversion: Conversion) -> ResolvedOption:
    """Find out what an option came to: what the output's config says, where that has something of its name.

    What is not given, and stands in the config as the tensors or the native config have it, comes from there.
    """
    from pydantic_core import to_jsonable_python

    context, spec = conversion.context, conversion.algorithm.spec
    given = getattr(context.options, name)
    field = type(context.options).model_fields[name]
    written = _written(conversion.config, name)
    stated = [value for key in _keys(field.metadata, name) for value in _stated(context, key)]
    seen = name in conversion.facts.parts
    if name in context.options.model_fields_set and given is not None and written in ([], [given]):
        value, origin = given, KWARG
    elif name in spec.table.parts and written in ([], [seen]):
        value, origin = seen, DETECTED
    elif stated and (not written or written[0] in stated):
        value, origin = (written or stated)[0], NATIVE
    else:
        value, origin = (written or [given])[0], DEFAULT
    return ResolvedOption(name, to_jsonable_python(value, fallback=str), origin)


def _keys(metadata: Iterable[object], name: str) -> tuple[str, ...]:
    return next((each.keys for each in metadata if isinstance(each, StatedAs)), (name,))


def _stated(context: Context, key: str) -> list[Any]:
    block, _, inner = key.rpartition(".")
    if not block:
        return context.stated(key)
    found = [each.get(inner) for each in context.stated(block) if isinstance(each, Mapping)]
    return [value for value in found if value is not None]


def _written(config: SpeculatorConfig, name: str) -> list[Any]:
    """Return the value that an output's config has for a name, in its layers and its proposals too; or nothing."""
    layers = getattr(config, "transformer_layer_config", None)
    blocks = [config, layers, *config.speculators_config.proposal_methods]
    return [getattr(block, name) for block in blocks if hasattr(block, name) and name in _fields(block)][:1]


def _fields(block: Any) -> set[str]:
    return {*type(block).model_fields, *(block.model_extra or {})}
