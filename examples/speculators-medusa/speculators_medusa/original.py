"""Medusa heads as their training code runs them, under the names that it saves.

Source: ``ResBlock`` and ``MedusaModel.forward`` in ``medusa/model/medusa_model_legacy.py`` of FasterDecoding/Medusa at
700ff84.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResBlock(nn.Module):
    """One residual block."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.act = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, T, H]`` → ``[B, T, H]``."""
        output: Tensor = hidden + self.act(self.linear(hidden))
        return output


class OriginalMedusa(nn.ModuleList):
    """A list of heads, each a sequence that ends with its LM head, so that names are ``{head}.{place}``."""

    def __init__(self, heads: int, layers: int, size: int, vocabulary: int) -> None:
        lm_heads = (nn.Linear(size, vocabulary, bias=False) for _ in range(heads))
        super().__init__(nn.Sequential(*(ResBlock(size) for _ in range(layers)), lm_head) for lm_head in lm_heads)
        self.state_size = size
        self.draft_tokens = heads

    def combine(self, states: Tensor) -> Tensor:
        """``[B, T, H]`` last hidden states of the verifier, as they are."""
        return states

    def forward(self, embeddings: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, H]`` states → these, and the logits of all heads, ``[B, T, K, V]``."""
        return hidden, torch.stack([head(hidden) for head in self], dim=-2)

    def logits(self, head_input: Tensor) -> Tensor:
        """The heads have made them."""
        return head_input
