"""The way back: write an output in the layout of the training code that it came from.

What a conversion recorded says where each of the source's tensors is. Outputs that say nothing of that, such as those
of other writers, are read backwards through the algorithm's table, and the algorithm makes their native config.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators import dtypes, output, provenance, traces, writer
from speculators.checkpoint import FORMATS, INDEX, Checkpoint, parse_json, read_bytes
from speculators.converted import algorithm_of, verifier_of
from speculators.errors import CheckpointError, OptionError, OutputError
from speculators.operations import cast
from speculators.progress import Progress, adding_up, unheard
from speculators.registry import Registry
from speculators.sources import Access
from speculators.sources.locations import is_name
from speculators.traces import Trace
from speculators.validation import check_files
from speculators.verifier import Verifier
from speculators.weights import Chunk, TensorInfo
from speculators.writer import Payload

if TYPE_CHECKING:
    from speculators.spec import ConverterSpec

LAYOUTS = ("native",)
"""What an output can be written as."""

DEFAULT_FILES: Mapping[str, str] = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
"""Kind of weight file → the name that training code gives to one."""

EXACT = {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}
"""Dtype of a source and of its output between which no value was rounded."""


@dataclass(frozen=True)
class ExportResult:
    """What `export_model` did.

    Attributes:
        output_path: The folder that holds the native checkpoint.
        source: What was exported, as the user named it, without secrets.
        algorithm: Name of the algorithm.
        weights: Name of the weight file, or of the index of shards.
        recorded: Whether the conversion had recorded where everything is; else the table was read backwards.
        written: Native name → the tensors of the output that it was made of.
        restored: Native name → which of the verifier's tensors it was restored from.
        missing: Native name → why it was left out by the conversion, and is not there now.
        rounded: Native name → the dtype that it had before the conversion rounded it.
        notes: What the user should know, one sentence each.
    """

    output_path: Path
    source: str
    algorithm: str
    weights: str
    recorded: bool
    written: dict[str, tuple[str, ...]]
    restored: dict[str, str]
    missing: dict[str, str]
    rounded: dict[str, str]
    notes: tuple[str, ...]


@dataclass
class _Export:
    """An output on its way back."""

    converted: Checkpoint
    traces: Mapping[str, Trace]
    config: bytes
    verifier: str | Path | None
    access: Access
    restored: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)

    def payloads(self) -> Iterator[Payload]:
        base: Verifier | None = None
        for name, trace in self.traces.items():
            info = TensorInfo(trace.dtype, trace.shape)
            if trace.pieces:
                yield self.moved(name, trace)
            elif trace.role:
                base = base or self.open_verifier(name, trace)
                self.restored[name] = f"the verifier's {trace.role}"
                yield Payload(name, info, _restored(name, trace, base))
            else:
                self.missing[name] = trace.why or "it was left out when it was converted"

    def moved(self, name: str, trace: Trace) -> Payload:
        stored = self.stored(name, trace)
        info = TensorInfo(stored, trace.shape)
        chunks: Iterable[Chunk] = list(self.stretches(name, trace, info))
        if stored == trace.dtype:
            return Payload(name, info, chunks)
        if (trace.dtype, stored) in EXACT:
            return Payload(name, TensorInfo(trace.dtype, trace.shape), cast(chunks, name, stored, trace.dtype))
        if not {trace.dtype, stored} <= {*dtypes.FLOATS}:
            raise CheckpointError(
                f"{self.converted.name} holds {name} as {stored}, which was {trace.dtype} in the source"
            )
        self.rounded[name] = trace.dtype
        return Payload(name, info, chunks)

    def stored(self, name: str, trace: Trace) -> str:
        kinds = set()
        for piece in trace.pieces:
            if piece.target not in self.converted.tensors:
                raise CheckpointError(f"{self.converted.name} holds no {piece.target}, of which {name} was made")
            kinds.add(self.converted.tensors[piece.target].dtype)
        if len(kinds) > 1:
            raise CheckpointError(f"{self.converted.name} holds the pieces of {name} as {', '.join(sorted(kinds))}")
        return kinds.pop()

    def stretches(self, name: str, trace: Trace, info: TensorInfo) -> Iterator[Chunk]:
        rest, size = info.nbytes, dtypes.SIZES[info.dtype]
        for piece in trace.pieces:
            start = piece.start * size
            stop = min(start + rest, self.converted.tensors[piece.target].nbytes)
            if stop <= start and rest:
                break
            yield self.converted.stretch(piece.target, start, stop)
            rest -= stop - start
        if rest:
            raise CheckpointError(f"{self.converted.name} holds {rest} bytes too few for {name} {info}")

    def open_verifier(self, name: str, trace: Trace) -> Verifier:
        try:
            base = Verifier(self.verifier or verifier_of(self.converted), self.access)
            found = base.find(trace.role)
        except CheckpointError as error:
            raise CheckpointError(
                f"{name} was left to the verifier's {trace.role}, which is needed: {error}"
            ) from error
        if found is None:
            raise CheckpointError(
                f"{name} was left to the verifier's {trace.role}, which {base.name} does not hold; pass --verifier"
            )
        return base


def _restored(name: str, trace: Trace, base: Verifier) -> Iterator[bytes]:
    """Yield the verifier's tensor as the source stored it, and compare it at the end with what the source held."""
    digest, refused = hashlib.sha256(), f"{name} cannot be restored from the verifier {base.name}: its {trace.role}"
    if base.shapes[trace.role] != trace.shape:
        raise CheckpointError(f"{refused} is {list(base.shapes[trace.role])}, expected {list(trace.shape)}")
    try:
        for chunk in base.stretches(trace.role, trace.dtype):
            digest.update(chunk)
            yield chunk
    except (OverflowError, ValueError) as error:
        raise CheckpointError(f"{refused} has no place in {trace.dtype}: {error}") from error
    if trace.sha256 and digest.hexdigest() != trace.sha256:
        raise CheckpointError(f"{refused} is not the one that was left out; pass the verifier of the conversion")


