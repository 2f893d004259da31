"""Find which tensors of two checkpoints stand for each other: by their names, or through an algorithm's table.

A native checkpoint may spell names in other ways than another one, put prefixes before them, and store tensors fused
or in pieces; its conversion has names of its own, and leaves some to the verifier. The table says all of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from speculators.comparing import Data, measure, same_bytes, stored
from speculators.errors import SpeculatorsError
from speculators.operations import derive
from speculators.plan import Derivation, Matching, Rework, match
from speculators.table import Merge, Shared, Split, Table, fill
from speculators.weights import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from speculators.checkpoint import Checkpoint
    from speculators.verifier import Verifier
    from speculators.weights import Chunk


@dataclass(frozen=True)
class Half:
    """A tensor as one checkpoint stores it.

    Attributes:
        names: The names of what it is made of: one, or several that are its pieces.
        data: Its dtype, shape and bytes.
    """

    names: tuple[str, ...]
    data: Data


@dataclass(frozen=True)
class Couple:
    """What stands for each other in two checkpoints, or stands alone.

    Attributes:
        a: In the first; ``None`` where there is none.
        b: In the second; ``None`` where there is none.
        why: How one came to be, or why it is alone; empty where nothing is to be said.
        explained: Whether a tensor that is alone is no difference, because the reason is a good one.
    """

    a: Half | None
    b: Half | None
    why: str = ""
    explained: bool = False

    @property
    def swapped(self) -> Couple:
        """The same with the checkpoints in the other order."""
        return Couple(self.b, self.a, self.why, self.explained)


@dataclass(frozen=True)
class Shelf:
    """The tensors of a checkpoint.

    Attributes:
        checkpoint: What stores them.
        tensors: Name → dtype and shape of each.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]

    def half(self, name: str) -> Half:
        """Return a tensor as it is stored."""
        return Half((name,), stored(self.checkpoint, name))

    def cut(self, name: str, start: int, info: TensorInfo) -> Half:
        """Return a piece of a tensor that begins at byte ``start``."""
        return Half((name,), stored(self.checkpoint, name, start, info))

    def joined(self, names: tuple[str, ...]) -> Half | None:
        """Return tensors one after another along their first dimension; ``None`` where they do not fit together."""
        infos = [self.tensors[name] for name in names]
        if len({(info.dtype, info.shape[1:]) for info in infos}) > 1 or not all(info.shape for info in infos):
            return None
        whole = TensorInfo(infos[0].dtype, (sum(info.shape[0] for info in infos), *infos[0].shape[1:]))

        def chunks() -> Iterator[Chunk]:
            for name in names:
                yield from stored(self.checkpoint, name).chunks()

        return Half(names, Data(whole, chunks))


@dataclass(frozen=True)
class Standard:
    """What the algorithm of a conversion knows about it.

    Attributes:
        table: Its table.
        shapes: Output name → shape of each tensor that the output can hold, as its config says.
        parts: The optional parts that its config declares; ``None`` where the config tells nothing.
        verifier: The base model, to compare with what is left to it; ``None`` where nobody named it.
        asked: Roles of the verifier's tensors that were asked for in place of the draft's own.
    """

    table: Table
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parts: frozenset[str] | None = None
    verifier: Verifier | None = None
    asked: frozenset[str] = frozenset()

    def left(self, half: Half, target: str) -> tuple[str, bool]:
        """Say why an output may lack a tensor that its source has, and whether that explains it."""
        found = self.table.writer_of(target)
        if found is None:
            return "", False
        row, _ = found
        if isinstance(row, Shared) and not row.copies:
            if row.verifier in self.asked:
                return f"left to the verifier, whose {row.verifier} was asked for", True
            return self.shared(half, row.verifier, "left to the verifier")
        if row.part and self.parts is not None and row.part not in self.parts:
            return (f"left out: {row.unless}", True) if row.unless else (f"the config declares no {row.part}", False)
        return "", False

    def shared(self, half: Half, role: str, what: str) -> tuple[str, bool]:
        """Say whether a tensor is the verifier's, as far as that is known."""
        if self.verifier is None:
            return f"{what}, not compared", True
        if half.data.info.shape != self.verifier.shapes[role]:
            return f"{what}, whose {role} is {list(self.verifier.shapes[role])}", False
        name = self.verifier.find(role)
        if name is None or self.verifier.weights is None:
            return f"{what}, which holds no {role} to compare", True
        info = TensorInfo(self.verifier.weights.info(name).dtype, half.data.info.shape)
        equal = _is_copy(half.data, stored(self.verifier.weights, name, info=info))
        return f"{what}, whose {role} {'is equal' if equal else 'differs'}", equal


