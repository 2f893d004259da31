"""Rotary parameters: two spellings in, one complete set out."""

from __future__ import annotations

from typing import Any

import pytest

from speculators import CheckpointError
from speculators.rope import legacy_scaling, rope_parameters, serving_positions

DEFAULT_NOTE = "config.json names no rope_theta: 10000, the default of the training code, is written"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}, id="old, no scaling"),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}, id="old, null"
        ),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            id="old, scaling",
        ),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            id="older, scaling",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            id="new",
        ),
        pytest.param(
            {"rope_parameters": {"rope_theta": 5e5}}, {"rope_type": "default", "rope_theta": 5e5}, id="new, no type"
        ),
        pytest.param(
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            },
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            id="both, agreeing",
        ),
        pytest.param(
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            id="both, completing each other",
        ),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
            {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 2048},
            id="rope_type before type",
        ),
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
            id="partial rotary factor beside",
        ),
        pytest.param(
            {
                "partial_rotary_factor": 0.5,
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 5e5,
                    "partial_rotary_factor": 0.25,
                },
            },
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 0.25},
            id="partial rotary factor within",
        ),
        pytest.param(
            {"rope_theta": 5e5, "partial_rotary_factor": 1.0},
            {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0},
            id="partial rotary factor of one",
        ),
        pytest.param(
            {"rope_theta": 5e5, "partial_rotary_factor": None},
            {"rope_type": "default", "rope_theta": 5e5},
            id="partial rotary factor of null",
        ),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 4.0},
            id="dynamic is left as it is",
        ),
    ],
)
def test_both_spellings_are_read(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert rope_parameters(config, 2048) == (expected, [])


def test_a_factor_that_llama_layers_ignore_is_left_out_with_a_note() -> None:
    parameters, notes = rope_parameters({"rope_theta": 5e5, "partial_rotary_factor": 0.5}, 2048)

    assert parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert [note.partition(":")[0] for note in notes] == ["partial_rotary_factor 0.5 is left out"]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, id="nulls"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, id="null in the new spelling"),
    ],
)
def test_a_config_that_names_nothing_gets_the_defaults_and_a_note(config: dict[str, Any]) -> None:
    assert rope_parameters(config, 2048) == ({"rope_type": "default", "rope_theta": 10000.0}, [DEFAULT_NOTE])


def test_a_null_in_the_new_spelling_does_not_hide_the_old_base() -> None:
    config = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": None}}

    assert rope_parameters(config, 2048)[0] == {"rope_type": "default", "rope_theta": 5e5}


def test_spellings_that_contradict_each_other_are_refused() -> None:
    config = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}}

    with pytest.raises(CheckpointError, match=r"factor 2\.0 in the old spelling and 4\.0 in rope_parameters"):
        rope_parameters(config, 2048)


@pytest.mark.parametrize("old", ["type", "rope_type"])
@pytest.mark.parametrize("new", ["type", "rope_type"])
def test_types_that_contradict_each_other_are_refused(old: str, new: str) -> None:
    config = {"rope_scaling": {old: "dynamic"}, "rope_parameters": {new: "linear", "factor": 4.0}}

    with pytest.raises(CheckpointError, match="'dynamic' in the old spelling and 'linear' in rope_parameters"):
        rope_parameters(config, 2048)


def test_an_old_and_a_new_name_of_one_type_agree() -> None:
    factors = {"short_factor": [1.0], "long_factor": [1.5], "factor": 2.0, "original_max_position_embeddings": 1024}
    config = {"rope_scaling": {"type": "su"}, "rope_parameters": {"rope_type": "longrope", "rope_theta": 5e5} | factors}

    assert rope_parameters(config, 2048)[0] == {"rope_type": "longrope", "rope_theta": 5e5} | factors


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        pytest.param({"type": "none"}, {"rope_type": "default"}, id="none is default"),
        pytest.param(
            {"type": "mrope", "mrope_section": [16, 24, 24]},
            {"rope_type": "default", "mrope_section": [16, 24, 24]},
            id="mrope is default and keeps its sections",
        ),
        pytest.param(
            {"type": "su", "factor": 2.0, "long_factor": [1.5], "short_factor": [1.0]},
            {
                "rope_type": "longrope",
                "factor": 2.0,
                "long_factor": [1.5],
                "short_factor": [1.0],
                "original_max_position_embeddings": 2048,
            },
            id="su is longrope",
        ),
    ],
)
def test_old_names_of_types_are_replaced(scaling: dict[str, Any], expected: dict[str, Any]) -> None:
    config = {"rope_theta": 10000.0, "rope_scaling": scaling}

    assert rope_parameters(config, 2048) == (expected | {"rope_theta": 10000.0}, [])


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
@pytest.mark.parametrize(
    ("config", "scaling", "original", "factor"),
    [
        pytest.param({}, {"factor": 4.0}, 8192, 4.0, id="no original positions"),
        pytest.param({}, {"original_max_position_embeddings": 2048}, 2048, 4.0, id="no factor"),
        pytest.param({}, {"original_max_position_embeddings": 2048, "factor": None}, 2048, 4.0, id="null as factor"),
        pytest.param({}, {"original_max_position_embeddings": None, "factor": 4.0}, 8192, 4.0, id="null as original"),
        pytest.param({}, {"original_max_position_embeddings": None}, 8192, 1.0, id="null as original, no factor"),
        pytest.param({}, {}, 8192, 1.0, id="neither"),
        pytest.param({}, {"original_max_position_embeddings": 2048, "factor": 3.0}, 2048, 3.0, id="both are kept"),
        pytest.param({"original_max_position_embeddings": 1024}, {}, 1024, 8.0, id="original positions beside"),
    ],
)
def test_scaling_that_extends_pre_training_is_completed(
    kind: str, config: dict[str, Any], scaling: dict[str, Any], original: int, factor: float
) -> None:
    factors = {"short_factor": [1.0], "long_factor": [1.5]} if kind == "longrope" else {}
    config = config | {"rope_theta": 10000.0, "rope_scaling": scaling | factors | {"rope_type": kind}}

    assert rope_parameters(config, 8192)[0] == {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        "factor": factor,
        **factors,
    }


