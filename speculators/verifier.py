"""The verifier: what its config says, and the few tensors that a draft shares with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators import dtypes
from speculators.checkpoint import VERIFIER_FORMATS, Checkpoint
from speculators.companions import TOKENIZER_FILES
from speculators.config import LARGEST_SIZE
from speculators.errors import CheckpointError, is_out_of_memory
from speculators.sources import Access
from speculators.weights import CHUNK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_BLOCKS = ("text_config", "llm_config", "language_config", "thinker_config", "model")
"""Where multimodal configs keep the language model's; the last is an old vLLM draft's."""

DEEPEST = 8
"""How deep blocks of a config lie in others, at most."""

SHARED_TENSORS: Mapping[str, tuple[str, ...]] = {
    "embed_tokens": (
        "model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "embed_tokens.weight",
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
    ),
    "lm_head": (
        "lm_head.weight",
        "language_model.lm_head.weight",
        "model.lm_head.weight",
        "output.weight",
        "embed_out.weight",
    ),
}
"""Role → the names under which model families store it, the most common first."""


class Verifier:
    """A base model, of which only ``config.json`` is read until a tensor is asked for.

    Args:
        location: A path, a Hugging Face ID or a URL, as the user gave it.
        access: How to reach it, if it lies elsewhere.

    Attributes:
        checkpoint: Its files, which may lie elsewhere.
        name: What messages call it.
        reference: What engines find it under: it goes into the output.
        text: The config of its language model, with the keys that stand outside of nested blocks.
        hidden_size: Width of its hidden states, ``TH``.
        vocab_size: Size of its vocabulary, ``V``; embeddings may be padded to more rows.
        num_layers: Number of its layers.
        max_positions: Positions that it was made for; ``None`` when its config does not say.
        architectures: Names of its classes in transformers.

    Raises:
        CheckpointError: Not a checkpoint, or its config lacks a size that is needed.
    """

    def __init__(self, location: str | Path, access: Access | None = None) -> None:
        self.checkpoint = Checkpoint.at(location, access or Access(), partly=True, formats=VERIFIER_FORMATS)
        self.name = self.checkpoint.name
        self.reference = self.checkpoint.place.reference
        self.text = text_config(self.checkpoint.config)
        self.hidden_size = self._size("hidden_size", "n_embd")
        self.vocab_size = self._size("vocab_size")
        self.num_layers = self._size("num_hidden_layers", "n_layer")
        stated = "max_position_embeddings" in self.text
        self.max_positions: int | None = self._size("max_position_embeddings") if stated else None
        self.architectures: list[str] = self.checkpoint.config.get("architectures") or []
        if not isinstance(self.architectures, list) or not all(isinstance(name, str) for name in self.architectures):
            raise CheckpointError(f"{self.name}: config.json says architectures {self.architectures!r}, expected names")

    def _size(self, *keys: str) -> int:
        for key in keys:
            value = self.text.get(key)
            if value is None:
                continue
            if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
                raise CheckpointError(
                    f"{self.name}: config.json says {key} {value!r}, expected a whole number from 1 to {LARGEST_SIZE}"
                )
            return value
        raise CheckpointError(f"the config of the verifier {self.name} does not say {keys[0]}")

    def load(self, device: str) -> PreTrainedModel:
        """Load the whole model for generation, in the dtype that its config says.

        Raises:
            CheckpointError: It holds no weights, or transformers cannot load them without its own code.
        """
        from transformers import AutoModelForCausalLM

        weights = self.require_weights()
        try:
            with quiet_transformers(), weights.gathered() as folder:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    folder, dtype="auto", trust_remote_code=False, weights_only=True
                )
            model: PreTrainedModel = loaded.to(device).eval()
            return model
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # what goes wrong depends on the model's own code
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"transformers cannot load the verifier {self.name}: {error}") from error

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes ``[V, TH]`` of the shareable tensors by role, as the config implies them."""
        return dict.fromkeys(SHARED_TENSORS, (self.vocab_size, self.hidden_size))

    @cached_property
    def weights(self) -> Checkpoint | None:
        """The verifier's checkpoint if it holds weights; a config alone is enough for many drafts.

        Ask it with ``holds`` and ``info``, which open no file but the one that is needed: ``tensors`` would open, and
        fetch, all of them.
        """
        return self.checkpoint if self.checkpoint.has_weights else None

    @cached_property
    def has_tokenizer(self) -> bool:
        """Tell whether a tokenizer lies beside its config."""
        return any(self.checkpoint.place.has(name) for name in TOKENIZER_FILES)

    def require_weights(self) -> Checkpoint:
        """Return the verifier's checkpoint with its weights.

        Raises:
            CheckpointError: It holds none.
        """
        if self.weights is None:
            raise CheckpointError(f"the verifier {self.name} holds no weights; acceptance needs the whole model")
        return self.weights

    def find(self, role: str) -> str | None:
        """Name the tensor that plays ``role``; ``None`` when there is none, or no weights at all.

        Without an LM head of its own, a model uses its embeddings as one. Tables may be padded: rows past
        the vocabulary are nobody's.

        Raises:
            CheckpointError: The tensor has another shape than the config says.
        """
        if self.weights is None:
            return None
        names = [*SHARED_TENSORS[role], *SHARED_TENSORS["embed_tokens"]]
        if role == "lm_head" and self.text.get("tie_word_embeddings") is True:
            names = [*SHARED_TENSORS["embed_tokens"]]
        name = next((name for name in names if self.weights.holds(name)), None)
        shape, (vocabulary, width) = self.weights.info(name).shape if name else (), self.shapes[role]
        if name is not None and (len(shape) != 2 or shape[0] < vocabulary or shape[1] != width):
            raise CheckpointError(
                f"{name} of the verifier {self.name} is {self.weights.info(name)}, "
                f"its config says {list(self.shapes[role])}"
            )
        return name

    def stretches(self, role: str, dtype: str) -> Iterator[bytes]:
        """Yield the tensor that plays ``role`` in another dtype, without padding, in chunks of whole rows.

        Args:
            role: One that `find` finds.
            dtype: In safetensors' spelling (``"BF16"``).

        Raises:
            OverflowError: A finite value becomes infinite.
            ValueError: It is stored in a dtype that nothing is cast from.
            CheckpointError: A file is damaged, or cannot be had.
        """
        name, weights = self.find(role), self.weights
        assert name is not None and weights is not None  # noqa: S101, PT018 - `find` has found it
        rows, width = self.shapes[role]
        stored, step = weights.info(name).dtype, max(1, CHUNK // (width * dtypes.SIZES[dtype]))
        for start in range(0, rows, step):
            yield dtypes.cast(weights.rows(name, start, min(start + step, rows)), stored, dtype)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars, and remarks about rotary parameters that were checked here."""
    import logging

    from transformers.utils import logging as remarks

    before, bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity(logging.ERROR)
    remarks.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        remarks.set_verbosity(before)
        if bars:
            remarks.enable_progress_bar()  # type: ignore[no-untyped-call]


def text_config(config: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Return the language model's part of a config: nested blocks first, then what stands outside."""
    merged = {key: value for key, value in config.items() if value is not None}
    for block in TEXT_BLOCKS:
        if isinstance(config.get(block), Mapping) and depth < DEEPEST:
            inner = text_config(config[block], depth + 1)
            merged |= {key: value for key, value in inner.items() if value is not None}
    return merged
