"""Tell how two checkpoints differ: their configs, and their tensors byte by byte and number by number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speculators import pairing, provenance
from speculators.checkpoint import Checkpoint
from speculators.comparing import Numbers, measure, same_bytes
from speculators.config import MODEL_TYPE_KEY
from speculators.converted import block_of
from speculators.errors import AlgorithmError, CheckpointError, MismatchError, OptionError, PluginError
from speculators.inspection import misfits_of
from speculators.pairing import Couple, Shelf, Standard
from speculators.progress import Progress, unheard
from speculators.registry import AUTO, Algorithm, Registry
from speculators.sources import Access
from speculators.spec import flatten
from speculators.verifier import Verifier
from speculators.weights import TensorInfo

EQUAL, BYTES, DTYPE, SHAPE, ONLY_A, ONLY_B = "equal", "bytes", "dtype", "shape", "only_a", "only_b"
"""What is to be said of a tensor in A and its counterpart in B: the first of these in which they differ, if they do."""

EVERYTHING, SHARED, EXPECTED, UNTOLD = "everything", "shared", "expected", "untold"
"""What is compared of two configs: every key; settings that both state, where one is native and one converted; what
a conversion would write now with what was written; or settings that both state, as that was asked for and cannot be
told, which is a difference."""

DEEPEST = 64
"""How deep blocks and lists of a config lie in others, at most."""

LAYERS = "transformer_layer_config"
"""Where outputs have the settings of their layers."""

DESCRIPTIVE = frozenset(
    {
        *("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "_name_or_path"),
        *("speculators_model_type", "speculators_version", "speculators_config"),
    }
)
"""Settings that say what a file is rather than what the draft computes, in which native and converted always differ."""

SHOWN_BY_TENSORS = frozenset(
    {
        *("vocab_size", "draft_vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_key_value_heads", "attention_bias", "qkv_bias", "mlp_bias"),
    }
)
"""Settings that a conversion takes from the tensors, whatever the native config says."""


@dataclass(frozen=True)
class ConfigDifference:
    """How two configs differ. Paths lead into nested blocks, as in ``rope_parameters.rope_theta``.

    Attributes:
        compared: ``"everything"``; ``"shared"`` where one is native and one converted: the settings that both state;
            ``"expected"``: what a conversion would write against what was written; or ``"untold"``: the settings that
            both state, because no conversion with the verifier that was named is possible.
        same: How many settings are the same.
        different: Path → values in A and in B.
        only_a: Path → value, of those that only A has.
        only_b: Path → value, of those that only B has.
        explained: Path → why values that differ are no contradiction.
    """

    compared: str
    same: int = 0
    different: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    only_a: Mapping[str, Any] = field(default_factory=dict)
    only_b: Mapping[str, Any] = field(default_factory=dict)
    explained: Mapping[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether nothing differs that is not explained."""
        contradicted = self.different.keys() - self.explained.keys() or self.only_a or self.only_b
        return not contradicted and self.compared != UNTOLD


