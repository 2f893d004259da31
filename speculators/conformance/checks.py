"""The checks: each is a function of a `Bench`, which raises `NonconformanceError` with what is wrong and what to do."""

from __future__ import annotations

import difflib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators import examples
from speculators.checkpoint import Checkpoint
from speculators.conformance.bench import Bench, NonconformanceError, Tensors, contents, files, require
from speculators.conformance.disk import full_disk
from speculators.dtypes import FLOATS
from speculators.errors import CheckpointError, OptionError, PluginError, SpeculatorsError, described
from speculators.export import export_model
from speculators.guard import guarded, own_classes, shown, unguarded
from speculators.output import CARD_FILE, CONFIG_FILE, NATIVE_CONFIG_FILE, PROVENANCE_FILE
from speculators.spec import ConverterSpec
from speculators.table import Drop, Refuse, Split, fill, symbols
from speculators.weights import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from speculators.config import SpeculatorConfig
    from speculators.convert import Conversion
    from speculators.draft import Draft
    from speculators.parity import Batch

TOLERANCE = 1e-4
"""Largest difference to reference outputs over the largest value, in float32."""

REFERENCE: Mapping[str, tuple[tuple[int, ...], bool]] = {
    "draft_input_ids": ((2,), False),
    "verifier_hidden_states": ((3,), True),
    "draft_logits": ((3, 4), True),
}
"""Tensors that a file of reference outputs must hold → how many dimensions, and whether they hold fractions."""

MORE_REFERENCE = ("draft_hidden_states", "draft_token_ids", "chain_token_ids", "input_ids")
"""Those that it may hold, too."""

STATES_TOLERANCE = 1e-2
"""Largest difference to the verifier's states over the largest value: it may have run in another dtype."""

WRITTEN = (".safetensors", ".json")
"""Endings of what an output consists of."""

SEES = 1e-5
"""Largest difference over the largest value that is no effect of another token."""


def check_found(bench: Bench) -> None:
    """The registry finds the plugin under its name, and nothing keeps it from being used."""
    require(bench.spec.name == bench.name, f"{bench.name!r} is an alias; the algorithm is called {bench.spec.name!r}")


def check_described(bench: Bench) -> None:
    """Users are told what it is: summary, reference, every option; no member is misspelt."""
    spec, owner = bench.spec, type(unguarded(bench.spec))
    where = owner.__qualname__
    require(bool(spec.summary.strip()) and "\n" not in spec.summary, f"{where}.summary must be one line")
    require(spec.reference.startswith(("https://", "http://")), f"{where}.reference must be the URL of a paper or code")
    for name, option in spec.options.model_fields.items():
        require(bool(option.description), f"the option {name!r} has no description, which --list-algorithms shows")
    known = {name for name in (*vars(ConverterSpec), *ConverterSpec.__annotations__) if not name.startswith("_")}
    own = {name for each in own_classes(spec) for name in vars(each)}
    for name in sorted(name for name in own - known if not name.startswith("_")):
        meant = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        require(not meant, f"{where}.{name} is no member of a spec, and nothing calls it; {''.join(meant)} is meant?")


LOADING = """
import sys
from speculators.registry import Registry
Registry().get(sys.argv[1])
print()  # ends what the plugin may have printed
print(*sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def check_light(bench: Bench) -> None:
    """Importing the plugin imports neither torch nor transformers, which would slow every command down."""
    heavy = bench.in_a_new_process(LOADING, bench.name).split("\n")[-2].split()
    require(
        not heavy,
        f"importing the plugin imports {' and '.join(heavy)}; import it in build() and in operations, or in a module "
        "that only these import",
    )


def check_recognised(bench: Bench) -> None:
    """``--algorithm auto`` finds it for its own checkpoint."""
    require(
        bench.spec.recognises(bench.source),
        f"recognises() says no to {bench.source.name}, with the tensors {', '.join(list(bench.source.tensors)[:4])}",
    )


def check_distinct(bench: Bench) -> None:
    """It takes no other family's checkpoint for its own, nor a base model, and no other plugin takes its own."""
    if bench.base.weights is not None:
        require(not bench.spec.recognises(bench.base.weights), "recognises() says yes to a base model")
    place = bench.place("foreign")
    scalars = {name: (TensorInfo("F32", ()), bytes(4)) for name in bench.tensors}
    bench.spec.recognises(Checkpoint(bench.damaged(place / "scalars", scalars)))  # whatever it says
    stranger = bench.damaged(place / "stranger", {"weight": (TensorInfo("I64", (0,)), b"")})
    (stranger / CONFIG_FILE).write_text('{"architectures": null, "model_type": 0}')
    require(not bench.spec.recognises(Checkpoint(stranger)), "recognises() says yes to a checkpoint without any draft")
    for other in bench.registry.algorithms:
        if other.spec.name == bench.name:
            continue
        require(
            not other.spec.recognises(bench.source),
            f"{other.spec.name} ({other.origin}) recognises this checkpoint, too, so 'auto' cannot choose",
        )
        try:
            draft, _, _ = examples.write_example(other.spec, bench.place("other") / "files")
        except PluginError:
            continue  # it brings none, or a wrong one, which is for its own authors to hear
        require(
            not bench.spec.recognises(Checkpoint(draft)),
            f"recognises() says yes to a checkpoint of {other.spec.name} ({other.origin})",
        )


