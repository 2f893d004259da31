"""Check a converted model at three levels: its structure, its forward, its acceptance.

Nothing is taken from memory: config and tensors are read back from the folder that was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from speculators.checkpoint import Checkpoint, local_path
from speculators.config import MODEL_TYPE_KEY
from speculators.errors import CheckpointError, OptionError, ValidationError
from speculators.plan import Facts, match, plan
from speculators.registry import Registry
from speculators.table import Table
from speculators.verifier import Verifier

if TYPE_CHECKING:
    from speculators.acceptance import Acceptance
    from speculators.config import SpeculatorConfig
    from speculators.spec import ConverterSpec

LEVELS = ("structure", "forward", "acceptance")
"""What can be checked, each level with those before it."""

BATCH, LENGTH, SEED = 2, 16, 0
"""The batch of the forward check: random tokens and states, the same ones every time."""

NEW_TOKENS = 48
"""Tokens that the verifier generates after each prompt of the acceptance check."""


@dataclass(frozen=True)
class Check:
    """One check and its outcome; ``detail`` has the numbers, or says what is wrong."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """The outcome of a validation; ``acceptance`` is there when it was measured."""

    checks: tuple[Check, ...]
    acceptance: Acceptance | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def raise_on_failure(self) -> None:
        """Raise what failed.

        Raises:
            ValidationError: Some check failed; the message holds all that did.
        """
        failed = [f"    {check.name}: {check.detail}" for check in self.checks if not check.passed]
        if failed:
            raise ValidationError("\n".join(["the converted model failed validation:", *failed]))


def validate_model(
    path: str | Path,
    *,
    verifier: str | Path | None = None,
    device: str = "cpu",
    level: str = "forward",
    prompts: Sequence[Sequence[int]] | None = None,
    registry: Registry | None = None,
) -> Report:
    """Check any folder in the speculators format.

    Args:
        path: The converted model.
        verifier: Folder of the base model; the one that its config names by default.
        device: Torch device of the forward and acceptance checks.
        level: ``"structure"``, ``"forward"`` or ``"acceptance"``, each with those before it.
        prompts: Token ids to continue for the acceptance check, which needs them.
        registry: Where to look for algorithms; the installed plugins by default.

    Raises:
        SpeculatorsError: The folder or the verifier cannot be read, or the algorithm is not installed.
            A check that fails is no exception: it is in the report.
    """
    folder = local_path(path)
    config = Checkpoint(folder).config
    if MODEL_TYPE_KEY not in config:
        raise CheckpointError(f"{folder} is not in the speculators format; convert it first")
    block = config.get("speculators_config")
    if not isinstance(block, dict) or not isinstance(block.get("algorithm"), str):
        raise CheckpointError(f"the config of {folder} names no speculators_config.algorithm")
    spec = (registry or Registry()).get(block["algorithm"]).spec
    named = verifier or (block.get("verifier") or {}).get("name_or_path")
    if not named:
        raise CheckpointError(f"the config of {folder} names no verifier; pass --verifier")
    return check(folder, spec, Verifier(named), device=device, level=level, prompts=prompts)


def check(
    folder: Path,
    spec: ConverterSpec,
    verifier: Verifier,
    *,
    device: str = "cpu",
    level: str = "forward",
    prompts: Sequence[Sequence[int]] | None = None,
) -> Report:
    """Check a converted model in ``folder`` up to ``level``, stopping at the first level that fails."""
    if level not in LEVELS:
        raise OptionError(f"validation level {level!r} is none of {', '.join(LEVELS)}")
    if level == "acceptance" and not prompts:
        raise OptionError("the acceptance check needs prompts: lists of token ids to continue")
    converted = Checkpoint(folder)
    try:
        config = spec.config.model_validate(converted.config)
    except ValueError as error:
        return Report((Check("config", False, str(error).replace("\n", " ")),))
    checks = check_structure(converted, config, spec, verifier)
    if level != "structure" and checks[-1].passed:
        checks.append(check_forward(converted, config, spec, verifier, device))
    if level == "acceptance" and checks[-1].passed:
        outcome, acceptance = check_acceptance(converted, config, spec, verifier, device, prompts or ())
        return Report((*checks, outcome), acceptance)
    return Report(tuple(checks))


def check_structure(
    converted: Checkpoint, config: SpeculatorConfig, spec: ConverterSpec, verifier: Verifier
) -> list[Check]:
    """Compare names, shapes and dtypes in the headers with config, table and verifier; needs no torch."""
    table = Table(tuple(row.as_output() for row in spec.table.moving))
    matching = match(table, converted.tensors)
    facts = Facts(dict(spec.dims(config)), spec.parts(config))
    planned = plan(table, converted.tensors, matching, facts, verifier.shapes)
    findings = [*planned.findings, *(f"{name} has no place: {why}" for name, why in planned.dropped.items())]
    layer = config.transformer_layer_config
    if layer.vocab_size != verifier.vocab_size:
        findings.append(f"vocab_size is {layer.vocab_size}, the verifier's {verifier.vocab_size}")
    detail = f"{len(converted.tensors)} tensors with the names, shapes and dtypes that config.json requires"
    return [Check("structure", not findings, "; ".join(findings) or detail)]


def check_forward(
    converted: Checkpoint, config: SpeculatorConfig, spec: ConverterSpec, verifier: Verifier, device: str
) -> Check:
    """Run the draft on a random batch in its own dtype: shapes, finite numbers, the same twice."""
    import torch

    from speculators.draft import Draft

    draft = Draft(converted, config, spec, verifier, device=device)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(config.transformer_layer_config.vocab_size, (BATCH, LENGTH), generator=generator)
    states = torch.randn(BATCH, LENGTH, draft.state_size, generator=generator)
    first, second = (draft.run(tokens, states) for _ in range(2))
    named = [("hidden states", first[0], second[0])]
    if first[1] is not None and second[1] is not None:
        named.append(("logits", first[1], second[1]))
    for name, once, again in named:
        if not torch.isfinite(once).all():
            return Check("forward", False, f"{name} hold NaN or infinity: the weights or their dtype are unsound")
        if not torch.equal(once, again):
            return Check("forward", False, f"{name} differ between two runs on {device}")
    seen = " and ".join(f"{name} {list(once.shape)}" for name, once, _ in named)
    unseen = "" if first[1] is not None else "; no logits, as no file holds the LM head"
    return Check("forward", True, f"{seen} finite and repeatable in {config.dtype} on {device}{unseen}")


def check_acceptance(
    converted: Checkpoint,
    config: SpeculatorConfig,
    spec: ConverterSpec,
    verifier: Verifier,
    device: str,
    prompts: Sequence[Sequence[int]],
) -> tuple[Check, Acceptance]:
    """Run the verifier greedily and count how much of what the draft proposes it accepts.

    Verifier and draft run in the verifier's dtype, as inference engines run them.
    """
    from speculators.acceptance import measure
    from speculators.draft import Draft

    model = verifier.load(device)
    dtype = str(model.dtype).removeprefix("torch.")
    draft = Draft(converted, config, spec, verifier, device=device, dtype=dtype)
    depth = config.speculators_config.proposal_methods[0].speculative_tokens
    acceptance = measure(draft, model, prompts, depth=depth, new_tokens=NEW_TOKENS)
    rates = " / ".join(f"{rate:.3f}" for rate in acceptance.rates)
    detail = f"mean acceptance length {acceptance.length:.2f}, rates {rates} over {acceptance.drafts} drafts in {dtype}"
    if not acceptance.accepted[0]:
        return Check("acceptance", False, f"{detail}: the verifier accepts nothing that the draft proposes"), acceptance
    return Check("acceptance", True, detail), acceptance
