"""``speculators diff``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from speculators.cli import screen as screens
from speculators.cli.options import SOURCE, AlgorithmName, examples, reaching
from speculators.cli.screen import Block, Line, Screen, Table
from speculators.errors import ValidationError
from speculators.registry import AUTO

if TYPE_CHECKING:
    from speculators.comparing import Numbers
    from speculators.difference import ConfigDifference, Difference, TensorDifference

DIFFERENT = ValidationError.exit_code
"""The exit code where two checkpoints differ: 1, which diff(1) has for that, stands for a bug here."""

ABSENT = "-"
"""Stands for the value of a setting that is not there; a value would be JSON."""

LONGEST_VALUE = 60
"""Characters of a value that are shown."""

_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d*)(?=\.)")


@click.command(
    epilog=examples(
        """
        speculators diff ./EAGLE3-head converted
        speculators diff ./EAGLE3-head converted --verifier ./Llama-3.1-8B-Instruct
        speculators diff yuhuili/EAGLE3-LLaMA3.1-Instruct-8B@main ./EAGLE3-head
        speculators diff converted converted-float16 --json
        """
    )
)
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@click.option(
    "--algorithm",
    type=AlgorithmName(AUTO),
    default=AUTO,
    show_default=True,
    help="Whose table tells which tensor became which; auto finds it.",
)
@click.option(
    "--verifier",
    type=SOURCE,
    help="Base model, to compare with it what is left to it, and the config with what it should be.",
)
@reaching
@screens.manners
def diff(screen: Screen, **arguments: Any) -> None:
    """Compare the configs and tensors of the checkpoints A and B.

    A and B are local paths, Hugging Face IDs (org/name@revision:folder) or URLs. Exits with 0 where they hold the same,
    and with 4 where they differ.
    """
    from speculators.difference import diff_models

    with screen.progress() as progress:
        found = diff_models(**arguments, progress=progress)
    screen.show("difference/1", found.to_dict(), blocks(found, verbose=screen.verbose))
    if not found.equal:
        raise SystemExit(DIFFERENT)


def blocks(found: Difference, *, verbose: bool = False) -> Iterator[Block]:
    """Say what is compared, what differs, and what was renamed or left out.

    Args:
        found: The difference.
        verbose: Whether equal tensors are listed, too, and each layer by itself.
    """
    sides = zip("AB", (found.a, found.b), found.converted, found.algorithms, strict=True)
    for letter, name, converted, algorithm in sides:
        yield Line(f"{letter}: {name} ({_kind(converted, algorithm)})")
    yield from _config_blocks(found.config, found.converted)
    yield from _tensor_blocks(found.tensors, verbose)
    yield from (Line(f"note: {note}") for note in found.notes)
    if found.equal:
        yield Line("Equal", style="green")
    else:
        yield Line(f"Different: {_summary(found)}", style="bold red")


def _kind(converted: bool, algorithm: str) -> str:
    return ", ".join(filter(None, ("converted" if converted else "native", algorithm)))


def _summary(found: Difference) -> str:
    config = found.config
    settings = len(config.different.keys() - config.explained.keys()) + len(config.only_a) + len(config.only_b)
    tensors = sum(not each.equal for each in found.tensors)
    counted = ((settings, "setting"), (tensors, "tensor"))
    said = [screens.count(number, noun) for number, noun in counted if number]
    return ", ".join([*said, *(["no conversion with this verifier"] if config.compared == "untold" else [])])


COMPARED = {
    "everything": ("settings are the same", "settings that differ"),
    "shared": ("settings that both state are the same; --verifier compares all", "settings that differ"),
    "untold": ("settings that both state are the same", "settings that differ"),
    "expected": ("settings are what a conversion writes", "settings that are not what a conversion writes"),
}
"""What was compared of two configs → what to say of the settings that are the same, and of the others."""


def _config_blocks(config: ConfigDifference, converted: tuple[bool, bool]) -> Iterator[Block]:
    said, title = COMPARED[config.compared]
    rows = [(path, _value(a), _value(b), config.explained.get(path, "")) for path, (a, b) in config.different.items()]
    rows += [(path, _value(value), ABSENT, "") for path, value in config.only_a.items()]
    rows += [(path, ABSENT, _value(value), "") for path, value in config.only_b.items()]
    yield Line(f"config: {config.same} of {config.same + len(rows)} {said}")
    sides = ["found" if each else "expected" for each in converted] if config.compared == "expected" else ["A", "B"]
    yield Table(title, ("setting", *sides, ""), rows)


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _tensor_blocks(tensors: Sequence[TensorDifference], verbose: bool) -> Iterator[Block]:
    equal = [each for each in tensors if each.state == "equal"]
    renamed = sum(each.renamed for each in equal)
    under = f", {renamed} of them under another name" if renamed else ""
    yield Line(f"tensors: {len(equal)} of {len(tensors)} with equal bytes{under}")
    groups = [[each] for each in tensors] if verbose else _folded(tensors)

    def rows(*states: str, explained: bool = False) -> list[list[TensorDifference]]:
        return [group for group in groups if group[0].state in states and group[0].explained == explained]

    if verbose:
        yield Table("equal", ("tensor", "stored as"), [(_label(group), _stored(group)) for group in rows("equal")])
    changed = [(_label(group), _label(group, "b"), group[0].why) for group in groups if group[0].renamed]
    yield Table("changed names", ("in A", "in B", ""), changed, joint=" -> ")
    yield Table(
        "in one of them, for a reason",
        ("tensor", "", "why"),
        [(_label(g), f"only in {_letter(g)}", g[0].why) for g in rows("only_a", "only_b", explained=True)],
    )
    for state in ("only_a", "only_b"):
        alone = [(_label(group), _stored(group), group[0].why) for group in rows(state)]
        yield Table(f"only in {state[-1].upper()}", ("tensor", "stored as", "why"), alone)
    different = [_measured(group) for group in rows("bytes", "dtype", "shape")]
    yield Table("different", ("tensor", "stored as", "what differs"), different)


def _folded(tensors: Iterable[TensorDifference]) -> list[list[TensorDifference]]:
    """Put tensors together that differ in a layer's number alone."""
    groups: dict[object, list[TensorDifference]] = {}
    for each in tensors:
        names = tuple(tuple(_NUMBER.sub("{}", name, count=1) for name in side) for side in (each.a, each.b))
        key = (names, each.info_a, each.info_b, each.state, each.why, each.explained)
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def _label(group: Sequence[TensorDifference], side: str = "") -> str:
    """Name the tensors of a group in A or B; by default in A, or where they are not there in B."""
    from speculators.plan import fold

    names = [getattr(each, side) if side else each.a or each.b for each in group]
    return " + ".join(name for column in zip(*names, strict=True) for name in fold(dict.fromkeys(column)))


