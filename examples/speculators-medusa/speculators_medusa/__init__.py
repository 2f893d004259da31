"""Convert Medusa heads, as FasterDecoding/Medusa trains them and saves them in ``medusa_lm_head.pt``.

Head ``k`` reads the verifier's last hidden state and proposes the token ``k + 2`` places on: residual
blocks, then an LM head of its own. Source: ``medusa/model/medusa_model_legacy.py`` of FasterDecoding/Medusa at
700ff84 (later ones have no LM heads), paper https://arxiv.org/abs/2401.10774. The output has the names of vLLM's
``model_executor/models/medusa.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from speculators import (
    Checkpoint,
    Context,
    ConverterSpec,
    Example,
    Facts,
    Original,
    Rename,
    SpeculatorConfig,
    Table,
    Verifier,
    hookimpl,
    match,
)

if TYPE_CHECKING:
    from torch import nn

TABLE = Table(
    (
        Rename("{0:K}.{0:R}.linear.weight", "blocks.{0:K}.layers.{0:R}.weight", "H, H"),
        Rename("{0:K}.{0:R}.linear.bias", "blocks.{0:K}.layers.{0:R}.bias", "H"),
        # The LM head follows the R residual blocks of its head, so its number is R.
        Rename("{0:K}.(1|2|3|4).weight", "lm_heads.{0:K}.weight", "V, H"),
    ),
    prefixes=("medusa_head.", "medusa_heads."),
)


class MedusaConfig(SpeculatorConfig):
    """The output type ``medusa``; heads and blocks are counted under the names of vLLM's ``MedusaConfig``."""

    speculators_model_type: Literal["medusa"] = "medusa"
    architectures: list[str] = Field(default=["MedusaSpeculator"])
    target_hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)


class Medusa(ConverterSpec[MedusaConfig]):
    """Medusa heads with LM heads of their own."""

    interface = 1
    name = "medusa"
    summary = "Medusa heads (FasterDecoding/Medusa)"
    reference = "https://arxiv.org/abs/2401.10774"
    quirks = (
        "Published configs say 2 heads where the file has 5; heads and residual blocks are counted in the tensors.",
        "The config tells no sizes: they are the verifier's, which the tensors must have.",
        "With several residual blocks (up to 4 are read), the training code repeats one: they are equal copies.",
        "Heads without LM heads of their own (`version` 2 of the training code) are refused.",
    )
    table = TABLE
    config = MedusaConfig
    embedding = head = ""

    def recognises(self, source: Checkpoint) -> bool:
        """A residual block of a numbered head."""
        return "blocks.0.layers.0.weight" in match(TABLE, source.tensors).moves

    def examine(self, context: Context) -> Facts:
        """Count heads and blocks; the rest must fit the verifier."""
        moves = context.matching.moves
        blocks = [found.numbers for target, found in moves.items() if target.startswith("blocks.")]
        heads, layers = (1 + max(numbers, default=0) for numbers in zip(*blocks, strict=True)) if blocks else (1, 1)
        said = {"medusa_num_heads": heads, "medusa_num_layers": layers}
        notes = [
            f"config.json says {key} {context.settings[key]}, the tensors say {count}: {count} is written"
            for key, count in said.items()
            if context.settings.get(key, count) != count
        ]
        findings = []
        if not any(target.startswith("lm_heads.") for target in moves):
            findings.append(
                "the heads have no LM heads of their own; Medusa 2 uses the verifier's, which is not converted"
            )
        for target, found in moves.items():
            if target.startswith("lm_heads.") and found.source.split(".")[-2] != str(layers):
                findings.append(f"{found.source} does not follow the {layers} residual blocks of its head")
        verifier = context.verifier
        dims = {"K": heads, "R": layers, "H": verifier.hidden_size, "V": verifier.vocab_size}
        return Facts(dims, notes=tuple(notes), findings=tuple(findings))

    def configure(self, context: Context, facts: Facts) -> tuple[MedusaConfig, list[str]]:
        """Build the config of type ``medusa``, which proposes one token per head."""
        config = MedusaConfig(
            **context.common_fields("medusa", most_tokens=facts.dims["K"]),
            draft_vocab_size=facts.dims["V"],
            target_hidden_size=facts.dims["H"],
            num_heads=facts.dims["K"],
            num_hidden_layers=facts.dims["R"],
        )
        return config, []

    def dims(self, config: MedusaConfig) -> Mapping[str, int]:
        """Heads, blocks per head, hidden size and vocabulary of the verifier."""
        return {
            "K": config.num_heads,
            "R": config.num_hidden_layers,
            "H": config.target_hidden_size,
            "V": config.draft_vocab_size,
        }

    def parts(self, config: MedusaConfig) -> frozenset[str]:
        """Nothing is optional."""
        return frozenset()

    def build(self, config: MedusaConfig) -> nn.Module:
        """Build the draft model."""
        from speculators_medusa.draft import MedusaDraft

        return MedusaDraft(config)

    def original(self, context: Context, facts: Facts) -> Original:
        """The training code's modules, under its own names."""
        from speculators_medusa.original import OriginalMedusa

        names = {TABLE.spellings(found.source)[-1]: found.source for found in context.matching.moves.values()}
        sizes = (facts.dims[symbol] for symbol in "KRHV")
        return Original(OriginalMedusa(*sizes), names, state_layers=(context.verifier.num_layers,))

    def example(self, verifier: Verifier) -> Example:
        """Two heads with one block each."""
        dims = {"K": 2, "R": 1, "H": verifier.hidden_size, "V": verifier.vocab_size}
        return Example({"medusa_num_heads": 2, "medusa_num_layers": 1}, dims, file="medusa_lm_head.pt")


@hookimpl
def register_converter() -> type[ConverterSpec]:
    """Bring the algorithm ``medusa``."""
    return Medusa
