"""What a plugin implements to add an algorithm: `ConverterSpec` and its `Options`.

A complete plugin is one class and one hook. This one converts heads that are one linear layer over the verifier's last
hidden state, with a bias or without::

    # speculators_toy.py
    from typing import Literal

    from pydantic import Field

    from speculators import ConverterSpec, Example, Facts, Options, Rename, SpeculatorConfig, Table, hookimpl


    class ToyOptions(Options):
        scale: float = Field(default=1.0, gt=0, description="What the output is multiplied by.")


    class ToyConfig(SpeculatorConfig):
        speculators_model_type: Literal["toy"] = "toy"
        architectures: list[str] = ["ToySpeculator"]
        target_hidden_size: int
        bias: bool
        scale: float


    class Toy(ConverterSpec[ToyConfig]):
        interface = 1
        name = "toy"
        summary = "Toy heads: one linear layer over the verifier's hidden state"
        reference = "https://example.org/toy"
        table = Table(
            (
                Rename("fc.weight", "linear.weight", "H, H"),
                Rename("fc.bias", "linear.bias", "H", part="bias"),
            )
        )
        options = ToyOptions
        config = ToyConfig

        def recognises(self, source):
            return "fc.weight" in source.tensors and source.config.get("model_type") == "toy"

        def examine(self, context):
            has_bias = context.shape("linear.bias") is not None
            return Facts(dims={"H": context.verifier.hidden_size}, parts=frozenset({"bias"} if has_bias else ()))

        def configure(self, context, facts):
            config = ToyConfig(
                **context.common_fields("toy"),
                draft_vocab_size=context.verifier.vocab_size,
                target_hidden_size=facts.dims["H"],
                bias="bias" in facts.parts,
                scale=context.options.scale,
            )
            return config, []

        def dims(self, config):
            return {"H": config.target_hidden_size}

        def parts(self, config):
            return frozenset({"bias"} if config.bias else ())

        def build(self, config):
            from torch import nn  # takes seconds, so not at the top

            class ToyDraft(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.state_size = config.target_hidden_size
                    self.linear = nn.Linear(self.state_size, self.state_size, bias=config.bias)

                def combine(self, states):
                    return states

                def forward(self, embeddings, hidden, positions):
                    output = self.linear(hidden + embeddings) * config.scale
                    return output, output

            return ToyDraft()

        def example(self, verifier):
            return Example({"model_type": "toy"}, {"H": verifier.hidden_size}, parts=frozenset({"bias"}))


    @hookimpl
    def register_converter():
        return Toy

Its package announces it by an entry point named like the algorithm::

    [project]
    name = "speculators-toy"
    version = "0.1.0"
    dependencies = ["speculators>=1.0"]

    [project.entry-points.speculators]
    toy = "speculators_toy"
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypeVar

from speculators import dtypes
from speculators.checkpoint import Checkpoint
from speculators.config import (
    DEFAULT_DRAFT_TOKENS,
    MOST_DRAFT_TOKENS,
    SpeculatorConfig,
    SpeculatorsBlock,
    TokenProposal,
    VerifierReference,
)
from speculators.errors import CheckpointError, OptionError
from speculators.plan import Facts, Matching
from speculators.table import Table
from speculators.verifier import Verifier

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

INTERFACE = 1
"""The version of this interface; a spec states the one it was written for."""

Config = TypeVar("Config", bound=SpeculatorConfig, default=Any)
"""The output type of a spec."""


class Options(BaseModel):
    """An algorithm's keyword arguments: subclass it and add fields with descriptions.

    Unknown arguments, and values of another type, are refused before anything else is looked at. An option that a
    user need not give has a default; ``None`` where the checkpoint decides. Annotate with types that JSON has, as
    ``--algorithm-kwargs`` is a JSON object. Conversions hand an instance to hooks as ``context.options``.
    An option called ``use_verifier_embed_tokens`` or ``use_verifier_lm_head`` that is true leaves out the draft's own
    tensor of the `Shared` row with that role.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    speculative_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MOST_DRAFT_TOKENS,
        description="Draft tokens per step that the config proposes; by default 3, or all that one pass makes.",
    )


