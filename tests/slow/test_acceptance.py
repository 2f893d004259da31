"""Acceptance of every trained head, and of deliberate mistakes, count for count as the original code's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, TRAINED, VERIFIER, Copy

from speculators import convert_model, validate_model

PROMPTS = json.loads((VERIFIER / "golden" / "prompts.json").read_text())["prompts"]
NORMS = ("embed_layernorm.weight", "hidden_layernorm.weight", "lm_head_layernorm.weight")
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

pytestmark = pytest.mark.slow


def measured(folder: Path, prompts: int) -> tuple[int, list[int]]:
    acceptance = validate_model(folder, level="acceptance", prompts=PROMPTS[:prompts]).acceptance
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
    ("name", "mistake", "source", "options"),
    [
        ("eagle1-fc-bias", "fc_bias_dropped", {"tensors": {"fc.bias": None}}, {}),
        ("hass-fc-bias", "fc_bias_dropped", {"tensors": {"fc.bias": None}}, {}),
        ("hass-layernorms", "all_three_layernorms_ignored", {"tensors": dict.fromkeys(NORMS)}, {}),
        ("eagle3", "aux_states_taken_one_layer_late", {}, {LAYER_IDS: [3, 5, 6]}),
    ],
)
def test_a_mistake_costs_what_it_cost_the_original(
    name: str, mistake: str, source: dict[str, Any], options: dict[str, Any], variant: Copy, tmp_path: Path
) -> None:
    convert_model(variant(name, **source), verifier=VERIFIER, output_path=tmp_path / "out", **options)
    wrong = expected(name)["wrong"][mistake]

    assert measured(tmp_path / "out", wrong["prompts"]) == (wrong["drafts"], wrong["accepted_per_position"])
