"""Convert toy heads: one linear layer on the verifier's hidden state and the next token's embedding.

A whole plugin in one module, as somebody who has never seen the core's source would write it.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

import speculators
from speculators import ConverterSpec, Facts, Options, Rename, SpeculatorConfig, Table, decoder, hookimpl


class ToyOptions(Options):
    """Options of toy heads."""

    squash: bool = Field(default=False, description="Whether the output goes through tanh.")


class ToyConfig(SpeculatorConfig):
    """The output type ``toy``."""

    speculators_model_type: str = "toy"
    architectures: list[str] = Field(default=["ToySpeculator"])
    squash: bool


class Toy(ConverterSpec):
    """Toy heads."""

    interface = 1
    name = "toy"
    aliases = ("plaything",)
    summary = "Toy heads for tests"
    reference = "https://example.org/toy"
    table = Table((Rename("toy.weight", "linear.weight", "H, 2*H"),))
    options = ToyOptions
    config = ToyConfig

    def recognises(self, source: Any) -> bool:
        return set(source.tensors) == {"toy.weight"}

    def examine(self, context: Any) -> Facts:
        return Facts({"H": context.verifier.hidden_size})

    def configure(self, context: Any, facts: Facts) -> tuple[SpeculatorConfig, list[str]]:
        size = facts.dims["H"]
        layer = speculators.DecoderLayerConfig(
            vocab_size=context.verifier.vocab_size,
            hidden_size=size,
            intermediate_size=size,
            num_hidden_layers=0,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=size,
            hidden_act="tanh",
            rms_norm_eps=1e-6,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rope_theta=10000.0,
            dtype="float32",
        )
        config = ToyConfig(
            speculators_version=speculators.__version__,
            speculators_config=decoder.speculators_block(context, "toy"),
            transformer_layer_config=layer,
            draft_vocab_size=layer.vocab_size,
            dtype="float32",
            squash=context.options.squash,
        )
        return config, []

    def dims(self, config: SpeculatorConfig) -> dict[str, int]:
        return {"H": config.transformer_layer_config.hidden_size}

    def parts(self, config: SpeculatorConfig) -> frozenset[str]:
        return frozenset()

    def build(self, config: SpeculatorConfig) -> Any:
        import torch

        class ToyDraft(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.state_size = config.transformer_layer_config.hidden_size
                self.linear = torch.nn.Linear(2 * self.state_size, self.state_size, bias=False)

            def combine(self, states: Any) -> Any:
                return states

            def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
                output = self.linear(torch.cat((embeddings, hidden), dim=-1))
                return (output.tanh(), output.tanh()) if config.squash else (output, output)

        return ToyDraft()


@hookimpl
def register_converter() -> type[ConverterSpec]:
    return Toy
