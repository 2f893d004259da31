"""Convert EAGLE v1 and v2 draft heads, as SafeAILab/EAGLE trains and saves them.

The two versions share one architecture (``eagle/model/cnets1.py``); v2 changes only how the draft
tree is built at run time. ``fc`` fuses the embedding of the next token with the verifier's last
hidden state, one Llama decoder layer without an input norm follows, and the verifier's LM head reads
the result. ``fc`` has a bias unless the config says ``"bias": false``.

HASS trains the same modules, and a variant with three more norms; speculators-hass builds on this
module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from speculators import (
    Alternative,
    Checkpoint,
    Context,
    ConverterSpec,
    Example,
    Facts,
    LayeredConfig,
    Original,
    Refuse,
    Rename,
    Row,
    Shared,
    Table,
    Verifier,
    Vllm,
    decoder,
    hookimpl,
    match,
)

if TYPE_CHECKING:
    from torch import nn

ROWS: tuple[Row, ...] = (
    Rename("fc.weight", "fusion_fc.weight", "H, 2*H"),
    Rename("fc.bias", "fusion_fc.bias", "H", part="fusion_bias"),
    *decoder.layer_rows("layers.0.", "transformer."),
    Rename("layers.0.self_attn.o_proj.bias", "transformer.self_attn.o_proj.bias", "H", part="o_bias"),
    # The three norms of the HASS variant that vllm-project/speculators v0.1.0 trained
    # (research/hass/model/llama_eagle_full_grad.py): on the token embeddings, on the verifier's hidden
    # state *before* the fusion, and before the LM head.
    Rename("embed_layernorm.weight", "embedding_layernorm.weight", "H", part="layernorms"),
    Rename("hidden_layernorm.weight", "hidden_layernorm.weight", "H", part="layernorms"),
    Rename("lm_head_layernorm.weight", "pre_lm_head_layernorm.weight", "H", part="layernorms"),
    Shared("embed_tokens.weight", "embed_tokens.weight", "V, H", verifier="embed_tokens"),
    # Copied in by the community's script for the first vLLM that served EAGLE.
    Shared("lm_head.weight", "lm_head.weight", "V, H", verifier="lm_head", own=False),
    Refuse("layers.{1:L}.**", "more than one decoder layer has no place in the output type 'eagle'"),
    *decoder.RECOMPUTED_ROWS,
    *decoder.UNSUPPORTED_ROWS,
)
TABLE = Table(ROWS, prefixes=("model.", "module.", "ea_layer."))


class EagleOptions(decoder.DraftOptions):
    """Options of EAGLE and HASS."""

    layernorms: bool | None = Field(
        default=None, description="Whether the head has the three norms of the HASS variant; seen in the tensors."
    )
    fusion_bias: bool | None = Field(
        default=None, description="Whether the fusion layer fc has a bias; seen in the tensors."
    )


class EagleConfig(LayeredConfig):
    """The output type ``eagle``, which speculators 0.1 to 0.5 wrote too."""

    speculators_model_type: Literal["eagle"] = "eagle"
    architectures: list[str] = Field(default=["EagleSpeculator"])
    transformer_layer_architecture: str = "LlamaDecoderLayer"
    layernorms: bool
    fusion_bias: bool


class Eagle(ConverterSpec[EagleConfig]):
    """EAGLE v1 and v2."""

    interface = 1
    name = "eagle"
    aliases: ClassVar[tuple[str, ...]] = ("eagle1", "eagle2")
    summary = "EAGLE v1 and v2 draft heads (SafeAILab/EAGLE)"
    reference = "https://github.com/SafeAILab/EAGLE"
    quirks: ClassVar[tuple[str, ...]] = (
        "v1 and v2 are one architecture; v2 changes only the draft tree at run time.",
        '`fc.bias` is there unless the training config says `"bias": false`; the tensor decides.',
        "Biases on q, k and v without one on the output (`qkv_bias`, Qwen2 heads) are kept as they are.",
        "`model_type` qwen2, mixtral and others stand around a Llama layer and are written as `llama`.",
        "Some scripts copy the verifier's `lm_head.weight` in. The output type has no room for another one.",
    )
    table = TABLE
    options = EagleOptions
    config = EagleConfig
    copies_embedding = True
    vllm = Vllm("eagle", packages=("speculators-eagle",))

    def recognises(self, source: Checkpoint) -> bool:
        """EAGLE's modules without the norms of the HASS variant."""
        return is_eagle(source) and not has_layernorms(source)

    def examine(self, context: Context) -> Facts:
        """Sizes from the layer; the hidden size must be the verifier's, whose LM head reads the result."""
        facts = decoder.examine_layers(context, "transformer.", vocabulary=("embed_tokens.weight", "lm_head.weight"))
        findings = [*facts.findings, *decoder.check_options(self.table, context, facts.parts)]
        hidden = facts.dims.get("H")
        if hidden is not None and hidden != context.verifier.hidden_size:
            findings.append(
                f"the draft has hidden size {hidden}, the verifier {context.verifier.name} has "
                f"{context.verifier.hidden_size}; is it the right verifier?"
            )
        if {"o_bias", "qkv_bias"} & facts.parts == {"o_bias"}:
            findings.append("o_proj has a bias but q, k and v have none, which no engine can build")
        return Facts(facts.dims, facts.parts, (*facts.notes, *_bias_note(context, facts)), tuple(findings))

    def configure(self, context: Context, facts: Facts) -> tuple[EagleConfig, list[str]]:
        """Build the config of type ``eagle``."""
        layer, notes = decoder.layer_config(context, facts)
        config = EagleConfig(
            **context.common_fields("eagle"),
            transformer_layer_config=layer,
            draft_vocab_size=layer.vocab_size,
            target_hidden_size=context.verifier.hidden_size,
            layernorms="layernorms" in facts.parts,
            fusion_bias="fusion_bias" in facts.parts,
        )
        return config, notes

    def export_config(self, config: EagleConfig) -> dict[str, Any]:
        """What EAGLE's training saves: the config of a Llama, and whether the fusion has a bias."""
        return decoder.export_config(config, bias=config.fusion_bias)

    def dims(self, config: EagleConfig) -> Mapping[str, int]:
        """Sizes of the decoder layer; `speculators.decoder` explains the symbols."""
        return decoder.config_dims(config.transformer_layer_config)

    def parts(self, config: EagleConfig) -> frozenset[str]:
        """Biases of the layer, fusion bias, layer norms."""
        flags = {"layernorms": config.layernorms, "fusion_bias": config.fusion_bias}
        return frozenset(
            decoder.config_parts(config.transformer_layer_config) | {part for part, on in flags.items() if on}
        )

    def alternatives(self, config: EagleConfig, verifier: Verifier) -> list[Alternative]:
        """Other rotary bases."""
        return decoder.rope_alternatives(config, verifier)

    def original(self, context: Context, facts: Facts) -> Original:
        """The training code's model; see `speculators_eagle.original`."""
        from speculators_eagle.original import OriginalEagle

        native = context.matching.native
        return Original(
            OriginalEagle(decoder.original_layer(context, facts), native),
            native,
            state_layers=(context.verifier.num_layers,),
            embedding=decoder.own_embedding(context),
            head=native.get("lm_head.weight", ""),
        )

    def build(self, config: EagleConfig) -> nn.Module:
        """Build the draft model."""
        from speculators_eagle.draft import EagleDraft

        return EagleDraft(config)

    def example(self, verifier: Verifier) -> Example:
        """A head with a fusion bias."""
        made = decoder.example(verifier, ["fusion_bias"])
        return replace(made, optional=frozenset({"fc.bias"}))


def is_eagle(source: Checkpoint) -> bool:
    """Tell whether ``source`` holds EAGLE's modules: ``fc`` over twice its width, a layer over its width."""
    moves = match(TABLE, source.tensors).moves
    fusion, query = moves.get("fusion_fc.weight"), moves.get("transformer.self_attn.q_proj.weight")
    if fusion is None or query is None:
        return False
    joined, read = source.tensors[fusion.source].shape, source.tensors[query.source].shape
    return len(joined) == len(read) == 2 and joined[1] == 2 * joined[0] == 2 * read[1]


def has_layernorms(source: Checkpoint) -> bool:
    """Tell whether ``source`` holds any of the three norms of the HASS variant."""
    return match(TABLE, source.tensors).present("layernorms")


def _bias_note(context: Context, facts: Facts) -> list[str]:
    said = decoder.native_config(context).get("bias")
    present = "fusion_bias" in facts.parts
    if said is None or said == present:
        return []
    return [
        f"config.json says bias {said}, but fc.bias is {'there' if present else 'not there'}; the tensors are right"
    ]


@hookimpl
def register_converter() -> type[ConverterSpec]:
    """Bring the algorithm ``eagle``."""
    return Eagle
