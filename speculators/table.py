"""The renaming table: what becomes of every tensor that an algorithm's training code saves.

A table is data. Each row states one fact about one tensor, or about one tensor per layer:

=================  ==================================================================================
`Rename`, `Keep`   the tensor is required, and is written under the target name
`Shared`           it may be the verifier's: left out when equal to it or absent, written when not
`Split`            it holds several tensors one after another, each of which is written by itself
`Merge`            it is written as a piece of a larger tensor
`Drop`             it is not needed, for the stated reason
`Refuse`           its presence means a kind of draft that the algorithm cannot convert
=================  ==================================================================================

Source patterns match whole names: ``(a|b)`` is either spelling (the first is the one training code
uses), ``{1:L}`` runs over the numbers from 1 below ``L``, ``*`` is any one dotted part and ``**`` any
stretch; the last two only in `Drop` and `Refuse`. Where a name has several numbered places, its target has the
same ones in the same order. Shapes are products of symbols, as in ``"heads*head_dim, 2*H"``; what a symbol
stands for is the algorithm's to say (`examine`).

Each tensor belongs to exactly one row. `Refuse` rows are looked at first, then `Drop` rows; after
them two matching rows are an error in the table and none is an error to report, so the order of
rows never matters.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from speculators.dtypes import FLOATS

if TYPE_CHECKING:
    from speculators.checkpoint import Checkpoint
    from speculators.weights import Chunk

_TOKEN = re.compile(r"\(([^()]*)\)|\{(\w+):(\w+)\}|(\*\*)|(\*)|([^(){}*]+)")
_SYMBOL = re.compile(r"[A-Za-z_]\w*|\d+")

MOST_NUMBERS = 1000
"""How many tensors a row stands for at most: more than there are layers in any draft, few enough to list."""


@dataclass(frozen=True)
class Derive:
    """How to make a tensor that the checkpoint lacks from ones that it has.

    ``by`` names an operation, ``function(source, names, shape)``. It is called with the source `Checkpoint`, the
    names of ``sources`` there, and the shape to make. It returns the dtype of the new tensor as safetensors names
    it (``"I64"``), one of the row's, and an iterable of its bytes in row-major little-endian order, in chunks of
    whole elements: bytes, or what `Checkpoint.stretch` returns, which is copied unread. Chunks are asked for one by
    one while they are written, so yield those of a large tensor. An operation that raises anything but a
    `SpeculatorsError`, or makes another size or dtype, ends the conversion with a `PluginError`.

    Args:
        by: Where the operation lives, as ``"package.module:function"``; imported when it is needed.
        sources: Target names that it needs, with the row's own numbered places or none; it is used only when all of
            them are there, stored as they are written.
        why: What the user is told.
    """

    by: str
    sources: tuple[str, ...]
    why: str

    def __call__(
        self, source: Checkpoint, names: tuple[str, ...], shape: tuple[int, ...]
    ) -> tuple[str, Iterable[Chunk]]:
        """Import the operation and carry it out."""
        module, _, function = self.by.partition(":")
        made: tuple[str, Iterable[Chunk]] = getattr(importlib.import_module(module), function)(source, names, shape)
        return made


@dataclass(frozen=True)
class Row:
    """What all rows share: the pattern of the source name."""

    source: str

    def __post_init__(self) -> None:
        """Reject a malformed pattern where it is written, on the author's machine."""
        if "".join(match.group() for match in _TOKEN.finditer(self.source)) != self.source:
            raise ValueError(f"malformed pattern {self.source!r}")
        _ = self.regex

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """The source pattern as a regular expression; numbered places become groups."""
        return _compile(self.source)

    @property
    def stops(self) -> tuple[str, ...]:
        """What each numbered place runs up to, in the order of the places."""
        return tuple(stop for _, stop in _ranges(self.source))

    @property
    def name(self) -> str:
        """The source pattern in the spelling that training code uses."""
        return re.sub(r"\(([^()|]*)[^()]*\)", r"\1", self.source)

    def check_target(self, target: str) -> None:
        """Reject a target that does not name one tensor for each that the row matches."""
        if "*" in self.source or "*" in target or "(" in target:
            raise ValueError(f"row {self.source!r} -> {target!r}: a written tensor needs exact names")
        if _ranges(self.source) != _ranges(target):
            raise ValueError(f"row {self.source!r} -> {target!r}: the numbered places differ")

    def check_shape(self, shape: str) -> None:
        """Reject a malformed shape."""
        for symbol in symbols(shape):
            if not _SYMBOL.fullmatch(symbol):
                raise ValueError(f"row {self.source!r}: malformed shape {shape!r}")


