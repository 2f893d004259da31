"""Compare two tensors wherever they lie: their bytes, and where these differ their numbers, a few MiB at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from speculators import dtypes
from speculators.progress import Progress, unheard
from speculators.weights import CHUNK, Chunk, TensorInfo, pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from speculators.checkpoint import Checkpoint

STEP = 1 << 18
"""Elements whose numbers are compared at a time: as double-precision numbers, 2 MiB of each."""

READABLE = (*dtypes.FLOATS, "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Dtypes whose numbers numpy reads: all but the eight-bit floats."""


@dataclass(frozen=True)
class Data:
    """A tensor that can be read any number of times.

    Attributes:
        info: Its dtype and shape.
        chunks: Returns its bytes in order, in chunks, each of which is read when it is asked for.
    """

    info: TensorInfo
    chunks: Callable[[], Iterable[Chunk]]


@dataclass(frozen=True)
class Numbers:
    """How the numbers in two tensors A and B of one shape differ.

    Floating numbers of all dtypes are compared as double-precision ones, integers and flags exactly.

    Attributes:
        elements: How many there are.
        differing: How many differ; two that are NaN do not, nor do zeros of either sign.
        largest: The largest ``|a - b|``, where both are finite.
        scale: The largest finite ``|a|``.
        first: Index of the first element that differs; ``None`` where none does.
        nan: How many are NaN, in A and in B.
        infinite: How many are infinite, in A and in B.
        rounded: Whether A cast to B's dtype gives the very bytes of B, and B cast to A's those of A; both false where
            the dtypes are the same, or not floating.
    """

    elements: int
    differing: int
    largest: float
    scale: float
    first: tuple[int, ...] | None
    nan: tuple[int, int] = (0, 0)
    infinite: tuple[int, int] = (0, 0)
    rounded: tuple[bool, bool] = (False, False)

    @property
    def relative(self) -> float | None:
        """The largest difference as a share of the largest number in A; ``None`` where A holds but zeros."""
        return self.largest / self.scale if self.scale else None


def stored(checkpoint: Checkpoint, name: str, start: int = 0, info: TensorInfo | None = None) -> Data:
    """Return a tensor of a checkpoint, or a piece of one.

    Args:
        checkpoint: What stores it.
        name: Its name there.
        start: First byte of the piece.
        info: Dtype and shape of the piece; those of the whole by default.
    """
    info = info or checkpoint.info(name)
    return Data(info, partial(checkpoint.chunks, name, start, start + info.nbytes))


def same_bytes(a: Data, b: Data, progress: Progress = unheard) -> bool:
    """Tell whether two tensors of one dtype and shape have equal bytes; reads no further than the first that differ.

    Raises:
        CheckpointError: One cannot be read.
    """
    step, done, total = CHUNK // dtypes.SIZES[a.info.dtype], 0, a.info.nbytes
    for ours, theirs in zip(_steps(a, step), _steps(b, step), strict=True):
        if bytes(ours) != bytes(theirs):
            return False
        done += len(ours)
        progress("comparing", done, total)
    return True


def measure(a: Data, b: Data) -> Numbers | None:
    """Compare the numbers of two tensors of one shape; ``None`` where numpy knows no numbers of their dtypes.

    Raises:
        CheckpointError: One cannot be read.
    """
    if not {a.info.dtype, b.info.dtype} <= set(READABLE):
        return None
    import numpy as np

    tally = _Tally(a.info, b.info)
    with np.errstate(all="ignore"):
        for ours, theirs in zip(_steps(a, STEP), _steps(b, STEP), strict=True):
            tally.add(ours, theirs)
    return tally.numbers()


class _Tally:
    """Adds up what pieces of two tensors tell."""

    def __init__(self, a: TensorInfo, b: TensorInfo) -> None:
        self.a, self.b = a, b
        self.elements = self.differing = 0
        self.largest = self.scale = 0.0
        self.first: int | None = None
        self.nan, self.infinite = [0, 0], [0, 0]
        kinds = {a.dtype, b.dtype}
        casts = len(kinds) == 2 and kinds <= set(dtypes.FLOATS)
        self.rounded = [casts, casts]
        signed = any(kind.startswith("I") for kind in kinds)
        self.exact = not kinds & set(dtypes.FLOATS) and not ("U64" in kinds and signed)

    def add(self, ours: bytes | memoryview, theirs: bytes | memoryview) -> None:
        import numpy as np

        a, b = dtypes.array(ours, self.a.dtype), dtypes.array(theirs, self.b.dtype)
        differing, gaps, sizes = (self._exact if self.exact else self._floating)(a, b)
        if self.first is None and differing.any():
            self.first = self.elements + int(np.argmax(differing))
        self.differing += int(differing.sum())
        self.largest = max(self.largest, gaps.max(initial=0).item())
        self.scale = max(self.scale, sizes.max(initial=0).item())
        self.elements += len(a)
        pair = (ours, self.a.dtype), (theirs, self.b.dtype)
        self.rounded[0] = self.rounded[0] and _casts(*pair)
        self.rounded[1] = self.rounded[1] and _casts(*reversed(pair))

    def _exact(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        import numpy as np

        kind = np.result_type(a, b, np.uint8)  # of flags, too
        a, b = a.astype(kind), b.astype(kind)
        gaps = np.maximum(a, b).astype("u8") - np.minimum(a, b).astype("u8")  # wraps around to what is right
        return a != b, gaps, np.where(a < 0, 0 - a.astype("u8"), a.astype("u8"))

    def _floating(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        import numpy as np

        a, b = a.astype("f8"), b.astype("f8")
        absent = [np.isnan(a), np.isnan(b)]
        for side, (values, missing) in enumerate(zip((a, b), absent, strict=True)):
            self.nan[side] += int(missing.sum())
            self.infinite[side] += int(np.isinf(values).sum())
        finite = np.isfinite(a) & np.isfinite(b)
        return (a != b) & ~(absent[0] & absent[1]), np.abs(a - b)[finite], np.abs(a)[np.isfinite(a)]

    def numbers(self) -> Numbers:
        import numpy as np

        first = None if self.first is None else tuple(map(int, np.unravel_index(self.first, self.a.shape)))
        return Numbers(
            self.elements,
            self.differing,
            self.largest,
            self.scale,
            first,
            (self.nan[0], self.nan[1]),
            (self.infinite[0], self.infinite[1]),
            (self.rounded[0], self.rounded[1]),
        )


def _casts(source: tuple[bytes | memoryview, str], target: tuple[bytes | memoryview, str]) -> bool:
    """Tell whether floating numbers become others when they are cast to their dtype."""
    try:
        return dtypes.cast(source[0], source[1], target[1]) == bytes(target[0])
    except OverflowError:
        return False


def _steps(data: Data, elements: int) -> Iterator[bytes | memoryview]:
    """Yield the bytes of so many elements at a time, and of the rest."""
    size, kept = elements * dtypes.SIZES[data.info.dtype], bytearray()
    for chunk in data.chunks():
        for piece in pieces(chunk):
            whole = 0 if kept else len(piece) - len(piece) % size
            yield from (piece[start : start + size] for start in range(0, whole, size))
            kept += piece[whole:]
            while len(kept) >= size:
                yield bytes(kept[:size])
                del kept[:size]
    if kept:
        yield bytes(kept)
