"""``speculators export``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from speculators.cli import screen as screens
from speculators.cli.options import FOLDER, SOURCE, Word, examples, reaching
from speculators.cli.screen import Block, Line, Screen, Table

if TYPE_CHECKING:
    from speculators.export import ExportResult


@click.command(
    epilog=examples(
        """
        speculators export converted --output-path EAGLE3-head
        speculators export converted --verifier ./base --output-path EAGLE-head
        speculators export RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3 \\
            --output-path EAGLE3-head
        """
    )
)
@click.argument("converted", type=SOURCE)
@click.option(
    "--to",
    type=Word("layout", "native"),
    default="native",
    show_default=True,
    help="Layout to write: native, that of the training code.",
)
@click.option(
    "--verifier", type=SOURCE, help="Base model; the one that CONVERTED names by default. Read only where it is needed."
)
@click.option(
    "--output-path",
    type=FOLDER,
    default="exported",
    show_default=True,
    help="Folder to write; nothing may be there yet.",
)
@click.option(
    "--weights",
    type=Word("kind", "safetensors", "bin"),
    help="Kind of weight file: safetensors or bin; that of the source by default.",
)
@click.option(
    "--max-shard-size",
    type=Word("size"),
    help="Most bytes of tensors per safetensors file, e.g. 5GB; one file by default.",
)
@reaching
@screens.manners
def export(screen: Screen, converted: str, **arguments: Any) -> None:
    """Write the model CONVERTED in its original layout.

    For engines that read what the training code saved. Tensors and config are those of the checkpoint that was
    converted, bit for bit.
    """
    from speculators.export import export_model

    with screen.progress() as progress:
        result = export_model(converted, progress=progress, **arguments)
    screen.show("export/1", {**asdict(result), "output_path": str(result.output_path)}, _blocks(result))


def _blocks(result: ExportResult) -> Iterator[Block]:
    yield Line(f"Exported {result.source} to the native layout of {result.algorithm}")
    written = sorted((", ".join(made), name) for name, made in result.written.items())
    yield Table("renamed", ("",), [(f"{old} -> {new}",) for old, new in written if old != new])
    yield Table("kept", ("",), [(new,) for old, new in written if old == new])
    yield Table("restored", ("name", "from"), sorted(result.restored.items()), joint=": ")
    yield Table("not there any more", ("name", "why"), sorted(result.missing.items()), joint=": ")
    rounded = [(name, f"was {dtype}, the conversion rounded it") for name, dtype in sorted(result.rounded.items())]
    yield Table("not as it was", ("name", "why"), rounded, joint=": ")
    yield from (Line(f"note: {note}") for note in result.notes)
    yield Line(f"Wrote {result.output_path} with config.json and {result.weights}")