def check_accounted(bench: Bench) -> None:
    """Every tensor goes somewhere, and none is dropped but those that are no part of the draft."""
    _require_one_row(bench)
    result, conversion = bench.converted, bench.prepare()
    lost = bench.source.tensors.keys() - result.renamed.keys() - result.reworked.keys() - result.dropped.keys()
    used = {name for made in conversion.derivations for name in made.sources}
    moves = conversion.context.matching.moves
    shared = {moves[target].source for target in conversion.from_verifier if target in moves}
    require(lost <= used, f"{', '.join(sorted(lost - used))}: neither written nor dropped")
    for name in sorted(result.dropped.keys() - shared - {*bench.dropped}):
        advice = "if it is no part of the draft, list it in 'dropped'"
        raise NonconformanceError(f"{name} is dropped ({result.dropped[name]}); {advice}")
    made = {*result.renamed.values(), *(each for several in result.reworked.values() for each in several)}
    invented = bench.output.tensors.keys() - made - result.completed.keys()
    require(not invented, f"{', '.join(sorted(invented))}: written, and nothing says what from")


def _require_one_row(bench: Bench) -> None:
    table = bench.spec.table
    for name in bench.tensors:
        rows = [row for spelling in table.spellings(name) for row in table.rows if row.regex.fullmatch(spelling)]
        hiding = [row for row in rows if isinstance(row, Drop | Refuse)]
        meant = [row for row in rows if row not in hiding]
        require(
            not (hiding and meant),
            f"the row {' and '.join(f'{type(row).__name__}({row.source!r})' for row in hiding)} takes {name}, which "
            f"{' and '.join(f'{type(row).__name__}({row.source!r})' for row in meant)} would write",
        )


def check_unchanged(bench: Bench) -> None:
    """What is read back has the source's bits, dtypes and shapes."""
    written = contents(bench.output)
    for source, target in bench.converted.renamed.items():
        require(written.get(target) == bench.tensors[source], f"{target} is not, bit for bit, {source}")
    for made in bench.prepare().derivations:
        if made.reworks and len(made.sources) > 1:
            joined = b"".join(bench.tensors[name][1] for name in made.sources)
            require(written[made.target][1] == joined, f"{made.target} is not {' and '.join(made.sources)} joined")
    for each in bench.prepare().context.matching.reworked:
        if isinstance(each.row, Split):
            pieces = [fill(target, each.numbers) for target in each.row.targets]
            joined = b"".join(written[piece][1] for piece in pieces)
            require(joined == bench.tensors[each.source][1], f"{' and '.join(pieces)} are not {each.source} cut")


CONVERTING = """
import json, sys
from speculators.convert import convert_model
convert_model(**json.loads(sys.argv[1]))
"""


ELSEWHERE = (
    {"PYTHONHASHSEED": "1", "TZ": "WEST+12"},
    {"PYTHONHASHSEED": "2", "TZ": "EAST-14"},
)
"""Environments in which sets have other orders, and in which it is never the same day."""


