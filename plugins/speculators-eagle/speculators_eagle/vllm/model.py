"""The draft model of the type ``eagle`` in vLLM's own layers.

Computes what `speculators_eagle.draft` does, from the same tensor names. The surroundings are those that
vLLM's proposer for the method ``eagle`` expects: embeddings at ``model.embed_tokens``, the LM head at
``lm_head``, and the flags ``has_own_embed_tokens`` and ``has_own_lm_head``, by which it decides what to
share with the verifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speculators_eagle import TABLE, Eagle, EagleConfig
from speculators_eagle.vllm import cannot

try:
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import VllmConfig
    from vllm.distributed import get_pp_group
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader
    from vllm.model_executor.models.llama_eagle import LlamaDecoderLayer
    from vllm.model_executor.models.utils import maybe_prefix
except ImportError as error:
    raise ImportError(cannot(str(error))) from error

JOINED: Mapping[str, Mapping[str, str | int]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}
"""Projection of vLLM's Llama layer → the stored ones that it joins, each with what its loader calls the place."""


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0})
class EagleModel(nn.Module):
    """Everything but the LM head, under the output's tensor names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.speculator = EagleConfig.read(config.speculator)
        size = config.hidden_size

        def norm() -> nn.Module:
            return RMSNorm(size, eps=config.rms_norm_eps) if self.speculator.layernorms else nn.Identity()

        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, prefix=maybe_prefix(prefix, "embed_tokens"))
        self.embedding_layernorm = norm()
        self.hidden_layernorm = norm()
        self.fusion_fc = ReplicatedLinear(
            2 * size,
            size,
            bias=self.speculator.fusion_bias,
            params_dtype=vllm_config.model_config.dtype,
            prefix=maybe_prefix(prefix, "fusion_fc"),
            return_bias=False,
        )
        # vLLM keeps keys and values under the layer's prefix, so its number must follow the verifier's last.
        number = vllm_config.model_config.get_total_num_hidden_layers()
        self.transformer = LlamaDecoderLayer(
            vllm_config, disable_input_layernorm=True, prefix=maybe_prefix(prefix, f"layers.{number}"), config=config
        )
        self.pre_lm_head_layernorm = norm()

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[N]`` token ids and positions, ``[N, H]`` states → inputs of the LM head, and states to feed back."""
        embeddings = self.embedding_layernorm(self.embed_tokens(input_ids))
        fused = self.fusion_fc(torch.cat((embeddings, self.hidden_layernorm(hidden_states)), dim=-1))
        hidden, residual = self.transformer(positions, fused, None)
        hidden = hidden + residual
        return self.pre_lm_head_layernorm(hidden), hidden


class EagleSpeculatorForCausalLM(nn.Module):
    """A draft of the type ``eagle``, which uses the verifier's LM head.

    Raises:
        ValueError: It does not fit the verifier, or is run with another method.
    """

    has_own_lm_head = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        speculative, verifier = vllm_config.speculative_config, vllm_config.model_config
        self.config = speculative.draft_model_config.hf_config
        _require_fit(self.config, speculative.method, verifier.get_hidden_size(), verifier.get_vocab_size())
        self.has_own_embed_tokens = False
        self.model = EagleModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: Any = None  # vLLM puts the verifier's here
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[N]`` token ids → ``[N, H]`` embeddings."""
        embeddings: Tensor = self.model.embed_tokens(input_ids)
        return embeddings

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `EagleModel.forward`."""
        if inputs_embeds is not None:
            raise NotImplementedError("speculators of type 'eagle' draft from token ids, not from embeddings of images")
        outputs: tuple[Tensor, Tensor] = self.model(input_ids, positions, hidden_states)
        return outputs

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[N, H]`` inputs of the LM head → ``[N, V]`` logits."""
        logits: Tensor | None = self.logits_processor(self._head(), hidden_states)
        return logits

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """``[N, H]`` inputs of the LM head → ``[N]`` likeliest token ids, found without gathering logits."""
        tokens: Tensor = self.logits_processor.get_top_tokens(self._head(), hidden_states)
        return tokens

    def _head(self) -> Any:
        if self.lm_head is not None:
            return self.lm_head
        if self.has_own_embed_tokens:
            raise RuntimeError(
                "vLLM's model of the verifier has no lm_head, only embeddings, and this speculator of type 'eagle' "
                "has others; convert it without --self-contained, or serve the verifier alone"
            )
        return self.model.embed_tokens  # the verifier's, which ties them

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the output's tensors; returns the names of the parameters that are right.

        Shapes are compared here, as vLLM's own loaders cut what is too large.

        Raises:
            ValueError: A tensor is missing, there is one that the config does not tell of, or one of another shape.
            NotImplementedError: The draft is in use already, and what it shares with the verifier would be written.
        """
        if self.lm_head is not None:
            raise NotImplementedError("a speculator of type 'eagle' cannot be loaded anew while it is served")
        spec, config = Eagle(), self.model.speculator
        shapes = TABLE.shapes(spec.dims(config), spec.parts(config))
        del shapes[spec.head]  # the type has no room for a head of its own
        parameters = dict(self.model.named_parameters())
        places = _places(parameters)
        found: set[str] = set()
        problems = []
        for name, tensor in weights:
            found.add(name)
            if name not in shapes:
                problems.append(f"holds {name}, which its config does not tell of")
            elif tuple(tensor.shape) != shapes[name]:
                problems.append(f"holds {name} {list(tensor.shape)}, its config says {list(shapes[name])}")
            else:
                parameter, place = places[name]
                load = getattr(parameter, "weight_loader", default_weight_loader)
                load(parameter, tensor, *place)
        if missing := sorted(shapes.keys() - found - {spec.embedding}):
            problems.append(f"lacks {', '.join(missing)}")
        if problems:
            raise ValueError(
                f"this speculator of type 'eagle' {'; '.join(sorted(problems))}: its drafts would be worthless; "
                "convert the original checkpoint again"
            )
        self.has_own_embed_tokens = spec.embedding in found
        if not self.has_own_embed_tokens and get_pp_group().world_size > 1:
            raise ValueError(
                "with pipeline parallelism, a speculator of type 'eagle' needs embeddings of its own; "
                "convert it with --self-contained"
            )
        return {f"model.{name}" for name in parameters}


def _require_fit(config: Any, method: str, hidden_size: int, vocab_size: int) -> None:
    """Compare a draft with how and beside which verifier it is run."""
    sides = {
        "method": (method, "eagle"),
        "hidden size of the verifier": (hidden_size, config.hidden_size),
        "vocabulary of the verifier": (vocab_size, config.vocab_size),
    }
    problems = [f"{what} is {is_!r}, expected {must!r}" for what, (is_, must) in sides.items() if is_ != must]
    if problems:
        raise ValueError(
            f"this speculator of type 'eagle' cannot be served so: {'; '.join(problems)}; pass the method 'eagle' and "
            "the verifier that it was converted for"
        )


def _places(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[nn.Parameter, tuple[str | int, ...]]]:
    """Return stored name → the parameter that it goes into, and its place if others go there too."""
    places: dict[str, tuple[nn.Parameter, tuple[str | int, ...]]] = {}
    for name, parameter in parameters.items():
        module, _, kind = name.rpartition(".")
        owner, _, last = module.rpartition(".")
        if last in JOINED:
            places |= {f"{owner}.{piece}.{kind}": (parameter, (place,)) for piece, place in JOINED[last].items()}
        else:
            places[name] = (parameter, ())
    return places
