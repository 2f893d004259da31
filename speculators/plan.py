"""Decide what becomes of each tensor, before any byte is written.

`match` is a pure function of names; `plan` adds shapes and the algorithm's facts. Everything that
is wrong is collected and raised together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from speculators.dtypes import FLOATS
from speculators.operations import Cut, Operation, join
from speculators.table import Drop, Merge, Refuse, Rename, Shared, Split, Table, evaluate_shape, fill
from speculators.weights import TensorInfo


@dataclass(frozen=True)
class Facts:
    """What an algorithm knows about one checkpoint.

    Attributes:
        dims: What each symbol of the table's shapes and numbered places stands for; without those that cannot be known,
            which the user is told about.
        parts: The optional parts of the table that this draft uses: all tensors of them must be there, or be made. A
            tensor of another part that is there is left out, with the row's ``unless`` as the reason.
        notes: What the user should be told, one sentence each.
        findings: What makes a conversion impossible, one line each; what was found, where, and what to do.
    """

    dims: Mapping[str, int]
    parts: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Match:
    """One source tensor and the row it belongs to.

    Attributes:
        source: Its name, with the prefixes that it has.
        row: The row.
        numbers: The numbers in the row's numbered places, in order.
    """

    source: str
    row: Rename
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Rework:
    """One source tensor that is written in pieces, or as a piece.

    Attributes:
        source: Its name, with the prefixes that it has.
        row: The row.
        numbers: The numbers in the row's numbered places, in order.
        parts: The optional parts of the rows that write it; ``""`` among them where one is required.
    """

    source: str
    row: Split | Merge
    numbers: tuple[int, ...]
    parts: frozenset[str]


@dataclass(frozen=True)
class Matching:
    """The outcome of `match`: every source name is in exactly one of these.

    Attributes:
        moves: Target name → match.
        dropped: Source name → reason.
        refused: Source name → reason.
        unmatched: Source names that no row knows.
        doubled: Findings about two source tensors with one target.
        reworked: Those that are written in pieces, or as pieces.
        native: The name that the original code gives a tensor, without prefixes → source name; of all tensors.
    """

    moves: Mapping[str, Match]
    dropped: Mapping[str, str]
    refused: Mapping[str, str]
    unmatched: tuple[str, ...]
    doubled: tuple[str, ...] = ()
    reworked: tuple[Rework, ...] = ()
    native: Mapping[str, str] = field(default_factory=dict)

    def present(self, part: str) -> bool:
        """Tell whether any tensor of an optional part is there, fused or in pieces, too."""
        moved = any(found.row.part == part for found in self.moves.values())
        return moved or any(part in rework.parts for rework in self.reworked)


@dataclass(frozen=True)
class Move:
    """A tensor to write: ``source`` of the draft becomes ``target``."""

    source: str
    target: str
    info: TensorInfo


@dataclass(frozen=True)
class Comparison:
    """A tensor to write unless it equals the verifier's."""

    move: Move
    row: Shared