def check_reproducible(bench: Bench) -> None:
    """The same checkpoint gives the same bytes, in other processes with other orders of sets and other clocks, too."""
    place, first = bench.place("again"), bench.converted.output_path
    since = time.time() - (first / CONFIG_FILE).stat().st_mtime
    time.sleep(min(1.0, max(0.0, 1 - since)))  # a time in seconds is another one then

    def convert(environment: Mapping[str, str]) -> Path:
        out = place / environment["PYTHONHASHSEED"]
        arguments = {
            "model": str(bench.places[0]),
            "verifier": str(bench.places[1]),
            "algorithm": bench.name,
            "output_path": str(out),
            "validate": False,
            **bench.options,
        }
        bench.in_a_new_process(CONVERTING, json.dumps(arguments), **environment)
        return out

    with ThreadPoolExecutor() as threads:
        for again in threads.map(convert, ELSEWHERE):
            _require_same(files(first), files(again))


def _require_same(first: Mapping[str, bytes], again: Mapping[str, bytes]) -> None:
    for name in sorted(first, key=lambda name: (name == CARD_FILE, name)):  # the card repeats what others say
        if again.get(name) != first[name]:
            what = f"{name} ({_changed(first[name], again[name])})" if name.endswith(".json") else name
            raise NonconformanceError(
                f"{what} differs between two conversions: something in it depends on time, chance or a set's order"
            )


def check_round_trip(bench: Bench) -> None:
    """The config is read back as it was written, and gives the sizes and parts that it was written for."""
    text = (bench.converted.output_path / CONFIG_FILE).read_text(encoding="utf-8")
    facts, schema = bench.prepare().facts, bench.spec.config.__name__
    # Another process reads it, whose spec has examined nothing.
    spec = guarded(type(unguarded(bench.spec))(), bench.algorithm.origin)
    require(bench.config.to_json() == text, f"{schema} changes what it reads: {_changed(text, bench.config.to_json())}")
    dims = spec.dims(bench.config)
    used = {symbol for row in spec.table.moving for symbol in (*symbols(row.shape), *row.bounds)}
    for symbol in sorted(used & facts.dims.keys()):
        require(symbol in dims, f"dims() of the written config has no {symbol}, which the table uses")
        require(
            dims[symbol] == facts.dims[symbol],
            f"examine() says {symbol} is {facts.dims[symbol]}, dims() of the written config {dims[symbol]}",
        )
    told, kept = sorted(facts.parts & {*spec.table.parts}), sorted(spec.parts(bench.config))
    require(told == kept, f"examine() finds the parts {told}, parts() of the written config {kept}")
    reader = bench.config.speculators_config.algorithm
    try:
        bench.registry.get(reader).spec.config.read(bench.output.config)
    except SpeculatorsError as error:
        raise NonconformanceError(
            f"the written config says that {reader!r} reads it, and that does not: {error}; give common_fields() the "
            "name of the algorithm that does"
        ) from error
    other = {**bench.output.config, "speculators_model_type": "something-else"}
    try:
        spec.config.read(other)
    except CheckpointError:
        return
    raise NonconformanceError(f"{schema} reads configs of any type; narrow speculators_model_type to a Literal")


def _changed(before: str | bytes, after: str | bytes) -> str:
    old, new = json.loads(before), json.loads(after)
    names = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return ", ".join(f"{key} {shown(old.get(key))} becomes {shown(new.get(key))}" for key in names) or "its layout"


def check_asked(bench: Bench) -> None:
    """What is asked for with ``dtype`` and ``speculative_tokens`` is what is written, and runs."""
    methods = bench.prepare(speculative_tokens=1).config.speculators_config.proposal_methods
    said = sorted({method.speculative_tokens for method in methods})
    require(said == [1], f"with the option speculative_tokens=1 the config proposes {said}; use common_fields()")
    dtype = "bfloat16" if bench.config.dtype != "bfloat16" else "float32"
    cast = Checkpoint(bench.convert(bench.place("cast") / "out", dtype=dtype).output_path)
    found = cast.config.get("dtype")
    require(found == dtype, f"with dtype={dtype!r} the config says dtype {found!r}; use common_fields()")
    _require_sound(bench, cast, bench.prepare(dtype), f"with dtype={dtype!r}, ")