@dataclass(frozen=True)
class Rename(Row):
    """A tensor that is written under another name, in the dtype that it has unless the user asks for another.

    Args:
        source: Pattern of the name in the checkpoint.
        target: Name in the output; its ``{a:b}`` places take the numbers of the source's and are the same, in the same
            order.
        shape: Shape in symbols, dimensions separated by commas; each is a product, such as ``"2*H"``.
        part: Name of the optional part of the draft that the tensor belongs to. Rows of one part are
            present together or not at all. Without one, the tensor is always required.
        dtypes: Dtypes that it may have, as safetensors names them; the floating ones by default.
        derive: How to make it when its part is there and it is not.
        unless: Why it is left out when its part is not in use although the tensor is there.

    Raises:
        ValueError: A pattern or the shape is malformed, or source and target differ in their numbered places.
    """

    target: str
    shape: str
    part: str = ""
    dtypes: tuple[str, ...] = FLOATS
    derive: Derive | None = None
    unless: str = ""

    def __post_init__(self) -> None:
        """Check that both sides run over the same numbers and that nothing is written by wildcard."""
        super().__post_init__()
        self.check_target(self.target)
        self.check_shape(self.shape)

    @property
    def bounds(self) -> tuple[str, ...]:
        """The symbols that bound the row's numbered places."""
        return tuple(stop for stop in self.stops if not stop.isdigit())

    def numbered(self, numbers: tuple[int, ...]) -> str:
        """Return the target name with its places filled by ``numbers``."""
        return fill(self.target, numbers)

    def as_output(self) -> Rename:
        """Return the row that recognises this one's target in an output."""
        return replace(self, source=self.target, derive=None)

    def expansions(self, dims: Mapping[str, int]) -> list[tuple[int, ...]]:
        """List the numbers that the row's places run over, the last one fastest; one empty tuple without a place.

        Raises:
            KeyError: A symbol is not in ``dims``.
            ValueError: There are more than any draft has.
        """
        ranges = [range(evaluate(start, dims), evaluate(stop, dims)) for start, stop in _ranges(self.source)]
        for stop, each in zip(self.stops, ranges, strict=True):
            if each.stop > MOST_NUMBERS:
                raise ValueError(f"{stop} is {each.stop}, at most {MOST_NUMBERS} can be converted")
        if (count := math.prod(map(len, ranges))) > MOST_NUMBERS:
            raise ValueError(f"{' times '.join(self.stops)} is {count}, at most {MOST_NUMBERS} can be converted")
        return list(itertools.product(*ranges))


def Keep(  # noqa: N802 - a row like the others
    name: str,
    shape: str,
    *,
    part: str = "",
    dtypes: tuple[str, ...] = FLOATS,
    derive: Derive | None = None,
    unless: str = "",
) -> Rename:
    """A tensor that keeps its name; the arguments are those of `Rename`."""
    return Rename(name, re.sub(r"\(([^()|]*)[^()]*\)", r"\1", name), shape, part, dtypes, derive, unless)


@dataclass(frozen=True)
class Shared(Rename):
    """A tensor that drafts share with their verifier; the other arguments are those of `Rename`.

    It is left out of the output when it equals the verifier's in the draft's dtype, as inference engines share that
    one, unless ``copies`` says otherwise.
    When it differs it is written, or refused where ``own`` is false. When it is absent the
    verifier's takes its place, if the shapes allow it.

    Args:
        verifier: Which of the verifier's tensors: ``"embed_tokens"`` or ``"lm_head"``.
        own: Whether the output type has room for a draft's own.
        copies: Whether a copy is written although it equals the verifier's, for readers that do not share.
    """

    verifier: str = ""
    own: bool = True
    copies: bool = False


