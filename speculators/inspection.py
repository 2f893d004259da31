"""Say what a checkpoint is: which algorithm's, or in the speculators format, what it holds, and what is odd about it.

Headers and ``config.json`` are read, no tensor. Why an algorithm recognises a checkpoint is its own affair; what speaks
for and against it is told from its table: which tensors have a row, which do not, and which are missing.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators import dtypes, provenance
from speculators.checkpoint import FORMATS, Checkpoint, may_hold_draft
from speculators.config import MODEL_TYPE_KEY, SpeculatorConfig
from speculators.converted import block_of, reference_of
from speculators.errors import CheckpointError, SpeculatorsError
from speculators.guard import HookError, stated, unguarded
from speculators.plan import Match, Matching, Rework, by_reason, fold, match
from speculators.progress import Progress, unheard
from speculators.registry import Algorithm, Registry
from speculators.sources import Access
from speculators.sources.locations import redacted_text
from speculators.spec import ConverterSpec, flatten, stated_values
from speculators.table import Shared, Split, Table, evaluate_shape, fill, symbols
from speculators.verifier import SHARED_TENSORS, text_config
from speculators.weights import TensorInfo

if TYPE_CHECKING:
    from speculators.validation import Check

NATIVE, CONVERTED, UNRECOGNISED = "native", "converted", "unrecognised"
"""What a checkpoint may be: of an installed algorithm's family, in the speculators format, or something else."""

CONVERTED_BLOCKS = ("transformer_layer_config",)
"""Blocks of a config in the speculators format that hold settings of the draft."""

HIGHLIGHTS = (
    "architectures",
    "model_type",
    "_name_or_path",
    "hidden_size",
    "target_hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
)
"""Keys of a config that are shown; those that an algorithm has options or fields for are shown as well."""

SAYING_THE_SAME = ("architectures", "model_type", "_name_or_path", "transformers_version")
"""Keys that nested blocks have of their own, so that other values are no contradiction."""

SIZE_KEYS = {"DV": "draft_vocab_size"}
"""Symbols of tables beside those of `speculators.decoder`, and the keys under which native configs state them."""


@dataclass(frozen=True)
class Evidence:
    """What speaks for and against one installed algorithm.

    Attributes:
        algorithm: Its name.
        package: The plugin package that brings it, with its version.
        recognises: Whether it takes the checkpoint for one of its family; ``None`` when it failed to tell.
        failure: How it failed; empty when it did not.
        seeks: What it looks for, in the words of its authors; empty when they do not say.
        matched: How many tensors have a row in its table.
        unmatched: Tensors that have none, those of numbered layers on one line.
        refused: Kinds of tensors that it cannot convert, each with why.
        missing: Tensors that it requires and that are not there.
    """

    algorithm: str
    package: str
    recognises: bool | None
    failure: str
    seeks: str
    matched: int
    unmatched: tuple[str, ...]
    refused: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class WeightFile:
    """A file with tensors: its name, its format (``"safetensors"`` or ``"pickle"``) and its size."""

    name: str
    format: str
    bytes: int


