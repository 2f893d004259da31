"""Acceptance of every trained head, and of deliberate mistakes, count for count as the original code's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, TRAINED, VERIFIER
from damaged import SPECS, registry

from speculators import Registry, convert_model, validate_model

PROMPTS = json.loads((VERIFIER / "golden" / "prompts.json").read_text())["prompts"]

pytestmark = pytest.mark.slow


def measured(folder: Path, prompts: int, plugins: Registry | None = None) -> tuple[int, list[int]]:
    acceptance = validate_model(folder, level="acceptance", prompts=PROMPTS[:prompts], registry=plugins).acceptance
    assert acceptance is not None
    return acceptance.drafts, list(acceptance.accepted)


def expected(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "golden" / "golden.json").read_text())["acceptance"]


@pytest.mark.parametrize("name", TRAINED)
def test_a_converted_head_is_accepted_as_the_original_was(name: str, tmp_path: Path) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out")
    reference = expected(name)["reference_64"]

    assert measured(tmp_path / "out", 64) == (reference["drafts"], reference["accepted_per_position"])


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        (name, mistake)
        for name, specs in SPECS.items()
        for mistake in expected(name)["wrong"]
        if mistake in specs and mistake != "token_ids_not_shifted"  # damaged alike but for the first token
    ],
)
def test_a_mistake_costs_what_it_cost_the_original(name: str, mistake: str, tmp_path: Path) -> None:
    spec = SPECS[name][mistake]
    plugins = registry(spec)
    convert_model(
        DATA / name,
        algorithm=spec.name,
        verifier=VERIFIER,
        output_path=tmp_path / "out",
        registry=plugins,
        validate=False,
    )
    wrong = expected(name)["wrong"][mistake]

    assert measured(tmp_path / "out", wrong["prompts"], plugins) == (wrong["drafts"], wrong["accepted_per_position"])