@dataclass(frozen=True)
class Derivation:
    """A tensor to make.

    Attributes:
        target: Its name in the output.
        sources: What it is made from.
        shape: Its shape.
        dtypes: The dtypes that it may have.
        operation: How it is made.
        why: What the user is told.
        reworks: Whether it is made of the very bytes of its sources, cut or joined.
    """

    target: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    operation: Operation
    why: str = ""
    reworks: bool = False


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, or, where ``findings`` is not empty, why it cannot be done.

    Attributes:
        moves: Tensors to write, by target name.
        comparisons: Tensors to compare with the verifier's first.
        derivations: Tensors to make.
        dropped: Source name → reason.
        from_verifier: Target name → the verifier's tensor that takes its place.
        findings: One line per problem.
    """

    moves: tuple[Move, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    derivations: tuple[Derivation, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    from_verifier: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[str, ...] = ()


def match(table: Table, names: Iterable[str]) -> Matching:
    """Find the row of each tensor by its name alone.

    Use it in `ConverterSpec.recognises`; other hooks find the outcome in `Context`.

    Args:
        table: The algorithm's table.
        names: Names of tensors, such as ``source.tensors``.
    """
    moves: dict[str, Match] = {}
    dropped: dict[str, str] = {}
    refused: dict[str, str] = {}
    unmatched: list[str] = []
    doubled: list[str] = []
    reworked: list[Rework] = []
    native: dict[str, str] = {}
    for name in sorted(names):
        row, numbers = _find(table, name)
        native[fill(row.name, numbers) if isinstance(row, Rename | Split | Merge) else table.spellings(name)[-1]] = name
        if isinstance(row, Refuse):
            refused[name] = row.why
        elif isinstance(row, Drop):
            dropped[name] = row.why
        elif isinstance(row, Split | Merge):
            parts = frozenset(table.writing[target].part for target in row.targets)
            reworked.append(Rework(name, row, numbers, parts))
        elif isinstance(row, Rename):
            target = row.numbered(numbers)
            if target in moves:
                doubled.append(f"{moves[target].source} and {name} are both {target}: only one can be meant")
            else:
                moves[target] = Match(name, row, numbers)
        else:
            unmatched.append(name)
    return Matching(moves, dropped, refused, tuple(unmatched), tuple(doubled), tuple(reworked), native)


def _find(table: Table, name: str) -> tuple[Refuse | Drop | Rename | Split | Merge | None, tuple[int, ...]]:
    for kind in (Refuse, Drop, (Rename, Split, Merge)):
        for spelling in table.spellings(name):
            for row in table.rows:
                if isinstance(row, kind) and (found := row.regex.fullmatch(spelling)):
                    return row, tuple(map(int, found.groups()))
    return None, ()


def plan(
    table: Table,
    tensors: Mapping[str, TensorInfo],
    matching: Matching,
    facts: Facts,
    verifier_shapes: Mapping[str, tuple[int, ...]],
) -> Plan:
    """Work out every tensor's fate and collect everything that stands in the way.

    Args:
        table: The algorithm's table.
        tensors: The source's tensors.
        matching: What `match` found for them.
        facts: What the algorithm knows about this checkpoint.
        verifier_shapes: Shapes of the verifier's shareable tensors by their role in `Shared`.
    """
    builder = _Builder(table, tensors, matching, facts, verifier_shapes)
    for row in table.moving:
        builder.place(row)
    return builder.finish()


class _Builder:
    def __init__(
        self,
        table: Table,
        tensors: Mapping[str, TensorInfo],
        matching: Matching,
        facts: Facts,
        verifier_shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.table = table
        self.tensors = tensors
        self.matching = matching
        self.facts = facts
        self.verifier_shapes = verifier_shapes
        self.pending = dict(matching.moves)
        self.reworked: dict[str, list[Rework]] = {}
        for rework in matching.reworked:
            for target in rework.row.targets:
                self.reworked.setdefault(fill(target, rework.numbers), []).append(rework)
        self.moves: list[Move] = []
        self.comparisons: list[Comparison] = []
        self.derivations: list[Derivation] = []
        self.dropped = dict(matching.dropped)
        self.from_verifier: dict[str, str] = {}
        self.wrong: list[str] = []
        self.missing: list[str] = []
        self.unknown: set[str] = set()

    def place(self, row: Rename) -> None:
        try:
            expansions = row.expansions(self.facts.dims)
        except KeyError as error:
            self.unknown.add(error.args[0])
            return
        except ValueError as error:
            self.wrong.append(str(error))
            return
        for numbers in expansions:
            target = row.numbered(numbers)
            found = self.pending.pop(target, None)
            if row.part and row.part not in self.facts.parts:
                if found:
                    self.dropped[found.source] = row.unless or f"the draft does not use {row.part}"
            elif found:
                self.take(row, found, target)
            else:
                self.miss(row, numbers, target)

    def take(self, row: Rename, found: Match, target: str) -> None:
        info = self.tensors[found.source]
        if info.dtype not in row.dtypes:
            quantised = "; quantised weights are not supported" if row.dtypes == FLOATS else ""
            self.wrong.append(f"{found.source} is {info}, expected {' or '.join(row.dtypes)}{quantised}")
        expected = self.shape(row)
        if expected is not None and expected != info.shape:
            self.wrong.append(f"{found.source} is {info}, expected [{row.shape}] = {list(expected)}")
        move = Move(found.source, target, info)
        if isinstance(row, Shared) and not row.copies:
            self.comparisons.append(Comparison(move, row))
        else:
            self.moves.append(move)

    def miss(self, row: Rename, numbers: tuple[int, ...], target: str) -> None:
        expected = self.shape(row)
        if found := self.reworked.pop(target, None):
            if expected is not None:
                self.rework(found, row, target, expected)
            return
        if isinstance(row, Shared) and (expected is None or expected == self.verifier_shapes.get(row.verifier)):
            self.from_verifier[target] = row.verifier
            return
        sources = [self.matching.moves.get(fill(name, numbers)) for name in row.derive.sources] if row.derive else []
        if row.derive and expected is not None and all(sources):
            names = tuple(found.source for found in sources if found)
            self.derivations.append(Derivation(target, names, expected, row.dtypes, row.derive, row.derive.why))
            return
        shape = f"[{row.shape}]" + (f" = {list(expected)}" if expected else "")
        reason = ""
        if isinstance(row, Shared) and row.verifier in self.verifier_shapes:
            reason = (
                f"; the verifier's {row.verifier} is {list(self.verifier_shapes[row.verifier])} and cannot stand in"
            )
        self.missing.append(f"{fill(row.name, numbers)} {shape}{reason}")

    def rework(self, found: list[Rework], row: Rename, target: str, expected: tuple[int, ...]) -> None:
        """Cut ``target`` out of a larger tensor, or join its pieces."""
        names = [each.source for each in found]
        if len({each.row for each in found}) < len(found) or len({type(each.row) for each in found}) > 1:
            self.wrong.append(f"{' and '.join(names)} both hold {target}: only one can be meant")
            return
        infos = {name: self.tensors[name] for name in names}
        self.wrong += [
            f"{name} is {info}, expected {' or '.join(row.dtypes)}"
            for name, info in infos.items()
            if info.dtype not in row.dtypes
        ]
        if len({info.dtype for info in infos.values()}) > 1:
            kinds = ", ".join(f"{name} is {info}" for name, info in infos.items())
            self.wrong.append(f"the pieces of {target} differ in dtype: {kinds}")
        if isinstance(found[0].row, Split):
            self.split(found[0], row, target, expected)
        else:
            self.merge(found, row, target, expected)

    def split(self, rework: Rework, row: Rename, target: str, expected: tuple[int, ...]) -> None:
        shapes = [self.shape(self.table.writing[piece]) for piece in rework.row.targets]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes):
            return
        whole = (sum(shape[0] for shape in known), *expected[1:])
        info = self.tensors[rework.source]
        if info.shape != whole:
            pieces = " and ".join(map(str, map(list, known)))
            self.wrong.append(f"{rework.source} is {info}, expected {list(whole)} for its pieces {pieces}")
        start = sum(math.prod(shape) for shape in known[: rework.row.targets.index(row.target)])
        self.derivations.append(Derivation(target, (rework.source,), expected, row.dtypes, Cut(start), reworks=True))

    def merge(self, found: list[Rework], row: Rename, target: str, expected: tuple[int, ...]) -> None:
        there = {each.row: each for each in found}
        names, size = [], 0
        for piece in self.table.pieces(row.target):
            if piece not in there:
                self.missing.append(f"{fill(piece.name, found[0].numbers)} [{piece.shape}], a piece of {target}")
                continue
            name = there[piece].source
            names.append(name)
            size += math.prod(self.tensors[name].shape)
            shape = self.shape(piece)
            if shape is not None and shape != self.tensors[name].shape:
                self.wrong.append(f"{name} is {self.tensors[name]}, expected [{piece.shape}] = {list(shape)}")
        if size != math.prod(expected) and len(names) == len(self.table.pieces(row.target)):
            self.wrong.append(f"{' and '.join(names)} do not fill {target} [{row.shape}] = {list(expected)}")
        self.derivations.append(Derivation(target, tuple(names), expected, row.dtypes, join, reworks=True))

    def shape(self, row: Rename | Merge) -> tuple[int, ...] | None:
        try:
            return evaluate_shape(row.shape, self.facts.dims)
        except KeyError as error:
            self.unknown.add(error.args[0])
            return None

    def finish(self) -> Plan:
        matching = self.matching
        if matching.refused:
            return Plan(findings=tuple(f"{why} ({names})" for why, names in by_reason(matching.refused).items()))
        findings = list(matching.doubled)
        findings += [f"{line}: matches no row of the table" for line in fold(matching.unmatched, self.tensors)]
        if not self.unknown:
            findings += fold(f"{found.source} {self._outside(found.row)}" for found in self.pending.values())
            findings += fold(
                f"{rework.source} holds {pattern}, which {self._besides(fill(pattern, rework.numbers))}"
                for rework in self.matching.reworked
                for pattern in rework.row.targets
                if fill(pattern, rework.numbers) in self.reworked
            )
        findings += [f"missing: {line}" for line in fold(self.missing)]
        findings += fold(dict.fromkeys(self.wrong))
        findings += self.facts.findings
        if self.unknown and not findings:
            findings.append(f"neither config nor tensors tell {', '.join(sorted(self.unknown))}")
        return Plan(
            tuple(sorted(self.moves, key=lambda move: move.target)),
            tuple(self.comparisons),
            tuple(self.derivations),
            self.dropped,
            self.from_verifier,
            tuple(findings),
        )

    def _besides(self, target: str) -> str:
        stored = self.matching.moves.get(target)
        return f"is stored as {stored.row.name} too: only one can be meant" if stored else "the draft does not use"

    def _outside(self, row: Rename) -> str:
        known = ", ".join(f"{symbol} = {self.facts.dims[symbol]}" for symbol in row.bounds if symbol in self.facts.dims)
        return f"is outside {row.name}" + (f" with {known}" if known else "")


def by_reason(refused: Mapping[str, str]) -> dict[str, str]:
    """Turn name → reason into reason → the first of the names, and how many more there are."""
    grouped: dict[str, list[str]] = {}
    for name, why in refused.items():
        grouped.setdefault(why, []).append(name)
    return {
        why: f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" for why, names in grouped.items()
    }


def fold(lines: Iterable[str], tensors: Mapping[str, TensorInfo] | None = None) -> list[str]:
    """Fold lines that differ in a layer number alone: ``layers.{1…3}.mlp.up_proj.weight``.

    With ``tensors``, the lines are names and each gets its dtype and shape.
    """
    groups: dict[str, list[int]] = {}
    for line in lines:
        text = f"{line} {tensors[line]}" if tensors else line
        number = re.search(r"(?<=\.)(0|[1-9]\d*)(?=\.)", text)
        key = text if not number else f"{text[: number.start()]}\0{text[number.end() :]}"
        groups.setdefault(key, []).append(int(number.group()) if number else -1)
    return [_unfold(key, numbers) for key, numbers in groups.items()]


def _unfold(key: str, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return key.replace("\0", str(numbers[0]))
    low, high = min(numbers), max(numbers)
    span = f"{low}…{high}" if high - low + 1 == len(numbers) else ",".join(map(str, sorted(numbers)))
    return key.replace("\0", f"{{{span}}}")
