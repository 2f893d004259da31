"""A converted draft that runs: the plugin's model filled from the output's own files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from speculators import dtypes
from speculators.checkpoint import Checkpoint
from speculators.errors import OptionError, ValidationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from speculators.config import SpeculatorConfig
    from speculators.spec import ConverterSpec
    from speculators.verifier import Verifier

ROWS_AT_ONCE = 16384
"""Rows of an LM head that are read and multiplied at a time."""

SEED = 0
"""Seed of the embeddings that stand in where no file holds any."""


class Draft:
    """A converted draft, built on the meta device and filled from files.

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
            hidden, head_input = self.forward(tokens, self.combine(states))
            return hidden, self.logits(head_input)

    def combine(self, states: Tensor) -> Tensor:
        """``[B, T, S]`` hidden states of the verifier → ``[B, T, H]``, what the draft starts from."""
        combined: Tensor = self.model.combine(states.to(self.device, self.dtype))  # type: ignore[operator]
        return combined

    def forward(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T]`` ids and ``[B, T, H]`` states → states to feed back and inputs of the LM head."""
        outputs: tuple[Tensor, Tensor] = self.model(self.embed(tokens, hidden.shape[-1]), hidden)
        return outputs

    def state_layers(self, layers: int) -> tuple[int, ...]:
        """Return which hidden states of a verifier with ``layers`` layers the draft reads."""
        return self._spec.state_layers(self.config, layers)

    def target_id(self, token: int) -> int:
        """Return the verifier's id of a draft token."""
        name = self._spec.draft_to_target
        if name not in self._converted.tensors:
            return token
        return token + int(self._converted.array(name)[token])

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
        if checkpoint is not self._converted:
            rows = self._verifier.vocab_size
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
