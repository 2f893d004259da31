"""EAGLE and HASS heads as their training code runs them, under the names that it saves.

Validation compares outputs with this, so it follows the original forwards line by line and shares
nothing with the output's config and names: ``Model.forward`` in ``eagle/model/cnets1.py`` of
SafeAILab/EAGLE and ``model/cnets.py`` of HArmonizedSS/HASS, and for the norms
``LlamaForCausalLMEagle.forward`` in ``research/hass/model/llama_eagle_full_grad.py`` of
vllm-project/speculators v0.1.0.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from speculators import DecoderLayerConfig
from speculators.modeling import DecoderLayer, RMSNorm, Rotary


class OriginalEagle(nn.Module):
    """What the training code computes with the modules that ``names`` shows it to have saved."""

    def __init__(self, layer: DecoderLayerConfig, names: Container[str]) -> None:
        super().__init__()
        size = layer.hidden_size
        self.state_size = size
        self.fc = nn.Linear(2 * size, size, bias="fc.bias" in names)
        self.rotary = Rotary(layer)
        self.layers = nn.ModuleList([DecoderLayer(layer)])

        def norm(name: str) -> nn.Module:
            return RMSNorm(size, eps=layer.rms_norm_eps) if f"{name}.weight" in names else nn.Identity()

        self.embed_layernorm = norm("embed_layernorm")
        self.hidden_layernorm = norm("hidden_layernorm")
        self.lm_head_layernorm = norm("lm_head_layernorm")

    def combine(self, states: Tensor) -> Tensor:
        """``[B, T, H]`` last hidden states of the verifier, as they are."""
        return states

    def forward(self, embeddings: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, H]`` embeddings and hidden states → hidden states and LM-head inputs ``[B, T, H]``."""
        embeddings = self.embed_layernorm(embeddings)
        hidden = self.hidden_layernorm(hidden)
        hidden = self.fc(torch.cat((embeddings, hidden), dim=-1))
        rotary = self.rotary(positions, hidden)
        for layer in self.layers:
            hidden = layer(hidden, hidden, rotary)
        return hidden, self.lm_head_layernorm(hidden)
