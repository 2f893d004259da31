"""The speculators format's ``config.json``, as vLLM 0.32 and speculators 0.9 read it.

Each output type subclasses `SpeculatorConfig`, or `LayeredConfig` where the draft is made of decoder layers,
with its own fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from speculators import dtypes
from speculators.errors import CheckpointError, described

MODEL_TYPE_KEY = "speculators_model_type"
"""The key that marks a config as one in the speculators format."""

LARGEST_SIZE = 2**31 - 1
"""More than any size in a config, and what every engine can still count."""

Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
"""A size of a model."""

DEFAULT_DRAFT_TOKENS = 3
"""Draft tokens per step where nobody says how many."""

MOST_DRAFT_TOKENS = 1000
"""More than any engine proposes per step."""


class TokenProposal(BaseModel):
    """How draft tokens are proposed and accepted: greedily, one chain at a time."""

    model_config = ConfigDict(extra="allow")

    proposal_type: str = "greedy"
    speculative_tokens: int = Field(
        default=DEFAULT_DRAFT_TOKENS, ge=1, le=MOST_DRAFT_TOKENS, description="Draft tokens per step."
    )
    verifier_accept_k: int = Field(default=1, ge=1, description="Accepted when among the verifier's top k tokens.")
    accept_tolerance: float = Field(default=0.0, ge=0.0, description="Largest accepted log-likelihood gap to the top.")


class VerifierReference(BaseModel):
    """The verifier that the draft was trained for."""

    name_or_path: str | None
    architectures: list[str]


class SpeculatorsBlock(BaseModel):
    """The ``speculators_config`` block: what an engine needs to run the draft beside its verifier."""

    model_config = ConfigDict(extra="allow")

    algorithm: str
    proposal_methods: list[TokenProposal]
    default_proposal_method: str = "greedy"
    verifier: VerifierReference

    @model_validator(mode="after")
    def _default_exists(self) -> Self:
        known = [method.proposal_type for method in self.proposal_methods]
        if self.default_proposal_method not in known:
            raise ValueError(f"default_proposal_method {self.default_proposal_method!r} is none of {known}")
        return self


class DecoderLayerConfig(BaseModel):
    """The draft's own decoder layer or layers, in the vocabulary of a transformers config.

    Rotary parameters appear twice, for engines on either side of transformers 5: whole in
    ``rope_parameters``, and as ``rope_theta`` with ``rope_scaling``.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model_type: str = "llama"
    architectures: list[str] = ["LlamaForCausalLM"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: int = Field(ge=0, le=LARGEST_SIZE)
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: Size
    rope_parameters: dict[str, Any]
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: str


class SpeculatorConfig(BaseModel):
    """What every output type's ``config.json`` holds; a type adds its fields and narrows the first.

    Reading tolerates keys that it does not know and keeps them: other writers of the format add
    their own. `Context.common_fields` returns three of the fields.

    Attributes:
        speculators_model_type: The output type; give it a default and the type ``Literal["mine"]``.
        speculators_version: The version of speculators that wrote it.
        architectures: Names of classes, as in any config of transformers; give it a default.
        speculators_config: What an engine needs to run the draft beside its verifier.
        draft_vocab_size: Size of the draft's vocabulary, ``DV``.
        target_hidden_size: Width of the verifier's hidden states, ``TH``; ``None`` when it is the draft's own.
        dtype: The dtype of most tensors, in torch's spelling.
    """

    model_config = ConfigDict(extra="allow")

    speculators_model_type: str
    speculators_version: str
    architectures: list[str]
    speculators_config: SpeculatorsBlock
    draft_vocab_size: Size
    target_hidden_size: Size | None = None
    dtype: str

    @property
    def verifier_sizes(self) -> dict[str, int]:
        """What it says of the verifier: ``vocab_size`` and ``target_hidden_size``, those that it states."""
        return {} if self.target_hidden_size is None else {"target_hidden_size": self.target_hidden_size}

    @property
    def positions(self) -> int | None:
        """Positions that the draft was made for; ``None`` where they are the verifier's."""
        return None

    @field_validator("dtype")
    @classmethod
    def _is_floating(cls, name: str) -> str:
        known = [dtypes.TORCH_NAMES[dtype] for dtype in dtypes.FLOATS]
        if name not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return name

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Check what a ``config.json`` says.

        Raises:
            CheckpointError: It is not of this type; names every key that is wrong.
        """
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, each['loc']))} {each['input']!r}: {each['msg']}" for each in error.errors()]
            raise CheckpointError("; ".join(wrong)) from error
        except MemoryError:
            raise
        except Exception as error:  # whatever a plugin's validator raises
            raise CheckpointError(f"a validator of {cls.__name__} raised {described(error)}") from error

    def to_json(self) -> str:
        """Serialise with sorted keys and a final newline; the same config gives the same bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


class LayeredConfig(SpeculatorConfig):
    """The config of an output type whose drafts are made of decoder layers."""

    transformer_layer_config: DecoderLayerConfig

    @property
    def verifier_sizes(self) -> dict[str, int]:
        """The layers state the verifier's vocabulary, too."""
        return {"vocab_size": self.transformer_layer_config.vocab_size} | super().verifier_sizes

    @property
    def positions(self) -> int | None:
        """Those of the layers."""
        return self.transformer_layer_config.max_position_embeddings
