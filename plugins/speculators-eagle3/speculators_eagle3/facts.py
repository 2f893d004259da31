"""What the tensors and the native config of an EAGLE-3 head say about it.

Symbols beside those of `speculators.decoder`: ``TH`` is the hidden size of the verifier, ``naux`` how
many of its states ``fc`` joins, ``DV`` the draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from speculators import Context, Facts, Table, decoder
from speculators_eagle3 import vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTED_FLAGS = ("norm_before_fc", "fc_norm")
"""Flags that tensors show: their norms have weights."""

HIDDEN_FLAGS = ("norm_before_residual", "norm_output", "eagle_aux_hidden_state_layer_ids")
"""What no tensor shows: taken from the config, else from the options."""

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


class _NativeConfig(BaseModel):
    """The keys of an EAGLE-3 config that are read, and the types that they must have."""

    model_config = ConfigDict(extra="allow", strict=True)

    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    use_aux_hidden_state: bool | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool | None = None
    fc_norm: bool | None = None
    norm_output: bool | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None


def _config(context: Context) -> dict[str, Any]:
    return decoder.native_config(context, _NativeConfig)


def examine(table: Table, context: Context) -> Facts:
    """Find sizes, optional parts, notes and everything that contradicts something else."""
    facts = decoder.examine_layers(context, "layers.0.", vocabulary=("embed_tokens.weight", "t2d"))
    config = _config(context)
    dims, parts = dict(facts.dims), set(facts.parts) - {"draft_vocabulary"}
    notes, findings = list(facts.notes), list(facts.findings)

    findings += _states(context, config, dims)
    findings += _draft_vocabulary(context, config, dims, notes)
    if dims["DV"] < dims["V"]:
        parts.add("draft_vocabulary")
    if {"qkv_bias", "o_bias"} & parts:
        parts |= {"qkv_bias", "o_bias"}  # engines know all four biases or none
    if config.get("tie_word_embeddings") and context.shape("lm_head.weight") is None:
        findings.append(
            "config.json ties the missing lm_head to the draft's own embeddings; save lm_head.weight as well"
        )
    findings += decoder.check_options(table, context, parts)
    findings += _norms(context, config, parts, notes)
    findings += _hidden_flags(context)
    findings += _layer_ids(context, config, dims, notes)
    return Facts(dims, frozenset(parts), tuple(notes), tuple(findings))


def flag(context: Context, name: str) -> bool:
    """Return a flag that no tensor shows: the native config's, else the given one, else false."""
    return bool(_config(context).get(name, getattr(context.options, name)))


def layer_ids(context: Context) -> list[int] | None:
    """Return the aux layer ids of the native config or the given ones; ``None`` leaves the engines' default."""
    return _config(context).get(LAYER_IDS) or getattr(context.options, LAYER_IDS) or None


def said(context: Context, name: str) -> Any:
    """Return what a native config, or else the user, says about something that no tensor shows."""
    return next(iter(context.stated(name)), getattr(context.options, name))