def _is_copy(draft: Data, theirs: Data) -> bool:
    """Tell whether a draft's tensor is the verifier's in the draft's dtype."""
    if draft.info == theirs.info:
        return same_bytes(draft, theirs)
    numbers = measure(draft, theirs)
    return numbers is not None and numbers.rounded[1]


def by_name(a: Shelf, b: Shelf) -> list[Couple]:
    """Pair tensors of one name."""
    both = dict.fromkeys((*a.tensors, *b.tensors))
    return [Couple(*_halves(name, a, b)) for name in both]


def _halves(name: str, a: Shelf, b: Shelf) -> tuple[Half | None, Half | None]:
    return a.half(name) if name in a.tensors else None, b.half(name) if name in b.tensors else None


def of_outputs(a: Shelf, b: Shelf, standard: Standard) -> list[Couple]:
    """Pair the tensors of two outputs, of which one may leave to the verifier what the other holds."""
    couples = []
    for couple in by_name(a, b):
        half, lacking = (couple.a, "B") if couple.b is None else (couple.b, "A")
        found = standard.table.writer_of(half.names[0]) if half and not (couple.a and couple.b) else None
        if half is None or found is None or not isinstance(found[0], Shared):
            couples.append(couple)
            continue
        why, equal = standard.shared(half, found[0].verifier, f"{lacking} leaves it to the verifier")
        couples.append(Couple(couple.a, couple.b, why, equal and standard.verifier is not None))
    return couples


def of_natives(a: Shelf, b: Shelf, table_a: Table | None, table_b: Table | None) -> list[Couple]:
    """Pair the tensors of two native checkpoints: of one name, then of one name in the original code, then pieces."""
    same = {name: name for name in a.tensors if name in b.tensors}
    rest_a, rest_b = _without(a, same), _without(b, same.values())
    originals = {original: name for name, original in _originals(rest_b, table_b).items()}
    for name, original in _originals(rest_a, table_a).items():
        if original in originals:
            same[name] = originals.pop(original)
    couples = [Couple(a.half(name), b.half(other)) for name, other in same.items()]
    rest_a, rest_b = _without(a, same), _without(b, same.values())
    if table_a is not None and table_b is not None and table_a.sha256 == table_b.sha256:
        pieces = _pieces(rest_a, rest_b, table_a)
        couples += pieces
        rest_a = _without(rest_a, (name for each in pieces if each.a for name in each.a.names))
        rest_b = _without(rest_b, (name for each in pieces if each.b for name in each.b.names))
    return couples + by_name(rest_a, rest_b)


def _originals(shelf: Shelf, table: Table | None) -> dict[str, str]:
    """Return name → what the original code calls it."""
    if table is None:
        return {}
    return {name: original for original, name in match(table, shelf.tensors).native.items()}


def _without(shelf: Shelf, names: Iterable[str]) -> Shelf:
    gone = set(names)
    return Shelf(shelf.checkpoint, {name: info for name, info in shelf.tensors.items() if name not in gone})


def _pieces(a: Shelf, b: Shelf, table: Table) -> list[Couple]:
    """Pair what one checkpoint stores fused with what the other stores in pieces, where all of it is there."""
    found = {}
    matched = [match(table, shelf.tensors) for shelf in (a, b)]
    shapes: dict[str, tuple[int, ...]] = {}
    for shelf, matching in zip((a, b), matched, strict=True):
        shapes |= {target: shelf.tensors[each.source].shape for target, each in matching.moves.items()}
    ours, theirs = (halves(shelf, table, each, shapes) for shelf, each in zip((a, b), matched, strict=True))
    for target in ours.keys() & theirs.keys():
        found[target] = Couple(ours[target], theirs[target])
    covered: dict[str, set[str]] = {}
    for side in (ours, theirs):
        for target, half in side.items():
            for name in half.names:
                covered.setdefault(name, set()).add(target)
    lost = {name for name, targets in covered.items() if not targets <= found.keys()}
    return [
        couple
        for _, couple in sorted(found.items())
        if couple.a and couple.b and not lost & {*couple.a.names, *couple.b.names}
    ]


