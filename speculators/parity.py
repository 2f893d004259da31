"""Compare what a converted draft computes with what its source computes, down to the first difference.

Both drafts see the same batch: random tokens, random hidden states that differ between the layers of
the verifier, and positions that lie close together and far apart, so that every rotary frequency
counts. On the way each module's input and output are kept. They are small, and tell where the two part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from speculators.convert import Conversion
    from speculators.draft import Draft

LENGTH, SEED = 16, 0
"""Tokens of a batch, and the seed of everything random in it."""

TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest difference over the largest value that still counts as equal: two rounding steps of the halves."""


@dataclass(frozen=True)
class Batch:
    """What a draft is run on: ``[1, T]`` tokens at ``[T]`` positions; states are made as they are asked for."""

    tokens: Tensor
    positions: Tensor

    def states(self, layers: tuple[int, ...], size: int) -> Tensor:
        """``[1, T, size]`` hidden states of the given layers of a verifier, different for each of them."""
        import torch

        width = size // len(layers)
        pieces = [
            torch.randn(1, len(self.positions), width, generator=torch.Generator().manual_seed(SEED + 1 + layer))
            for layer in layers
        ]
        return torch.cat(pieces, dim=-1)


def batches(vocabulary: int, positions: int) -> list[Batch]:
    """Return two batches of tokens below ``vocabulary``: at the first positions, and spread over ``positions``."""
    import torch

    tokens = torch.randint(vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(SEED))
    near = torch.arange(LENGTH)
    far = torch.linspace(0, max(LENGTH, positions) - 1, LENGTH, dtype=torch.float64).long()
    return [Batch(tokens, near), Batch(tokens, far)]


@dataclass(frozen=True)
class Step:
    """What a module was fed and what it gave, and whether it has tensors of its own."""

    fed: Tensor
    gave: Tensor
    weighted: bool


@dataclass(frozen=True)
class Run:
    """What one draft computed on one batch; ``steps`` has its modules by name, as they ran."""

    hidden: Tensor
    logits: Tensor | None
    steps: Mapping[str, Step]


def run(draft: Draft, batch: Batch) -> Run:
    """Run ``draft`` on ``batch``."""
    with _watched(draft.model) as steps:
        hidden, logits = draft.run(batch.tokens, batch.states(draft.layers, draft.state_size), batch.positions)
    return Run(hidden, logits, steps)


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Step]]:
    import torch

    steps: dict[str, Step] = {}

    def keep(name: str, weighted: bool, module: nn.Module, inputs: Any, output: Any) -> None:
        gave = torch.cat([each.flatten() for each in output]) if isinstance(output, tuple) else output
        steps.setdefault(name, Step(inputs[0], gave, weighted))

    with ExitStack() as stack:
        for name, module, weighted in _steps(model):
            stack.callback(module.register_forward_hook(partial(keep, name, weighted)).remove)
        yield steps


def _steps(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the modules that compute something themselves, and whether they have tensors."""
    own = any(True for _ in module.parameters(recurse=False))
    if own or not any(True for _ in module.parameters()):
        yield name, module, own
        return
    for child, inner in module.named_children():
        yield from _steps(inner, f"{name}.{child}".lstrip("."))


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; infinity where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.double().abs().max().item()
    largest = (found.double() - expected.double()).abs().max().item()
    return largest / scale if scale else largest


def first_difference(
    converted: Run, source: Run, sources: Mapping[str, str], conversion: Conversion, tolerance: float
) -> str:
    """Say where the two runs part, in the order in which the source's modules ran.

    Args:
        converted: Run of the output.
        source: Run of its source.
        sources: Parameter of the source's model → source tensor.
        conversion: Tells under which names the output has the source's tensors; a module whose tensor was cut
            or joined has no counterpart there.
        tolerance: Largest difference that counts as none.
    """
    renamed, reworked = conversion.renamed, conversion.reworked
    modules = {parameter.rpartition(".")[0]: name for parameter, name in sources.items()}
    names = {module: renamed[name].rpartition(".")[0] for module, name in modules.items() if name in renamed}
    agreed = ""
    for name, step in source.steps.items():
        other = names.get(name, name)
        where = f"{name} ({other} in the output)" if other != name else name or "the draft as a whole"
        after = f", after {agreed}, which agrees" if agreed else ""
        if other not in converted.steps:
            if step.weighted and modules.get(name) not in reworked:
                return f"{where} does not run in the output{after}"
            continue
        if (off := relative(converted.steps[other].fed, step.fed)) > tolerance:
            return f"{where} is fed something else (by {off:.2g}){after}"
        if (off := relative(converted.steps[other].gave, step.gave)) > tolerance:
            return f"{where} makes something else of the same input (by {off:.2g}){after}"
        agreed = where
    return f"all modules agree, so it arises after {agreed}" if agreed else "no module tells where"


def count_differences(found: Any, expected: Any) -> int:
    """Count the draft tokens that stand for different tokens of the verifier; ``None`` is the identity."""
    import numpy as np

    if found is None and expected is None:
        return 0
    size = len(found if expected is None else expected)
    found, expected = (np.arange(size) if ids is None else ids for ids in (found, expected))
    return size if len(found) != size else int((found != expected).sum())