@dataclass(frozen=True)
class Split(Row):
    """A tensor that holds several others one after another along its first dimension.

    The others have rows of their own, with their shapes, for checkpoints that store them apart.

    Args:
        source: Pattern of the name in the checkpoint.
        targets: Target names of the pieces, in the order in which they lie.

    Raises:
        ValueError: The pattern is malformed, or ``targets`` are none, the same, or differ in their numbered places.
    """

    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that there are pieces, each once and with exact names."""
        super().__post_init__()
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"row {self.source!r} holds {list(self.targets)}, expected different tensors")
        for target in self.targets:
            self.check_target(target)


@dataclass(frozen=True)
class Merge(Row):
    """A tensor that is written as a piece of a larger one, in which pieces lie along the first dimension.

    The larger one has a row of its own, with its shape, for checkpoints that store it whole.

    Args:
        source: Pattern of the name in the checkpoint.
        target: Target name of the larger tensor.
        place: Number of this piece in it, from 0.
        shape: Shape of this piece in symbols.

    Raises:
        ValueError: A pattern or the shape is malformed, or source and target differ in their numbered places.
    """

    target: str
    place: int
    shape: str

    def __post_init__(self) -> None:
        """Check that source and target have exact names."""
        super().__post_init__()
        self.check_target(self.target)
        self.check_shape(self.shape)

    @property
    def targets(self) -> tuple[str, ...]:
        """The target name, as of a `Split`."""
        return (self.target,)


@dataclass(frozen=True)
class Drop(Row):
    """A tensor that is not needed, and why.

    Args:
        source: Pattern of the name in the checkpoint; may hold ``*`` and ``**``.
        why: What the user is told.
    """

    why: str


@dataclass(frozen=True)
class Refuse(Row):
    """A tensor that marks a kind of draft the algorithm cannot convert.

    Args:
        source: Pattern of the name in the checkpoint; may hold ``*`` and ``**``.
        why: What kind it is, and what to do if anything can be done.
    """

    why: str


@dataclass(frozen=True)
class Table:
    """All rows of one algorithm.

    Args:
        rows: In any order.
        prefixes: Prefixes that some trainers put before every name; stripped before matching.

    Raises:
        ValueError: Two rows write one name, or match each other's tensors; or the pieces of a tensor do not
            make up one that a row writes.
    """

    rows: tuple[Row, ...]
    prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Find conflicting rows when the table is built."""
        self._check_names()
        self._check_pieces()

    def _check_names(self) -> None:
        reading = (*self.moving, *self.reworked)
        named = [name for row in self.rows for name in (row.source, *(row.targets if isinstance(row, Split) else ()))]
        literal = {int(number) for name in named for number in re.findall(r"(?<![^.|(])\d{1,9}(?![^.|)])", name)}
        for row in reading:
            others = [other for other in reading if other is not row]
            for sample in _samples(row.source, literal):
                if clash := next((other for other in others if other.regex.fullmatch(sample)), None):
                    raise ValueError(f"rows {row.source!r} and {clash.source!r} both match {sample!r}")
        for row in self.moving:
            for sample in _samples(row.target, literal):
                if clash := next(
                    (other for other in self.moving if other is not row and _compile(other.target).fullmatch(sample)),
                    None,
                ):
                    raise ValueError(f"two rows write {sample!r}: {row.source!r} and {clash.source!r}")

    def _check_pieces(self) -> None:
        for row in self.reworked:
            for target in row.targets:
                if target not in self.writing:
                    raise ValueError(f"row {row.source!r}: no row writes {target!r}")
                whole = row.shape if isinstance(row, Merge) else self.writing[row.targets[0]].shape
                if _tail(whole) != _tail(self.writing[target].shape):
                    raise ValueError(
                        f"row {row.source!r}: pieces lie along the first dimension, and [{whole}] and "
                        f"{target!r} [{self.writing[target].shape}] differ in others"
                    )
                if isinstance(self.writing[target], Shared):
                    raise ValueError(f"row {row.source!r}: {target!r} may be the verifier's and must come whole")
        for target in self.writing:
            places = [piece.place for piece in self.pieces(target)]
            if places != list(range(len(places))):
                raise ValueError(f"the pieces of {target!r} are numbered {places}")

    @cached_property
    def sha256(self) -> str:
        """A digest of what the table says, whatever the order of its rows."""
        rows = sorted(json.dumps([type(row).__name__, asdict(row)], sort_keys=True) for row in self.rows)
        return hashlib.sha256(json.dumps([rows, self.prefixes]).encode()).hexdigest()

    @property
    def moving(self) -> tuple[Rename, ...]:
        """The rows that may write a tensor."""
        return tuple(row for row in self.rows if isinstance(row, Rename))

    @property
    def reworked(self) -> tuple[Split | Merge, ...]:
        """The rows of tensors that are written in pieces, or as pieces."""
        return tuple(row for row in self.rows if isinstance(row, Split | Merge))

    @cached_property
    def writing(self) -> dict[str, Rename]:
        """The rows that may write a tensor by their target."""
        return {row.target: row for row in self.moving}

    def shapes(self, dims: Mapping[str, int], parts: Container[str]) -> dict[str, tuple[int, ...]]:
        """Return output name → shape of every tensor that an output of these sizes and parts can hold.

        Raises:
            KeyError: A symbol is not in ``dims``.
            ValueError: A numbered place runs to more than any draft has.
        """
        return {
            row.numbered(numbers): evaluate_shape(row.shape, dims)
            for row in self.moving
            if not row.part or row.part in parts
            for numbers in row.expansions(dims)
        }

    def native(self, target: str) -> str:
        """Return the name that training code gives to what an output calls ``target``; the table read backwards.

        Raises:
            KeyError: No row writes it.
        """
        found = self.writer_of(target)
        if found is None:
            raise KeyError(target)
        row, numbers = found
        return fill(row.name, numbers)

    def writer_of(self, target: str) -> tuple[Rename, tuple[int, ...]] | None:
        """Return the row that writes ``target``, and the numbers in its places; ``None`` when none does."""
        for row in self.moving:
            if found := row.as_output().regex.fullmatch(target):
                return row, tuple(map(int, found.groups()))
        return None

    def pieces(self, target: str) -> tuple[Merge, ...]:
        """Return the rows of the tensors that make up ``target``, in order."""
        rows = [row for row in self.rows if isinstance(row, Merge) and row.target == target]
        return tuple(sorted(rows, key=lambda row: row.place))

    @property
    def parts(self) -> tuple[str, ...]:
        """The optional parts of a draft, sorted."""
        return tuple(sorted({row.part for row in self.moving if row.part}))

    def spellings(self, name: str) -> list[str]:
        """Return ``name`` and what is left of it without declared prefixes, one after another; the last has none."""
        found = [name]
        while stripped := next((p for p in self.prefixes if found[-1].startswith(p)), ""):
            found.append(found[-1].removeprefix(stripped))
        return found


