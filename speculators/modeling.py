"""Torch building blocks of draft models: one Llama decoder layer that computes what training did.

Rotary embedding with its scaling types, RMSNorm and the MLP are transformers' own, which compute
exactly what the training code of EAGLE and HASS computes (``eagle/model/cnets1.py`` and
``cnets.py`` of SafeAILab/EAGLE, themselves taken from transformers). Attention is written here, as
drafts differ in what it reads. Parameter names are those of the original layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from speculators.config import DecoderLayerConfig

RMSNorm = LlamaRMSNorm


class Rotary(nn.Module):
    """Cosines and sines of positions, with the config's scaling.

    Raises:
        KeyError: transformers does not know the scaling type.
    """

    def __init__(self, config: DecoderLayerConfig) -> None:
        super().__init__()
        with torch.device("cpu"):  # it holds no weights, so it is real even in a model built on meta
            self.embedding = LlamaRotaryEmbedding(_llama(config))

    def forward(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[T]`` positions → two tensors ``[1, 1, T, R]`` in the dtype of ``hidden``; R is at most head_dim."""
        cos, sin = self.embedding(hidden, positions[None])
        return cos[:, None], sin[:, None]


class Attention(nn.Module):
    """Causal grouped-query attention over inputs of any width.

    Args:
        config: The layer's config.
        width: Width of the input; H, or 2H where embeddings and states are joined.
    """

    def __init__(self, config: DecoderLayerConfig, width: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or (config.model_extra or {}).get("qkv_bias", False)
        self.q_proj = nn.Linear(width, queries, bias=qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(self, inputs: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """``[B, T, width]`` → ``[B, T, H]``."""
        batch, length, _ = inputs.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, self.head_dim).transpose(1, 2)

        attended = nn.functional.scaled_dot_product_attention(
            _rotate(heads(self.q_proj(inputs)), rotary),
            _rotate(heads(self.k_proj(inputs)), rotary),
            heads(self.v_proj(inputs)),
            is_causal=True,
            enable_gqa=True,
        )
        output: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        return output


class DecoderLayer(nn.Module):
    """A Llama decoder layer whose attention input and residual stream are the caller's to prepare."""

    def __init__(self, config: DecoderLayerConfig, width: int | None = None) -> None:
        super().__init__()
        self.self_attn = Attention(config, width or config.hidden_size)
        self.mlp = LlamaMLP(_llama(config))  # type: ignore[no-untyped-call]
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, inputs: Tensor, residual: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """``[B, T, width]`` attention inputs and ``[B, T, H]`` residual → ``[B, T, H]``."""
        hidden = residual + self.self_attn(inputs, rotary)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


def _rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    turned, passed = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    return torch.cat((turned * cos + _half_turn(turned) * sin, passed), dim=-1)


def _half_turn(heads: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _llama(config: DecoderLayerConfig) -> LlamaConfig:
    # One head satisfies LlamaConfig's demand that heads divide the hidden size, which drafts need
    # not meet; what is built from it reads head_dim and the sizes of the MLP alone.
    return LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=1,
        head_dim=config.head_dim,
        hidden_act=config.hidden_act,
        mlp_bias=config.mlp_bias,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