@dataclass(frozen=True)
class TensorDifference:
    """A tensor of A and its counterpart in B.

    Attributes:
        a: Names in A: one, several that are joined to what B has, or none.
        b: Names in B, likewise.
        info_a: Dtype and shape in A; of a piece of a larger tensor, its own. ``None`` where A has none.
        info_b: Likewise in B.
        state: ``"equal"``, byte by byte; ``"bytes"``, ``"dtype"`` or ``"shape"`` where these differ; ``"only_a"`` or
            ``"only_b"`` where there is no counterpart.
        numbers: How their numbers differ; ``None`` where that was not compared: equal bytes, another shape, or
            eight-bit floats.
        why: How one came from the other, or why there is no counterpart; empty where nothing is to be said.
        explained: Whether it is no difference that there is no counterpart, for that reason.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    info_a: TensorInfo | None
    info_b: TensorInfo | None
    state: str
    numbers: Numbers | None = None
    why: str = ""
    explained: bool = False

    @property
    def equal(self) -> bool:
        """Whether nothing differs that is not explained."""
        return self.state == EQUAL or self.explained

    @property
    def renamed(self) -> bool:
        """Whether its names differ."""
        return bool(self.a and self.b) and self.a != self.b


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ.

    Attributes:
        a: The first, as the user named it, without secrets.
        b: The second.
        converted: Whether A and B are in the speculators format.
        algorithms: The algorithm that A and B are of; empty where none is known.
        config: How their configs differ.
        tensors: Every tensor of either, by name.
        notes: What the user should know, one sentence each.
    """

    a: str
    b: str
    converted: tuple[bool, bool]
    algorithms: tuple[str, str]
    config: ConfigDifference
    tensors: tuple[TensorDifference, ...]
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether both hold the same: what is equal byte by byte, moved by the table, or explained by it."""
        return self.config.equal and all(each.equal for each in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return it in types that JSON knows."""
        sides = [
            {"name": name, "kind": "converted" if converted else "native", "algorithm": algorithm or None}
            for name, converted, algorithm in zip((self.a, self.b), self.converted, self.algorithms, strict=True)
        ]
        config = self.config
        return {
            "equal": self.equal,
            "a": sides[0],
            "b": sides[1],
            "config": {
                "compared": config.compared,
                "equal": config.equal,
                "same": config.same,
                "different": {
                    path: {"a": a, "b": b, "explained": config.explained.get(path)}
                    for path, (a, b) in config.different.items()
                },
                "only_a": dict(config.only_a),
                "only_b": dict(config.only_b),
            },
            "tensors": [_tensor_to_dict(each) for each in self.tensors],
            "notes": list(self.notes),
        }


def diff_models(
    a: str | Path,
    b: str | Path,
    *,
    algorithm: str = AUTO,
    verifier: str | Path | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress = unheard,
    registry: Registry | None = None,
) -> Difference:
    """Compare two checkpoints, native or converted.

    Where one is native and the other converted, the algorithm's table says which tensor became which, and what was left
    out for a reason; two native ones of a family are compared whatever spellings and prefixes their names have.

    Args:
        a: A checkpoint: a local path, a Hugging Face ID (``org/name@revision:folder``) or a URL.
        b: Another one.
        algorithm: Name or alias of the algorithm whose table is used; ``"auto"`` for the one that a converted
            checkpoint names, or whose plugin recognises a native one.
        verifier: The base model, given likewise. With it, tensors that are left to it are compared with its own, and
            the config of a conversion with what would be written now.
        token: Token for the Hub; that of ``HF_TOKEN`` or of a login by default.
        cache_dir: Where downloads are kept; huggingface_hub's cache by default.
        offline: Whether nothing but the cache may be used.
        progress: Called with what is being done, and how many bytes of it are done of how many.
        registry: Where to look for algorithms; the installed plugins by default.

    Raises:
        SpeculatorsError: One of them cannot be read, or there is no such algorithm. That they differ is no exception.
    """
    access = Access(token, cache_dir, offline, progress)
    registry = registry or Registry()
    given = registry.get(algorithm) if algorithm != AUTO else None
    opened = _open(a, access), _open(b, access)
    base = None if verifier is None else Verifier(verifier, access)
    asked = _Question(opened, base, registry, given)
    couples = asked.couples()
    tensors = tuple(_compared(couples, progress))
    config = asked.config()
    for checkpoint in (*opened, *([base.checkpoint] if base else [])):
        checkpoint.place.require_unchanged()
    return Difference(
        opened[0].name,
        opened[1].name,
        asked.converted,
        asked.names,
        config,
        tensors,
        tuple(dict.fromkeys(asked.notes)),
    )


def _open(place: str | Path, access: Access) -> Checkpoint:
    checkpoint = Checkpoint.at(place, access, partly=True)
    level: list[Any] = [checkpoint.config]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inner(value)]
    if level:
        raise CheckpointError(f"the config of {checkpoint.name} is nested too deep, expected {DEEPEST} levels at most")
    return checkpoint


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