def test_llama3_scaling_gets_its_original_positions() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

    assert rope_parameters({"rope_theta": 5e5, "rope_scaling": scaling}, 8192)[0] == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    ("scaling", "absent"),
    [
        ({"type": "linear"}, "factor"),
        ({"type": "dynamic", "factor": None}, "factor"),
        ({"type": "llama3", "low_freq_factor": 1.0}, "factor, high_freq_factor"),
        ({"type": "longrope", "long_factor": [1.5]}, "short_factor"),
    ],
    ids=["linear", "null", "llama3", "longrope"],
)
def test_scaling_that_lacks_what_it_needs_is_refused(scaling: dict[str, Any], absent: str) -> None:
    with pytest.raises(CheckpointError, match=f"without {absent}, which it needs"):
        rope_parameters({"rope_theta": 10000.0, "rope_scaling": scaling}, 8192)


def test_an_unknown_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(CheckpointError, match="'spiral', none of default, dynamic, linear, llama3, longrope, yarn"):
        rope_parameters({"rope_scaling": {"type": "spiral"}}, 8192)


def test_the_config_is_not_changed() -> None:
    config = {"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_theta": 5e5}}

    rope_parameters(config, 2048)

    assert config == {"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_theta": 5e5}}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "block",
    [
        pytest.param("linear", id="a text"),
        pytest.param(2.0, id="a number"),
        pytest.param([{"rope_type": "linear"}], id="a list"),
        pytest.param({"full_attention": {"rope_type": "linear"}}, id="one object per kind of layer"),
        pytest.param({"rope_type": ["linear"]}, id="a list as type"),
        pytest.param({"rope_type": 3}, id="a number as type"),
        pytest.param({"rope_type": "yarn", "original_max_position_embeddings": "2048"}, id="text as positions"),
        pytest.param({"rope_type": "yarn", "original_max_position_embeddings": [2048]}, id="list as positions"),
        pytest.param({"rope_type": "linear", "factor": [2.0]}, id="list as factor"),
        pytest.param({"rope_type": "linear", "factor": True}, id="bool as factor"),
        pytest.param({"rope_type": "linear", "factor": float("nan")}, id="no finite number"),
    ],
)
def test_a_malformed_block_is_refused(key: str, block: object) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json says .*{key}"):
        rope_parameters({"rope_theta": 10000.0, key: block}, 8192)


@pytest.mark.parametrize("value", ["10000", float("inf"), float("nan"), [10000.0], {"full": 10000.0}], ids=str)
@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor", "original_max_position_embeddings"])
def test_a_field_beside_the_blocks_that_is_no_number_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        rope_parameters({key: value, "rope_scaling": {"type": "yarn", "factor": 2.0}}, 8192)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        pytest.param({"rope_type": "default", "rope_theta": 5e5}, None, id="no scaling"),
        pytest.param(
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
            id="scaling without the base",
        ),
        pytest.param(
            {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [16, 24, 24]},
            {"rope_type": "default", "mrope_section": [16, 24, 24]},
            id="default with more",
        ),
    ],
)
def test_legacy_scaling(parameters: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert legacy_scaling(parameters) == expected


@pytest.mark.parametrize(
    ("kind", "positions", "verifier", "expected"),
    [
        pytest.param("default", 2048, None, (2048, ""), id="no verifier"),
        pytest.param("default", 2048, 2048, (2048, ""), id="as many as the verifier"),
        pytest.param("default", 4096, 2048, (4096, ""), id="more than the verifier"),
        pytest.param(
            "default",
            2048,
            8192,
            (8192, "max_position_embeddings is raised from 2048 to the verifier's 8192"),
            id="fewer than the verifier",
        ),
        pytest.param(
            "yarn",
            2048,
            8192,
            (8192, "max_position_embeddings is raised from 2048 to the verifier's 8192"),
            id="scaling that names its own positions",
        ),
        pytest.param(
            "dynamic",
            2048,
            8192,
            (
                2048,
                "max_position_embeddings stays at 2048, as dynamic rotary scaling depends on it; the verifier has 8192",
            ),
            id="dynamic stays",
        ),
        pytest.param("dynamic", 2048, 2048, (2048, ""), id="dynamic that has enough"),
    ],
)
def test_serving_positions(kind: str, positions: int, verifier: int | None, expected: tuple[int, str]) -> None:
    assert serving_positions({"rope_type": kind}, positions, verifier) == expected