def _stored(group: Sequence[TensorDifference]) -> str:
    infos = [info for info in (group[0].info_a, group[0].info_b) if info]
    if group[0].state == "dtype":
        return f"{infos[0].dtype} -> {infos[1]}"
    return " -> ".join(dict.fromkeys(map(str, infos)))


def _letter(group: Sequence[TensorDifference]) -> str:
    return "A" if group[0].a else "B"


def _measured(group: Sequence[TensorDifference]) -> tuple[str, str, str]:
    numbers = [each.numbers for each in group if each.numbers]
    said = (
        [group[0].why, *_remarks(group[0], numbers)] if numbers else [group[0].why or f"its {group[0].state} differs"]
    )
    differing, elements = sum(each.differing for each in numbers), sum(each.elements for each in numbers)
    largest = max((each.largest for each in numbers), default=0)
    relative = max((each.relative or 0 for each in numbers), default=0)
    share = f" ({100 * relative:.2g}%)" if relative else ""
    upto = f" by up to {largest:.3g}{share}" if largest else ""
    counted = f"{differing} of {elements} differ{upto}" if differing else ""
    return _label(group), _stored(group), "; ".join(filter(None, (counted, *said)))


def _remarks(one: TensorDifference, numbers: Sequence[Numbers]) -> Iterator[str]:
    if one.info_a is None or one.info_b is None:
        return
    if not any(each.differing for each in numbers):
        yield "the same numbers" if one.state == "dtype" else "only signs of zeros, or kinds of NaN"
    elif all(each.rounded[0] for each in numbers):
        yield f"B is A cast to {one.info_b.dtype}"
    elif all(each.rounded[1] for each in numbers):
        yield f"A is B cast to {one.info_a.dtype}"
    for what, pairs in (("NaN", [each.nan for each in numbers]), ("infinite", [each.infinite for each in numbers])):
        for letter, count in zip("AB", map(sum, zip(*pairs, strict=True)), strict=True):
            if count:
                yield f"{count} {what} in {letter}"