def of_conversion(native: Shelf, output: Shelf, standard: Standard) -> list[Couple]:
    """Pair the tensors of a native checkpoint with those of its conversion, through the table."""
    table = standard.table
    matching = match(table, native.tensors)
    shapes = dict(standard.shapes) | {name: info.shape for name, info in output.tensors.items()}
    ours = halves(native, table, matching, shapes)
    couples = []
    for target, half in sorted(ours.items()):
        if target in output.tensors:
            couples.append(Couple(half, output.half(target)))
        else:
            couples.append(Couple(half, None, *standard.left(half, target)))
    moved = {name for half in ours.values() for name in half.names}
    rest = _without(output, ours)
    for name in native.tensors.keys() - moved:
        same = rest.half(name) if name in matching.unmatched and name in rest.tensors else None
        couples.append(Couple(native.half(name), same, *(("", False) if same else _fate(name, matching))))
    alone = _without(rest, matching.unmatched)
    return couples + [_made(native, output, name, matching, standard) for name in alone.tensors]


def _fate(name: str, matching: Matching) -> tuple[str, bool]:
    """Say what the table does with a tensor that it does not move."""
    if name in matching.dropped:
        return f"left out: {matching.dropped[name]}", True
    if name in matching.refused:
        return matching.refused[name], False
    if name in matching.unmatched:
        return "matches no row of the table", False
    doubled = next((line for line in matching.doubled if name in line.split()), "")
    return doubled or "its pieces do not fit", False


def _made(native: Shelf, output: Shelf, target: str, matching: Matching, standard: Standard) -> Couple:
    """Pair a tensor that only an output has with what it was made from."""
    half, found = output.half(target), standard.table.writer_of(target)
    if found is None:
        return Couple(None, half, "no row of the table writes it")
    row, numbers = found
    sources = [matching.moves.get(fill(name, numbers)) for name in row.derive.sources] if row.derive else []
    if row.derive and all(sources):
        names = tuple(each.source for each in sources if each)
        made = Derivation(target, names, half.data.info.shape, row.dtypes, row.derive, row.derive.why)

        def chunks() -> Iterable[Chunk]:
            return derive(made, native.checkpoint)[1]

        try:
            info, _ = derive(made, native.checkpoint)
        except SpeculatorsError as error:
            return Couple(None, half, str(error))
        return Couple(Half(names, Data(info, chunks)), half, row.derive.why)
    if isinstance(row, Shared):
        return Couple(None, half, *standard.shared(half, row.verifier, "completed from the verifier"))
    return Couple(None, half)


def halves(shelf: Shelf, table: Table, matching: Matching, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Half]:
    """Return output name → tensor, of all that a native checkpoint stores whole, fused or in pieces.

    Args:
        shelf: Its tensors.
        table: The table.
        matching: What `match` found for them.
        shapes: Output name → shape, of the pieces of fused tensors.
    """
    found = {target: shelf.half(each.source) for target, each in matching.moves.items()}
    joined: dict[str, list[Rework]] = {}
    for rework in matching.reworked:
        if isinstance(rework.row, Split):
            for target, half in _split(shelf, rework, shapes).items():
                found.setdefault(target, half)
        else:
            joined.setdefault(fill(rework.row.target, rework.numbers), []).append(rework)
    for target, reworks in joined.items():
        there = {rework.row: rework.source for rework in reworks}
        pieces: tuple[Merge, ...] = table.pieces(reworks[0].row.targets[0])
        if len(there) == len(reworks) and all(piece in there for piece in pieces):
            whole = shelf.joined(tuple(there[piece] for piece in pieces))
            if whole is not None:
                found.setdefault(target, whole)
    return found


def _split(shelf: Shelf, rework: Rework, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Half]:
    """Cut a fused tensor into its pieces; no pieces where their shapes are not known, or do not fill it."""
    whole = shelf.tensors[rework.source]
    targets = [fill(target, rework.numbers) for target in rework.row.targets]
    known = [shapes[target] for target in targets if shapes.get(target)]
    if len(known) < len(targets) or whole.shape != (sum(shape[0] for shape in known), *known[0][1:]):
        return {}
    found, start = {}, 0
    for target, shape in zip(targets, known, strict=True):
        info = TensorInfo(whole.dtype, (shape[0], *whole.shape[1:]))
        found[target] = shelf.cut(rework.source, start, info)
        start += info.nbytes
    return found
