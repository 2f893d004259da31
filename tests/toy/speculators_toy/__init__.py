"""Convert toy heads: one linear layer on the verifier's hidden state and the next token's embedding.

A whole plugin in one module, as somebody who has never seen the core's source would write it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

import speculators
from speculators import ConverterSpec, Example, Facts, Options, Rename, SpeculatorConfig, Table, hookimpl


class ToyOptions(Options):
    """Options of toy heads."""

    squash: bool = Field(default=False, description="Whether the output goes through tanh.")


class ToyConfig(SpeculatorConfig):
    """The output type ``toy``."""

    speculators_model_type: Literal["toy"] = "toy"
    architectures: list[str] = Field(default=["ToySpeculator"])
    squash: bool


class Toy(ConverterSpec[ToyConfig]):
    """Toy heads."""

    interface = 1
    name = "toy"
    aliases = ("plaything",)
    summary = "Toy heads for tests"
    reference = "https://example.org/toy"
    table = Table((Rename("toy.weight", "linear.weight", "H, 2*H"),))
    options = ToyOptions
    config = ToyConfig

    def recognises(self, source: speculators.Checkpoint) -> bool:
        return set(source.tensors) == {"toy.weight"}

    def examine(self, context: speculators.Context) -> Facts:
        return Facts({"H": context.verifier.hidden_size})

    def configure(self, context: speculators.Context, facts: Facts) -> tuple[ToyConfig, list[str]]:
        config = ToyConfig(
            **context.common_fields("toy"),
            draft_vocab_size=context.verifier.vocab_size,
            target_hidden_size=facts.dims["H"],
            squash=context.options.squash,
        )
        return config, []

    def dims(self, config: ToyConfig) -> dict[str, int]:
        return {"H": config.target_hidden_size}

    def parts(self, config: ToyConfig) -> frozenset[str]:
        return frozenset()

    def build(self, config: ToyConfig) -> Any:
        import torch

        class ToyDraft(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.state_size = config.target_hidden_size
                self.linear = torch.nn.Linear(2 * self.state_size, self.state_size, bias=False)

            def combine(self, states: Any) -> Any:
                return states

            def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
                output = self.linear(torch.cat((embeddings, hidden), dim=-1))
                return (output.tanh(), output.tanh()) if config.squash else (output, output)

        return ToyDraft()

    def example(self, verifier: speculators.Verifier) -> Example:
        return Example({"model_type": "toy"}, {"H": verifier.hidden_size})


@hookimpl
def register_converter() -> type[ConverterSpec]:
    return Toy
