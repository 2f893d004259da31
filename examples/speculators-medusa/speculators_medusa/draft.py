"""The Medusa draft in torch, with the output's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from speculators_medusa import MedusaConfig


class Block(nn.Module):
    """The residual blocks of one head."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, T, H]`` → ``[B, T, H]``."""
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(hidden))
        return hidden


class MedusaDraft(nn.Module):
    """Heads side by side on one hidden state of the verifier."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        size, heads = config.target_hidden_size, range(config.num_heads)
        self.state_size = size
        self.draft_tokens = config.num_heads
        self.blocks = nn.ModuleList(Block(size, config.num_hidden_layers) for _ in heads)
        self.lm_heads = nn.ModuleList(nn.Linear(size, config.draft_vocab_size, bias=False) for _ in heads)

    def combine(self, states: Tensor) -> Tensor:
        """``[B, T, H]`` last hidden states of the verifier, as they are."""
        return states

    def forward(self, embeddings: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, H]`` states → these, and what each LM head reads, ``[B, T, K, H]``; tokens are not read."""
        return hidden, torch.stack([block(hidden) for block in self.blocks], dim=-2)

    def logits(self, head_input: Tensor) -> Tensor:
        """``[..., K, H]`` → ``[..., K, V]``."""
        pairs = zip(self.lm_heads, head_input.unbind(-2), strict=True)
        return torch.stack([head(read) for head, read in pairs], dim=-2)
