"""Decide which of the tensors that drafts share with their verifier are left to the verifier."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from speculators.errors import MismatchError, OptionError
from speculators.plan import Comparison, Move
from speculators.progress import Progress, unheard
from speculators.spec import Context
from speculators.table import Shared, Table
from speculators.weights import TensorInfo, read


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


@dataclass(frozen=True)
class Equal:
    """What is known of a tensor that is left out because the verifier has the same.

    Attributes:
        role: Which of the verifier's tensors it equals, in the draft's dtype.
        sha256: The SHA-256 of its bytes, in hexadecimal digits.
    """

    role: str
    sha256: str


@dataclass(frozen=True)
class Settled:
    """What becomes of the tensors that drafts share with their verifier.

    Attributes:
        kept: Those to write.
        dropped: Source name → why it is left out.
        equal: Source name → what it equals, of those that are left out for that.
        notes: What the user should know, one sentence each.
    """

    kept: list[Move] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    equal: dict[str, Equal] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def settle(
    comparisons: Iterable[Comparison], context: Context, *, self_contained: bool = False, progress: Progress = unheard
) -> Settled:
    """Compare shareable tensors with the verifier's.

    Args:
        comparisons: What to compare.
        context: The conversion that asks.
        self_contained: Whether all are written for which the output type has room.
        progress: Told about the bytes that were compared.

    Raises:
        MismatchError: A tensor differs from the verifier's and the output type has no room for it.
    """
    settled = Settled()
    for comparison in comparisons:
        name, role = comparison.move.source, comparison.row.verifier
        if getattr(context.options, f"use_verifier_{role}", False):
            _require_verifier_shape(comparison, context)
            settled.dropped[name] = f"the verifier's {role} was asked for"
            continue
        evidently_own = comparison.move.info.shape != context.verifier.shapes[role]  # a width or vocabulary of its own
        if evidently_own or (self_contained and comparison.row.own):
            settled.kept.append(comparison.move)
            continue
        difference, sha256 = _compare(comparison, context, progress)
        if not difference:
            settled.dropped[name] = f"equal to the verifier's {role}"
            settled.equal[name] = Equal(role, sha256)
        elif comparison.row.own:
            settled.kept.append(comparison.move)
            settled.notes.append(f"{name} {difference}; it is kept")
        else:
            raise MismatchError(
                f"{context.source.name} cannot be converted (nothing was written):",
                [f"{name} {difference}, and the output type has no room for a draft's own {role}"],
            )
    return settled


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


def _compare(comparison: Comparison, context: Context, progress: Progress) -> tuple[str, str]:
    """Say how a tensor differs from the verifier's in the draft's dtype; nothing, and its SHA-256, when it is equal."""
    move, role, verifier = comparison.move, comparison.row.verifier, context.verifier
    name = verifier.find(role)
    if name is None or verifier.weights is None:
        return f"could not be compared with the verifier's {role}, which {verifier.name} does not hold", ""
    digest, done, total = hashlib.sha256(), 0, move.info.nbytes
    theirs = verifier.stretches(role, move.info.dtype)
    try:
        for chunk in theirs:
            if bytes(read(context.source.stretch(move.source, done, done + len(chunk)))) != chunk:
                return f"differs from the verifier's {role}", ""
            digest.update(chunk)
            done += len(chunk)
            progress(f"comparing {role}", done, total)
    except OverflowError:
        return f"differs from the verifier's {role}", ""
    except ValueError:
        stored = verifier.weights.info(name).dtype
        return f"could not be compared with the verifier's {role}, which is stored as {stored}", ""
    return "", digest.hexdigest()