def export_model(
    converted: str | Path,
    *,
    output_path: str | Path = "exported",
    to: str = "native",
    verifier: str | Path | None = None,
    weights: str | None = None,
    max_shard_size: str | int | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress = unheard,
    registry: Registry | None = None,
) -> ExportResult:
    """Write an output in the layout of the training code, for engines that read that.

    Names, shapes, dtypes and bytes of tensors, and the config, are those of the checkpoint that was converted. Tensors
    that were left to the verifier are restored from it; those that nobody needs are named in the result.

    Args:
        converted: A model in the speculators format: a local path, a Hugging Face ID or a URL.
        output_path: Folder to write; there must be nothing yet.
        to: ``"native"``, the layout of the training code.
        verifier: The base model; the one that the output names by default. Read only where it is needed.
        weights: ``"safetensors"`` or ``"bin"``, the kind of weight file; that of the source by default.
        max_shard_size: Most bytes of tensors per safetensors file (``"5GB"``); one file by default.
        token: Token for the Hub; that of ``HF_TOKEN`` or of a login by default.
        cache_dir: Where downloads are kept; huggingface_hub's cache by default.
        offline: Whether nothing but the cache may be used, as where ``HF_HUB_OFFLINE`` says so.
        progress: Called with what is being done, and how many bytes of it are done of how many.
        registry: Where to look for the algorithm, which is needed only for outputs that do not say what they were made
            from; the installed plugins by default.

    Raises:
        SpeculatorsError: Anything that keeps the result from being what was converted. ``output_path`` is then as it
            was before.
    """
    for asked, known in ((to, LAYOUTS), (weights, (None, *DEFAULT_FILES))):
        if asked not in known:
            raise OptionError(f"{asked!r} is none of {', '.join(filter(None, known))}")
    shard_size = None if max_shard_size is None else writer.parse_size(max_shard_size)
    target = output.target_of(output_path, [each for each in (converted, verifier) if each is not None])
    output.check_vacant(target)
    access = Access(token, cache_dir, offline, progress)
    found = Checkpoint.at(converted, access)
    algorithm = algorithm_of(found)
    found.fetch()
    _require_unchanged(found)
    record = provenance.read_record(found)
    said = traces.of_record(record, f"{found.name}/{output.PROVENANCE_FILE}")
    recorded = said is not None and found.place.has(output.NATIVE_CONFIG_FILE)
    if said is not None and recorded:
        export = _Export(found, said, _recorded_config(found), verifier, access)
    else:
        spec = (registry or Registry()).get(algorithm).spec
        export = _Export(found, traces.of_table(spec, found), _made_config(found, spec), verifier, access)
    file = _weight_file(record if recorded else {}, weights)
    if shard_size is not None and not file.endswith(".safetensors"):
        raise OptionError(f"{file} is written as one file; pass --weights safetensors for shards")
    with output.staged(target) as folder, output.writing(target):
        payloads = list(export.payloads())
        report = adding_up(progress, "writing", sum(payload.info.nbytes for payload in payloads))
        writer.write_bytes(folder, output.CONFIG_FILE, export.config)
        sharded = len(writer.write_safetensors(folder, payloads, max_shard_size=shard_size, report=report)) > 1
        if not sharded:
            _rename_weights(folder, file)
        found.place.require_unchanged()
    return ExportResult(
        output_path=target,
        source=found.name,
        algorithm=algorithm,
        weights=output.INDEX_FILE if sharded else file,
        recorded=recorded,
        written={
            name: tuple(each.target for each in trace.pieces) for name, trace in export.traces.items() if trace.pieces
        },
        restored=export.restored,
        missing=export.missing,
        rounded=export.rounded,
        notes=tuple(_notes(record, recorded)),
    )