@dataclass(frozen=True)
class Context:
    """Everything that one conversion starts from; made by the core and given to hooks.

    Attributes:
        source: The native checkpoint, whose files are all here.
        verifier: The base model, which may lie anywhere.
        options: The algorithm's checked options; an instance of its ``options`` class.
        matching: Which tensors of the source belong to which rows, by their names alone; shapes are not checked yet.
        dtype: Dtype in torch's spelling (``"float16"``) to which the user wants floating tensors cast; ``None`` when
            they are to stay as stored.
        nested: The algorithm's ``nested``.
    """

    source: Checkpoint
    verifier: Verifier
    options: Any
    matching: Matching
    dtype: str | None = None
    nested: tuple[str, ...] = ()

    def shape(self, target: str) -> tuple[int, ...] | None:
        """Return the shape of the source tensor that becomes ``target``; ``None`` if there is none.

        Tensors that come fused or in pieces (`Split`, `Merge`) have no source tensor of their own: look for them in
        ``matching.reworked`` and ``source.tensors``.
        """
        found = self.matching.moves.get(target)
        return self.source.tensors[found.source].shape if found else None

    def source_name(self, target: str) -> str | None:
        """Return the name of the source tensor that becomes ``target``; ``None`` if there is none."""
        found = self.matching.moves.get(target)
        return found.source if found else None

    @property
    def settings(self) -> dict[str, Any]:
        """The native config with the keys of its nested blocks beside its own; its own win.

        Keys that are null count as missing. Values are as the file has them, of any type: check those that are used.
        """
        return flatten(self.source.config, self.nested)

    def stated(self, key: str) -> list[Any]:
        """List the different values that the native config and its nested blocks give for a key, its own first.

        More than one is a contradiction that only the user can settle.
        """
        config = self.source.config
        values: list[Any] = []
        for block in [config, *(config[name] for name in self.nested if isinstance(config.get(name), Mapping))]:
            if block.get(key) is not None and block[key] not in values:
                values.append(block[key])
        return values

    @property
    def draft_dtype(self) -> str:
        """The draft's dtype in torch's spelling: asked for, said by the config, or that of most tensors.

        One of ``"float64"``, ``"float32"``, ``"float16"`` and ``"bfloat16"``.
        """
        if self.dtype is not None:
            return self.dtype
        said = str(self.settings.get("dtype") or self.settings.get("torch_dtype") or "").removeprefix("torch.")
        if said in dtypes.STORED_NAMES and dtypes.STORED_NAMES[said] in dtypes.FLOATS:
            return said
        read = [move.source for move in self.matching.moves.values()]
        read += [rework.source for rework in self.matching.reworked]
        stored = Counter(self.source.tensors[name].dtype for name in read).most_common()
        found = [dtypes.TORCH_NAMES[dtype] for dtype, _ in stored if dtype in dtypes.FLOATS]
        if not found:
            raise CheckpointError(f"{self.source.name} holds no tensor of the draft with floating-point numbers")
        return found[0]

    def common_fields(self, algorithm: str, most_tokens: int | None = None) -> dict[str, Any]:
        """Return the fields of `SpeculatorConfig` that do not depend on the algorithm, to be passed on as ``**``.

        They are ``speculators_version``, ``speculators_config`` (greedy chains for the given verifier) and ``dtype``.

        Args:
            algorithm: Which algorithm reads the output: the name of the output type.
            most_tokens: Tokens that one pass of the draft makes, where it makes no more.

        Raises:
            OptionError: The option asks for more.
        """
        import speculators

        tokens = self.options.speculative_tokens or most_tokens or DEFAULT_DRAFT_TOKENS
        if most_tokens is not None and tokens > most_tokens:
            raise OptionError(
                f"speculative_tokens is {tokens}, but the draft makes {most_tokens} at most; ask for fewer"
            )
        verifier = VerifierReference(name_or_path=self.verifier.reference, architectures=self.verifier.architectures)
        methods = [TokenProposal(speculative_tokens=tokens)]
        return {
            "speculators_version": speculators.__version__,
            "speculators_config": SpeculatorsBlock(algorithm=algorithm, proposal_methods=methods, verifier=verifier),
            "dtype": self.draft_dtype,
        }


def flatten(config: Mapping[str, Any], blocks: tuple[str, ...]) -> dict[str, Any]:
    """Return a config with the keys of the named blocks beside its own, which win; without keys that are null."""
    flat: dict[str, Any] = {}
    for block in reversed(blocks):
        if isinstance(config.get(block), Mapping):
            flat |= flatten(config[block], blocks)
    return flat | {key: value for key, value in config.items() if value is not None}