def check_alternatives(bench: Bench) -> None:
    """What ``--diagnose`` tries is what converting with that value of the option gives."""
    schema = bench.spec.options
    for other in bench.spec.alternatives(bench.config, bench.base):
        value = f"{other.option}={json.dumps(other.value)}"
        require(other.option in schema.model_fields, f"alternatives() changes {other.option!r}, which is no option")
        require(
            not _refuses(schema, {**bench.options, other.option: other.value}),
            f"alternatives() has {value}, which is refused",
        )
        require(other.config != bench.config, f"alternatives() has {value}, which changes nothing")
        try:
            made = bench.prepare(**{other.option: other.value}).config
        except (CheckpointError, OptionError):
            continue  # the checkpoint says otherwise, and the user is told to correct it
        require(
            made.to_json() == other.config.to_json(),
            f"alternatives() has another config for {value} than converting with it gives: "
            f"{_changed(made.to_json(), other.config.to_json())}",
        )


def check_strict(bench: Bench) -> None:
    """Misspelt and ill-typed options are refused, and the defaults are what a user could have given."""
    schema, given = bench.spec.options, dict(bench.options)
    known = {*schema.model_fields, *(option.alias for option in schema.model_fields.values() if option.alias)}
    required = [name for name, option in schema.model_fields.items() if option.is_required() and name not in given]
    if required:
        return  # nothing is accepted without them, and nobody gave them
    require(not _refuses(schema, given), f"{schema.__name__} refuses the options of this test, {shown(given)}")
    for name, option in schema.model_fields.items():
        typo = f"{name}s"
        require(
            typo in known or _refuses(schema, given | {typo: 1}),
            f"{schema.__name__} takes the misspelt option {typo!r}",
        )
        default = None if option.is_required() else option.get_default(call_default_factory=True)
        fits = option.is_required() or not _refuses(schema, given | {name: default})
        require(fits, f"the default of the option {name!r} is {shown(default)}, which the option does not take")
        kinds = json.dumps(schema.model_json_schema()["properties"].get(name, {}))
        lax = '"string"' not in kinds and not all(_refuses(schema, given | {name: text}) for text in ("1", "true"))
        require(not lax, f"the option {name!r} takes text for {option.annotation}; keep the schema strict")
    require(_refuses(schema, given | {"no_such_option": 1}), f"{schema.__name__} takes an option that there is not")


def _refuses(schema: Any, given: Mapping[str, Any]) -> bool:
    from pydantic import ValidationError

    try:
        schema.model_validate(given)
    except ValidationError:
        return True
    return False


def check_forward(bench: Bench) -> None:
    """The converted draft runs, and computes what its source computes in the plugin's own words (`original`)."""
    import torch

    with torch.device("meta"):
        made = bench.spec.build(bench.config)
    unreal = [name for name, buffer in made.named_buffers() if buffer.is_meta]
    require(
        not unreal,
        f"build() makes the buffers {', '.join(unreal)}, which hold nothing, as it is called under "
        "torch.device('meta'); compute them in forward(), or under torch.device('cpu')",
    )
    _require_sound(bench, bench.output, bench.prepare())


def _require_sound(bench: Bench, output: Checkpoint, conversion: Conversion, when: str = "") -> None:
    """Validate an output, as every conversion does."""
    from speculators.validation import check

    report = check(output, bench.spec, bench.base, conversion=conversion)
    failed = [f"{when}{each.name}: {each.detail}" for each in report.checks if not each.passed]
    require(not failed, "; ".join(failed))


def check_causal(bench: Bench) -> None:
    """What is computed for a token depends on it and on those before it, never on later ones or other sequences."""
    import torch

    from speculators.parity import Batch, relative

    draft, batch = _draft(bench), _batch(bench)
    states = batch.states(draft.layers, draft.state_size)
    here = len(batch.positions) // 2
    tokens = (batch.tokens + 1) % bench.base.vocab_size
    later, other = batch.tokens.clone(), states.clone()
    later[:, here:], other[:, here:] = tokens[:, here:], states[:, here:].roll(1, dims=-1)
    before = _computed(draft, batch, states)
    changes = {
        "token": _computed(draft, Batch(later, batch.positions), states),
        "state of the verifier": _computed(draft, batch, other),
    }
    for what, after in changes.items():
        for old, new in zip(before, after, strict=True):
            off = relative(new[:, :here], old[:, :here])
            require(off <= SEES, f"what is computed at position {here - 1} changes with a later {what} (by {off:.2g})")
        own = any(not torch.equal(old[:, here], new[:, here]) for old, new in zip(before, after, strict=True))
        any_at_all = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        require(own or not any_at_all, f"what is computed at position {here} ignores its own {what}, later ones do not")
    _require_alone(draft, batch, states, before, Batch(tokens, batch.positions))


