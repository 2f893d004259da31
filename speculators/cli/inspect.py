"""``speculators inspect``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from speculators.cli import screen as screens
from speculators.cli.options import SOURCE, examples, reaching
from speculators.cli.screen import Block, Line, Screen, Table

if TYPE_CHECKING:
    from speculators.inspection import Evidence, Inspection

MOST_LINES = 3
"""Lines of each kind that are shown of what speaks against an algorithm; --verbose and --json show all."""


@click.command(
    epilog=examples(
        """
        speculators inspect ./EAGLE3-head
        speculators inspect yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
        speculators inspect converted --json
        """
    )
)
@click.argument("source", type=SOURCE)
@reaching
@screens.manners
def inspect(screen: Screen, source: str, **arguments: Any) -> None:
    """Say what the checkpoint SOURCE is and what it holds.

    No more than headers are read.

    SOURCE is a native checkpoint, a converted model or anything else: a local path, a Hugging Face ID
    (org/name@revision:folder) or a URL.
    """
    from speculators.inspection import inspect_model

    with screen.progress() as progress:
        found = inspect_model(source, progress=progress, **arguments)
    screen.show("inspection/1", found.to_dict(), blocks(found, most=None if screen.verbose else MOST_LINES))


def blocks(found: Inspection, most: int | None = MOST_LINES) -> Iterator[Block]:
    """Say what a checkpoint is and why, what it holds, and what is odd about it."""
    from speculators.plan import fold

    yield Line(found.source, style="bold")
    yield Line(found.summary)
    yield from _evidence(found, most)
    yield from (Line(f"broken plugin, not asked: {plugin}") for plugin in found.broken)
    yield from _format(found)
    yield Table(
        "files",
        ("file", "format", "size"),
        [(file.name, file.format, screens.size(file.bytes)) for file in found.files],
        right=frozenset({2}),
    )
    yield Table(
        "dtypes",
        ("dtype", "", "numbers", "size"),
        [
            (each.dtype, screens.count(each.tensors, "tensor"), f"{each.numbers:,}", screens.size(each.bytes))
            for each in found.dtypes
        ],
        right=frozenset({2, 3}),
    )
    if found.files:
        held = screens.count(len(found.tensors), "tensor")
        yield Line(f"{held}, {found.parameters:,} parameters, {screens.size(found.bytes)}")
    yield Table("config", ("key", "value"), [(each.key, _shown(each.values)) for each in found.settings], joint=": ")
    yield Table("tensors", ("tensor",), [(line,) for line in fold(found.tensors, found.tensors)])
    yield Table("quirks", ("what is unusual",), [(quirk,) for quirk in found.quirks])
    if found.evidence and found.algorithm:
        yield Line(f"What such checkpoints are like: speculators plugins page {found.algorithm}")


def _evidence(found: Inspection, most: int | None) -> Iterator[Block]:
    rows = [
        (each.algorithm, _verdict(each), f"{each.matched} of {screens.count(len(found.tensors), 'tensor')}", each.seeks)
        for each in found.evidence
    ]
    yield Table("algorithms", ("algorithm", "", "in its table", "looks for"), rows, padded=3)
    for each in found.evidence:
        against = [("failed", each.failure)] if each.failure else []
        against += [("refused", line) for line in _cut(each.refused, most)]
        against += [("missing", line) for line in _cut(each.missing, most)]
        against += [("not in its table", line) for line in _cut(each.unmatched, most)]
        yield Table(f"against {each.algorithm}", ("", "tensor"), against, joint=": ")


def _verdict(evidence: Evidence) -> str:
    return {True: "recognised", False: "not recognised", None: "failed to tell"}[evidence.recognises]


def _cut(lines: Sequence[str], most: int | None) -> list[str]:
    rest = len(lines) - (most or len(lines))
    return [*lines[:most], *([f"and {rest} more; --verbose shows them"] if rest > 0 else [])]


def _format(found: Inspection) -> Iterator[Block]:
    said = found.format
    if said is None:
        return
    reading = ", ".join(said.readers) or "no installed algorithm"
    rows = [
        ("type", said.type),
        ("algorithm", said.algorithm or "none is named"),
        ("read by", reading),
        ("verifier", found.verifier or "none is named"),
        ("verifier's classes", ", ".join(said.architectures)),
        ("draft tokens per step", "" if said.speculative_tokens is None else str(said.speculative_tokens)),
        ("made from", _listed(said.origin, said.origin.keys())),
        ("made by", _listed(said.converter, ("package", "package_version", "speculators", "dtype"))),
    ]
    yield Table("speculators format", ("", "what it says"), [row for row in rows if row[1]], joint=": ")
    if said.findings == ():
        yield Line("Its tensors are those that config.json requires", style="green")
    yield Table("what does not fit", ("what was found",), [(finding,) for finding in said.findings or ()])


def _listed(said: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {said[key]}" for key in keys if isinstance(said.get(key), str))


def _shown(values: Sequence[Any]) -> str:
    return " or ".join(value if isinstance(value, str) else json.dumps(value) for value in values)
