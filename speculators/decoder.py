"""Drafts that are made of Llama decoder layers, as most families are: rows, sizes, config.

Training configs say little and are sometimes wrong, so sizes come from the tensors wherever these
decide them, and the user is told about every disagreement. Symbols in the shapes of the rows:

============  ================================================
``H``         hidden size of the draft
``I``         intermediate size of its MLP
``V``         vocabulary of the verifier
``heads``     query heads
``kv_heads``  key and value heads
``head_dim``  width of one head; not always ``H / heads``
``L``         decoder layers
============  ================================================
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from speculators.checkpoint import Checkpoint
from speculators.config import DecoderLayerConfig, LayeredConfig, Size
from speculators.errors import CheckpointError
from speculators.plan import Facts
from speculators.rope import (
    DEFAULT_THETA,
    EXTENDING_TYPES,
    RENAMED_TYPES,
    legacy_scaling,
    rope_parameters,
    serving_positions,
)
from speculators.spec import Alternative, Context, Example, Options, StatedAs
from speculators.table import Drop, Refuse, Rename, Row, Table
from speculators.verifier import Verifier
from speculators.weights import TensorInfo

DEFAULT_POSITIONS = 2048
"""``max_position_embeddings`` of a config that names none (LlamaConfig; EAGLE's EConfig alike)."""

CARRIED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
"""Keys that no forward reads and that travel along when the native config has them."""

CONFIG_KEYS = {
    "H": "hidden_size",
    "I": "intermediate_size",
    "V": "vocab_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "L": "num_hidden_layers",
}
"""Symbol → the key under which native configs state it."""

UNSUPPORTED_ROWS: tuple[Row, ...] = (
    Refuse(
        "**.(kv_a_proj_with_mqa|kv_b_proj|kv_a_layernorm|q_a_proj|q_b_proj|q_a_layernorm).**",
        "an MLA draft (DeepSeek's latent attention) is not supported, only Llama layers are",
    ),
    Refuse(
        "**.self_attn.(q_norm|k_norm).weight",
        "a draft with norms on queries and keys (Qwen3's attention) is not supported, only Llama layers are",
    ),
    Refuse(
        "**.mlp.(experts|router|gate|shared_expert|shared_experts).**",
        "a mixture-of-experts draft is not supported, only Llama layers are",
    ),
    Refuse(
        "**.(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|weight_zero_point|weight_global_scale"
        "|absmax|quant_map|nested_absmax|nested_quant_map|weight_scale|weight_scale_2|weight_scale_inv|input_scale|input_global_scale|k_scale|v_scale)",
        "quantised weights are not supported; convert the checkpoint from before quantisation",
    ),
    Refuse("**.(lora_A|lora_B).**", "a LoRA adapter is no draft by itself; merge it first"),
)
"""Checkpoints that look like a known family's from afar and hold something else."""


RECOMPUTED_ROWS: tuple[Row, ...] = (
    Drop("**rotary_emb.inv_freq", "a buffer that every engine recomputes from the config"),
)
"""Buffers that older training code saves."""


ROTARY_BASE = StatedAs(("rope_theta", "rope_scaling.rope_theta", "rope_parameters.rope_theta"))
"""Where native configs state the base of the rotary embedding."""


class DraftOptions(Options):
    """Options of every draft that is made of decoder layers."""

    rope_theta: Annotated[float | None, ROTARY_BASE] = Field(
        default=None, gt=0, description="Base of the rotary embedding used in training, when config.json is wrong."
    )
    use_verifier_embed_tokens: Annotated[bool, StatedAs()] = Field(
        default=False, description="Leave the draft's own embed_tokens out, for exports that saved untrained ones."
    )


def layer_rows(source: str, target: str, width: str = "H") -> tuple[Rename, ...]:
    """Return the rows of one Llama decoder layer, except for norms on its input and the bias of ``o_proj``.

    Biases are the parts ``qkv_bias`` and ``mlp_bias``; a row for the bias of ``o_proj`` has the part ``o_bias``.

    Args:
        source: What the names in the checkpoint begin with.
        target: What the names in the output begin with.
        width: Width of what the attention reads; ``"2*H"`` where embeddings and states are joined.
    """

    def row(name: str, shape: str, part: str = "") -> Rename:
        return Rename(source + name, target + name, shape, part)

    return (
        row("self_attn.q_proj.weight", f"heads*head_dim, {width}"),
        row("self_attn.k_proj.weight", f"kv_heads*head_dim, {width}"),
        row("self_attn.v_proj.weight", f"kv_heads*head_dim, {width}"),
        row("self_attn.o_proj.weight", "H, heads*head_dim"),
        row("self_attn.q_proj.bias", "heads*head_dim", "qkv_bias"),
        row("self_attn.k_proj.bias", "kv_heads*head_dim", "qkv_bias"),
        row("self_attn.v_proj.bias", "kv_heads*head_dim", "qkv_bias"),
        row("mlp.gate_proj.weight", "I, H"),
        row("mlp.up_proj.weight", "I, H"),
        row("mlp.down_proj.weight", "H, I"),
        row("mlp.gate_proj.bias", "I", "mlp_bias"),
        row("mlp.up_proj.bias", "I", "mlp_bias"),
        row("mlp.down_proj.bias", "H", "mlp_bias"),
        row("post_attention_layernorm.weight", "H"),
    )


def zeros(source: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, list[bytes]]:
    """Make zeros in the dtype of the first of ``names``; for ``Derive("speculators.decoder:zeros", ...)``."""
    info = TensorInfo(source.tensors[names[0]].dtype, shape)
    return info.dtype, [bytes(info.nbytes)]


class _NativeConfig(BaseModel):
    """The keys of a draft's config that are read, and the types that they must have."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: int | None = None
    num_hidden_layers: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: Size | None = None
    max_sequence_length: Size | None = None
    original_max_position_embeddings: Size | None = None
    hidden_act: str | None = None
    rms_norm_eps: PositiveFloat | None = None
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: PositiveFloat | None = None
    initializer_range: float | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


def native_config(context: Context, schema: type[BaseModel] = _NativeConfig) -> dict[str, Any]:
    """Flatten a draft's config and check the types of the keys that are read.

    Its own keys come first, then those of the nested blocks that the algorithm names.

    Args:
        context: The conversion.
        schema: Further keys with their types, as a pydantic model.

    Raises:
        CheckpointError: A key has a value of another type; names every such key.
    """
    flat = context.settings
    problems = set()
    for model in (_NativeConfig, schema):
        try:
            model.model_validate(flat)
        except ValidationError as error:
            problems |= {f"{each['loc'][0]} {flat[str(each['loc'][0])]!r}" for each in error.errors()}
    if problems:
        raise CheckpointError(f"config.json says {', '.join(sorted(problems))}, which cannot be")
    return flat


def export_config(config: LayeredConfig, **more: Any) -> dict[str, Any]:
    """Return the config that training code saves beside such a draft; for `ConverterSpec.export_config`.

    Args:
        config: The config of an output.
        **more: Keys that the algorithm's training code adds.
    """
    layer = config.transformer_layer_config.model_dump(mode="json")
    kept = {key: layer[key] for key in (*_NativeConfig.model_fields, *_EXPORTED) if layer.get(key) is not None}
    return {**kept, "torch_dtype": config.dtype, **more}


_EXPORTED = ("architectures", "model_type", "rope_scaling", "attention_bias", "mlp_bias", "tie_word_embeddings")
"""Keys that training code saves beside those that are read."""


def active_parts(context: Context) -> set[str]:
    """Return the optional parts of the table of which the source holds a tensor."""
    return {found.row.part for found in context.matching.moves.values() if found.row.part}


def check_options(table: Table, context: Context, parts: Iterable[str]) -> list[str]:
    """Check every option that is named like a part of the table against the tensors, which decide it.

    Args:
        table: The algorithm's table.
        context: The conversion.
        parts: The parts that are in use.

    Returns:
        A finding for each that was given and contradicts the checkpoint.
    """
    findings = []
    for part in table.parts:
        given = getattr(context.options, part, None)
        if given is None or given == (part in parts):
            continue
        held = sorted(found.source for found in context.matching.moves.values() if found.row.part == part)
        what = f"holds {', '.join(held)}" if held else f"holds none of the tensors of {part}"
        findings.append(f"{part}={str(given).lower()} was given, but the checkpoint {what}; leave the option out")
    return findings


def examine_layers(context: Context, layer: str, vocabulary: Iterable[str]) -> Facts:
    """Find the sizes of a draft's decoder layers; for `ConverterSpec.examine`.

    Args:
        context: The conversion.
        layer: What the output names of the first layer begin with.
        vocabulary: Output names of tensors with one row for each token of the verifier.

    Returns:
        The symbols of this module that can be known, every part of which the source holds a tensor, and a note or
        finding about whatever config, tensors and verifier do not agree on. Build another `Facts` from it to add to it.

    Raises:
        CheckpointError: The config has a key of another type.
    """
    sizes = _Sizes(context)
    sizes.stated("H", "hidden_size", f"{layer}post_attention_layernorm.weight")
    sizes.stated("I", "intermediate_size", f"{layer}mlp.gate_proj.weight")
    sizes.heads(layer)
    sizes.vocabulary(vocabulary)
    numbers = set(_layer_numbers(context))
    sizes.observed("L", "num_hidden_layers", next(number for number in itertools.count(1) if number not in numbers))
    return Facts(sizes.dims, frozenset(active_parts(context)), tuple(sizes.notes), tuple(sizes.findings))


class _Sizes:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = native_config(context)
        self.dims: dict[str, int] = {}
        self.notes: list[str] = []
        self.findings: list[str] = []

    def rows(self, name: str) -> int | None:
        shape = self.context.shape(name)
        return shape[0] if shape else None

    def stated(self, symbol: str, key: str, witness: str) -> None:
        """Take a size that the config states; a tensor speaks only where it does not."""
        value = self.config.get(key, self.rows(witness))
        if value is not None:
            self.dims[symbol] = value

    def observed(self, symbol: str, key: str, value: int) -> None:
        """Take a size that the tensors decide, and tell when the config says otherwise."""
        self.dims[symbol] = value
        said = self.config.get(key)
        if said is not None and said != value:
            self.notes.append(f"config.json says {key} {said}, the tensors say {value}: {value} is written")

    def heads(self, layer: str) -> None:
        queries, keys = self.rows(f"{layer}self_attn.q_proj.weight"), self.rows(f"{layer}self_attn.k_proj.weight")
        heads, head_dim = self.config.get("num_attention_heads"), self.config.get("head_dim")
        if heads is None and queries and head_dim:
            heads = queries // head_dim
        if not heads or heads < 1:
            self.findings.append("config.json does not say num_attention_heads, which the tensors cannot tell; add it")
            return
        self.dims["heads"] = heads
        if queries is None or keys is None:
            return
        if queries % heads or not queries:
            self.findings.append(f"q_proj has {queries} rows, which {heads} attention heads cannot share evenly")
            return
        if queries // heads % 2:
            self.findings.append(f"q_proj has {queries} rows, so each of {heads} heads is odd and cannot be rotated")
            return
        self.observed("head_dim", "head_dim", queries // heads)
        groups, rest = divmod(keys, queries // heads)
        if rest or not groups or heads % groups:
            self.findings.append(f"k_proj has {keys} rows, which do not fit {heads} heads of {queries // heads}")
            return
        self.observed("kv_heads", "num_key_value_heads", groups)

    def vocabulary(self, names: Iterable[str]) -> None:
        verifier = self.context.verifier
        self.dims["V"] = verifier.vocab_size
        said = self.config.get("vocab_size")
        if said is None or said == verifier.vocab_size:
            return
        if verifier.vocab_size in map(self.rows, names):
            self.notes.append(
                f"config.json says vocab_size {said}, the tensors and the verifier say {verifier.vocab_size}"
            )
        else:
            self.findings.append(
                f"the draft was made for a vocabulary of {said}, the verifier {verifier.name} has "
                f"{verifier.vocab_size}; is it the right verifier?"
            )


def _layer_numbers(context: Context) -> Iterable[int]:
    for found in context.matching.moves.values():
        if "L" in found.row.stops:
            yield found.numbers[found.row.stops.index("L")]


def layer_config(context: Context, facts: Facts) -> tuple[DecoderLayerConfig, list[str]]:
    """Build the config of the draft's decoder layers, and what the user should know about it.

    Nothing is taken from the verifier but its vocabulary size and its number of positions.

    Args:
        context: The conversion.
        facts: What was examined, with all symbols of this module.

    Raises:
        CheckpointError: The config's rotary parameters are such that nothing can compute them.
    """
    config = native_config(context)
    dims = facts.dims
    own = config.get("max_position_embeddings") or config.get("max_sequence_length") or DEFAULT_POSITIONS
    override = getattr(context.options, "rope_theta", None)
    rope, notes = rope_parameters(config, own)
    if override is not None:
        notes = [f"rope_theta {override:g} was given and replaces the config's {rope['rope_theta']:g}"]
        rope["rope_theta"] = override
    positions, note = serving_positions(rope, own, context.verifier.max_positions)
    qkv, out = "qkv_bias" in facts.parts, "o_bias" in facts.parts
    layer = DecoderLayerConfig(
        vocab_size=dims["V"],
        hidden_size=dims["H"],
        intermediate_size=dims["I"],
        num_hidden_layers=dims["L"],
        num_attention_heads=dims["heads"],
        num_key_value_heads=dims["kv_heads"],
        head_dim=dims["head_dim"],
        hidden_act=config.get("hidden_act", "silu"),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        max_position_embeddings=positions,
        rope_parameters=rope,
        rope_theta=rope["rope_theta"],
        rope_scaling=legacy_scaling(rope),
        attention_bias=qkv and out,
        mlp_bias="mlp_bias" in facts.parts,
        dtype=context.draft_dtype,
    )
    extra = {key: config[key] for key in CARRIED_KEYS if key in config}
    if qkv and not out:
        extra["qkv_bias"] = True  # vLLM's Llama layer knows it; LlamaConfig's attention_bias means all four
    layer = DecoderLayerConfig.model_validate(layer.model_dump() | extra)
    return layer, notes + ([note] if note else [])


ROTARY_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
"""Keys of a native config that transformers' rotary embedding depends on."""


def original_layer(context: Context, facts: Facts) -> DecoderLayerConfig:
    """Describe a draft's layers as transformers reads the native config; for `ConverterSpec.original`.

    Of what `layer_config` works out only the sizes are taken, which shapes confirm.

    Args:
        context: The conversion.
        facts: What was examined, with all symbols of this module.
    """
    from transformers import LlamaConfig

    config, dims = native_config(context), facts.dims
    positions = config.get("max_position_embeddings") or config.get("max_sequence_length") or DEFAULT_POSITIONS
    said = {key: copy.deepcopy(config[key]) for key in ROTARY_KEYS if config.get(key) is not None}
    said["max_position_embeddings"] = positions
    # transformers would drop one of two spellings, an outer original_max_position_embeddings and a missing factor.
    block = {"original_max_position_embeddings": said.pop("original_max_position_embeddings", None)}
    block |= said.pop("rope_scaling", {}) | said.pop("rope_parameters", {})
    kind = block.pop("type", None) or "default"
    kind = block["rope_type"] = RENAMED_TYPES.get(block.get("rope_type") or kind, block.get("rope_type") or kind)
    if kind in EXTENDING_TYPES and block["original_max_position_embeddings"]:
        block.setdefault("factor", positions / block["original_max_position_embeddings"])
    said["rope_parameters"] = {key: value for key, value in block.items() if value is not None}
    rope = dict(LlamaConfig(**said, head_dim=dims["head_dim"]).rope_parameters or {})
    if (override := getattr(context.options, "rope_theta", None)) is not None:
        rope["rope_theta"] = override
    saved = {
        name.rpartition("_proj.")[0].rpartition(".")[2] for name in context.matching.native if "_proj.bias" in name
    }
    layer = DecoderLayerConfig(
        vocab_size=dims["V"],
        hidden_size=dims["H"],
        intermediate_size=dims["I"],
        num_hidden_layers=dims["L"],
        num_attention_heads=dims["heads"],
        num_key_value_heads=dims["kv_heads"],
        head_dim=dims["head_dim"],
        hidden_act=config.get("hidden_act") or LlamaConfig.hidden_act,
        rms_norm_eps=config.get("rms_norm_eps") or LlamaConfig.rms_norm_eps,
        max_position_embeddings=positions,
        rope_parameters=rope,
        rope_theta=rope["rope_theta"],
        attention_bias="o" in saved,
        mlp_bias="gate" in saved,
        dtype="float32",
    )
    return layer.model_copy(update={"qkv_bias": "q" in saved})


def own_embedding(context: Context) -> str:
    """Return the source name of a draft's own token embeddings; ``""`` when the verifier's take their place."""
    if getattr(context.options, "use_verifier_embed_tokens", False):
        return ""
    return context.matching.native.get("embed_tokens.weight", "")


def rope_alternatives(config: LayeredConfig, verifier: Verifier) -> list[Alternative]:
    """List other rotary bases that a draft may have been trained with: transformers' default and the verifier's."""
    layer = config.transformer_layer_config
    theirs = verifier.text.get("rope_theta") or (verifier.text.get("rope_parameters") or {}).get("rope_theta")
    found = []
    for base in dict.fromkeys((DEFAULT_THETA, theirs)):
        if isinstance(base, (int, float)) and base > 0 and base != layer.rope_theta:
            rope = {**layer.rope_parameters, "rope_theta": float(base)}
            changed = layer.model_copy(update={"rope_theta": float(base), "rope_parameters": rope})
            found.append(
                Alternative("rope_theta", float(base), config.model_copy(update={"transformer_layer_config": changed}))
            )
    return found


def config_dims(layer: DecoderLayerConfig) -> dict[str, int]:
    """Return the symbols of this module as an output's config states them."""
    return {
        "H": layer.hidden_size,
        "I": layer.intermediate_size,
        "V": layer.vocab_size,
        "heads": layer.num_attention_heads,
        "kv_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "L": layer.num_hidden_layers,
    }


def config_parts(layer: DecoderLayerConfig) -> set[str]:
    """Return the optional parts of `layer_rows` that an output's config declares."""
    extra = layer.model_extra or {}
    declared = {
        "qkv_bias": layer.attention_bias or extra.get("qkv_bias", False),
        "o_bias": layer.attention_bias,
        "mlp_bias": layer.mlp_bias,
    }
    return {part for part, present in declared.items() if present}


EXAMPLE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
)
"""Keys in which the layer of an example is like those of its verifier."""


def example(verifier: Verifier, parts: Iterable[str] = (), **more: Any) -> Example:
    """Describe a checkpoint with one Llama layer like the verifier's; for `ConverterSpec.example`.

    Args:
        verifier: What `ConverterSpec.example` is given.
        parts: The optional parts of the table that it has.
        **more: Other symbols of the table, and what they stand for.
    """
    config = {key: verifier.text[key] for key in EXAMPLE_KEYS} | {"model_type": "llama", "num_hidden_layers": 1}
    dims = {
        "H": config["hidden_size"],
        "I": config["intermediate_size"],
        "V": config["vocab_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "L": 1,
    }
    return Example(config, dims | more, frozenset(parts))