def _require_alone(draft: Draft, batch: Batch, states: Tensor, alone: list[Tensor], other: Batch) -> None:
    """Compare what is computed for a sequence alone with the same beside another one, and with less of it."""
    import torch

    from speculators.parity import Batch, relative

    half = len(batch.positions) // 2
    both = Batch(torch.cat((other.tokens, batch.tokens)), batch.positions)
    beside = _computed(draft, both, torch.cat((states.roll(1, dims=-1), states)))
    less = _computed(draft, Batch(batch.tokens[:, :half], batch.positions[:half]), states[:, :half])
    for whole, second, begun in zip(alone, beside, less, strict=True):
        off = relative(second[1:], whole)
        require(off <= TOLERANCE, f"what is computed for a sequence depends on another one beside it (by {off:.2g})")
        off = relative(begun, whole[:, :half])
        require(off <= TOLERANCE, f"what is computed for a token depends on how many follow (by {off:.2g})")


def _batch(bench: Bench) -> Batch:
    from speculators import parity

    return parity.batches(bench.base.vocab_size, bench.config.positions or bench.base.max_positions or 0)[0]


def _computed(draft: Draft, batch: Batch, states: Tensor) -> list[Tensor]:
    """Return what is fed back and what the LM head reads, of two steps where there are several, and its logits."""
    import torch

    with torch.no_grad():
        hidden, head_input = draft.forward(batch.tokens, draft.combine(states), batch.positions)
        found = [hidden, head_input]
        if draft.tokens is None:  # what a second step makes of what is fed back
            found += draft.forward(batch.tokens, hidden, batch.positions)
        return [*found, *(logits for each in found[1::2] if (logits := draft.logits(each)) is not None)]


def check_reference(bench: Bench) -> None:
    """The converted draft computes what the original code computed, where its outputs are given.

    The file holds ``draft_input_ids`` ``[B, T]`` int64, the tokens that follow those of the states,
    ``verifier_hidden_states`` ``[B, T, S]`` and ``draft_logits`` ``[B, T, DV]`` or ``[B, T, K, DV]``; and, if the
    original tells them, ``draft_hidden_states`` ``[B, T, H]`` and ``draft_token_ids``, the verifier's ids of the
    likeliest tokens, shaped like the logits without their last dimension; and ``chain_token_ids`` ``[B, N]``, the
    verifier's ids of the tokens that it proposes one after another behind the last one. With ``input_ids`` ``[B, T]``
    or longer, which the verifier read, the states are compared with its own, which shows which layers they come from.
    """
    assert bench.reference is not None  # noqa: S101 - without one, the check does not apply
    from speculators.draft import of_source

    expected = _read_reference(bench.reference)
    largest = int(expected["draft_input_ids"].max())
    require(
        largest < bench.base.vocab_size, f"draft_input_ids hold {largest}, the verifier knows {bench.base.vocab_size}"
    )
    drafts = {"the output": _draft(bench), "the source": of_source(bench.prepare(), dtype="float32")}
    for what, draft in drafts.items():
        if wrong := _differs(draft, expected):
            hint = _hint(bench, expected)
            raise NonconformanceError(f"{wrong} than the original code, computed from {what}{hint}")
    if "input_ids" in expected and bench.base.weights is not None:
        _require_states(bench, drafts["the output"], expected)


