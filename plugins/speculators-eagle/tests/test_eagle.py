"""EAGLE v1/v2: parity with ``eagle/model/cnets1.py`` and the quirks of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, VERIFIER, Copy, read_tensors
from golden import TOLERANCE, assert_parity, converted_draft, difference, golden

from speculators import MismatchError, Registry, convert_model


@pytest.mark.parametrize("name", ["eagle1-fc-bias", "eagle1-no-bias"])
def test_the_converted_head_computes_what_the_original_code_computed(name: str, tmp_path: Path) -> None:
    assert_parity(name, tmp_path / "out")


def test_a_lost_bias_would_show(variant: Copy, tmp_path: Path) -> None:
    expected = golden("eagle1-fc-bias")

    hidden, _ = converted_draft(variant("eagle1-fc-bias", tensors={"fc.bias": None}), tmp_path / "out").run(
        expected["draft_input_ids"], expected["verifier_hidden_states"]
    )

    assert difference(hidden, expected["draft_hidden_states"]) > 100 * TOLERANCE


def test_another_rotary_base_would_show(variant: Copy, tmp_path: Path) -> None:
    expected = golden("eagle1-no-bias")

    hidden, _ = converted_draft(DATA / "eagle1-no-bias", tmp_path / "out", rope_theta=500000.0).run(
        expected["draft_input_ids"], expected["verifier_hidden_states"]
    )

    assert difference(hidden, expected["draft_hidden_states"]) > 100 * TOLERANCE


@pytest.mark.parametrize("alias", ["eagle1", "eagle2"])
def test_both_versions_are_known_by_name(alias: str) -> None:
    assert Registry().get(alias).spec.name == "eagle"


@pytest.mark.parametrize("prefix", ["model.", "module.", "ea_layer."])
def test_a_prefix_on_every_name_is_stripped(prefix: str, variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle1-fc-bias", rename=lambda name: prefix + name)

    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")

    assert "fusion_fc.bias" in read_tensors(tmp_path / "out")


def test_query_key_and_value_biases_need_no_output_bias(variant: Copy, tmp_path: Path) -> None:
    biases = {
        f"layers.0.self_attn.{name}_proj.bias": torch.randn(size).half()
        for name, size in (("q", 128), ("k", 64), ("v", 64))
    }
    source = variant("eagle1-fc-bias", config={"qkv_bias": True}, tensors=biases)

    draft = converted_draft(source, tmp_path / "out")

    layer = json.loads((tmp_path / "out" / "config.json").read_text())["transformer_layer_config"]
    assert (layer["qkv_bias"], layer["attention_bias"]) == (True, False)
    assert torch.equal(draft.model.transformer.self_attn.q_proj.bias, biases["layers.0.self_attn.q_proj.bias"].float())
    assert "transformer.self_attn.o_proj.bias" not in read_tensors(tmp_path / "out")


def test_an_lm_head_of_its_own_has_no_place(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle1-fc-bias", tensors={"lm_head.weight": torch.randn(256, 128).half()})

    with pytest.raises(MismatchError, match=r"lm_head\.weight differs.*no room"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


def test_a_second_layer_has_no_place(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle1-fc-bias", tensors={"layers.1.input_layernorm.weight": torch.ones(128).half()})

    with pytest.raises(MismatchError, match="more than one decoder layer"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


def test_the_tensors_decide_about_the_bias_and_the_user_is_told(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle1-fc-bias", config={"bias": False})

    result = convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")

    assert "config.json says bias False, but fc.bias is there; the tensors are right" in result.notes
