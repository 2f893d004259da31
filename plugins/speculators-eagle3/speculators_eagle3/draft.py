"""The EAGLE-3 draft model in torch: what the original forward computes.

Source: ``eagle/model/cnets.py`` of SafeAILab/EAGLE, paper https://arxiv.org/abs/2503.01840. The flags
that it does not have follow vLLM (``vllm/model_executor/models/llama_eagle3.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speculators import DecoderLayerConfig
from speculators.modeling import DecoderLayer, RMSNorm, Rotary

if TYPE_CHECKING:
    from speculators_eagle3 import Eagle3Config


class FirstLayer(DecoderLayer):
    """The layer that reads embeddings and hidden states side by side, each with a norm of its own."""

    def __init__(self, config: DecoderLayerConfig, norm_before_residual: bool) -> None:
        super().__init__(config, width=2 * config.hidden_size)
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def prepare(self, embeddings: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Two ``[B, T, H]`` → attention inputs ``[B, T, 2H]`` and residual ``[B, T, H]``."""
        normed = self.hidden_norm(hidden)
        inputs = torch.cat((self.input_layernorm(embeddings), normed), dim=-1)
        return inputs, normed if self.norm_before_residual else hidden


class LaterLayer(DecoderLayer):
    """An ordinary Llama layer."""

    def __init__(self, config: DecoderLayerConfig) -> None:
        super().__init__(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def prepare(self, embeddings: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Two ``[B, T, H]``, of which embeddings are not read → attention inputs and residual ``[B, T, H]``."""
        return self.input_layernorm(hidden), hidden


class Eagle3Draft(nn.Module):
    """Join the verifier's states, run the layers, and norm for the LM head."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        layer = config.transformer_layer_config
        size, count = config.state_size, config.state_count
        self.state_size = size * count
        self.norm_output = config.norm_output
        self.rotary = Rotary(layer)
        self.fc = nn.Linear(size * count, layer.hidden_size, bias=False)
        self.input_norm = RMSNorm(size * count, eps=layer.rms_norm_eps) if config.norm_before_fc else None
        norms = (RMSNorm(size, eps=layer.rms_norm_eps) for _ in range(count))
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None
        first = FirstLayer(layer, config.norm_before_residual)
        self.layers = nn.ModuleList([first, *(LaterLayer(layer) for _ in range(1, layer.num_hidden_layers))])
        self.norm = RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)

    def combine(self, states: Tensor) -> Tensor:
        """``[B, T, naux*TH]`` states of the verifier, shallow to deep → ``[B, T, H]``."""
        if self.input_norm is not None:
            states = self.input_norm(states)
        if self.fc_norm is not None:
            pieces = states.chunk(len(self.fc_norm), dim=-1)
            states = torch.cat([norm(piece) for norm, piece in zip(self.fc_norm, pieces, strict=True)], dim=-1)
        hidden: Tensor = self.fc(states)
        return hidden

    def forward(self, embeddings: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, H]`` embeddings and hidden states → states to feed back and LM-head inputs ``[B, T, H]``."""
        rotary = self.rotary(positions, hidden)
        for layer in self.layers:
            inputs, residual = layer.prepare(embeddings, hidden)  # type: ignore[operator] # a ModuleList forgets types
            hidden = layer(inputs, residual, rotary)
        normed = self.norm(hidden)
        return (normed if self.norm_output else hidden), normed