@dataclass(frozen=True)
class Tally:
    """How many tensors, numbers and bytes are stored in one dtype, as safetensors names it."""

    dtype: str
    tensors: int
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Setting:
    """A key of the config and its value; several where nested blocks contradict each other, what counts first."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Format:
    """What a model in the speculators format says about itself, and whether its tensors are those that it says.

    Attributes:
        type: Its ``speculators_model_type``.
        version: The version of speculators that wrote it; ``None`` when it does not say.
        algorithm: The algorithm that its config names; ``None`` when it names none.
        readers: Installed algorithms that read the type, with the packages that bring them.
        architectures: Classes of the verifier.
        speculative_tokens: Draft tokens per step.
        findings: What its tensors and files have that its config and record do not say, or the other way round;
            ``None`` when nothing that is installed reads the type, or there are no tensors.
        origin: What it was made from, as ``provenance.json`` says.
        converter: What made it, likewise.
    """

    type: str
    version: str | None
    algorithm: str | None
    readers: tuple[str, ...]
    architectures: tuple[str, ...]
    speculative_tokens: int | None
    findings: tuple[str, ...] | None
    origin: Mapping[str, Any]
    converter: Mapping[str, Any]


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, and what it holds.

    Attributes:
        source: What was looked at, as the user named it, without secrets.
        kind: ``"native"``, ``"converted"`` or ``"unrecognised"``.
        summary: What it is, in one sentence.
        algorithm: The algorithm that recognises it, or reads it; ``None`` when there is none, or not just one.
        evidence: What speaks for and against each installed algorithm; nothing for what is converted.
        broken: Installed plugins that were not asked, and why.
        format: What a converted model says about itself; ``None`` for others.
        files: The files with tensors; none where there is just a config.
        dtypes: What is stored in each dtype, most bytes first.
        parameters: How many floating-point numbers there are.
        bytes: Size of all tensors.
        tensors: Dtype and shape of each tensor by name.
        settings: What the config says, as far as it matters.
        verifier: The base model that it names; ``None`` when it names none.
        quirks: What is unusual about it, one sentence each.
    """

    source: str
    kind: str
    summary: str
    algorithm: str | None
    evidence: tuple[Evidence, ...]
    broken: tuple[str, ...]
    format: Format | None
    files: tuple[WeightFile, ...]
    dtypes: tuple[Tally, ...]
    parameters: int
    bytes: int
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    settings: tuple[Setting, ...]
    verifier: str | None
    quirks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it in types that JSON knows."""
        tensors = {name: asdict(info) | {"bytes": info.nbytes} for name, info in self.tensors.items()}
        return {**asdict(self), "tensors": tensors}


def inspect_model(
    source: str | Path,
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress = unheard,
    registry: Registry | None = None,
) -> Inspection:
    """Say what any checkpoint is: native or in the speculators format, or something else, such as a base model.

    Args:
        source: A local path, a Hugging Face ID (``org/name@revision:folder``) or a URL.
        token: Token for the Hub; that of ``HF_TOKEN`` or of a login by default.
        cache_dir: Where downloads are kept; huggingface_hub's cache by default.
        offline: Whether nothing but the cache may be used, as where ``HF_HUB_OFFLINE`` says so.
        progress: Called with what is being done, and how many bytes of it are done of how many.
        registry: Where to look for algorithms; the installed plugins by default.

    Raises:
        SpeculatorsError: It cannot be read. What no algorithm recognises is no error.
    """
    checkpoint = _open(source, Access(token, cache_dir, offline, progress))
    registry = registry or Registry()
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        tensors = checkpoint.tensors if checkpoint.has_weights else {}
    config, files = checkpoint.config, _files(checkpoint)
    quirks = [*(str(remark.message) for remark in remarks), *_beside(checkpoint, files)]
    evidence: list[Evidence] = []
    chosen: Algorithm | None
    blocks: tuple[str, ...]
    said, verifier = None, None
    if MODEL_TYPE_KEY in config:
        kind = CONVERTED
        readers = [each for each in registry.algorithms if _type_of(each.spec) == config[MODEL_TYPE_KEY]]
        named = block_of(config).get("algorithm")
        chosen = next((each for each in readers if each.spec.name == named), readers[0] if readers else None)
        said = _format(checkpoint, tensors, readers, chosen)
        blocks, verifier = CONVERTED_BLOCKS, _verifier(config)
    else:
        evidence = [_weigh(each, checkpoint) for each in registry.algorithms] if tensors else []
        fitting = [each.algorithm for each in evidence if each.recognises]
        kind = NATIVE if fitting else UNRECOGNISED
        chosen = registry.get(fitting[0]) if len(fitting) == 1 else None
        blocks = chosen.spec.nested if chosen else ()
        config = config if chosen else text_config(config)
    if kind == NATIVE and chosen:
        quirks += _quirks(checkpoint, chosen.spec)
    settings = _settings(config, blocks, chosen.spec if chosen else None)
    quirks += [
        f"config.json says {each.key} both {' and '.join(map(json.dumps, each.values))}"
        for each in settings
        if len(each.values) > 1
    ]
    tallies = _tallies(tensors)
    return Inspection(
        source=checkpoint.name,
        kind=kind,
        summary=_summary(config, evidence, said, chosen, bool(files)),
        algorithm=chosen.spec.name if chosen else None,
        evidence=tuple(evidence),
        broken=tuple(map(str, registry.broken)),
        format=said,
        files=files,
        dtypes=tallies,
        parameters=sum(each.numbers for each in tallies if _is_floating(each.dtype)),
        bytes=sum(each.bytes for each in tallies),
        tensors=tensors,
        settings=settings,
        verifier=verifier,
        quirks=tuple(quirks),
    )


def _open(source: str | Path, access: Access) -> Checkpoint:
    """Open a checkpoint of which nothing but headers will be asked for."""
    return Checkpoint.at(source, access, partly=True)


def _files(checkpoint: Checkpoint) -> tuple[WeightFile, ...]:
    read = {name: said["size"] for name, said in checkpoint.files_read.items() if Path(name).suffix in FORMATS}
    return tuple(
        WeightFile(name, "safetensors" if name.endswith(".safetensors") else "pickle", size)
        for name, size in sorted(read.items())
    )


def _beside(checkpoint: Checkpoint, files: tuple[WeightFile, ...]) -> list[str]:
    """Name weight files that lie beside those that are read."""
    read = {file.name for file in files}
    if not files or checkpoint.place.file is not None:
        return []
    others = [name for name in checkpoint.place.listing() if Path(name).suffix in FORMATS and name not in read]
    return [f"{name} lies beside the weights that are read, and is not" for name in filter(may_hold_draft, others)]


def _tallies(tensors: Mapping[str, TensorInfo]) -> tuple[Tally, ...]:
    found = []
    for dtype in {info.dtype for info in tensors.values()}:
        held = [info for info in tensors.values() if info.dtype == dtype]
        size = sum(info.nbytes for info in held)
        found.append(Tally(dtype, len(held), size // dtypes.SIZES[dtype], size))
    return tuple(sorted(found, key=lambda tally: (-tally.bytes, tally.dtype)))


def _is_floating(dtype: str) -> bool:
    return dtype in dtypes.FLOATS or dtype.startswith("F8")


def _weigh(algorithm: Algorithm, source: Checkpoint) -> Evidence:
    spec = algorithm.spec
    matching = match(spec.table, source.tensors)
    recognises, failure = None, ""
    try:
        recognises = spec.recognises(source)
    except HookError as error:
        failure = error.what
    except SpeculatorsError as error:  # which it may raise of its own accord, but should not
        failure = str(error)
    seeks = " ".join((unguarded(spec).recognises.__doc__ or "").split("\n\n")[0].split())
    return Evidence(
        algorithm=spec.name,
        package=algorithm.origin,
        recognises=recognises,
        failure=failure,
        seeks=seeks,
        matched=len(source.tensors) - len(matching.unmatched) - len(matching.refused),
        unmatched=tuple(fold(matching.unmatched, source.tensors)),
        refused=tuple(f"{names}: {why}" for why, names in by_reason(matching.refused).items()),
        missing=tuple(fold(_missing(spec.table, matching))),
    )


def _missing(table: Table, matching: Matching) -> Iterator[str]:
    """Yield tensors without which no checkpoint of these layers and parts is whole, with their shapes in symbols."""
    made = {fill(target, rework.numbers) for rework in matching.reworked for target in rework.row.targets}
    counts = _counts(matching)
    for row in table.moving:
        if isinstance(row, Shared) or (row.part and not matching.present(row.part)):
            continue
        try:
            expansions = row.expansions({symbol: counts.get(symbol, 1) for symbol in row.bounds})
        except ValueError as error:  # a number that no draft has
            yield str(error)
            continue
        for numbers in expansions:
            sources = [fill(name, numbers) for name in row.derive.sources] if row.derive else []
            there = row.numbered(numbers) in matching.moves or row.numbered(numbers) in made
            if not there and not (sources and all(name in matching.moves for name in sources)):
                yield f"{fill(row.name, numbers)} [{row.shape}]"


def _counts(matching: Matching) -> dict[str, int]:
    """Return how far the numbers go that stand in the places of each symbol."""
    counts: dict[str, int] = {}
    numbered: list[Match | Rework] = [*matching.moves.values(), *matching.reworked]
    for found in numbered:
        for symbol, number in zip(found.row.stops, found.numbers, strict=True):
            counts[symbol] = max(counts.get(symbol, 0), number + 1)
    return counts


def _quirks(checkpoint: Checkpoint, spec: ConverterSpec) -> Iterator[str]:
    """Say what is unusual about a checkpoint of a family, as far as its table and its config tell."""
    tensors, table = checkpoint.tensors, spec.table
    matching = match(table, tensors)
    stripped = {name: table.spellings(name)[-1] for name in tensors if name not in matching.unmatched}
    prefixes = Counter(name.removesuffix(bare) for name, bare in stripped.items() if name != bare)
    for prefix, count in sorted(prefixes.items()):
        yield f"{count} of {len(tensors)} names begin with {prefix!r}, which is passed over"
    spelled = Counter(
        _difference(stripped[name], native)
        for native, name in matching.native.items()
        if name in stripped and stripped[name] != native
    )
    for (ours, theirs), count in spelled.items():
        yield f"{count} of {len(tensors)} names have {ours!r} where training code has {theirs!r}"
    yield from matching.doubled
    for rework in matching.reworked:
        targets = " and ".join(fill(target, rework.numbers) for target in rework.row.targets)
        how = "holds several tensors, and is cut into" if isinstance(rework.row, Split) else "is stored as a piece of"
        yield f"{rework.source} {how} {targets}"
    yield from (f"{names} would be left out: {why}" for why, names in by_reason(matching.dropped).items())
    yield from (f"{names}: {why}" for why, names in by_reason(matching.refused).items())
    yield from _contradictions(checkpoint, spec, matching)


def _difference(name: str, other: str) -> tuple[str, str]:
    """Return two names without the dotted parts at the end that are the same, but with one part at least."""
    parts, others = name.split("."), other.split(".")
    while min(len(parts), len(others)) > 1 and parts[-1] == others[-1]:
        parts.pop()
        others.pop()
    return ".".join(parts), ".".join(others)


def _contradictions(checkpoint: Checkpoint, spec: ConverterSpec, matching: Matching) -> Iterator[str]:
    """Compare what the config says with what tensors show without a verifier: their sizes and their dtype."""
    from speculators import decoder

    settings = flatten(checkpoint.config, spec.nested)
    used = {symbol for row in spec.table.moving for symbol in symbols(row.shape)}
    if used.issuperset({"heads", "kv_heads", "head_dim"}):  # the symbols of `decoder`, which mean the same everywhere
        keys = decoder.CONFIG_KEYS | SIZE_KEYS
        heads = settings.get(keys["heads"])
        shown = _sizes(checkpoint.tensors, matching, {"heads": heads} if type(heads) is int and heads > 0 else {})
        for symbol, size in shown.items():
            said = settings.get(keys.get(symbol, ""))
            if said is not None and said != size:
                yield f"config.json says {keys[symbol]} {said!r}, the tensors say {size}"
    said = str(settings.get("dtype") or settings.get("torch_dtype") or "").removeprefix("torch.")
    stored = [each.dtype for each in _tallies(checkpoint.tensors) if each.dtype in dtypes.FLOATS]
    if said and stored and dtypes.TORCH_NAMES[stored[0]] != said:
        yield f"config.json says dtype {said!r}, most tensors are stored as {dtypes.TORCH_NAMES[stored[0]]}"


def _sizes(tensors: Mapping[str, TensorInfo], matching: Matching, known: Mapping[str, int]) -> dict[str, int]:
    """Work out symbols of shapes, one after another, where a dimension has but one that is not known."""
    sizes, before = dict(known), -1
    while before < len(sizes):
        before = len(sizes)
        for found in matching.moves.values():
            shape = tensors[found.source].shape
            products = found.row.shape.split(",")
            for product, size in zip(products, shape, strict=False) if len(products) == len(shape) else ():
                factors = symbols(product)
                unknown = [factor for factor in factors if not factor.isdigit() and factor not in sizes]
                rest = evaluate_shape("*".join(each for each in factors if each not in unknown) or "1", sizes)[0]
                if len(unknown) == 1 and rest and size and not size % rest:
                    sizes[unknown[0]] = size // rest
    return sizes | {symbol: count for symbol, count in _counts(matching).items() if symbol == "L"}


def _settings(config: Mapping[str, Any], blocks: tuple[str, ...], spec: ConverterSpec | None) -> tuple[Setting, ...]:
    flat = flatten(config, blocks)
    own = [*spec.options.model_fields, *spec.config.model_fields] if spec else []
    keys = dict.fromkeys((*HIGHLIGHTS, *(key for key in sorted(own) if key not in SpeculatorConfig.model_fields)))
    settings = []
    for key in keys:
        if key in flat and key not in blocks:
            values = stated_values(config, blocks, key) if key not in SAYING_THE_SAME else []
            settings.append(Setting(key, tuple(map(_without_secrets, values or [flat[key]]))))
    return tuple(settings)


def _type_of(spec: ConverterSpec) -> Any:
    return spec.config.model_fields[MODEL_TYPE_KEY].default


def _verifier(config: Mapping[str, Any]) -> str | None:
    named = reference_of(config).get("name_or_path")
    return redacted_text(named) if isinstance(named, str) and named else None


def _format(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], readers: list[Algorithm], chosen: Algorithm | None
) -> Format:
    config = checkpoint.config
    findings: list[str] = []
    try:
        record = provenance.read_record(checkpoint)
    except CheckpointError as error:
        record, findings = {}, [str(error)]
    if chosen is not None:
        findings += misfits_of(checkpoint, tensors, chosen.spec)
    named, version = block_of(config).get("algorithm"), config.get("speculators_version")
    architectures = reference_of(config).get("architectures")
    methods = block_of(config).get("proposal_methods")
    method = methods[0] if isinstance(methods, list) and methods else None
    tokens = method.get("speculative_tokens") if isinstance(method, Mapping) else None
    return Format(
        type=str(config[MODEL_TYPE_KEY]),
        version=version if isinstance(version, str) else None,
        algorithm=named if isinstance(named, str) else None,
        readers=tuple(f"{each.spec.name} ({each.origin})" for each in readers),
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        speculative_tokens=tokens if type(tokens) is int else None,
        findings=tuple(findings) if chosen and tensors else None,
        origin=_object(record, "source"),
        converter=_object(record, "converter"),
    )


def _object(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = record.get(key)
    return _without_secrets(found) if isinstance(found, Mapping) else {}


def _without_secrets(value: Any) -> Any:
    """Return what a stranger wrote with every URL in it redacted."""
    if isinstance(value, Mapping):
        return {key: _without_secrets(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_secrets(each) for each in value]
    return redacted_text(value) if isinstance(value, str) else value


def misfits_of(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], spec: ConverterSpec) -> list[str]:
    """Compare the tensors of a converted model with its config, and its files, if they are here, with its record."""
    from speculators.validation import check_files, compare_tensors

    try:
        config = spec.config.read(checkpoint.config)
        shapes = _shared_shapes(spec, config)
        findings = compare_tensors(tensors, spec, config, shapes)
    except SpeculatorsError as error:
        return [str(error)]
    files: list[Check] = check_files(checkpoint, read=False) if checkpoint.place.local is not None else []
    return [*findings, *(check.detail for check in files if not check.passed)]


def _shared_shapes(spec: ConverterSpec, config: SpeculatorConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the verifier's tensors that drafts share, as far as an output's config tells them."""
    sizes, _ = stated(spec, config)
    if sizes.keys() >= {"vocab_size", "target_hidden_size"}:
        return dict.fromkeys(SHARED_TENSORS, (sizes["vocab_size"], sizes["target_hidden_size"]))
    dims = spec.dims(config)
    return {row.verifier: evaluate_shape(row.shape, dims) for row in spec.table.moving if isinstance(row, Shared)}


def _summary(
    config: Mapping[str, Any],
    evidence: list[Evidence],
    said: Format | None,
    chosen: Algorithm | None,
    has_weights: bool,
) -> str:
    if said is not None:
        by = f"written by speculators {said.version}" if said.version else "written by an unknown version"
        reader = f"{chosen.spec.name} ({chosen.origin}) reads it" if chosen else "no installed algorithm reads it"
        return f"a model in the speculators format, type {said.type!r}, {by}; {reader}"
    fitting = [each.algorithm for each in evidence if each.recognises]
    if chosen is not None:
        return f"a native checkpoint, recognised as {chosen.spec.name} ({chosen.origin})"
    if fitting:
        return f"a native checkpoint that could be any of {', '.join(fitting)}; choose one with --algorithm"
    names = config.get("architectures")
    names = ", ".join(map(str, names)) if isinstance(names, list) and names else "no architecture"
    kind = f", model_type {config['model_type']!r}" if config.get("model_type") else ""
    why = "no installed algorithm recognises it" if has_weights else "it holds no weights that an algorithm could be by"
    return f"{why}; its config says {names}{kind}"