def symbols(shape: str) -> list[str]:
    """List the factors of a shape, numbers included."""
    return [factor.strip() for dimension in shape.split(",") for factor in dimension.split("*")]


def _tail(shape: str) -> list[list[str]]:
    """List the factors of every dimension but the first."""
    return [sorted(map(str.strip, dimension.split("*"))) for dimension in shape.split(",")[1:]]


def evaluate(product: str, dims: Mapping[str, int]) -> int:
    """Compute a product such as ``"2*H"``.

    Raises:
        KeyError: A symbol is not in ``dims``.
    """
    result = 1
    for factor in map(str.strip, product.split("*")):
        result *= int(factor) if factor.isdigit() else dims[factor]
    return result


def evaluate_shape(shape: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Compute a shape such as ``"2*H, H"``.

    Raises:
        KeyError: A symbol is not in ``dims``.
    """
    return tuple(evaluate(dimension, dims) for dimension in shape.split(","))


def fill(pattern: str, numbers: tuple[int, ...]) -> str:
    """Put ``numbers`` into the ``{a:b}`` places of a pattern."""
    remaining = iter(numbers)
    return re.sub(r"\{\w+:\w+\}", lambda _: str(next(remaining)), pattern)


def _ranges(pattern: str) -> list[tuple[str, str]]:
    return re.findall(r"\{(\w+):(\w+)\}", pattern)


def _samples(pattern: str, literal: Iterable[int]) -> list[str]:
    """List names for each combination of alternatives, at the first numbers and at those that other rows name."""
    places = [{int(start), *(number for number in literal if number > int(start))} for start, _ in _ranges(pattern)]
    names = [fill(pattern, numbers) for numbers in itertools.product(*places)]
    while any("(" in name for name in names):
        names = [re.sub(r"\([^()]*\)", choice, name, count=1) for name in names for choice in _choices(name)]
    return names


def _choices(name: str) -> list[str]:
    found = re.search(r"\(([^()]*)\)", name)
    return found.group(1).split("|") if found else []


def _compile(pattern: str) -> re.Pattern[str]:
    parts = []
    for match in _TOKEN.finditer(pattern):
        alternatives, start, _, anything, one, literal = match.groups()
        if alternatives is not None:
            parts.append(f"(?:{'|'.join(map(re.escape, alternatives.split('|')))})")
        elif start is not None:
            parts.append(_number_from(start))
        elif anything:
            parts.append(r".*")
        elif one:
            parts.append(r"[^.]+")
        else:
            parts.append(re.escape(literal))
    return re.compile("".join(parts))


def _number_from(start: str) -> str:
    if start not in ("0", "1"):
        raise ValueError(f"a numbered place starts at 0 or 1, not at {start}")
    return r"(0|[1-9]\d{0,8})" if start == "0" else r"([1-9]\d{0,8})"
