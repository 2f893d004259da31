"""HASS: parity with ``model/cnets.py`` of HASS and, with norms, the research code of speculators 0.1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import VERIFIER, Copy
from golden import TOLERANCE, assert_parity, converted_draft, difference, golden

from speculators import MismatchError, convert_model

NORMS = ("embed_layernorm.weight", "hidden_layernorm.weight", "lm_head_layernorm.weight")


@pytest.mark.parametrize("name", ["hass-fc-bias", "hass-layernorms"])
def test_the_converted_head_computes_what_the_original_code_computed(name: str, tmp_path: Path) -> None:
    assert_parity(name, tmp_path / "out")


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_of_ones_in_place_of_the_trained_one_would_show(norm: str, variant: Copy, tmp_path: Path) -> None:
    expected = golden("hass-layernorms")
    source = variant("hass-layernorms", tensors={norm: torch.ones(128)})

    _, logits = converted_draft(source, tmp_path / "out").run(
        expected["draft_input_ids"], expected["verifier_hidden_states"]
    )

    assert difference(logits, expected["draft_logits"]) > 100 * TOLERANCE


@pytest.mark.parametrize("norm", NORMS)
def test_two_norms_of_three_are_refused(norm: str, variant: Copy, tmp_path: Path) -> None:
    source = variant("hass-layernorms", tensors={norm: None})

    with pytest.raises(MismatchError, match=rf"missing: {norm}"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")