class _Question:
    """What is to be compared, and what is known about it."""

    def __init__(
        self,
        both: tuple[Checkpoint, Checkpoint],
        verifier: Verifier | None,
        registry: Registry,
        given: Algorithm | None,
    ) -> None:
        self.both = both
        self.verifier = verifier
        self.registry = registry
        self.notes: list[str] = []
        self.converted = (MODEL_TYPE_KEY in both[0].config, MODEL_TYPE_KEY in both[1].config)
        self.shelves = self._shelf(both[0]), self._shelf(both[1])
        self.algorithms = (given, given) if given else self._algorithms()

    @property
    def names(self) -> tuple[str, str]:
        """The algorithms that the two are of; what a conversion was made from need not have the same."""
        a, b = (algorithm.spec.name if algorithm else "" for algorithm in self.algorithms)
        return (a, b) if self.conversion is None else (a * self.converted[0], b * self.converted[1])

    @property
    def conversion(self) -> tuple[int, int] | None:
        """Which is native and which is converted; ``None`` where both are the same."""
        return None if self.converted[0] == self.converted[1] else ((1, 0) if self.converted[0] else (0, 1))

    def couples(self) -> list[Couple]:
        """Pair the tensors."""
        a, b = self.shelves
        if self.conversion is None:
            tables = [algorithm.spec.table if algorithm else None for algorithm in self.algorithms]
            if not self.converted[0]:
                if self.verifier is not None:
                    self.notes.append("both are native, so that nothing was compared with the verifier")
                return pairing.of_natives(a, b, *tables)
            standard = self._standard(a.checkpoint, self.algorithms[0])
            return pairing.of_outputs(a, b, standard) if standard else pairing.by_name(a, b)
        native, output = (self.shelves[side] for side in self.conversion)
        standard = self._standard(output.checkpoint, self.algorithms[self.conversion[1]])
        if standard is None:
            return pairing.by_name(a, b)
        couples = pairing.of_conversion(native, output, standard)
        return couples if self.conversion == (0, 1) else [couple.swapped for couple in couples]

    def config(self) -> ConfigDifference:
        """Compare the configs."""
        a, b = (checkpoint.config for checkpoint in self.both)
        algorithm = self.algorithms[self.conversion[1]] if self.conversion else None
        if self.conversion is None or algorithm is None:
            return _compare(EVERYTHING, leaves(a), leaves(b))
        native, output = (self.both[side] for side in self.conversion)
        compared, sides = EXPECTED, self._expected(native, output, algorithm)
        if sides is None:
            ours = leaves(_settings(flatten(native.config, algorithm.spec.nested)))
            theirs = leaves(_settings(output.config))
            sides = (
                {path: ours[path] for path in ours if path in theirs},
                {path: theirs[path] for path in ours.keys() & theirs},
            )
            compared = SHARED if self.verifier is None else UNTOLD
        difference = _compare(compared, *(sides[self.conversion.index(side)] for side in (0, 1)))
        if compared == EXPECTED:
            return difference
        return replace(difference, explained=self._explained(output, algorithm, *sides))

    def _explained(
        self, output: Checkpoint, algorithm: Algorithm, ours: Mapping[str, Any], theirs: Mapping[str, Any]
    ) -> dict[str, str]:
        """Say which settings differ for a good reason; there is none where the output's own tensors contradict it."""
        misfits = misfits_of(output, output.tensors if output.has_weights else {}, algorithm.spec)
        self.notes += [f"{output.name} is not fit to serve: {misfit}" for misfit in misfits]
        return {} if misfits else _explain(ours, theirs)

    def _shelf(self, checkpoint: Checkpoint) -> Shelf:
        if checkpoint.has_weights:
            return Shelf(checkpoint, checkpoint.tensors)
        self.notes.append(f"{checkpoint.name} holds no weights")
        return Shelf(checkpoint, {})

    def _algorithms(self) -> tuple[Algorithm | None, Algorithm | None]:
        if self.conversion is None:
            a, b = (self._algorithm(shelf, out) for shelf, out in zip(self.shelves, self.converted, strict=True))
            return a, b
        found = self._algorithm(self.shelves[self.conversion[1]], True)
        return found, found

    def _algorithm(self, shelf: Shelf, converted: bool) -> Algorithm | None:
        checkpoint = shelf.checkpoint
        try:
            if not converted:
                return self.registry.recognise(checkpoint) if shelf.tensors else None
            name = block_of(checkpoint.config).get("algorithm")
            if isinstance(name, str):
                return self.registry.get(name)
            self.notes.append(f"the config of {checkpoint.name} names no algorithm: names are compared as they are")
        except (AlgorithmError, PluginError) as error:
            if converted or isinstance(error, PluginError):
                self.notes.append(f"{error}: names of {checkpoint.name} are compared as they are")
        return None

    def _standard(self, output: Checkpoint, algorithm: Algorithm | None) -> Standard | None:
        """Return what an algorithm knows of an output, as far as the config can be read."""
        if algorithm is None:
            return None
        spec = algorithm.spec
        asked = {key.removeprefix("use_verifier_") for key, value in self._options(output).items() if value is True}
        standard = Standard(spec.table, verifier=self.verifier, asked=frozenset(asked))
        try:
            config = spec.config.read(output.config)
            parts = frozenset(spec.parts(config))
            return replace(standard, parts=parts, shapes=spec.table.shapes(spec.dims(config), parts))
        except (CheckpointError, PluginError) as error:
            self.notes.append(f"the config of {output.name} is not what {spec.name} writes: {error}")
        except (KeyError, ValueError) as error:
            self.notes.append(f"the config of {output.name} does not tell the sizes of its tensors: {error}")
        return standard

    def _options(self, output: Checkpoint) -> Mapping[str, Any]:
        """Return the options that an output says it was converted with."""
        options = self._converter(output).get("options")
        return options if isinstance(options, Mapping) else {}

    def _converter(self, output: Checkpoint) -> Mapping[str, Any]:
        try:
            said = provenance.read_record(output).get("converter")
        except CheckpointError as error:
            self.notes.append(str(error))
            return {}
        return said if isinstance(said, Mapping) else {}

    def _expected(
        self, native: Checkpoint, output: Checkpoint, algorithm: Algorithm
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return what a conversion would write now and what was written; ``None`` where the former cannot be told."""
        if self.verifier is None:
            return None
        from speculators.convert import examine, parse_options, require_dtype

        spec, said = algorithm.spec, self._converter(output)
        try:
            options = parse_options(algorithm, dict(self._options(output)))
            dtype = said.get("dtype") if isinstance(said.get("dtype"), str) else None
            require_dtype(dtype)
            context, facts, planned = examine(native, self.verifier, spec, options, dtype)
            if planned.findings:
                what = f"{native.name} cannot be converted as {spec.name!r} with this verifier:"
                raise MismatchError(what, planned.findings)
            config, _ = spec.configure(context, facts)
        except (CheckpointError, OptionError, PluginError) as error:
            self.notes.append(f"what a conversion would write cannot be told: {error}")
            return None
        return _without_origin(json.loads(config.to_json())), _without_origin(output.config)


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an output, but the version that wrote it and the name of its verifier."""
    origin = {"speculators_version", "speculators_config.verifier.name_or_path"}
    return {path: value for path, value in leaves(config).items() if path not in origin}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says the draft computes, an output's layers beside the rest."""
    layers = config.get(LAYERS)
    merged = {**config, **layers} if isinstance(layers, Mapping) else config
    return {
        key: value for key, value in merged.items() if key not in DESCRIPTIVE and key != LAYERS and value is not None
    }


def _explain(native: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, str]:
    """Say which settings a conversion changes for a good reason."""
    found = {path: "the tensors decide" for path in native if path in SHOWN_BY_TENSORS}
    before, after = (settings.get("max_position_embeddings") for settings in (native, output))
    if isinstance(before, int) and isinstance(after, int) and before < after:
        found["max_position_embeddings"] = "raised to the verifier's"
    return {path: why for path, why in found.items() if not _same(native[path], output[path])}


def leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return path → value of every setting, in nested blocks and lists of blocks too, in the order of the paths."""
    return dict(sorted(_leaves(config, ())))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterable[tuple[str, Any]]:
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        inner = ((str(number), each) for number, each in enumerate(value))
    found = [leaf for key, each in inner for leaf in _leaves(each, (*path, key))]
    return found or ([(".".join(map(_key, path)), value)] if path else [])


def _key(key: str) -> str:
    """Return a key as it stands in a path; one with a dot of its own is quoted."""
    return json.dumps(key) if "." in key else key


def _compare(compared: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> ConfigDifference:
    both = [path for path in a if path in b]
    different = {path: (a[path], b[path]) for path in both if not _same(a[path], b[path])}
    return ConfigDifference(
        compared,
        len(both) - len(different),
        different,
        {path: a[path] for path in a if path not in b},
        {path: b[path] for path in b if path not in a},
    )


def _same(a: Any, b: Any) -> bool:
    """Compare values of JSON: 1 is 1.0, but not true."""
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) or (_is_nan(a) and _is_nan(b))


def _is_nan(value: Any) -> bool:
    """Tell whether a value is NaN, which JSON does not have, but Python's does."""
    return isinstance(value, float) and math.isnan(value)


def _compared(couples: Iterable[Couple], progress: Progress) -> Iterable[TensorDifference]:
    """Compare the tensors that stand for each other, one after the other."""
    ordered = sorted(couples, key=lambda couple: tuple(half.names for half in (couple.a, couple.b) if half))
    total = sum(couple.a.data.info.nbytes for couple in ordered if couple.a and couple.b)
    before = 0
    for couple in ordered:

        def report(task: str, done: int, size: int, before: int = before) -> None:
            if before + done < total:
                progress(task, before + done, total)

        yield _difference(couple, report)
        if couple.a and couple.b and couple.a.data.info.nbytes:
            before += couple.a.data.info.nbytes
            progress("comparing", before, total)


def _difference(couple: Couple, progress: Progress) -> TensorDifference:
    a, b = couple.a, couple.b
    found = TensorDifference(
        a.names if a else (),
        b.names if b else (),
        a.data.info if a else None,
        b.data.info if b else None,
        EQUAL if a and b else ONLY_A if a else ONLY_B,
        why=couple.why,
        explained=couple.explained,
    )
    if a is None or b is None:
        return found
    if a.data.info.shape != b.data.info.shape:
        return replace(found, state=SHAPE)
    try:
        if a.data.info.dtype != b.data.info.dtype:
            return replace(found, state=DTYPE, numbers=measure(a.data, b.data))
        if same_bytes(a.data, b.data, progress):
            return found
        return replace(found, state=BYTES, numbers=measure(a.data, b.data))
    except PluginError as error:  # from what a table has made of a tensor
        return replace(found, state=BYTES, why=str(error))


def _tensor_to_dict(each: TensorDifference) -> dict[str, Any]:
    return {
        "a": list(each.a),
        "b": list(each.b),
        "state": each.state,
        "equal": each.equal,
        "stored_a": _info_to_dict(each.info_a),
        "stored_b": _info_to_dict(each.info_b),
        "numbers": _numbers_to_dict(each.numbers) if each.numbers else None,
        "why": each.why,
        "explained": each.explained,
    }


def _info_to_dict(info: TensorInfo | None) -> dict[str, Any] | None:
    return None if info is None else {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}


def _numbers_to_dict(numbers: Numbers) -> dict[str, Any]:
    return {**vars(numbers), "relative": numbers.relative}
