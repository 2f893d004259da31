"""``speculators validate``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from speculators.cli import screen as screens
from speculators.cli.options import DEVICE, FILE, LEVEL, SOURCE, algorithm_kwargs, examples, reaching, refuse_clashes
from speculators.cli.screen import Block, Line, Screen, Table
from speculators.errors import ValidationError

if TYPE_CHECKING:
    from speculators.validation import Report

BAR = 30
"""Characters of a bar that stands for everything accepted."""


@click.command(
    epilog=examples(
        """
        speculators validate converted
        speculators validate converted --source ./EAGLE3-head
        speculators validate converted --prompts prompts.json --device cuda
        speculators validate converted --diagnose --device cuda
        """
    )
)
@click.argument("path", type=SOURCE)
@click.option("--verifier", type=SOURCE, help="Base model; the one that the config of PATH names by default.")
@click.option("--source", type=SOURCE, help="Native checkpoint that PATH was made from; both must compute the same.")
@algorithm_kwargs("Options with which --source was converted, as JSON.")
@click.option("--device", type=DEVICE, default="cpu", show_default=True, help="Torch device of forward and acceptance.")
@click.option(
    "--level",
    type=LEVEL,
    help="structure, forward or acceptance; forward by default, acceptance with --prompts or --diagnose.",
)
@click.option(
    "--prompts", type=FILE, help="File of prompts for acceptance, text or token ids; some are made up by default."
)
@click.option("--diagnose", is_flag=True, help="Find out with which options the checkpoint was trained.")
@reaching
@screens.manners
def validate(
    screen: Screen,
    path: str,
    level: str | None,
    prompts: str | None,
    diagnose: bool,
    algorithm_kwargs: dict[str, Any],
    **arguments: Any,
) -> None:
    """Check the converted model PATH, up to its acceptance."""
    from speculators import prompts as prompting
    from speculators.validation import validate_model

    refuse_clashes(algorithm_kwargs, validate_model)
    given = prompting.read(prompts) if prompts else None
    with screen.progress() as progress:
        report = validate_model(
            path,
            level=level or ("acceptance" if prompts or diagnose else "forward"),
            prompts=given,
            diagnose=diagnose,
            progress=progress,
            **arguments,
            **algorithm_kwargs,
        )
    screen.show("validation/1", report.to_dict(), report_blocks(report))
    if not report.passed:
        raise SystemExit(ValidationError.exit_code)


def report_blocks(report: Report) -> Iterator[Block]:
    """Say how each check went, and what was measured."""
    rows = [(check.name, "passed" if check.passed else "FAILED", check.detail) for check in report.checks]
    yield Table("", ("check", "", "what was found"), rows, padded=1, indented=False)
    if report.acceptance is not None:
        yield Table(
            "accepted by position",
            ("", "", ""),
            [(f"draft token {n}", _bar(rate), f"{rate:.3f}") for n, rate in enumerate(report.acceptance.rates, 1)],
            padded=2,
        )
    most = max((trial.acceptance.per_step for trial in report.trials), default=0) or 1  # not 0 for all
    trials = [
        (
            f"{trial.option}={json.dumps(trial.value)}",
            _bar(trial.acceptance.per_step / most),
            f"{trial.acceptance.per_step:.2f}",
            trial.verdict,
        )
        for trial in report.trials
    ]
    yield Table("tried instead", ("option", "", "tokens per step", "verdict"), trials, padded=2, right=frozenset({2}))
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        yield Line(f"Not fit to serve: {', '.join(failed)} failed", style="bold red")
    else:
        yield Line("Everything that was checked is right", style="green")


def _bar(share: float) -> str:
    return f"{'#' * round(BAR * share):<{BAR}}"
