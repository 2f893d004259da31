"""Where each tensor of a source has gone, so that it can be brought back.

Every tensor of a source is either a run of pieces of the output's tensors, or left out: because the verifier has the
same, or because nobody needs it. That is one way back for rows of every kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from speculators import dtypes
from speculators.errors import CheckpointError
from speculators.operations import Cut
from speculators.table import Shared, evaluate_shape
from speculators.verifier import SHARED_TENSORS

if TYPE_CHECKING:
    from speculators.checkpoint import Checkpoint
    from speculators.convert import Conversion
    from speculators.spec import ConverterSpec

METADATA = "__metadata__"
"""What is no tensor in the header of a safetensors file."""

_STRICT = ConfigDict(strict=True, extra="ignore")


@pydantic_dataclass(frozen=True, config=_STRICT)
class Piece:
    """A stretch of an output's tensor.

    Attributes:
        target: Name of the tensor in the output.
        start: Number of its first element there.
    """

    target: str
    start: int = 0


@pydantic_dataclass(frozen=True, config=_STRICT)
class Trace:
    """Where one tensor of the source has gone.

    Attributes:
        dtype: As the source stored it, in safetensors' spelling.
        shape: Its shape there.
        pieces: The stretches of the output that it consists of, one after another; each runs to the end of its
            tensor, or until this one is complete. None when it was left out.
        role: Which of the verifier's tensors it equals in its own dtype; empty when it was not left out for that.
        sha256: The SHA-256 of its bytes, of one that equals the verifier's.
        why: Why it was left out.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    role: str = ""
    sha256: str = ""
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it in types that JSON knows, without what is empty."""
        facts = {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "pieces": [{"target": piece.target, "start": piece.start} for piece in self.pieces],
            "role": self.role,
            "sha256": self.sha256,
            "why": self.why,
        }
        return {key: value for key, value in facts.items() if value or key == "shape"}


@dataclass(frozen=True)
class _Placed:
    """A piece, and where it begins in the source's tensor."""

    at: int
    piece: Piece


def of_conversion(conversion: Conversion) -> dict[str, Trace]:
    """Return source name → trace of every tensor that a conversion reads."""
    tensors = conversion.context.source.tensors
    placed: dict[str, list[_Placed]] = {name: [] for name in tensors}
    for move in conversion.moves:
        placed[move.source].append(_Placed(0, Piece(move.target)))
    for made in conversion.derivations:
        start = 0
        for name in made.sources if made.reworks else ():
            at = made.operation.start if isinstance(made.operation, Cut) else 0
            placed[name].append(_Placed(at, Piece(made.target, start)))
            start += math.prod(tensors[name].shape)
    traces = {}
    for name, info in tensors.items():
        pieces = tuple(each.piece for each in sorted(placed[name], key=lambda each: each.at))
        equal, why = conversion.equal.get(name), conversion.dropped.get(name, "")
        role, sha256 = (equal.role, equal.sha256) if equal else ("", "")
        traces[name] = Trace(info.dtype, info.shape, pieces, role, sha256, why)
    return traces


def of_record(record: Mapping[str, Any], name: str) -> dict[str, Trace] | None:
    """Return what a provenance says of the source's tensors; ``None`` when it says nothing.

    Args:
        record: The provenance.
        name: What messages call it.

    Raises:
        CheckpointError: It says something that cannot be.
    """
    said = record.get("tensors")
    if said is None:
        return None
    try:
        traces = TypeAdapter(dict[str, Trace]).validate_python(said, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{name} says {first['input']!r} under tensors.{where}: {first['msg']}") from error
    for tensor, trace in traces.items():
        negative = min((0, *trace.shape, *(piece.start for piece in trace.pieces))) < 0
        if trace.dtype not in dtypes.SIZES or negative or trace.role not in ("", *SHARED_TENSORS):
            raise CheckpointError(f"{name} says that {tensor} is {json.dumps(trace.to_json())}, which cannot be")
        if tensor == METADATA:
            raise CheckpointError(f"{name} names a tensor {tensor!r}, which no file can hold")
    return traces


def of_table(spec: ConverterSpec, converted: Checkpoint) -> dict[str, Trace]:
    """Return native name → trace of what an output holds, as the algorithm's table tells it.

    Of what is left to the verifier, the embeddings are among them where training code saves a copy.

    Raises:
        CheckpointError: The output holds a tensor that no row writes, or its config is not of the algorithm's type.
    """
    traces = {}
    if spec.copies_embedding and spec.embedding not in converted.tensors:
        config, row = spec.config.read(converted.config), spec.table.writing[spec.embedding]
        shape, role = evaluate_shape(row.shape, spec.dims(config)), row.verifier if isinstance(row, Shared) else ""
        traces[row.name] = Trace(dtypes.STORED_NAMES[config.dtype], shape, role=role)
    for target, info in converted.tensors.items():
        try:
            traces[spec.table.native(target)] = Trace(info.dtype, info.shape, (Piece(target),))
        except KeyError:
            raise CheckpointError(
                f"{converted.name} holds {target} {info}, which no row of {spec.name!r} writes; it is no output of it"
            ) from None
    return traces