@dataclass(frozen=True)
class Original:
    """A native checkpoint as its training code would run it, for comparison with the output.

    Attributes:
        model: A module like the one of `ConverterSpec.build`, with parameter names of its own.
        names: Its parameter name → the source tensor that belongs there, of the same shape. Every parameter has one, or
            is named like an output tensor that is made from others; names that are no parameter's are passed over.
        state_layers: Which hidden states of the verifier it reads; see `ConverterSpec.state_layers`.
        embedding: Source name of its token embeddings; the verifier's when the source holds none.
        head: Source name of its LM head; the verifier's when the source holds none.
        targets: ``[DV]`` verifier's id of each draft token, of any width of integer; ``None`` when they are the same.
    """

    model: nn.Module
    names: Mapping[str, str]
    state_layers: tuple[int, ...]
    embedding: str = ""
    head: str = ""
    targets: NDArray[Any] | None = None


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True))
class Vllm:
    """How vLLM serves an output type.

    Attributes:
        method: The ``method`` in its ``--speculative-config``.
        packages: Packages that teach it the type, to be installed beside it; none where it knows the type.
        settings: What ``--speculative-config`` needs beside ``method``, ``model`` and ``num_speculative_tokens``.

    Raises:
        ValueError: Something is not of its type.
    """

    method: str
    packages: tuple[str, ...] = ()
    settings: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Alternative:
    """A value that an option could have instead, as far as the tensors tell.

    Attributes:
        option: The option's name.
        value: The other value, which JSON must know.
        config: The output's config with it, of the spec's ``config``; the same tensors must fill it.
    """

    option: str
    value: Any
    config: SpeculatorConfig


@dataclass(frozen=True)
class Example:
    """A tiny native checkpoint with random weights, with which an installed plugin can be tried and checked.

    It has one tensor for every row of the table that must be there: of the first spelling, and of the shape that
    ``dims`` gives it. Rows of ``parts`` are among them, `Shared` ones are not.

    Attributes:
        config: Its ``config.json``, which `ConverterSpec.recognises` must find enough.
        dims: What each symbol of the table's shapes and numbered places stands for.
        parts: The optional parts of the table that it has.
        tensors: Source name → array, of those that must not be random, or that the rows do not ask for.
        file: Name of its weight file; the ending tells the format.
        optional: Source names of tensors without which it is a valid checkpoint, too, but another draft.
    """

    config: Mapping[str, Any]
    dims: Mapping[str, int]
    parts: frozenset[str] = frozenset()
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    file: str = "model.safetensors"
    optional: frozenset[str] = frozenset()