def _require_unchanged(converted: Checkpoint) -> None:
    for each in check_files(converted, read=True):
        if not each.passed:
            raise CheckpointError(f"{converted.name} is not as it was written: {each.detail}")


def _recorded_config(converted: Checkpoint) -> bytes:
    """Return the config that the conversion kept."""
    data = read_bytes(converted.place.path(output.NATIVE_CONFIG_FILE))
    parse_json(data, f"{converted.name}/{output.NATIVE_CONFIG_FILE}")
    return data


def _made_config(converted: Checkpoint, spec: ConverterSpec) -> bytes:
    """Return the config that training code would have saved, as the algorithm knows it."""
    made = spec.export_config(spec.config.read(converted.config))
    if made is None:
        raise CheckpointError(
            f"{converted.name} does not say what it was converted from, and {spec.name!r} makes no native config; "
            "convert the original again"
        )
    return (json.dumps(made, indent=2) + "\n").encode()


def _weight_file(record: Mapping[str, Any], asked: str | None) -> str:
    """Return the name of the weight file: that of the source, if it was one file of the wanted kind."""
    said = record.get("source")
    files = said.get("files") if isinstance(said, Mapping) else None
    named = [name for name in files if isinstance(name, str)] if isinstance(files, Mapping) else []
    held = [name for name in named if Path(name).suffix in FORMATS and is_name(name)]
    kinds, sharded = {_kind(name) for name in held}, any(name.endswith(INDEX) for name in named)
    if len(held) == 1 and not sharded and asked in (None, *kinds):
        return held[0]
    return DEFAULT_FILES[asked or (kinds.pop() if kinds else "safetensors")]


def _kind(name: str) -> str:
    return "safetensors" if name.endswith(".safetensors") else "bin"


def _rename_weights(folder: Path, file: str) -> None:
    """Give the safetensors file that was written its name, or turn it into what PyTorch writes."""
    written = folder / output.WEIGHTS_FILE
    if file.endswith(".safetensors"):
        if file != output.WEIGHTS_FILE and written.exists():
            written.rename(folder / file)
        return
    import torch
    from safetensors.torch import load_file

    tensors = load_file(written)  # maps the file: pages are read while they are written
    empty = {name: tensor.clone() for name, tensor in tensors.items() if not tensor.numel()}
    try:
        torch.save(dict(sorted({**tensors, **empty}.items())), folder / file)
    except RuntimeError as error:  # how a full disk reads
        raise OutputError(f"cannot write {file}: {error}; nothing was kept") from error
    del tensors
    written.unlink()


def _notes(record: Mapping[str, Any], recorded: bool) -> Iterator[str]:
    if not recorded:
        yield "it does not record what it was converted from: names are of the table, the config is made of its own"
        return
    with suppress(KeyError, TypeError, AttributeError):
        options = {name: value for name, value in record["converter"]["options"].items() if value not in (None, False)}
        if options:
            given = json.dumps(options, sort_keys=True)
            yield f"it was converted with {given}; engines that read the native layout must be told likewise"
