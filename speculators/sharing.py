"""Decide which of the tensors that drafts share with their verifier are left to the verifier."""

from __future__ import annotations

from collections.abc import Iterable

from speculators import dtypes
from speculators.errors import MismatchError, OptionError
from speculators.plan import Comparison, Move
from speculators.progress import Progress, unheard
from speculators.spec import Context
from speculators.weights import CHUNK


def settle(
    comparisons: Iterable[Comparison], context: Context, progress: Progress = unheard
) -> tuple[list[Move], dict[str, str], list[str]]:
    """Compare shareable tensors with the verifier's: those to write, those left out, and notes.

    Args:
        comparisons: What to compare.
        context: The conversion that asks.
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
        if comparison.move.info.shape != context.verifier.shapes[role]:
            kept.append(comparison.move)  # evidently its own: another width, or a draft vocabulary
            continue
        difference = _difference(comparison, context, progress)
        if difference is None:
            dropped[name] = f"equal to the verifier's {role}"
        elif comparison.row.own:
            kept.append(comparison.move)
            notes.append(f"{name} {difference}; it is kept")
        else:
            raise MismatchError(
                f"{context.source.path} cannot be converted (nothing was written):",
                [f"{name} {difference}, and the output type has no room for a draft's own {role}"],
            )
    return kept, dropped, notes


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
    stored = weights.tensors[name].dtype
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