class ConverterSpec(ABC, Generic[Config]):
    """One algorithm: which checkpoints it reads, what they become, and what the draft computes.

    Subclass it with the output type in brackets, ``ConverterSpec[ToyConfig]``, for hooks with that type. It is made
    once, without arguments, and its hooks may be called in any order and for many checkpoints: keep no state.

    A conversion calls `recognises` (with ``--algorithm auto``), `examine` and `configure`; then, on what it wrote,
    `dims`, `parts`, `inspect`, `build`, `state_layers` and `targets`, and `original` for the comparison. Validating a
    folder starts at `dims`.

    A hook may raise a `SpeculatorsError`, whose message the user is shown: `CheckpointError` for a checkpoint or a
    config that cannot be used, `OptionError` for options. Any other exception, and a result of another type than the
    signature says, ends the run with a `PluginError` that names the package and the hook. A hook that says nothing
    about what it raises keeps to that.

    Attributes:
        interface: The version of this interface that the plugin was written for: 1.
        name: The algorithm's name; equal to the plugin's entry-point name. Letters, digits, ``.``, ``_`` and ``-``.
        aliases: Other names that users know it by, of the same characters.
        summary: What it converts, on one line without a final period, for ``--list-algorithms`` and its page.
        reference: URL of the paper or of the original code.
        quirks: What checkpoints of this family are like, and what becomes of that: Markdown, one sentence or more
            each, for the algorithm's page.
        table: What becomes of every tensor; its symbols are those of `dims`, its parts those of `parts`.
        options: The keyword arguments that it takes: a subclass of `Options`.
        config: The output type that it writes and reads back: a subclass of `SpeculatorConfig`. What finds the plugin
            for an output is the default of its ``speculators_model_type``.
        embedding: Output name of the token embeddings; the verifier's when the output leaves it out. Empty when the
            output never holds any.
        copies_embedding: Whether training saves a frozen copy of the verifier's embeddings in the draft's
            dtype, so that the draft saw rounded ones.
        head: Output name of the LM head; the verifier's when the output leaves it out. Empty when the output never
            holds one, or when `build`'s model has LM heads of its own (``logits``).
        buffers: Output names of tensors that are no parameters of the draft model, such as vocabulary maps.
        nested: Blocks of the native config in which trainers put the draft's own settings; what stands
            outside them wins.
        draft_to_target: Output name of the offsets ``[DV]`` from draft token ids to the verifier's; empty when there
            are none. Draft token ``i`` is the verifier's ``i + offsets[i]``.
        vllm: How vLLM serves the output type; ``None`` when it does not.
    """

    interface: ClassVar[int]
    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str]
    reference: ClassVar[str]
    quirks: ClassVar[tuple[str, ...]] = ()
    table: ClassVar[Table]
    options: ClassVar[type[Options]] = Options
    config: type[Config]
    embedding: ClassVar[str] = "embed_tokens.weight"
    copies_embedding: ClassVar[bool] = False
    head: ClassVar[str] = "lm_head.weight"
    buffers: ClassVar[tuple[str, ...]] = ()
    nested: ClassVar[tuple[str, ...]] = ("model", "text_config")
    draft_to_target: ClassVar[str] = ""
    vllm: ClassVar[Vllm | None] = None

    @abstractmethod
    def recognises(self, source: Checkpoint) -> bool:
        """Tell whether this algorithm's training code saved ``source``, from config, tensor names and shapes.

        Called for ``--algorithm auto`` with every checkpoint, among them other families', base models and damaged
        ones; must not raise on foreign ones, whose config may hold anything. Answer true for members of the family that
        the table refuses: the refusal then names them. Read no tensor.

        Args:
            source: Any checkpoint.

        Returns:
            Whether it is of this family. Where two plugins say so, the user is asked to choose.

        Raises:
            CheckpointError: A file of ``source`` cannot be read; it comes from ``source.tensors``.
        """

    @abstractmethod
    def examine(self, context: Context) -> Facts:
        """Find out what the table leaves open: sizes, which optional parts are in use, contradictions.

        Tensors win over the config; say so in ``notes``. Put what makes a conversion impossible into
        ``findings`` rather than raising, so that the user sees everything at once, and leave a
        symbol out of ``dims`` when it cannot be known. The core compares every shape with the table
        afterwards, so tensors may be missing or have any shape here. Not called where the table refuses a tensor.

        Args:
            context: The conversion.

        Raises:
            CheckpointError: The config is such that nothing more can be found out.
        """

    @abstractmethod
    def configure(self, context: Context, facts: Facts) -> tuple[Config, list[str]]:
        """Build the output's config, and what the user should know about it, one sentence each.

        Called only when there are no findings: each tensor that the table requires is there, with the shape that
        ``facts.dims`` gives it. The same checkpoint, verifier and options must give the same config.

        Args:
            context: The conversion.
            facts: What `examine` returned.

        Returns:
            The config, for which `dims` and `parts` give the ``dims`` and ``parts`` of ``facts`` again, and notes.

        Raises:
            CheckpointError: The native config says something that the output type cannot.
        """

    @abstractmethod
    def dims(self, config: Config) -> Mapping[str, int]:
        """Return the table's symbols as an output's config states them; `examine` for the way back.

        Its docstring may explain symbols, one a line, as in ``DV: draft vocabulary``: the algorithm's page shows them.

        Args:
            config: The config of an output, perhaps of another writer's; it has passed its own validators.

        Returns:
            A size for every symbol in the table, also of parts that are not in use.
        """

    @abstractmethod
    def parts(self, config: Config) -> frozenset[str]:
        """Return the optional parts of the table that an output's config declares.

        An output must hold the tensors of these parts, but for `Shared` ones, and none of the others.

        Args:
            config: As for `dims`.
        """

    def state_layers(self, config: Config, layers: int) -> tuple[int, ...]:
        """Return which hidden states of a verifier with ``layers`` layers the draft reads, in order.

        Number i is what enters layer i; number ``layers`` is the last hidden state, after the final norm,
        which is what drafts read unless this says otherwise.

        Args:
            config: As for `dims`.
            layers: Layers of the verifier.

        Returns:
            At least one number from 0 to ``layers``. The states, ``[B, T, TH]`` each, are joined in this order along
            the last dimension to what ``combine`` is given: ``state_size`` is their count times ``TH``, the verifier's
            hidden size.
        """
        return (layers,)

    def inspect(self, converted: Checkpoint, config: Config) -> list[str]:
        """Find what is wrong with an output although its names, shapes and dtypes are right.

        Read nothing large: this is part of the check that takes milliseconds. A check of the level
        ``structure``, so every conversion and ``speculators validate`` make it.

        Args:
            converted: The output.
            config: Its config.

        Returns:
            One line for each thing that is wrong; any makes the check fail.
        """
        return []

    def alternatives(self, config: Config, verifier: Verifier) -> list[Alternative]:
        """List what else the checkpoint may have been trained with, where no tensor shows it.

        ``speculators validate --diagnose`` measures the acceptance of each in place of what ``config`` says, and
        goes on from the best with what this returns for it.

        Args:
            config: As for `dims`.
            verifier: The base model.
        """
        return []

    def original(self, context: Context, facts: Facts) -> Original:
        """Build the source as the training code would, called under ``torch.device("meta")`` like `build`.

        A conversion's output is compared with it, so take nothing from `configure`, `build` or the
        target side of the table: read the native config, use the names in ``context.matching.native``,
        and write down the forward of the original code. Left as it is, it runs `build`'s model on the
        source's tensors, which shows what was lost or damaged on the way but not a wrong row of the
        table, a wrong config or a wrong forward.

        Args:
            context: The conversion.
            facts: What `examine` returned.
        """
        config, _ = self.configure(context, facts)
        names = {target: found.source for target, found in context.matching.moves.items()}
        return Original(
            self.build(config),
            names,
            self.state_layers(config, context.verifier.num_layers),
            names.get(self.embedding, ""),
            names.get(self.head, ""),
            self.targets(context.source, names.get(self.draft_to_target, "")),
        )

    def targets(self, checkpoint: Checkpoint, name: str) -> NDArray[Any] | None:
        """Return ``[DV]`` verifier's ids of draft tokens from the offsets in tensor ``name``, if it is there.

        Override it where the tensor holds something else than offsets.

        Args:
            checkpoint: An output or a native checkpoint.
            name: The tensor, or ``""``.

        Returns:
            A one-dimensional array of integers; ``None`` when draft tokens are the verifier's.
        """
        return to_ids(checkpoint.array(name)) if name in checkpoint.tensors else None

    @abstractmethod
    def build(self, config: Config) -> nn.Module:
        """Build the draft model whose forward is the original code's; import torch only here.

        Its parameters have the output's tensor names, without embeddings, LM head and ``buffers``.
        It is called under ``torch.device("meta")`` and must offer:

        ``combine(states)``
            ``[B, T, S]`` hidden states of the verifier → ``[B, T, H]``, what the draft starts from.
            Its attribute ``state_size`` is ``S``.
        ``forward(embeddings, hidden, positions)``
            ``[B, T, H]`` token embeddings, shifted by one against ``[B, T, H]`` hidden states, and
            ``[T]`` positions, int64, rising but not always by one →
            ``(hidden, head_input)``, both ``[B, T, H]``: what is fed back for the next draft token,
            and what the LM head is applied to.

        Widths are the model's own: ``combine`` may hold weights and lead from ``S`` to any ``H``, which is
        that of ``hidden`` from then on, and of what is fed back; embeddings are as wide as their table, and
        ``head_input`` as the LM head.

        It may offer:

        ``draft_tokens``
            ``K``, where one pass proposes that many tokens, none of which depends on another. ``head_input``
            is ``[B, T, K, H]`` then, nothing is fed back, and no more than ``K`` tokens are ever asked for.
        ``most_tokens``
            How many tokens it can propose one after another, where it was trained for no more; a config that
            proposes more is refused.
        ``embed(tokens)``
            ``[B, T]`` ids, int64, → what ``forward`` gets as embeddings, where they are parameters of its own
            rather than the one table called ``embedding``.
        ``logits(head_input)``
            ``[..., H]`` → ``[..., DV]``, where it has LM heads of its own rather than the one called ``head``;
            with ``K`` tokens per pass ``[..., K, H]`` → ``[..., K, DV]``.

        A draft whose weights differ by step can count the steps in what it feeds back.
        """

    def example(self, verifier: Verifier) -> Example | None:
        """Describe a tiny checkpoint for ``verifier``, a Llama of small sizes with random weights.

        ``speculators plugins check`` tries the installed plugin on it, and ``speculators plugins example`` writes it
        for users. Left as it is, the plugin brings none.

        Args:
            verifier: The base model that the checkpoint is to fit.
        """
        return None


def to_ids(offsets: NDArray[Any]) -> NDArray[Any]:
    """Return ``[DV]`` verifier's ids of draft tokens from ``[DV]`` offsets: token ``i`` is ``i + offsets[i]`` there."""
    import numpy as np

    ids: NDArray[Any] = np.arange(len(offsets)) + offsets
    return ids
