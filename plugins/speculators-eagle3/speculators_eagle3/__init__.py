"""Convert EAGLE-3 draft heads, as SafeAILab/EAGLE, SpecForge, ModelOpt and others save them.

``fc`` joins hidden states from several depths of the verifier (three in the paper), one decoder layer
called ``midlayer`` reads token embeddings and hidden state side by side, and the head has an LM head
of its own, usually over a smaller draft vocabulary that ``d2t`` and ``t2d`` map to the verifier's.
Sources: ``eagle/model/cnets.py`` of SafeAILab/EAGLE; for ``fc_norm`` and ``norm_output`` (EAGLE-3.1)
SpecForge; for ``input_norm`` (``norm_before_fc``) and the names ``layers.{i}`` NVIDIA's ModelOpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from speculators import (
    Alternative,
    Checkpoint,
    Context,
    ConverterSpec,
    Derive,
    Example,
    Facts,
    Keep,
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
from speculators_eagle3 import facts as eagle3_facts
from speculators_eagle3 import vocabulary

if TYPE_CHECKING:
    from torch import nn


def _output_bias(source: str, target: str) -> Rename:
    # Engines know biases on all four projections or on none. Zeros compute the same as no bias.
    return Rename(
        f"{source}self_attn.o_proj.bias",
        f"{target}self_attn.o_proj.bias",
        "H",
        part="o_bias",
        derive=Derive(
            "speculators.decoder:zeros",
            (f"{target}self_attn.q_proj.bias",),
            "zeros, as engines that have q, k and v biases expect an output bias too",
        ),
    )


FULL_VOCABULARY = "the draft vocabulary is the verifier's, so the map is the identity"

ROWS: tuple[Row, ...] = (
    Keep("fc.weight", "H, naux*TH"),
    Keep("fc_norm.{0:naux}.weight", "TH", part="fc_norm"),
    Keep("input_norm.weight", "naux*TH", part="norm_before_fc"),
    Rename("(midlayer|layers.0).hidden_norm.weight", "layers.0.hidden_norm.weight", "H"),
    Rename("(midlayer|layers.0).input_layernorm.weight", "layers.0.input_layernorm.weight", "H"),
    *decoder.layer_rows("(midlayer|layers.0).", "layers.0.", width="2*H"),
    _output_bias("(midlayer|layers.0).", "layers.0."),
    Keep("layers.{1:L}.input_layernorm.weight", "H"),
    *decoder.layer_rows("layers.{1:L}.", "layers.{1:L}."),
    _output_bias("layers.{1:L}.", "layers.{1:L}."),
    Keep("norm.weight", "H"),
    Shared("lm_head.weight", "lm_head.weight", "DV, H", verifier="lm_head", copies=True),
    Keep(
        "d2t",
        "DV",
        part="draft_vocabulary",
        dtypes=("I64", "I32"),
        unless=FULL_VOCABULARY,
        derive=Derive("speculators_eagle3.vocabulary:offsets", ("t2d",), "made from t2d"),
    ),
    Keep(
        "t2d",
        "V",
        part="draft_vocabulary",
        dtypes=("BOOL",),
        unless=FULL_VOCABULARY,
        derive=Derive("speculators_eagle3.vocabulary:mask", ("d2t",), "made from d2t"),
    ),
    Shared("embed_tokens.weight", "embed_tokens.weight", "V, H", verifier="embed_tokens"),
    Refuse("mask_hidden", "a P-EAGLE draft (parallel drafting) is not EAGLE-3; it needs an algorithm of its own"),
    *decoder.RECOMPUTED_ROWS,
    *decoder.UNSUPPORTED_ROWS,
)
TABLE = Table(ROWS, prefixes=("model.", "module.", "draft_model.", "ea_layer."))


class Eagle3Options(decoder.DraftOptions):
    """Options of EAGLE-3."""

    norm_before_residual: bool | None = Field(
        default=None,
        description="Whether the residual starts after hidden_norm (false when neither given nor in config.json).",
    )
    norm_before_fc: bool | None = Field(
        default=None, description="Whether input_norm is applied to the joined states before fc; seen in the tensors."
    )
    fc_norm: bool | None = Field(
        default=None, description="Whether each verifier state has a norm of its own before fc; seen in the tensors."
    )
    norm_output: bool | None = Field(
        default=None,
        description="Whether states are fed back after the final norm (false when neither given nor in config.json).",
    )
    eagle_aux_hidden_state_layer_ids: list[int] | None = Field(
        default=None,
        min_length=1,
        description="Verifier layers whose inputs fc joins (2, n/2, n-3 of n when neither given nor in config.json).",
    )


class Eagle3Config(LayeredConfig):
    """The output type ``eagle3``, field for field as speculators 0.9 and vLLM know it."""

    speculators_model_type: Literal["eagle3"] = "eagle3"
    architectures: list[str] = Field(default=["Eagle3Speculator"])
    norm_before_residual: bool
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    eagle_aux_hidden_state_layer_ids: list[int] | None = None

    @model_validator(mode="after")
    def _one_norm(self) -> Self:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        return self

    @model_validator(mode="after")
    def _states_are_counted(self) -> Self:
        said = (self.transformer_layer_config.model_extra or {}).get("num_aux_hidden_states", 3)
        if type(said) is not int or said < 1:
            raise ValueError(f"num_aux_hidden_states is {said!r}, expected a positive whole number")
        return self

    @property
    def state_count(self) -> int:
        """How many hidden states of the verifier ``fc`` joins."""
        return int((self.transformer_layer_config.model_extra or {}).get("num_aux_hidden_states", 3))

    @property
    def state_size(self) -> int:
        """Hidden size of the verifier."""
        return self.target_hidden_size or self.transformer_layer_config.hidden_size


class Eagle3(ConverterSpec[Eagle3Config]):
    """EAGLE-3 and 3.1."""

    interface = 1
    name = "eagle3"
    summary = "EAGLE-3 and 3.1 draft heads (SafeAILab/EAGLE, SpecForge, ModelOpt, ...)"
    reference = "https://arxiv.org/abs/2503.01840"
    quirks = (
        "`fc` joins three states of the verifier unless the head says otherwise. The first layer reads embeddings and "
        "states side by side, the others are ordinary Llama layers.",
        "The maps `d2t` (offsets) and `t2d` (a mask) must agree with each other; a missing one is made from the other. "
        "With a full draft vocabulary they are checked to be the identity and left out, as vLLM has no place for them.",
        "An `lm_head` is always kept, as speculators 0.9 does not share the verifier's. Where it is absent and the "
        "vocabulary full, engines use the verifier's.",
        "Biases on q, k and v alone are completed with an output bias of zeros, which changes nothing, as engines know "
        "biases on all four projections or on none; the result lists it.",
        "`use_verifier_embed_tokens` replaces embeddings that an exporter saved untrained; `rope_theta` overrides a "
        "base that the config states wrongly.",
        "Refused by name: MLA drafts, quantised weights, Qwen3 attention norms, mixture-of-experts layers, P-EAGLE, "
        "heads that read only the verifier's last state, and ModelOpt heads (`eagle_config`) that do not say which "
        "layers of the verifier feed them.",
    )
    table = TABLE
    options = Eagle3Options
    config = Eagle3Config
    buffers = ("d2t", "t2d")
    draft_to_target = "d2t"
    vllm = Vllm("eagle3")
    nested = ("model", "eagle_config", "text_config")

    def recognises(self, source: Checkpoint) -> bool:
        """A first layer that norms embeddings and states apart, or the architecture's name."""
        moves = match(TABLE, source.tensors).moves
        architectures = source.config.get("architectures")
        return (
            "layers.0.hidden_norm.weight" in moves
            or any("midlayer." in name for name in source.tensors)
            or "eagle3" in str(architectures).lower()
        )

    def examine(self, context: Context) -> Facts:
        """Sizes, draft vocabulary, norms and layer ids; see `speculators_eagle3.facts`."""
        return eagle3_facts.examine(TABLE, context)

    def configure(self, context: Context, facts: Facts) -> tuple[Eagle3Config, list[str]]:
        """Build the config of type ``eagle3``."""
        layer, notes = decoder.layer_config(context, facts)
        if facts.dims["naux"] != 3:
            # Where vLLM looks for it (vllm/model_executor/models/llama_eagle3.py); three is its default.
            layer = layer.model_copy(update={"num_aux_hidden_states": facts.dims["naux"]})
        config = Eagle3Config(
            **context.common_fields("eagle3"),
            transformer_layer_config=layer,
            draft_vocab_size=facts.dims["DV"],
            target_hidden_size=facts.dims["TH"],
            norm_before_residual=eagle3_facts.flag(context, "norm_before_residual"),
            norm_before_fc="norm_before_fc" in facts.parts,
            fc_norm="fc_norm" in facts.parts,
            norm_output=eagle3_facts.flag(context, "norm_output"),
            eagle_aux_hidden_state_layer_ids=eagle3_facts.layer_ids(context),
        )
        return config, notes

    def export_config(self, config: Eagle3Config) -> dict[str, Any]:
        """What EAGLE-3's trainers save, with the flags that no tensor shows where SpecForge and ModelOpt put them."""
        flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        said: dict[str, Any] = {flag: True for flag in flags if getattr(config, flag)}
        if config.eagle_aux_hidden_state_layer_ids:
            said |= {eagle3_facts.LAYER_IDS: config.eagle_aux_hidden_state_layer_ids}
        said |= {"target_hidden_size": config.state_size, "draft_vocab_size": config.draft_vocab_size}
        return decoder.export_config(config, **said | {"architectures": ["LlamaForCausalLMEagle3"]})

    def dims(self, config: Eagle3Config) -> Mapping[str, int]:
        """Sizes of the layers, the draft vocabulary and the verifier's states.

        Symbols beside those of `speculators.decoder`:
            TH: hidden size of the verifier
            naux: how many of its states ``fc`` joins
            DV: draft vocabulary
        """
        return decoder.config_dims(config.transformer_layer_config) | {
            "DV": config.draft_vocab_size,
            "TH": config.state_size,
            "naux": config.state_count,
        }

    def parts(self, config: Eagle3Config) -> frozenset[str]:
        """Biases, norms before ``fc``, and the vocabulary maps unless the vocabulary is full."""
        flags = {
            "norm_before_fc": config.norm_before_fc,
            "fc_norm": config.fc_norm,
            "draft_vocabulary": config.draft_vocab_size != config.transformer_layer_config.vocab_size,
        }
        return frozenset(
            decoder.config_parts(config.transformer_layer_config) | {part for part, on in flags.items() if on}
        )

    def state_layers(self, config: Eagle3Config, layers: int) -> tuple[int, ...]:
        """The layers that the config names, else those of the EAGLE-3 authors (``modeling_llama_kv.py``)."""
        ids = config.eagle_aux_hidden_state_layer_ids
        return tuple(ids) if ids else (2, layers // 2, layers - 3)

    def inspect(self, converted: Checkpoint, config: Eagle3Config) -> list[str]:
        """Whether the vocabulary maps agree with each other."""
        if "d2t" not in converted.tensors:
            return []
        layer = config.transformer_layer_config
        return vocabulary.check_maps(
            converted.array("d2t"), converted.array("t2d"), config.draft_vocab_size, layer.vocab_size
        )

    def alternatives(self, config: Eagle3Config, verifier: Verifier) -> list[Alternative]:
        """The other side of both flags that no tensor shows, other layers of the verifier, other rotary bases."""
        flags = [
            Alternative(name, not getattr(config, name), config.model_copy(update={name: not getattr(config, name)}))
            for name in ("norm_before_residual", "norm_output")
        ]
        current = list(self.state_layers(config, verifier.num_layers))
        layers = [
            Alternative(eagle3_facts.LAYER_IDS, ids, config.model_copy(update={eagle3_facts.LAYER_IDS: ids}))
            for ids in eagle3_facts.other_layer_ids(current, verifier.num_layers)
        ]
        return [*flags, *layers, *decoder.rope_alternatives(config, verifier)]

    def original(self, context: Context, facts: Facts) -> Original:
        """The training code's model; see `speculators_eagle3.original`."""
        from speculators_eagle3.original import OriginalEagle3, Settings

        native = context.matching.native
        settings = Settings(
            state_size=context.verifier.hidden_size,
            states=facts.dims["naux"],
            norm_before_residual=eagle3_facts.said(context, "norm_before_residual") is True,
            norm_output=eagle3_facts.said(context, "norm_output") is True,
        )
        layers = context.verifier.num_layers
        return Original(
            OriginalEagle3(decoder.original_layer(context, facts), settings, native),
            native,
            state_layers=tuple(eagle3_facts.said(context, eagle3_facts.LAYER_IDS) or (2, layers // 2, layers - 3)),
            embedding=decoder.own_embedding(context),
            head=native.get("lm_head.weight", ""),
            targets=vocabulary.original_targets(context.source, native),
        )

    def build(self, config: Eagle3Config) -> nn.Module:
        """Build the draft model."""
        from speculators_eagle3.draft import Eagle3Draft

        return Eagle3Draft(config)

    def example(self, verifier: Verifier) -> Example:
        """A head with a draft vocabulary of the verifier's first and last tokens."""
        import numpy as np

        made, size = decoder.example(verifier, ["draft_vocabulary"], naux=3, DV=32, TH=verifier.hidden_size), 32
        known = np.r_[0 : size // 2, verifier.vocab_size - size // 2 : verifier.vocab_size]
        tensors = {
            "d2t": known - np.arange(size),
            "t2d": np.isin(np.arange(verifier.vocab_size), known),
            "lm_head.weight": np.random.default_rng(0).standard_normal((size, verifier.hidden_size), np.float32),
        }
        return replace(made, tensors=tensors, optional=frozenset({"d2t", "t2d"}))


@hookimpl
def register_converter() -> type[ConverterSpec]:
    """Bring the algorithm ``eagle3``."""
    return Eagle3
