"""Decide which of the tensors that drafts share with their verifier are left to the verifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from speculators import dtypes
from speculators.errors import MismatchError, OptionError
from speculators.plan import Comparison, Move
from speculators.progress import Progress, unheard
from speculators.spec import Context
from speculators.table import Shared, Table
from speculators.weights import CHUNK, TensorInfo


@dataclass(frozen=True)
class Completion:
    """A tensor of the verifier's that is written into the output.

    Attributes:
        target: Its name there.
        role: Which of the verifier's tensors it is.
        source: Its name in the verifier.
        info: Its dtype and shape as it is read, without padding.
        dtype: Dtype to cast it to; as the verifier stores it by default.
    """

    target: str
    role: str
    source: str
    info: TensorInfo
    dtype: str | None = None


def settle(
    comparisons: Iterable[Comparison], context: Context, *, self_contained: bool = False, progress: Progress = unheard
) -> tuple[list[Move], dict[str, str], list[str]]:
    """Compare shareable tensors with the verifier's: those to write, those left out, and notes.

    Args:
        comparisons: What to compare.
        context: The conversion that asks.
        self_contained: Whether all are written for which the output type has room.
        progress: Told about the bytes that were compared.

    Raises:
        MismatchError: A tensor differs from the verifier's and the output type has no room for it.
    """
    kept: list[Move] = []
    dropped: dict[str, str] = {}
    notes: list[str] = []
    for comparison in comparisons:
        name, role = comparison.move.source, comparison.row.verifier
        if getattr(context.options, f"use_verifier_{role}", False):
            _require_verifier_shape(comparison, context)
            dropped[name] = f"the verifier's {role} was asked for"
            continue
        evidently_own = comparison.move.info.shape != context.verifier.shapes[role]  # a width or vocabulary of its own
        if evidently_own or (self_contained and comparison.row.own):
            kept.append(comparison.move)
            continue
        difference = _difference(comparison, context, progress)
        if difference is None:
            dropped[name] = f"equal to the verifier's {role}"
        elif comparison.row.own:
            kept.append(comparison.move)
            notes.append(f"{name} {difference}; it is kept")
        else:
            raise MismatchError(
                f"{context.source.name} cannot be converted (nothing was written):",
                [f"{name} {difference}, and the output type has no room for a draft's own {role}"],
            )
    return kept, dropped, notes


def complete(
    missing: Mapping[str, str], context: Context, table: Table, rounded: Mapping[str, str]
) -> tuple[list[Completion], list[str]]:
    """Find the verifier's tensors for what the draft leaves to it, as far as the output type has room.

    Args:
        missing: Output name → role of the verifier's tensor.
        context: The conversion that asks.
        table: The algorithm's table.
        rounded: Output name → dtype that training rounded the tensor to.

    Returns:
        What to write, and notes about what has no room.

    Raises:
        MismatchError: The verifier does not hold a tensor, or stores it in a dtype that the output cannot have.
    """
    completions, notes, findings = [], [], []
    verifier = context.verifier
    for target, role in sorted(missing.items()):
        row = table.writing[target]
        if isinstance(row, Shared) and not row.own:
            notes.append(f"the output type has no room for {target}, so engines use the verifier's")
            continue
        name = verifier.find(role)
        if name is None or verifier.weights is None:
            findings.append(f"{target} would be the verifier's {role}, which {verifier.name} does not hold")
            continue
        info = TensorInfo(verifier.weights.info(name).dtype, verifier.shapes[role])
        if info.dtype not in row.dtypes:
            findings.append(f"{target} would be the verifier's {name}, {info}, expected {' or '.join(row.dtypes)}")
            continue
        completions.append(Completion(target, role, name, info, rounded.get(target)))
    if findings:
        raise MismatchError(
            f"{context.source.name} cannot be made self-contained (nothing was written):",
            findings,
            advice="Without --self-contained these are left to the verifier.",
        )
    return completions, notes


def _require_verifier_shape(comparison: Comparison, context: Context) -> None:
    expected = context.verifier.shapes[comparison.row.verifier]
    if comparison.move.info.shape != expected:
        raise OptionError(
            f"{comparison.move.source} is {comparison.move.info} and cannot be replaced by the verifier's "
            f"{comparison.row.verifier} {list(expected)}"
        )


def _difference(comparison: Comparison, context: Context, progress: Progress) -> str | None:
    """Say how a tensor differs from the verifier's in the draft's dtype; ``None`` when it is equal."""
    move, role = comparison.move, comparison.row.verifier
    name = context.verifier.find(role)
    weights = context.verifier.weights
    if name is None or weights is None:
        return f"could not be compared with the verifier's {role}, which {context.verifier.name} does not hold"
    rows, width = move.info.shape
    stored = weights.info(name).dtype
    row = width * dtypes.SIZES[move.info.dtype]
    step = max(1, CHUNK // row)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        try:
            theirs = dtypes.cast(weights.rows(name, start, stop), stored, move.info.dtype)
        except OverflowError:
            return f"differs from the verifier's {role}"
        except ValueError:
            return f"could not be compared with the verifier's {role}, which is stored as {stored}"
        if bytes(context.source.rows(move.source, start, stop)) != theirs:
            return f"differs from the verifier's {role}"
        progress(f"comparing {role}", stop * row, rows * row)
    return None
