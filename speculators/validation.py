"""Check a converted model: its structure from headers alone, then its forward.

Nothing is taken from memory: config and tensors are read back from the folder that was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from speculators import dtypes
from speculators.checkpoint import Checkpoint
from speculators.errors import OptionError, ValidationError
from speculators.plan import Facts, match, plan
from speculators.table import Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from speculators.config import SpeculatorConfig
    from speculators.spec import ConverterSpec
    from speculators.verifier import Verifier

BATCH, LENGTH, SEED = 2, 16, 0
"""The batch of the forward check: random tokens and states, the same ones every time."""

ROWS_AT_ONCE = 16384
"""Rows of an LM head that are read and multiplied at a time."""


@dataclass(frozen=True)
class Check:
    """One check and its outcome; ``detail`` has the numbers, or says what is wrong."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """The outcome of a validation."""

    checks: tuple[Check, ...]

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
            raise ValidationError("\n".join(["the converted model failed validation (nothing was kept):", *failed]))


def check(folder: Path, spec: ConverterSpec, verifier: Verifier, *, device: str = "cpu") -> Report:
    """Check a converted model in ``folder``: structure, and if that is sound, forward on ``device``."""
    converted = Checkpoint(folder)
    try:
        config = spec.config.model_validate(converted.config)
    except ValueError as error:
        return Report((Check("config", False, str(error).replace("\n", " ")),))
    checks = [*check_structure(converted, config, spec, verifier)]
    if all(check.passed for check in checks):
        checks.append(check_forward(converted, config, spec, verifier, device))
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

    draft = Draft(converted, config, spec, verifier, device=device)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(config.transformer_layer_config.vocab_size, (BATCH, LENGTH), generator=generator)
    states = torch.randn(BATCH, LENGTH, draft.state_size, generator=generator)
    first, second = (draft.run(tokens, states) for _ in range(2))
    named = [("hidden states", *pair) for pair in [(first[0], second[0])]]
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


class Draft:
    """A converted draft that runs: the plugin's model filled from the output's own files.

    Token embeddings and LM head come from the verifier where the output leaves them out; only the
    rows that are used are read.

    Args:
        converted: The output.
        config: Its config.
        spec: The algorithm that wrote it.
        verifier: The base model.
        device: Torch device.
        dtype: Dtype to run in; the dtype in the config by default.

    Raises:
        OptionError: Torch does not know the device, or cannot use it here.
        ValidationError: The files do not fill the model exactly.
    """

    def __init__(
        self,
        converted: Checkpoint,
        config: SpeculatorConfig,
        spec: ConverterSpec,
        verifier: Verifier,
        *,
        device: str = "cpu",
        dtype: str | None = None,
    ) -> None:
        import torch

        self._converted = converted
        self._spec = spec
        self._verifier = verifier
        self.device = find_device(device)
        self.dtype: torch.dtype = getattr(torch, dtype or config.dtype)
        self.config = config
        self.model = self._filled()
        self.state_size: int = self.model.state_size  # type: ignore[assignment]

    def _filled(self) -> nn.Module:
        import torch

        try:
            with torch.device("meta"), _quiet_transformers():
                model = self._spec.build(self.config)
        except Exception as error:  # a config can be wrong in more ways than a schema tells
            raise ValidationError(
                f"the draft model cannot be built from the written config: {type(error).__name__}: {error}"
            ) from error
        outside = {self._spec.embedding, self._spec.head, *self._spec.buffers}
        inside = [name for name in self._converted.tensors if name not in outside]
        state = {name: self._converted.tensor(name).to(self.device, self.dtype) for name in inside}
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValidationError(f"the output does not fill the draft model: {error}") from error
        return model.to(self.device).eval()

    def run(self, tokens: Tensor, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the draft over whole sequences.

        Args:
            tokens: ``[B, T]`` ids of the tokens that follow those of ``states``.
            states: ``[B, T, S]`` hidden states of the verifier, as the algorithm takes them.

        Returns:
            Hidden states ``[B, T, H]`` and logits ``[B, T, DV]``; no logits when the LM head is the
            verifier's and it holds no weights.
        """
        import torch

        with torch.no_grad():
            combined = self.model.combine(states.to(self.device, self.dtype))  # type: ignore[operator]
            hidden, head_input = self.model(self.embed(tokens, combined.shape[-1]), combined)
            return hidden, self.logits(head_input)

    def embed(self, tokens: Tensor, width: int) -> Tensor:
        """``[B, T]`` ids → ``[B, T, H]`` embeddings; random ones when no file holds them.

        Where training saves a copy of the verifier's in the draft's dtype, the verifier's are rounded alike.
        """
        import torch

        home = self._home(self._spec.embedding, "embed_tokens")
        if home is None:
            generator = torch.Generator().manual_seed(SEED)
            return torch.randn(*tokens.shape, width, generator=generator).to(self.device, self.dtype)
        checkpoint, name = home
        distinct, positions = torch.unique(tokens, return_inverse=True)
        rows = torch.cat([checkpoint.tensor(name, (row, row + 1)) for row in distinct.tolist()])
        if checkpoint is not self._converted and self._spec.copies_embedding:
            rows = rows.to(self._stored_dtype)
        return rows[positions].to(self.device, self.dtype)

    @property
    def _stored_dtype(self) -> torch.dtype:
        import torch

        stored = Counter(info.dtype for info in self._converted.tensors.values() if info.dtype in dtypes.FLOATS)
        dtype: torch.dtype = getattr(torch, dtypes.TORCH_NAMES[stored.most_common(1)[0][0]])
        return dtype

    def logits(self, head_input: Tensor) -> Tensor | None:
        """``[B, T, H]`` → ``[B, T, DV]``; ``None`` when no file holds the LM head."""
        import torch

        home = self._home(self._spec.head, "lm_head")
        if home is None:
            return None
        checkpoint, name = home
        rows = checkpoint.tensors[name].shape[0]
        pieces = []
        for start in range(0, rows, ROWS_AT_ONCE):
            block = checkpoint.tensor(name, (start, min(start + ROWS_AT_ONCE, rows)))
            pieces.append(head_input @ block.to(self.device, self.dtype).T)
        return torch.cat(pieces, dim=-1)

    def _home(self, name: str, role: str) -> tuple[Checkpoint, str] | None:
        if name in self._converted.tensors:
            return self._converted, name
        found = self._verifier.find(role)
        return (self._verifier.weights, found) if found and self._verifier.weights else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence remarks about rotary parameters that were checked here or mean nothing to transformers."""
    import logging

    from transformers.utils import logging as remarks

    before = remarks.get_verbosity()
    remarks.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        remarks.set_verbosity(before)


def find_device(name: str) -> torch.device:
    """Return a torch device that works here.

    Raises:
        OptionError: Torch does not know it, or cannot use it on this machine.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # what torch raises depends on the device
        reason = str(error).splitlines()[0]
        raise OptionError(f"the device {name!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise OptionError("the device 'meta' computes nothing; choose another --validate-device")
    return device