def other_layer_ids(current: list[int], layers: int) -> list[list[int]]:
    """List what else may feed a head that reads the states ``current`` of a verifier with ``layers`` layers.

    Trainers count inputs or outputs of layers, and some repositories' defaults differ by one: their ids
    are those of EAGLE's authors (``2, n/2, n-3``), one less or one more.
    """
    authors = [2, layers // 2, layers - 3]
    starts = [current, authors] if len(current) == len(authors) else [current]
    found = [[number + shift for number in start] for start in starts for shift in (0, -1, 1)]
    rising = [ids for ids in found if sorted(set(ids)) == ids and ids[0] >= 0 and ids[-1] <= layers]
    return [ids for position, ids in enumerate(rising) if ids != current and ids not in rising[:position]]


def _states(context: Context, config: dict[str, Any], dims: dict[str, int]) -> list[str]:
    verifier = context.verifier
    dims["TH"] = verifier.hidden_size
    if config.get("use_aux_hidden_state") is False:
        return [
            "the head reads only the verifier's last hidden state (use_aux_hidden_state is false in config.json), "
            "which the output type 'eagle3' cannot express"
        ]
    said = config.get("target_hidden_size")
    if said is not None and said != verifier.hidden_size:
        return [f"the head was made for hidden size {said}, the verifier {verifier.name} has {verifier.hidden_size}"]
    shape = context.shape("fc.weight")
    if shape is None or len(shape) != 2:
        return []
    dims["naux"], rest = divmod(shape[1], verifier.hidden_size)
    if rest or not dims["naux"]:
        del dims["naux"]
        return [
            f"fc reads {shape[1]} values, no multiple of the verifier's hidden size {verifier.hidden_size}; "
            f"is {verifier.name} the right verifier?"
        ]
    return []


def _draft_vocabulary(context: Context, config: dict[str, Any], dims: dict[str, int], notes: list[str]) -> list[str]:
    d2t, t2d = _array(context, "d2t"), _array(context, "t2d")
    head, said, full = context.shape("lm_head.weight"), config.get("draft_vocab_size"), dims["V"]
    if head:
        size = head[0]
    elif d2t is not None:
        size = len(d2t)
    else:
        size = said or full
    dims["DV"] = size
    if said is not None and said != size:
        notes.append(f"config.json says draft_vocab_size {said}, the tensors say {size}: {size} is written")
    if size > full:
        return [f"lm_head has {size} rows, more than the verifier's vocabulary of {full}"]
    if (d2t is not None and d2t.shape != (size,)) or (t2d is not None and t2d.shape != (full,)):
        return []  # the plan reports the shapes
    if size == full:
        return vocabulary.check_identity(d2t, t2d)
    return vocabulary.check_maps(d2t, t2d, size, full)


def _array(context: Context, target: str) -> NDArray[Any] | None:
    name = context.source_name(target)
    if name is None or context.source.tensors[name].dtype not in ("I64", "I32", "BOOL"):
        return None
    return context.source.array(name)


def _norms(context: Context, config: dict[str, Any], parts: set[str], notes: list[str]) -> list[str]:
    findings = []
    for name in WEIGHTED_FLAGS:
        said = config.get(name)
        if name in parts and said is False:
            notes.append(f"config.json says {name} false, but its tensors are there; the tensors are right")
        if name not in parts and said and getattr(context.options, name) is not False:
            findings.append(
                f"config.json says {name} true, but the weights of that norm are missing; if the head was trained "
                f"without it, pass {name}=false"
            )
    if {"norm_before_fc", "fc_norm"} <= parts:
        findings.append("the head has both input_norm and fc_norm, of which engines apply only one")
    return findings


def _hidden_flags(context: Context) -> list[str]:
    findings = []
    for name in HIDDEN_FLAGS:
        said, given = context.stated(name), getattr(context.options, name)
        if len(said) > 1:
            findings.append(f"config.json says {name} both {said[0]!r} and {said[1]!r}; remove the one that is wrong")
        elif said and said != [[]] and given is not None and given != said[0]:
            findings.append(f"{name}={given!r} was given, but config.json says {said[0]!r}; correct the wrong one")
    return findings


def _layer_ids(context: Context, config: dict[str, Any], dims: dict[str, int], notes: list[str]) -> list[str]:
    ids, count, layers = layer_ids(context), dims.get("naux"), context.verifier.num_layers
    if ids is None:
        return _default_layer_ids(context, count, layers, LAYER_IDS in config, notes)
    if count is not None and len(ids) != count:
        return [f"fc joins {count} states, but {LAYER_IDS} names {len(ids)}: {ids}"]
    if sorted(set(ids)) != ids or not all(0 <= number <= layers for number in ids):
        return [f"{LAYER_IDS} {ids} are not rising layers of the verifier, which has {layers}; engines sort them"]
    return []


def _default_layer_ids(context: Context, count: int | None, layers: int, stated: bool, notes: list[str]) -> list[str]:
    default = [2, layers // 2, layers - 3]
    how = f"""pass --algorithm-kwargs '{{"{LAYER_IDS}": [...]}}'"""
    if count not in (None, 3):
        return [f"fc joins {count} states, but nothing says which layers of the verifier they come from; {how}"]
    if "eagle_config" in context.source.config and not stated:
        # ModelOpt writes this block and lets the ids be chosen; a published head without them accepts 1.2 % of
        # its drafts at the default layers and 58.9 % at its own (vllm-project/vllm pull request 50170).
        return [f"eagle_config does not say which layers of the verifier fc joins, and they vary; {how} ({default}?)"]
    if sorted({*default}) != default:
        return [f"nothing says which layers of the verifier fc joins, and it is too shallow for the usual ones; {how}"]
    notes.append(
        f"nothing says which layers of the verifier feed the head: engines take the inputs of layers {default}, "
        "as the EAGLE-3 authors do"
    )
    return []
