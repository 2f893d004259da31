"""What a table can have done to tensors on their way into the output, piece by piece.

An operation is called with the source `Checkpoint`, the names of the source's tensors that it needs, and
the shape to make. It returns the dtype of the new tensor (``"I64"``) and its bytes in row-major
little-endian order, as chunks of whole elements: bytes, or extents of the source's files, which are then
copied unread. Chunks are asked for one by one when they are written, so that memory stays small if each
of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speculators import dtypes
from speculators.errors import CheckpointError
from speculators.weights import Chunk, TensorInfo, pieces

if TYPE_CHECKING:
    from speculators.checkpoint import Checkpoint

Operation = Callable[["Checkpoint", tuple[str, ...], tuple[int, ...]], tuple[str, Iterable[Chunk]]]


@dataclass(frozen=True)
class Cut:
    """Take a stretch of one tensor that begins at its element number ``start``."""

    start: int

    def __call__(
        self, source: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...]
    ) -> tuple[str, Iterable[Chunk]]:
        """Return the stretch, unread."""
        (name,) = names
        dtype = source.tensors[name].dtype
        first = self.start * dtypes.SIZES[dtype]
        return dtype, [source.stretch(name, first, first + TensorInfo(dtype, shape).nbytes)]


def join(source: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, Iterable[Chunk]]:
    """Put tensors of one dtype one after another, unread."""
    return source.tensors[names[0]].dtype, map(source.stretch, names)


def cast(chunks: Iterable[Chunk], name: str, stored: str, wanted: str) -> Iterator[bytes]:
    """Cast floating values from dtype ``stored`` to ``wanted``.

    Raises:
        CheckpointError: A finite value of the tensor ``name`` becomes infinite.
    """
    for chunk in chunks:
        for piece in pieces(chunk):
            try:
                yield dtypes.cast(piece, stored, wanted)
            except OverflowError as error:
                raise CheckpointError(f"{name} cannot be cast to {dtypes.TORCH_NAMES[wanted]}: {error}") from error
