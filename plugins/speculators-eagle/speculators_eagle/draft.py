"""The EAGLE v1/v2 and HASS draft model in torch: what the original forwards compute.

Sources: ``eagle/model/cnets1.py`` of SafeAILab/EAGLE, ``model/cnets.py`` of HArmonizedSS/HASS, and for
the norms ``research/hass/model/llama_eagle_full_grad.py`` of vllm-project/speculators v0.1.0. Papers:
https://arxiv.org/abs/2401.15077, https://arxiv.org/abs/2406.16858, https://arxiv.org/abs/2408.15766.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speculators.modeling import DecoderLayer, RMSNorm, Rotary

if TYPE_CHECKING:
    from speculators_eagle import EagleConfig


class EagleDraft(nn.Module):
    """Fuse, run one decoder layer, and hand the result to the verifier's LM head."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        layer = config.transformer_layer_config
        self.state_size = layer.hidden_size
        self.rotary = Rotary(layer)

        def norm() -> nn.Module:
            return RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps) if config.layernorms else nn.Identity()

        self.embedding_layernorm = norm()
        self.hidden_layernorm = norm()
        self.pre_lm_head_layernorm = norm()
        self.fusion_fc = nn.Linear(2 * layer.hidden_size, layer.hidden_size, bias=config.fusion_bias)
        self.transformer = DecoderLayer(layer)

    def combine(self, states: Tensor) -> Tensor:
        """``[B, T, H]`` last hidden states of the verifier, after its final norm, as they are."""
        return states

    def forward(self, embeddings: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, H]`` embeddings and hidden states → hidden states and LM-head inputs ``[B, T, H]``.

        Norms come before the fusion, on verifier states and on the draft's own alike.
        """
        fused = self.fusion_fc(torch.cat((self.embedding_layernorm(embeddings), self.hidden_layernorm(hidden)), dim=-1))
        hidden = self.transformer(fused, fused, self.rotary(positions, fused))
        return hidden, self.pre_lm_head_layernorm(hidden)
