"""The maps between draft and target vocabulary.

``d2t`` holds offsets: draft token ``i`` is the verifier's token ``i + d2t[i]``. ``t2d`` marks the
verifier's tokens that the draft knows. (SafeAILab/EAGLE ``eagle/traineagle3/cnets.py``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from speculators import Checkpoint


def offsets(source: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, list[bytes]]:
    """Make ``d2t [DV]`` from ``t2d [V]``: draft tokens are the marked ones in order."""
    import numpy as np

    targets = np.flatnonzero(source.array(names[0]))
    return "I64", [(targets - np.arange(len(targets))).astype("<i8").tobytes()]


def mask(source: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, list[bytes]]:
    """Make ``t2d [V]`` from ``d2t [DV]``."""
    import numpy as np

    marked = np.zeros(shape, dtype=bool)
    marked[_targets(source.array(names[0]))] = True
    return "BOOL", [marked.tobytes()]


def original_targets(source: Checkpoint, names: Mapping[str, str]) -> NDArray[Any] | None:
    """Return ``[DV]`` verifier's ids as the original code maps draft tokens; ``None`` without a map.

    ``eagle/model/cnets.py``: ``input_ids = topk_index + self.d2t[topk_index]``.
    """
    import numpy as np

    if "d2t" in names:
        return _targets(source.array(names["d2t"]))
    if "t2d" in names and (marked := np.flatnonzero(source.array(names["t2d"]))).size:
        return marked
    return None


ABSOLUTE = "it seems to hold token ids where offsets (id - position) are expected"

SMALL = 16
"""Up to this many tokens, a draft vocabulary without neighbouring ids may be a coincidence."""


def _targets(d2t: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    targets: NDArray[Any] = np.arange(len(d2t)) + d2t
    return targets


def _looks_absolute(d2t: NDArray[Any], vocabulary: int) -> bool:
    """Tell token ids, which rise at every step, from offsets, which stand still between neighbours."""
    return bool(d2t.min() >= 0 and d2t.max() < vocabulary and (d2t[1:] > d2t[:-1]).all())


def check_maps(d2t: NDArray[Any] | None, t2d: NDArray[Any] | None, size: int, vocabulary: int) -> list[str]:
    """Find out what is wrong with the maps of a draft vocabulary of ``size`` out of ``vocabulary``.

    Either may be missing; the other then decides.
    """
    import numpy as np

    findings = []
    if t2d is not None and int(t2d.sum()) != size:
        findings.append(f"t2d marks {int(t2d.sum())} tokens, expected the {size} of the draft vocabulary")
    if d2t is None:
        return findings
    targets = _targets(d2t)
    if not d2t.any() and size < vocabulary and (t2d is None or not t2d.any()):
        return ["d2t is all zeros, the value of a buffer that was never filled: the vocabulary map was not saved"]
    if targets.min(initial=0) < 0 or targets.max(initial=0) >= vocabulary:
        hint = f"; {ABSOLUTE}" if _looks_absolute(d2t, vocabulary) else ""
        return [*findings, f"d2t leads to tokens {targets.min()} to {targets.max()} of {vocabulary}{hint}"]
    if len(np.unique(targets)) != len(targets):
        findings.append("d2t leads to one token twice")
    if t2d is None and size > SMALL and _looks_absolute(d2t, vocabulary):
        findings.append(f"no two neighbours in d2t are equal: {ABSOLUTE}")
    if t2d is not None and not np.array_equal(np.sort(targets), np.flatnonzero(t2d)):
        wrong = int((~t2d[targets]).sum())
        findings.append(f"d2t and t2d disagree about {wrong} of the {len(targets)} draft tokens")
    return findings


def check_identity(d2t: NDArray[Any] | None, t2d: NDArray[Any] | None) -> list[str]:
    """Check that the maps of a full draft vocabulary change nothing, so that they can be left out.

    A ``t2d`` that marks nothing beside a ``d2t`` of zeros is a pair of buffers that were never filled,
    which the original code deletes before loading (``eagle/model/ea_model.py``).
    """
    findings = []
    if d2t is not None and d2t.any():
        findings.append("the draft vocabulary is as large as the verifier's, but d2t is not the identity")
    if t2d is not None and t2d.any() and not t2d.all():
        findings.append("the draft vocabulary is as large as the verifier's, but t2d does not mark every token")
    return findings
