"""``speculators convert``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from speculators.cli import screen as screens
from speculators.cli.batch import from_file
from speculators.cli.options import (
    DEVICE,
    DTYPE,
    FOLDER,
    LEVEL,
    SOURCE,
    AlgorithmName,
    Word,
    algorithm_kwargs,
    examples,
    reaching,
    refuse_clashes,
)
from speculators.cli.screen import Block, Line, Screen, Table, was_typed
from speculators.cli.validate import report_blocks
from speculators.errors import PublishError
from speculators.registry import AUTO

if TYPE_CHECKING:
    from speculators.convert import ConversionResult
    from speculators.dry_run import PlannedConversion, PlannedTensor
    from speculators.registry import Algorithm
    from speculators.serving import Instructions


@click.command(
    epilog=examples(
        """
        speculators convert ./head --verifier ./base
        speculators convert yuhuili/EAGLE3-LLaMA3.1-Instruct-8B \\
            --verifier meta-llama/Llama-3.1-8B-Instruct --output-path eagle3
        speculators convert ./head --verifier ./base \\
            --algorithm-kwargs '{"norm_before_residual": true}'
        speculators convert ./head --verifier ./base --dry-run
        speculators convert ./head --verifier meta-llama/Llama-3.1-8B-Instruct \\
            --push-to-hub my-org/my-head --private
        speculators convert --from-file jobs.yaml --jobs 2
        speculators convert --list-algorithms
        """
    )
)
@click.argument("model", type=SOURCE, required=False)
@click.option(
    "--algorithm",
    type=AlgorithmName(AUTO),
    default=AUTO,
    show_default=True,
    help="What trained MODEL; auto lets the plugins look.",
)
@click.option("--verifier", type=SOURCE, help="Base model that MODEL drafts for; required.")
@click.option(
    "--output-path", type=FOLDER, default="converted", show_default=True, help="Where the converted model goes."
)
@click.option(
    "--validate-device", type=DEVICE, default="cpu", show_default=True, help="Torch device of the validation."
)
@click.option(
    "--validate/--no-validate",
    "-validate/-no-validate",
    default=True,
    show_default=True,
    help="Check the result before it appears.",
)
@click.option(
    "--validate-level",
    type=LEVEL,
    default="forward",
    show_default=True,
    help="How far: structure, forward or acceptance.",
)
@algorithm_kwargs("Options of the algorithm as a JSON object; --list-algorithms shows them.")
@click.option("--dtype", type=DTYPE, help="Cast floating tensors, e.g. to float16; as stored by default.")
@click.option(
    "--max-shard-size", type=Word("size"), help="Most bytes of tensors per file, e.g. 5GB; one file by default."
)
@click.option("--overwrite", is_flag=True, help="Replace a converted model at the output path.")
@click.option("--self-contained", is_flag=True, help="Write what drafts share with the verifier, too.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, tensor by tensor, and write nothing.")
@click.option("--push-to-hub", metavar="REPO", help="Upload the result to this repository of the Hub.")
@click.option("--private", is_flag=True, help="Make that repository private if it is not there yet.")
@reaching
@click.option("--list-algorithms", is_flag=True, help="List the installed algorithms with their options, and exit.")
@screens.manners
@from_file
def convert(
    screen: Screen,
    model: str | None,
    verifier: str | None,
    algorithm_kwargs: dict[str, Any],
    dry_run: bool,
    list_algorithms: bool,
    **arguments: Any,
) -> None:
    """Convert the draft checkpoint MODEL to the speculators format.

    MODEL and VERIFIER are local paths, Hugging Face IDs (org/name@revision:folder) or URLs.
    """
    if list_algorithms:
        _list_algorithms(screen)
        return
    if model is None:
        raise click.UsageError("MODEL is missing; it is the draft checkpoint")
    if verifier is None:
        raise click.UsageError("--verifier is missing; it is the base model that MODEL drafts for")
    from speculators.convert import convert_model

    refuse_clashes(algorithm_kwargs, convert_model)
    if arguments["push_to_hub"] is None and not was_typed("private"):
        arguments["private"] = False  # a variable says it of all that is pushed
    if dry_run:
        from speculators.dry_run import plan_conversion

        with screen.progress() as progress:
            planned = plan_conversion(model, verifier=verifier, progress=progress, **arguments, **algorithm_kwargs)
        screen.show("plan/1", planned.to_dict(), plan_blocks(planned))
        return
    try:
        with screen.progress() as progress:
            result = convert_model(model, verifier=verifier, progress=progress, **arguments, **algorithm_kwargs)
    except PublishError as error:
        if error.result is not None:
            screen.show("conversion/1", as_json(error.result), blocks(error.result))
        raise
    screen.show("conversion/1", as_json(result), blocks(result))


def as_json(result: ConversionResult) -> dict[str, Any]:
    """Return the document of a result."""
    report = result.validation.to_dict() if result.validation else None
    return {**asdict(result), "output_path": str(result.output_path), "validation": report}


def blocks(result: ConversionResult) -> Iterator[Block]:
    """Say what was done with each tensor, how the result was checked, and how it is served."""
    yield Line(f"Converted {result.source} with {result.algorithm} ({result.package})")
    yield _moved("renamed", {source: target for source, target in result.renamed.items() if source != target})
    yield _pairs("kept", ("", ""), {source: "" for source, target in result.renamed.items() if source == target})
    yield _moved("cut or joined", {name: ", ".join(made) for name, made in result.reworked.items()})
    yield _pairs("left out", ("name", "why"), result.dropped)
    yield _pairs("completed", ("name", "with"), result.completed)
    yield from (Line(f"note: {note}") for note in result.notes)
    if result.validation is None:
        yield Line("not validated")
    else:
        yield from report_blocks(result.validation)
    yield Line(f"Wrote {result.output_path}")
    if result.pushed_to is not None:
        yield Line(f"Pushed to {result.pushed_to}")
    if result.serving is not None:
        yield from serving_blocks(result.serving)


def plan_blocks(planned: PlannedConversion) -> Iterator[Block]:
    """Say what would be done with each tensor, with which options, and what would be written."""
    yield Line(f"Would convert {planned.source} with {planned.algorithm} ({planned.package})", style="bold")
    options = [(option.name, json.dumps(option.value), option.origin) for option in planned.options]
    yield Table("options", ("option", "value", "from"), options)
    for fate, titled in FATES.items():
        rows = [_planned(tensor) for tensor in planned.tensors if tensor.fate == fate]
        yield Table(titled, ("tensor", "dtype", "shape", "size", "why"), rows, right=frozenset({3}))
    yield from (Line(f"note: {note}") for note in planned.notes)
    yield Table(
        "files",
        ("file", "size", "holds"),
        [
            (file.name, screens.size(file.bytes), screens.count(file.tensors, "tensor") if file.tensors else "")
            for file in planned.files
        ],
        right=frozenset({1}),
    )
    yield Line("config.json:", style="bold")
    yield Line(planned.config.rstrip("\n"))
    total = sum(file.bytes for file in planned.files)
    written = screens.count(sum(file.tensors for file in planned.files), "tensor")
    yield Line(f"Nothing was written. {planned.output_path} would hold {written} in {screens.size(total)}")


FATES = {
    "renamed": "renamed",
    "kept": "kept",
    "cut": "cut",
    "joined": "joined",
    "made": "made",
    "completed": "written from the verifier",
    "left to the verifier": "left to the verifier",
    "dropped": "left out",
}
"""Fate of a tensor → the title of the table of those that share it."""


def _planned(tensor: PlannedTensor) -> tuple[str, ...]:
    target = [] if tensor.target is None else [tensor.target]
    names = dict.fromkeys(name for name in (", ".join(tensor.sources), *target) if name)  # once where it is kept
    cast = tensor.stored is not None and tensor.dtype not in (None, tensor.stored)
    dtype = f"{tensor.stored}->{tensor.dtype}" if cast else tensor.dtype or tensor.stored or ""
    shape = "" if tensor.shape is None else f"[{', '.join(map(str, tensor.shape))}]"
    return " -> ".join(names), dtype, shape, "" if tensor.dtype is None else screens.size(tensor.bytes), tensor.why


def serving_blocks(serving: Instructions) -> Iterator[Block]:
    """Say what to type where vLLM is installed."""
    yield Line()
    yield Line("Serve it where vLLM is installed:")
    if serving.packages:
        yield Line(f"{screens.INDENT}{shlex.join(['pip', 'install', *serving.packages])}")
    yield Line(f"{screens.INDENT}{serving.command}")
    if serving.note:
        yield Line(serving.note)


def _moved(title: str, entries: Mapping[str, str]) -> Table:
    return Table(title, ("",), [(f"{source} -> {target}",) for source, target in sorted(entries.items())])


def _pairs(title: str, columns: tuple[str, str], entries: Mapping[str, str]) -> Table:
    return Table(title, columns, sorted(entries.items()), joint=": ")


def _list_algorithms(screen: Screen) -> None:
    from speculators.registry import Registry, known_packages

    registry = Registry()
    algorithms = [_algorithm_facts(algorithm) for algorithm in registry.algorithms]
    facts = {
        "algorithms": algorithms,
        "broken": [vars(plugin) for plugin in registry.broken],
        "install": [] if registry.names or registry.left_out else known_packages(),
    }
    listing: list[Block] = []
    if not registry.names:
        message = registry.describe_installed()
        listing = [Line(message[0].upper() + message[1:])]
    for number, each in enumerate(algorithms):
        listing += [Line()] if number else []
        listing += _algorithm_blocks(each)
    listing += [Line(), *(Line(f"broken: {plugin}") for plugin in registry.broken)] if registry.broken else []
    screen.show("algorithms/1", facts, listing)


def _algorithm_facts(algorithm: Algorithm) -> dict[str, Any]:
    from speculators.pages import options

    spec = algorithm.spec
    return {
        "name": spec.name,
        "aliases": list(spec.aliases),
        "summary": spec.summary,
        "reference": spec.reference,
        "package": algorithm.package,
        "version": algorithm.version,
        "options": [asdict(option) for option in options(spec)],
    }


def _algorithm_blocks(facts: Mapping[str, Any]) -> list[Block]:
    known_as = f" (also {', '.join(facts['aliases'])})" if facts["aliases"] else ""
    rows = [
        (
            option["name"],
            option["type"],
            "required" if option["required"] else f"default {json.dumps(option['default'])}",
            option["description"],
        )
        for option in facts["options"]
    ]
    return [
        Line(f"{facts['name']}{known_as}: {facts['summary']}", style="bold"),
        Line(f"{screens.INDENT}{facts['reference']}"),
        Line(f"{screens.INDENT}from {facts['package']} {facts['version']}"),
        Table("options", ("option", "type", "", "what it is for"), rows),
    ]
