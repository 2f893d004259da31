"""Rotary parameters: every spelling read, every field kept, contradictions refused."""

from __future__ import annotations

from typing import Any

import pytest

from speculators import CheckpointError
from speculators.rope import legacy_scaling, rope_parameters, serving_positions

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({}, {"rope_type": "default", "rope_theta": 10000.0}, id="nothing"),
        pytest.param({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}, id="base"),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            id="old spelling",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            id="new spelling",
        ),
        pytest.param(
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            },
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            id="both spellings that agree",
        ),
        pytest.param(
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
            {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 10000.0},
            id="sections of positions",
        ),
        pytest.param(
            {"rope_scaling": {"type": "su", "factor": 2.0, "short_factor": [1.0], "long_factor": [2.0]}},
            {
                "rope_type": "longrope",
                "factor": 2.0,
                "short_factor": [1.0],
                "long_factor": [2.0],
                "original_max_position_embeddings": 2048,
                "rope_theta": 10000.0,
            },
            id="an old name of longrope",
        ),
        pytest.param(
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512}},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0},
            id="a factor that follows from the positions",
        ),
        pytest.param(
            {"partial_rotary_factor": 0.5},
            {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
            id="a part of each head",
        ),
    ],
)
def test_parameters_are_spelled_out(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert rope_parameters(config, positions=2048)[0] == expected


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, id="two bases"),
        pytest.param(
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
            id="scaling in one spelling only",
        ),
    ],
)
def test_spellings_that_contradict_each_other_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="remove the one that the draft was not trained with"):
        rope_parameters(config, positions=2048)


@pytest.mark.parametrize(
    "block", [[1], "yarn", {"type": ["yarn"]}, {"factor": "4"}, {"factor": float("nan")}, {"a": {}}]
)
def test_a_block_of_something_else_is_refused(block: Any) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        rope_parameters({"rope_scaling": block}, positions=2048)


def test_the_user_is_told_which_base_is_assumed() -> None:
    assert rope_parameters({}, positions=2048)[1] == [
        "config.json names no rope_theta: 10000, the default of the training code, is written"
    ]


def test_the_old_spelling_has_no_base_and_is_null_without_scaling() -> None:
    assert legacy_scaling({"rope_type": "default", "rope_theta": 5e5}) is None
    assert legacy_scaling({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}) == {
        "rope_type": "linear",
        "factor": 2.0,
    }


@pytest.mark.parametrize(
    ("kind", "verifier", "expected", "note"),
    [
        pytest.param("default", 8192, 8192, "raised from 2048 to the verifier's 8192", id="raised"),
        pytest.param("default", 1024, 2048, "", id="never lowered"),
        pytest.param("default", None, 2048, "", id="verifier does not say"),
        pytest.param("dynamic", 8192, 2048, "stays at 2048", id="scaling depends on it"),
    ],
)
def test_positions_follow_the_verifier(kind: str, verifier: int | None, expected: int, note: str) -> None:
    positions, told = serving_positions({"rope_type": kind}, 2048, verifier)

    assert positions == expected
    assert note in told
    assert bool(note) == bool(told)
