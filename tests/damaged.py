"""Converters with one mistake each, as somebody could make it: in the table, the config, or the forward.

The names are those of ``acceptance.wrong`` in the goldens, where the original code was damaged alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import torch
from torch import nn

from speculators import ConverterSpec, Drop, Registry, Rename, Table, hookimpl
from speculators.modeling import RMSNorm
from speculators_eagle import Eagle
from speculators_eagle.draft import EagleDraft
from speculators_eagle3 import Eagle3
from speculators_eagle3.draft import Eagle3Draft


@dataclass
class _Plugin:
    spec: type[ConverterSpec]

    @hookimpl
    def register_converter(self) -> type[ConverterSpec]:
        return self.spec


def registry(spec: type[ConverterSpec]) -> Registry:
    """Return a registry in which ``spec`` is the only algorithm."""
    globals()["installed"] = _Plugin(spec)
    return Registry(EntryPoints([EntryPoint(spec.name, "damaged:installed", "speculators")]))


def table(base: type[ConverterSpec], change: Callable[[Any], Any]) -> type[ConverterSpec]:
    """Change the rows of a table one by one."""
    rows = tuple(change(row) for row in base.table.rows)
    return type("Damaged", (base,), {"table": Table(rows, base.table.prefixes)})


def dropped(base: type[ConverterSpec], *names: str) -> type[ConverterSpec]:
    """Throw tensors away."""
    return table(base, lambda row: Drop(row.source, "of no use") if row.source in names else row)


def swapped(base: type[ConverterSpec], one: str, other: str) -> type[ConverterSpec]:
    """Write two tensors under each other's names."""
    targets = {one: other, other: one}

    def swap(row: Any) -> Any:
        return replace(row, target=targets[row.target]) if isinstance(row, Rename) and row.target in targets else row

    return table(base, swap)


def configured(base: type[ConverterSpec], change: Callable[[Any], dict[str, Any]]) -> type[ConverterSpec]:
    """Write other values into the output's config."""

    def configure(self: Any, context: Any, facts: Any) -> Any:
        config, notes = base.configure(self, context, facts)
        return config.model_copy(update=change(config)), notes

    return type("Damaged", (base,), {"configure": configure})


def layers_configured(base: type[ConverterSpec], change: Callable[[Any], dict[str, Any]]) -> type[ConverterSpec]:
    """Write other values into the config of the decoder layers."""

    def changed(config: Any) -> dict[str, Any]:
        layer = config.transformer_layer_config
        return {"transformer_layer_config": layer.model_copy(update=change(layer))}

    return configured(base, changed)


def built(base: type[ConverterSpec], model: type[nn.Module]) -> type[ConverterSpec]:
    """Run another forward."""
    return type("Damaged", (base,), {"build": lambda self, config: model(config)})


def replaced(base: type[ConverterSpec], **members: Any) -> type[ConverterSpec]:
    """Replace members of a spec."""
    return type("Damaged", (base,), members)


class UnitInputLayernorm(EagleDraft):
    def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
        fused = self.fusion_fc(torch.cat((self.embedding_layernorm(embeddings), self.hidden_layernorm(hidden)), -1))
        normed = nn.functional.rms_norm(fused, fused.shape[-1:])
        hidden = self.transformer(normed, fused, self.rotary(positions, fused))
        return hidden, self.pre_lm_head_layernorm(hidden)


class NotShifted(EagleDraft):
    def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
        return super().forward(embeddings.roll(1, dims=1), hidden, positions)


class Eagle3NotShifted(Eagle3Draft):
    def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
        return super().forward(embeddings.roll(1, dims=1), hidden, positions)


def without(norm: str) -> type[nn.Module]:
    """An EAGLE draft that has a norm and does not apply it."""

    class Without(EagleDraft):
        def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
            kept, self._modules[norm] = self._modules[norm], nn.Identity()
            try:
                return super().forward(embeddings, hidden, positions)
            finally:
                self._modules[norm] = kept

    return Without


class HiddenLayernormAfterFusion(EagleDraft):
    def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
        fused = self.fusion_fc(torch.cat((self.embedding_layernorm(embeddings), hidden), -1))
        fused = self.hidden_layernorm(fused)
        hidden = self.transformer(fused, fused, self.rotary(positions, fused))
        return hidden, self.pre_lm_head_layernorm(hidden)


class HiddenLayernormOnLayer(EagleDraft):
    def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
        fused = self.fusion_fc(torch.cat((self.embedding_layernorm(embeddings), hidden), -1))
        hidden = self.transformer(self.hidden_layernorm(fused), fused, self.rotary(positions, fused))
        return hidden, self.pre_lm_head_layernorm(hidden)