def _read_reference(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    require(path.is_file(), f"there are no reference outputs at {path}")
    try:
        expected: Mapping[str, Tensor] = load_file(path)
    except Exception as error:
        raise NonconformanceError(f"{path} is no safetensors file of reference outputs: {described(error)}") from error
    lacking = [name for name in REFERENCE if name not in expected]
    require(not lacking, f"{path} lacks {', '.join(lacking)}")
    unknown = sorted(expected.keys() - {*REFERENCE, *MORE_REFERENCE})
    require(
        not unknown, f"{path} holds {', '.join(unknown)}, which nothing reads; known are {', '.join(MORE_REFERENCE)}"
    )
    endless = [name for name, tensor in expected.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    require(not endless, f"{path} holds NaN or infinity in {', '.join(endless)}")
    batch, length = expected["verifier_hidden_states"].shape[:2]
    for name, (dimensions, fractions) in REFERENCE.items():
        found = expected[name]
        kind = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
        fits = found.is_floating_point() is fractions and found.ndim in dimensions
        fits = fits and (fractions or str(found.dtype) == "torch.int64")
        expected_kind = f"{'fractions' if fractions else 'int64'} in {' or '.join(map(str, dimensions))} dimensions"
        require(fits, f"{path} has {name} as {kind}, expected {expected_kind}")
        require(
            (batch, length) == tuple(found.shape[:2]),
            f"{path} has {name} as {kind}, and verifier_hidden_states for {[batch, length]}",
        )
    require(length > 1, f"{path} has one token per sequence, which shows nothing of how tokens are shifted; give more")
    return expected


def _require_states(bench: Bench, draft: Draft, expected: Mapping[str, Tensor]) -> None:
    import torch

    from speculators.parity import relative

    given = expected["verifier_hidden_states"]
    verifier: Any = bench.base.load("cpu")
    verifier.float()
    with torch.no_grad():
        every = verifier(expected["input_ids"][:, : given.shape[1]], output_hidden_states=True).hidden_states
    read = torch.cat([every[layer] for layer in draft.layers], dim=-1)
    off = relative(read, given.float())
    if off <= STATES_TOLERANCE:
        return
    found = []
    for piece in torch.split(given.float(), bench.base.hidden_size, dim=-1):
        alike = [layer for layer, states in enumerate(every) if relative(states, piece) <= STATES_TOLERANCE]
        found.append(str(alike[0]) if alike else "none")
    raise NonconformanceError(
        f"state_layers() says {list(draft.layers)}, and verifier_hidden_states are those of layers {', '.join(found)} "
        f"of {bench.base.name} (by {off:.2g} of the largest value)"
    )


def _draft(bench: Bench, config: SpeculatorConfig | None = None) -> Draft:
    from speculators.draft import of_output

    return of_output(bench.output, config or bench.config, bench.spec, bench.base, dtype="float32")


def _differs(draft: Draft, expected: Mapping[str, Tensor]) -> str:
    from speculators.parity import relative

    hidden, logits = draft.run(expected["draft_input_ids"], expected["verifier_hidden_states"])
    if logits is None:
        return "there are no logits, as no file holds the LM head, other"
    found = {"draft_logits": logits, "draft_hidden_states": hidden}
    for name in sorted(found.keys() & expected.keys()):
        if found[name].shape != expected[name].shape:
            return f"{name} are {list(found[name].shape)} in place of {list(expected[name].shape)}, other"
        if not (off := relative(found[name], expected[name])) <= TOLERANCE:
            return f"{name} are other (by {off:.2g} of the largest value)"
    if "draft_token_ids" in expected:
        tokens = logits.argmax(-1).cpu().apply_(draft.target_id)
        if wrong := int((tokens != expected["draft_token_ids"]).sum()):
            return f"{wrong} of {tokens.numel()} draft_token_ids are other"
    if "chain_token_ids" in expected:
        chains = _chains(draft, expected)
        if chains != expected["chain_token_ids"].tolist():
            return f"the chains {chains} are proposed in place of {expected['chain_token_ids'].tolist()}, other"
    return ""


def _chains(draft: Draft, expected: Mapping[str, Tensor]) -> list[list[int]]:
    """Propose tokens one after another behind each sequence."""
    import torch

    from speculators.acceptance import Continuation, propose

    given = expected["verifier_hidden_states"].float()
    prefixes = []
    for tokens, states in zip(expected["draft_input_ids"].tolist(), given, strict=True):
        pieces = torch.chunk(states, len(draft.layers), dim=-1)
        known = [0, *tokens]  # the first one has a state, and is read by nobody
        prefixes.append((Continuation(known, len(known), dict(zip(draft.layers, pieces, strict=True))), len(known)))
    return propose(draft, prefixes, expected["chain_token_ids"].shape[1])


def _hint(bench: Bench, expected: Mapping[str, Tensor]) -> str:
    """Name another value of an option with which the outputs would be right."""
    for other in bench.spec.alternatives(bench.config, bench.base):
        try:
            differs = _differs(_draft(bench, other.config), expected)
        except Exception:  # noqa: BLE001, S112 - a hint that cannot be given hides nothing
            continue
        if not differs:
            value = f"{other.option}={json.dumps(other.value)}"
            return f"; with {value} they are equal, so its default or configure() is wrong"
    return ""


def check_essential(bench: Bench) -> None:
    """Every parameter of the draft counts: whichever is changed, something else is computed."""
    import torch

    draft, batch = _draft(bench), _batch(bench)
    states = batch.states(draft.layers, draft.state_size)
    before = _computed(draft, batch, states)
    with torch.no_grad():
        for name, parameter in draft.model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(kept + 0.5 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0)))
            same = all(map(torch.equal, before, _computed(draft, batch, states)))
            parameter.copy_(kept)
            require(not same, f"{name} is loaded, but the forward computes the same whatever it holds")
    if bench.spec.embedding in bench.output.tensors:
        draft.embed = lambda tokens, width: torch.zeros(*tokens.shape, width)  # type: ignore[method-assign]
        same = all(map(torch.equal, before, _computed(draft, batch, states)))
        require(not same, f"{bench.spec.embedding} is written, but the forward does not read token embeddings")


