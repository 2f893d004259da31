"""EAGLE-3 heads as their training code runs them, under the names that it saves.

Validation compares outputs with this, so it follows ``LlamaDecoderLayeremb.forward`` and
``Model.forward`` in ``eagle/model/cnets.py`` of SafeAILab/EAGLE line by line, and shares nothing with
the output's config and names. What that code does not have: ``norm_before_residual``, ``norm_output``
and later layers as vLLM's ``vllm/model_executor/models/llama_eagle3.py`` runs them, ``input_norm`` as
ModelOpt's and ``fc_norm`` as SpecForge's.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speculators import DecoderLayerConfig
from speculators.modeling import DecoderLayer, RMSNorm, Rotary


@dataclass(frozen=True)
class Settings:
    """What the native config says about an EAGLE-3 head, beside its layers.

    Attributes:
        state_size: Hidden size of the verifier.
        states: How many of its states ``fc`` joins.
        norm_before_residual: Whether the residual starts after ``hidden_norm``.
        norm_output: Whether states are fed back after the final norm.
    """

    state_size: int
    states: int
    norm_before_residual: bool
    norm_output: bool


class NormedLayer(DecoderLayer):
    """A layer with a norm on its input, and one on the hidden states where embeddings come in beside them."""

    def __init__(self, layer: DecoderLayerConfig, width: int) -> None:
        super().__init__(layer, width)
        self.input_layernorm = RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        if width > layer.hidden_size:
            self.hidden_norm = RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)


class OriginalEagle3(nn.Module):
    """What the training code computes with the modules that ``names`` shows it to have saved."""

    def __init__(self, layer: DecoderLayerConfig, settings: Settings, names: Container[str]) -> None:
        super().__init__()

        def norm(size: int = layer.hidden_size) -> nn.Module:
            return RMSNorm(size, eps=layer.rms_norm_eps)

        self.settings = settings
        self.state_size = settings.states * settings.state_size
        if "input_norm.weight" in names:
            self.input_norm = norm(self.state_size)
        if "fc_norm.0.weight" in names:
            self.fc_norm = nn.ModuleList(norm(settings.state_size) for _ in range(settings.states))
        self.fc = nn.Linear(self.state_size, layer.hidden_size, bias=False)
        self.rotary = Rotary(layer)
        self.midlayer = NormedLayer(layer, 2 * layer.hidden_size)
        later = range(1, layer.num_hidden_layers)
        self.layers = nn.ModuleDict({str(number): NormedLayer(layer, layer.hidden_size) for number in later})
        self.norm = norm()

    def combine(self, states: Tensor) -> Tensor:
        """``[B, T, naux*TH]`` states of the verifier, shallow to deep → ``[B, T, H]``."""
        if hasattr(self, "input_norm"):
            states = self.input_norm(states)
        if hasattr(self, "fc_norm"):
            pieces = states.chunk(self.settings.states, dim=-1)
            states = torch.cat([self.fc_norm[number](piece) for number, piece in enumerate(pieces)], dim=-1)
        joined: Tensor = self.fc(states)
        return joined

    def forward(self, embeddings: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, H]`` embeddings and hidden states → states to feed back and LM-head inputs ``[B, T, H]``."""
        rotary = self.rotary(positions, hidden)
        residual = hidden
        hidden = self.midlayer.hidden_norm(hidden)
        if self.settings.norm_before_residual:
            residual = hidden
        embeddings = self.midlayer.input_layernorm(embeddings)
        hidden = self.midlayer(torch.cat((embeddings, hidden), dim=-1), residual, rotary)
        for layer in self.layers.values():
            hidden = layer(layer.input_layernorm(hidden), hidden, rotary)  # type: ignore[operator] # a ModuleDict forgets types
        normed = self.norm(hidden)
        return (normed if self.settings.norm_output else hidden), normed
