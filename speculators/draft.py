"""Drafts that run: a plugin's model filled from files, from an output's or from its source's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from speculators import dtypes
from speculators.checkpoint import Checkpoint, stored_dtype
from speculators.errors import OptionError, PluginError, SpeculatorsError, ValidationError, described
from speculators.operations import derive
from speculators.spec import to_ids
from speculators.verifier import quiet_transformers
from speculators.weights import read

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from speculators.config import SpeculatorConfig
    from speculators.convert import Conversion
    from speculators.plan import Derivation
    from speculators.spec import ConverterSpec
    from speculators.verifier import Verifier

Built = TypeVar("Built")

ROWS_AT_ONCE = 16384
"""Rows of an LM head that are read and multiplied at a time."""

SEED = 0
"""Seed of the embeddings that stand in where no file holds any."""

EMBEDDING_SCALE = 0.02
"""Their standard deviation, that of a freshly initialised Llama (``initializer_range``)."""


@dataclass
class Rows:
    """A ``[V, H]`` matrix, of which only what is needed is read.

    Attributes:
        checkpoint: Where it is stored, unless it is made from other tensors and held.
        name: Its name there.
        count: How many of its rows are tokens; tables may be padded.
        rounded: Dtype to which training rounded the rows, if it worked on a rounded copy.
        held: The whole matrix, once something needs it again and again.
    """

    checkpoint: Checkpoint
    name: str
    count: int
    rounded: torch.dtype | None = None
    held: Tensor | None = None

    def take(self, ids: Tensor) -> Tensor:
        """``[B, T]`` ids → ``[B, T, H]`` rows as they are stored, or as training rounded them."""
        import torch

        if self.held is not None:
            rows = self.held[ids.to(self.held.device)]
        else:
            distinct, positions = torch.unique(ids.cpu(), return_inverse=True)
            rows = torch.cat([self.checkpoint.tensor(self.name, (row, row + 1)) for row in distinct.tolist()])[
                positions
            ]
        return rows if self.rounded is None else rows.to(self.rounded)

    def multiply(self, vectors: Tensor) -> Tensor:
        """``[..., H]`` → ``[..., V]``, the products with every row in the dtype of ``vectors``."""
        import torch

        return torch.cat([vectors @ block.to(vectors.device, vectors.dtype).T for block in self._blocks()], dim=-1)

    def _blocks(self) -> Iterator[Tensor]:
        if self.held is not None:
            yield self.held[: self.count]
            return
        for start in range(0, self.count, ROWS_AT_ONCE):
            yield self.checkpoint.tensor(self.name, (start, min(start + ROWS_AT_ONCE, self.count)))


@contextmanager
def running() -> Iterator[None]:
    """Run a draft model, without gradients.

    Raises:
        ValidationError: In place of whatever else its code raises, as a config can be wrong in ways that show when it
            is used.
    """
    import torch

    try:
        with torch.no_grad():
            yield
    except (SpeculatorsError, MemoryError):
        raise
    except Exception as error:
        raise ValidationError(f"the draft model cannot be run: {described(error)}") from error


class Draft:
    """A draft model with weights, and what stands around it.

    Args:
        model: What `ConverterSpec.build` or `ConverterSpec.original` built, filled.
        layers: Which hidden states of the verifier it reads, in order; see `ConverterSpec.state_layers`.
        embedding: Token embeddings; random ones stand in where no file holds any.
        head: LM head, if a file holds it.
        targets: ``[DV]`` verifier's id of each draft token; ``None`` when they are the same.
        device: Torch device.
        dtype: Dtype to run in.
        sources: The model's parameter → native tensor, if that is where its weights come from.

    Its ``tokens`` says how many tokens one pass proposes at once; ``None`` where they follow one from another.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: tuple[int, ...],
        embedding: Rows | None,
        head: Rows | None,
        targets: NDArray | None,  # type: ignore[type-arg] # integers of any width
        device: torch.device,
        dtype: torch.dtype,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.sources = sources or {}
        self.model = model
        self.layers = layers
        self.targets = targets
        self.device = device
        self.dtype = dtype
        self.state_size: int = model.state_size  # type: ignore[assignment]
        self.tokens: int | None = getattr(model, "draft_tokens", None)
        self._own_embed: Callable[[Tensor], Tensor] | None = getattr(model, "embed", None)
        self._own_logits: Callable[[Tensor], Tensor] | None = getattr(model, "logits", None)
        self._embedding = embedding
        self._head = head

    def run(self, tokens: Tensor, states: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the draft over whole sequences.

        Args:
            tokens: ``[B, T]`` ids of the tokens that follow those of ``states``.
            states: ``[B, T, S]`` hidden states of the verifier, as the algorithm takes them.
            positions: ``[T]`` positions; 0 … T-1 by default.

        Returns:
            Hidden states ``[B, T, H]`` and logits ``[B, T, DV]``, or ``[B, T, K, DV]`` where one pass proposes ``K``
            tokens; no logits when no file holds the LM head.

        Raises:
            ValidationError: Its weights and its config do not make a model that computes anything.
        """
        with running():
            hidden, head_input = self.forward(tokens, self.combine(states), positions)
            return hidden, self.logits(head_input)

    def combine(self, states: Tensor) -> Tensor:
        """``[B, T, S]`` hidden states of the verifier → ``[B, T, H]``, what the draft starts from."""
        combined: Tensor = self.model.combine(states.to(self.device, self.dtype))  # type: ignore[operator]
        return combined

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[B, T]`` ids and ``[B, T, H]`` states → states to feed back and inputs of the LM head or heads."""
        import torch

        if positions is None:
            positions = torch.arange(hidden.shape[1])
        fed_back, head_input = self.model(self.embed(tokens, hidden.shape[-1]), hidden, positions.to(self.device))
        expected = (*hidden.shape[:2], *([] if self.tokens is None else [self.tokens]))
        if head_input.ndim != len(expected) + 1 or tuple(head_input.shape[:-1]) != expected:
            at_once = "" if self.tokens is None else f", as one pass proposes {self.tokens} tokens"
            raise ValidationError(
                f"the draft model gives the LM head {list(head_input.shape)}, expected {[*expected, 'H']}{at_once}"
            )
        return fed_back, head_input

    def embed(self, tokens: Tensor, width: int) -> Tensor:
        """``[B, T]`` ids → ``[B, T, H]`` embeddings."""
        import torch

        if self._own_embed is not None:
            return self._own_embed(tokens.to(self.device))
        if self._embedding is None:
            generator = torch.Generator().manual_seed(SEED)
            made = torch.randn(*tokens.shape, width, generator=generator) * EMBEDDING_SCALE
            return made.to(self.device, self.dtype)
        return self._embedding.take(tokens).to(self.device, self.dtype)

    def logits(self, head_input: Tensor) -> Tensor | None:
        """``[..., H]`` → ``[..., DV]``; ``None`` when no file holds the LM head."""
        if self._own_logits is not None:
            return self._own_logits(head_input)
        return None if self._head is None else self._head.multiply(head_input)

    def target_id(self, token: int) -> int:
        """Return the verifier's id of a draft token."""
        return token if self.targets is None else int(self.targets[token])

    def hold(self, verifier: PreTrainedModel, weights: Checkpoint | None) -> None:
        """Keep embeddings and LM head on the device, for drafting token by token.

        Args:
            verifier: The loaded base model, whose matrices are used rather than loaded again.
            weights: Its checkpoint.
        """
        loaded = (verifier.get_input_embeddings(), verifier.get_output_embeddings())  # type: ignore[no-untyped-call]
        for rows, module in zip((self._embedding, self._head), loaded, strict=True):
            if rows is None:
                continue
            if rows.checkpoint is weights and module is not None:
                rows.held = module.weight.detach()
            else:
                whole = rows.checkpoint.tensor(rows.name) if rows.held is None else rows.held
                rows.held = whole.to(self.device, self.dtype)


def of_output(
    converted: Checkpoint,
    config: SpeculatorConfig,
    spec: ConverterSpec,
    verifier: Verifier,
    *,
    device: str = "cpu",
    dtype: str | None = None,
) -> Draft:
    """Build the draft that an output describes and fill it from the output's own files.

    Token embeddings and LM head are the verifier's where the output leaves them out.

    Args:
        converted: The output.
        config: Its config.
        spec: The algorithm that wrote it.
        verifier: The base model.
        device: Torch device.
        dtype: Dtype to run in; the dtype in the config by default.

    Raises:
        OptionError: Torch does not know the device, or cannot use it here.
        ValidationError: The model cannot be built, or the files do not fill it exactly.
    """
    outside = {spec.embedding, spec.head, *spec.buffers}
    place, precision = find_device(device), _torch_dtype(dtype or config.dtype)
    model = _built("the written config", lambda: spec.build(config))
    inside = {name: partial(converted.tensor, name) for name in converted.tensors if name not in outside}
    if left := sorted(inside.keys() - {name for name, _ in model.named_parameters()}):
        raise ValidationError(f"the output does not fill the draft model: nothing reads {', '.join(left)}")
    for own, name in (("embed", spec.embedding), ("logits", spec.head)):
        if hasattr(model, own) and name in converted.tensors:
            raise ValidationError(f"the draft model has {own} of its own, so nothing reads {name}")
    _fill(model, inside, place, precision, "the output")
    _require_tokens(config, model)
    return Draft(
        model,
        layers=_readable(spec.state_layers(config, verifier.num_layers), model, verifier),
        embedding=_rows(converted, spec.embedding, verifier, "embed_tokens", spec.copies_embedding),
        head=_rows(converted, spec.head, verifier, "lm_head"),
        targets=spec.targets(converted, spec.draft_to_target),
        device=place,
        dtype=precision,
    )


def of_source(conversion: Conversion, *, device: str = "cpu", dtype: str | None = None) -> Draft:
    """Build the draft that the training code would build, and fill it from the native checkpoint.

    Args:
        conversion: The conversion whose source is meant.
        device: Torch device.
        dtype: Dtype to run in; the dtype of the conversion's output by default.

    Raises:
        OptionError: Torch does not know the device, or cannot use it here.
        ValidationError: The model cannot be built, or the checkpoint does not fill it exactly.
    """
    context, spec = conversion.context, conversion.algorithm.spec
    place, precision = find_device(device), _torch_dtype(dtype or conversion.config.dtype)
    original = _built("the native checkpoint", lambda: spec.original(context, conversion.facts))
    made = {each.target: partial(_derived, each, context.source) for each in conversion.derivations}

    def rows(name: str, target: str, role: str, copied: bool = False) -> Rows | None:
        if not name and target in made:
            matrix = made[target]()
            return Rows(context.source, target, len(matrix), held=matrix)
        return _rows(context.source, name, context.verifier, role, copied)

    targets = original.targets
    if targets is None and spec.draft_to_target in made:
        targets = to_ids(made[spec.draft_to_target]().numpy())
    tensors: dict[str, Callable[[], Tensor]] = {**made}
    tensors |= {parameter: partial(context.source.tensor, name) for parameter, name in original.names.items()}
    _fill(original.model, tensors, place, precision, "the native checkpoint")
    return Draft(
        original.model,
        layers=original.state_layers,
        embedding=rows(original.embedding, spec.embedding, "embed_tokens", spec.copies_embedding),
        head=rows(original.head, spec.head, "lm_head"),
        targets=targets,
        device=place,
        dtype=precision,
        sources=original.names,
    )


def _require_tokens(config: SpeculatorConfig, model: nn.Module) -> None:
    asked = max(method.speculative_tokens for method in config.speculators_config.proposal_methods)
    made = min(getattr(model, "draft_tokens", asked), getattr(model, "most_tokens", asked))
    if asked > made:
        raise ValidationError(f"the config proposes {asked} tokens per step, the draft makes no more than {made}")


def _readable(layers: tuple[int, ...], model: nn.Module, verifier: Verifier) -> tuple[int, ...]:
    outside = [layer for layer in layers if not 0 <= layer <= verifier.num_layers]
    if outside:
        raise ValidationError(
            f"the draft reads the states of layers {list(layers)} of the verifier; {verifier.name} has layers 0 to "
            f"{verifier.num_layers}"
        )
    if model.state_size != len(layers) * verifier.hidden_size:
        raise ValidationError(
            f"the draft reads {model.state_size} numbers per token; the states of layers {list(layers)} of "
            f"{verifier.name} have {len(layers)} times {verifier.hidden_size}"
        )
    return layers


def _derived(made: Derivation, source: Checkpoint) -> Tensor:
    info, chunks = derive(made, source)
    return dtypes.tensor(memoryview(bytearray().join(map(read, chunks))), info.dtype).view(info.shape)


def _built(origin: str, build: Callable[[], Built]) -> Built:
    import torch

    try:
        with torch.device("meta"), quiet_transformers():
            return build()
    except PluginError:
        raise
    except Exception as error:  # a config can be wrong in more ways than a schema tells
        raise ValidationError(f"the draft model cannot be built from {origin}: {described(error)}") from error


def _fill(
    model: nn.Module,
    tensors: Mapping[str, Callable[[], Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    origin: str,
) -> None:
    """Read each parameter's tensor, one after another; none is invented."""
    names = [name for name, _ in model.named_parameters()]
    if missing := sorted(set(names) - tensors.keys()):
        raise ValidationError(f"{origin} does not fill the draft model: it lacks {', '.join(missing)}")
    try:
        model.load_state_dict({name: tensors[name]().to(device, dtype) for name in names}, strict=False, assign=True)
    except RuntimeError as error:
        raise ValidationError(f"{origin} does not fill the draft model: {error}") from error
    model.to(device).eval()


def _rows(own: Checkpoint, name: str, verifier: Verifier, role: str, copied: bool = False) -> Rows | None:
    if name in own.tensors:
        return Rows(own, name, own.tensors[name].shape[0])
    found = verifier.find(role)
    if found is None or verifier.weights is None:
        return None
    return Rows(verifier.weights, found, verifier.vocab_size, _torch_dtype(stored_dtype(own)) if copied else None)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


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