class EmbedLayernormAfterFusion(EagleDraft):
    def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
        fused = self.embedding_layernorm(self.fusion_fc(torch.cat((embeddings, hidden), -1)))
        hidden = self.transformer(fused, fused, self.rotary(positions, fused))
        return hidden, self.pre_lm_head_layernorm(hidden)


class FinalNormIgnored(Eagle3Draft):
    def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
        hidden, _ = super().forward(embeddings, hidden, positions)
        return hidden, hidden


class NormAfterFusion(Eagle3Draft):
    """A norm more than the original has, on what the draft starts from."""

    def combine(self, states: Any) -> Any:
        joined = super().combine(states)
        return RMSNorm(joined.shape[-1]).to(joined.dtype)(joined)


def absolute(self: Any, checkpoint: Any, name: str) -> Any:
    """Take the offsets of a vocabulary map for token ids."""
    return checkpoint.array(name) if name in checkpoint.tensors else None


def rope(theta: float) -> Callable[[Any], dict[str, Any]]:
    """Write another rotary base."""
    return lambda layer: {"rope_theta": theta, "rope_parameters": {**layer.rope_parameters, "rope_theta": theta}}


LAYERNORMS = ("embed_layernorm.weight", "hidden_layernorm.weight", "lm_head_layernorm.weight")
FIRST = "layers.0."
AUX = "eagle_aux_hidden_state_layer_ids"

EAGLE = {
    "fc_bias_dropped": dropped(Eagle, "fc.bias"),
    "unit_input_layernorm_added": built(Eagle, UnitInputLayernorm),
    "token_ids_not_shifted": built(Eagle, NotShifted),
    "gate_and_up_swapped": swapped(Eagle, "transformer.mlp.gate_proj.weight", "transformer.mlp.up_proj.weight"),
    "activation": layers_configured(Eagle, lambda layer: {"hidden_act": "gelu"}),
    "rope_base": layers_configured(Eagle, rope(5e5)),
}
HASS = {
    "all_three_layernorms_ignored": dropped(Eagle, *LAYERNORMS),
    "lm_head_layernorm_ignored": built(Eagle, without("pre_lm_head_layernorm")),
    "embed_layernorm_ignored": built(Eagle, without("embedding_layernorm")),
    "hidden_layernorm_ignored": built(Eagle, without("hidden_layernorm")),
    "hidden_layernorm_after_fc": built(Eagle, HiddenLayernormAfterFusion),
    "hidden_layernorm_used_as_decoder_input_layernorm": built(Eagle, HiddenLayernormOnLayer),
    "embed_layernorm_after_fc_and_hidden_layernorm_ignored": built(Eagle, EmbedLayernormAfterFusion),
    "unit_input_layernorm_added": built(Eagle, UnitInputLayernorm),
    "token_ids_not_shifted": built(Eagle, NotShifted),
}
EAGLE3 = {
    "d2t_ignored": replaced(Eagle3, draft_to_target=""),
    "d2t_read_as_absolute_ids": replaced(Eagle3, targets=absolute),
    "final_norm_ignored": built(Eagle3, FinalNormIgnored),
    "hidden_norm_and_input_layernorm_swapped": swapped(
        Eagle3, f"{FIRST}hidden_norm.weight", f"{FIRST}input_layernorm.weight"
    ),
    "aux_states_taken_one_layer_late": configured(Eagle3, lambda config: {AUX: [3, 5, 6]}),
    "aux_states_in_reverse_order": replaced(Eagle3, state_layers=lambda self, config, layers: (5, 4, 2)),
    "token_ids_not_shifted": built(Eagle3, Eagle3NotShifted),
    "norm_before_residual": configured(Eagle3, lambda config: {"norm_before_residual": True}),
    "norm_output": configured(Eagle3, lambda config: {"norm_output": True}),
    "norm_after_fusion": built(Eagle3, NormAfterFusion),
    "rope_base": layers_configured(Eagle3, rope(5e5)),
    "norm_epsilon": layers_configured(Eagle3, lambda layer: {"rms_norm_eps": 1e-3}),
}

SPECS = {
    "eagle1-fc-bias": EAGLE,
    "eagle1-no-bias": EAGLE,
    "hass-fc-bias": EAGLE,
    "hass-layernorms": HASS,
    "eagle3": EAGLE3,
}
"""Trained checkpoint → damage → converter."""