def check_damage(bench: Bench) -> None:
    """A tensor that is missing, misnamed, unknown, or of another shape or kind is refused, and nothing is written."""
    _ = bench.converted, bench.variant(bench.tensors).converted  # as it is, it is not refused
    for name, (info, data) in bench.tensors.items():
        if name in bench.dropped:
            continue
        rest = {key: value for key, value in bench.tensors.items() if key != name}
        longer = TensorInfo(info.dtype, (info.shape[0] + 1, *info.shape[1:]) if info.shape else (2,))
        longer_data = data + bytes(longer.nbytes - len(data))
        other, added = TensorInfo("I64" if info.dtype in FLOATS else "F32", info.shape), f"{name}_misnamed"
        if name not in bench.lacking:
            advice = "; if that is a draft of its own, list it in 'optional'"
            _refused(bench, rest, f"the checkpoint without {name} is converted all the same{advice}")
        what = f"{name} of shape {list(longer.shape)} in place of {list(info.shape)}"
        _refused(bench, {**rest, name: (longer, longer_data)}, f"{what} is converted all the same")
        what = f"{name} of {other.dtype} in place of {info.dtype}"
        _refused(bench, {**rest, name: (other, bytes(other.nbytes))}, f"{what} is converted all the same")
        _refused(bench, {**rest, added: (info, data)}, f"the checkpoint with {added} in place of {name} is converted")
        what = f"the checkpoint with {added}, which nobody knows, beside {name}"
        _refused(bench, {**bench.tensors, added: (info, data)}, f"{what} is converted")


def _refused(bench: Bench, tensors: Tensors, message: str) -> None:
    place = bench.place("damage")
    source = bench.damaged(place / "draft", tensors)
    (place / "place").mkdir()
    try:
        with full_disk(place / "place") as disk:
            bench.convert(place / "place" / "out", source)
    except (CheckpointError, OptionError):
        left = [path.name for path in (place / "place").iterdir()]
        require(not left, f"a refused checkpoint leaves {', '.join(left)} behind")
        begun = sorted({Path(path).name for path in disk.changed if Path(path).suffix in WRITTEN})
        require(not begun, f"before a checkpoint is refused, {', '.join(begun)} is written")
        return
    finally:
        shutil.rmtree(place, ignore_errors=True)
    raise NonconformanceError(message)


def check_optional(bench: Bench) -> None:
    """Without a tensor that may be lacking it is another draft that is right, and the same one each time."""
    for name in sorted(bench.lacking):
        other = bench.variant({key: value for key, value in bench.tensors.items() if key != name})
        try:
            again = other.convert(other.place("again") / "out")
            _require_same(files(other.converted.output_path), files(again.output_path))
            for check in (check_accounted, check_unchanged, check_round_trip, check_forward, check_essential):
                check(other)
        except PluginError:
            raise
        except (NonconformanceError, SpeculatorsError) as error:
            raise NonconformanceError(f"without {name}, which may be lacking: {error}") from error


def check_reversible(bench: Bench) -> None:
    """The table, read backwards, leads from every output name to the source's."""
    native = bench.prepare().context.matching.native
    for source, target in bench.converted.renamed.items():
        name = bench.spec.table.native(target)
        require(
            native.get(name) == source,
            f"the table writes {source} as {target}, and reads that back as {native.get(name, name)}",
        )


