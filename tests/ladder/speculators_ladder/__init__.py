"""Convert ladder heads: rungs over the next token's embedding and two states of the verifier.

The plugin that `tests/test_conformance.py` seeds with mistakes: it has a part that may be lacking, numbered rows, a
tensor that older trainers did not save, one that is the verifier's, one that is no part of the draft, and an option
that no tensor shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from pydantic import Field

from speculators import (
    Alternative,
    Checkpoint,
    Context,
    ConverterSpec,
    Derive,
    Drop,
    Example,
    Facts,
    Options,
    Original,
    Rename,
    Shared,
    SpeculatorConfig,
    Table,
    Verifier,
    hookimpl,
)

NO_NORM = "older trainers had no norm, which is one of ones"


def ones(source: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, Iterable[bytes]]:
    """Make a norm that changes nothing."""
    return "F32", [np.ones(shape, "<f4").tobytes()]


class LadderOptions(Options):
    """Options of ladder heads."""

    slope: float = Field(default=0.25, gt=0, lt=1, description="Slope of the rungs below zero, which no tensor shows.")


class LadderConfig(SpeculatorConfig):
    """The output type ``ladder``."""

    speculators_model_type: Literal["ladder"] = "ladder"
    architectures: list[str] = Field(default=["LadderSpeculator"])
    rungs: int
    inner: int
    bias: bool
    slope: float


class Ladder(ConverterSpec[LadderConfig]):
    """Ladder heads."""

    interface = 1
    name = "ladder"
    summary = "Ladder heads for tests"
    reference = "https://example.org/ladder"
    table = Table(
        (
            Rename("mix.weight", "combiner.weight", "H, 2*H"),
            Rename("input.weight", "fuse.weight", "H, 2*H"),
            Rename("input.bias", "fuse.bias", "H", part="bias"),
            Rename(
                "rungs.{0:L}.norm.weight",
                "steps.{0:L}.norm.weight",
                "H",
                derive=Derive("speculators_ladder:ones", ("steps.{0:L}.turn.weight",), NO_NORM),
            ),
            Rename("rungs.{0:L}.turn.weight", "steps.{0:L}.turn.weight", "H, H"),
            Rename("rungs.{0:L}.tilt.weight", "steps.{0:L}.tilt.weight", "H, H"),
            Rename("rungs.{0:L}.wide.weight", "steps.{0:L}.wide.weight", "I, H"),
            Rename("rungs.{0:L}.narrow.weight", "steps.{0:L}.narrow.weight", "H, I"),
            Shared("embed_tokens.weight", "embed_tokens.weight", "V, H", verifier="embed_tokens"),
            Drop("trainer.**", "what a trainer resumes from"),
        )
    )
    options = LadderOptions
    copies_embedding = True
    config = LadderConfig

    def recognises(self, source: Checkpoint) -> bool:
        return {"mix.weight", "input.weight", "rungs.0.turn.weight"} <= set(source.tensors)

    def examine(self, context: Context) -> Facts:
        moves, wide = context.matching.moves, context.shape("steps.0.wide.weight")
        rungs = sum(target.endswith(".turn.weight") for target in moves)
        dims = {"H": context.verifier.hidden_size, "V": context.verifier.vocab_size, "L": rungs}
        if wide:
            dims["I"] = wide[0]
        return Facts(dims, frozenset({"bias"} if "fuse.bias" in moves else ()))

    def configure(self, context: Context, facts: Facts) -> tuple[LadderConfig, list[str]]:
        config = LadderConfig(
            **context.common_fields("ladder"),
            draft_vocab_size=facts.dims["V"],
            target_hidden_size=facts.dims["H"],
            rungs=facts.dims["L"],
            inner=facts.dims["I"],
            bias="bias" in facts.parts,
            slope=context.options.slope,
        )
        return config, []

    def dims(self, config: LadderConfig) -> dict[str, int]:
        assert config.target_hidden_size
        return {"H": config.target_hidden_size, "V": config.draft_vocab_size, "L": config.rungs, "I": config.inner}

    def parts(self, config: LadderConfig) -> frozenset[str]:
        return frozenset({"bias"} if config.bias else ())

    def export_config(self, config: LadderConfig) -> dict[str, Any]:
        return {"model_type": "ladder", "num_rungs": config.rungs, "torch_dtype": config.dtype}

    def state_layers(self, config: LadderConfig, layers: int) -> tuple[int, ...]:
        return (layers // 2, layers)

    def alternatives(self, config: LadderConfig, verifier: Verifier) -> list[Alternative]:
        others = {0.01, 0.25} - {config.slope}
        return [Alternative("slope", slope, config.model_copy(update={"slope": slope})) for slope in sorted(others)]

    def original(self, context: Context, facts: Facts) -> Original:
        import torch

        native, layers = context.matching.native, context.verifier.num_layers
        weights = [name for name in native if name.split(".")[0] in ("mix", "input", "rungs") and "weight" in name]

        def unscaled(states: Any) -> Any:
            return states * (states.square().mean(-1, True) + 1e-6).rsqrt()

        class Scale(torch.nn.Module):
            def __init__(self, size: int) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.empty(size))

            def forward(self, states: Any) -> Any:
                return unscaled(states) * self.weight

        class LadderAsTrained(torch.nn.Module):
            state_size = 2 * context.verifier.hidden_size

            def __init__(self) -> None:
                super().__init__()
                for name in weights:
                    rows, *columns = context.source.info(native[name]).shape
                    stem = name.removesuffix(".weight")
                    made = torch.nn.Linear(*columns, rows, f"{stem}.bias" in native) if columns else Scale(rows)
                    self.add_module(stem.replace(".", "_"), made)

            def combine(self, both: Any) -> Any:
                return self.mix(both)

            def forward(self, embedded: Any, state: Any, places: Any) -> Any:
                state = self.input(torch.cat((embedded, state), -1))
                rungs = dict(self.named_children())
                for rung in (f"rungs_{number}" for number in range(facts.dims["L"])):
                    level = rungs.get(f"{rung}_norm", unscaled)(state)
                    acted = torch.nn.functional.leaky_relu(rungs[f"{rung}_turn"](level), context.options.slope)
                    state = state + rungs[f"{rung}_narrow"](rungs[f"{rung}_wide"](acted)) + rungs[f"{rung}_tilt"](level)
                return state, state

        names = {
            f"{stem.replace('.', '_')}.{kind}": source
            for name, source in native.items()
            for stem, _, kind in [name.rpartition(".")]
        }
        embedding = native.get("embed_tokens.weight", "")
        return Original(LadderAsTrained(), names, state_layers=(layers // 2, layers), embedding=embedding)

    def build(self, config: LadderConfig) -> Any:
        from torch import cat, nn

        width = self.dims(config)["H"]

        class Step(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.RMSNorm(width, eps=1e-6)
                self.turn = nn.Linear(width, width, bias=False)
                self.tilt = nn.Linear(width, width, bias=False)
                self.wide = nn.Linear(width, config.inner, bias=False)
                self.narrow = nn.Linear(config.inner, width, bias=False)

            def forward(self, hidden: Any) -> Any:
                normed = self.norm(hidden)
                turned = nn.functional.leaky_relu(self.turn(normed), config.slope)
                return hidden + self.narrow(self.wide(turned)) + self.tilt(normed)

        class LadderDraft(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.state_size = 2 * width
                self.combiner = nn.Linear(self.state_size, width, bias=False)
                self.fuse = nn.Linear(2 * width, width, bias=config.bias)
                self.steps = nn.ModuleList(Step() for _ in range(config.rungs))

            def combine(self, states: Any) -> Any:
                return self.combiner(states)

            def forward(self, embeddings: Any, hidden: Any, positions: Any) -> Any:
                hidden = self.fuse(cat((embeddings, hidden), dim=-1))
                for step in self.steps:
                    hidden = step(hidden)
                return hidden, hidden

        return LadderDraft()

    def example(self, verifier: Verifier) -> Example:
        sizes = {"H": verifier.hidden_size, "V": verifier.vocab_size, "L": 2, "I": 24}
        norms = {f"rungs.{number}.norm.weight" for number in range(2)}
        config = {"model_type": "ladder", "num_rungs": 2}
        return Example(config, sizes, frozenset({"bias"}), optional=frozenset({"input.bias", *norms}))


@hookimpl
def register_converter() -> type[ConverterSpec]:
    return Ladder
