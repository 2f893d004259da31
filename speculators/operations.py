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
from speculators.errors import CheckpointError, PluginError, SpeculatorsError
from speculators.weights import Chunk, Extent, TensorInfo, pieces

if TYPE_CHECKING:
    from speculators.checkpoint import Checkpoint
    from speculators.plan import Derivation

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
        last = first + TensorInfo(dtype, shape).nbytes
        return dtype, (source.stretch(each, first, last) for each in names)  # not before it is written


def join(source: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, Iterable[Chunk]]:
    """Put tensors of one dtype one after another, unread."""
    return source.tensors[names[0]].dtype, map(source.stretch, names)


def derive(made: Derivation, source: Checkpoint) -> tuple[TensorInfo, Iterator[Chunk]]:
    """Carry out the operation of a tensor that is to be made.

    Raises:
        PluginError: It fails, or makes something else than was planned; perhaps only while chunks are asked for.
    """
    try:
        dtype, chunks = made.operation(source, made.sources, made.shape)
        if dtype not in made.dtypes:
            raise PluginError(f"{_origin(made)} made {made.target!r} as {dtype!r}, expected {' or '.join(made.dtypes)}")
        info = TensorInfo(dtype, made.shape)
        return info, _exactly(iter(chunks), info, made)
    except (SpeculatorsError, MemoryError):
        raise
    except Exception as error:  # whatever a plugin raises
        raise _failed(made, error) from error


def _exactly(chunks: Iterator[Chunk], info: TensorInfo, made: Derivation) -> Iterator[Chunk]:
    count = 0
    try:
        for chunk in chunks:
            size = chunk.size if isinstance(chunk, Extent) else memoryview(chunk).nbytes
            if not size:
                continue
            if size % dtypes.SIZES[info.dtype]:
                raise PluginError(f"{_origin(made)} made {size} bytes, which are no whole elements of {info.dtype}")
            count += size
            yield chunk if isinstance(chunk, Extent) else memoryview(chunk).cast("B")
    except (SpeculatorsError, MemoryError):
        raise
    except Exception as error:  # whatever a plugin raises
        raise _failed(made, error) from error
    if count != info.nbytes:
        raise PluginError(f"{_origin(made)} made {count} bytes for {made.target!r}, expected {info.nbytes} of {info}")


def _origin(made: Derivation) -> str:
    return getattr(made.operation, "by", type(made.operation).__name__)


def _failed(made: Derivation, error: Exception) -> PluginError:
    return PluginError(f"{_origin(made)} cannot make {made.target!r}: {type(error).__name__}: {error}")


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