def check_export(bench: Bench) -> None:
    """The output is exported as the very checkpoint; where its record is lost, as one that converts to the same."""
    place = bench.place("export")
    output, verifier, said = bench.converted.output_path, bench.places[1], bench.source.config_bytes
    export = export_model(output, verifier=verifier, output_path=place / "export", registry=bench.registry)
    exported, expected = Checkpoint(export.output_path), bench.tensors.items()
    require(exported.config_bytes == said, "an export has another config than the checkpoint that was converted")
    found = contents(exported)
    changed = [name for name, held in expected if name not in export.missing and found.get(name) != held]
    require(not changed and found.keys() <= bench.tensors.keys(), f"an export holds another {', '.join(changed)}")
    if bench.spec.export_config(bench.config) is None:
        return
    unrecorded = place / "unrecorded"
    shutil.copytree(output, unrecorded)
    for name in (PROVENANCE_FILE, NATIVE_CONFIG_FILE):
        (unrecorded / name).unlink()
    export = export_model(unrecorded, verifier=verifier, output_path=place / "made", registry=bench.registry)
    again = Checkpoint(bench.convert(place / "again", export.output_path).output_path)
    what = "what export_config returns is converted to"
    require(again.config == bench.output.config, f"{what} {_config_change(bench.output.config, again.config)}")
    require(contents(again) == contents(bench.output), f"{what} other tensors")


def _config_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    for key in sorted(before.keys() | after.keys()):
        if (was := before.get(key)) != (now := after.get(key)):
            if isinstance(was, Mapping) and isinstance(now, Mapping):
                return f"{key}: {_config_change(was, now)}"
            return f"{key} {shown(now)}, which was {shown(was)}"
    return "the same config"


def check_whole(bench: Bench) -> None:
    """Wherever the disk is full, what stood at the output path still stands, or the new output does, whole."""
    new, place = files(bench.converted.output_path), bench.place("full")
    earlier = bench.convert(place / "earlier", dtype="bfloat16").output_path
    old, number = files(earlier), 0
    _require_same(new, files(bench.convert(place / "again").output_path))
    while True:
        number += 1
        here = place / str(number)
        shutil.copytree(earlier, here / "out")
        with full_disk(here, number) as disk:
            try:
                bench.convert(here / "out", overwrite=True)
            except PluginError:
                raise
            except (SpeculatorsError, OSError):
                pass
        found = files(here / "out")
        require(
            found in (old, new), f"a full disk at change {number} leaves half an output: {', '.join(sorted(found))}"
        )
        bench.convert(here / "out", overwrite=True)
        left = sorted(path.name for path in here.iterdir())
        require(files(here / "out") == new and left == ["out"], f"after a full disk at change {number}, {left} is left")
        shutil.rmtree(here, ignore_errors=True)
        if len(disk.changed) < number:
            return


@dataclass(frozen=True)
class Check:
    """A promise, and the function that tells whether a plugin keeps it.

    Attributes:
        name: What verdicts and tests call it.
        run: Raises what is wrong.
        needs: What it cannot be made without: ``"checkpoint"``, ``"reference"``, or nothing.
    """

    name: str
    run: Callable[[Bench], None]
    needs: str = "checkpoint"

    @property
    def promise(self) -> str:
        """What is promised, as one sentence."""
        return (self.run.__doc__ or "").splitlines()[0]

    def applies(self, bench: Bench) -> bool:
        """Tell whether there is what it needs."""
        if self.needs == "reference":
            return bench.reference is not None
        return not self.needs or bench.has_checkpoint


CHECKS = (
    Check("found", check_found, needs=""),
    Check("described", check_described, needs=""),
    Check("light", check_light, needs=""),
    Check("strict options", check_strict, needs=""),
    Check("recognised", check_recognised),
    Check("distinct", check_distinct),
    Check("accounted", check_accounted),
    Check("unchanged", check_unchanged),
    Check("config round trip", check_round_trip),
    Check("reversible table", check_reversible),
    Check("forward", check_forward),
    Check("reference", check_reference, needs="reference"),
    Check("causal", check_causal),
    Check("essential", check_essential),
    Check("asked for", check_asked),
    Check("alternatives", check_alternatives),
    Check("damage", check_damage),
    Check("optional", check_optional),
    Check("reproducible", check_reproducible),
    Check("export", check_export),
    Check("whole", check_whole),
)
"""All checks, in the order in which their failures are best read."""
