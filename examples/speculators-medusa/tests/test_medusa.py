"""What the interface promises, what the original code computed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from speculators import MismatchError, OptionError, convert_model
from speculators.testing import Conformance

DATA = Path(__file__).parent / "data"
HEADS = DATA / "medusa"
VERIFIER = DATA / "verifier"


class TestTrained(Conformance):
    algorithm = "medusa"
    checkpoint = HEADS
    verifier = VERIFIER
    reference = HEADS / "golden" / "golden.safetensors"


class TestExample(Conformance):
    algorithm = "medusa"


def changed(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "medusa_lm_head.pt")
    return folder


def heads() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(HEADS / "medusa_lm_head.pt", weights_only=True)
    return found


def test_heads_are_counted_where_the_config_is_wrong(tmp_path: Path) -> None:
    result = convert_model(HEADS, verifier=VERIFIER, output_path=tmp_path / "out")

    assert "config.json says medusa_num_heads 2, the tensors say 3: 3 is written" in result.notes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_heads"] == 3
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3


def test_more_blocks_move_the_lm_head_back(tmp_path: Path) -> None:
    first = heads()
    tensors = {name: value for name, value in first.items() if "linear" in name}
    tensors |= {name.replace(".0.linear", ".1.linear"): value for name, value in tensors.items()}  # one block, twice
    tensors |= {name.replace(".1.", ".2."): value for name, value in first.items() if name.endswith(".1.weight")}

    result = convert_model(changed(tmp_path / "two", tensors), verifier=VERIFIER, output_path=tmp_path / "out")

    assert result.renamed["0.2.weight"] == "lm_heads.0.weight"
    assert result.renamed["2.1.linear.bias"] == "blocks.2.layers.1.bias"
    misplaced = tensors | {f"{head}.3.weight": tensors.pop(f"{head}.2.weight") for head in range(3)}
    with pytest.raises(MismatchError, match=r"0\.3\.weight does not follow the 2 residual blocks of its head"):
        convert_model(changed(tmp_path / "odd", misplaced), verifier=VERIFIER, output_path=tmp_path / "none")


def test_names_of_a_whole_model_give_the_same_bytes(tmp_path: Path) -> None:
    whole = {f"medusa_head.{name}": value for name, value in heads().items()}
    convert_model(HEADS, verifier=VERIFIER, output_path=tmp_path / "out")

    convert_model(changed(tmp_path / "whole", whole), verifier=VERIFIER, output_path=tmp_path / "again")

    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_heads_that_use_the_verifiers_lm_head_are_refused(tmp_path: Path) -> None:
    blocks = {name: value for name, value in heads().items() if "linear" in name}

    with pytest.raises(MismatchError, match="Medusa 2 uses the verifier's"):
        convert_model(changed(tmp_path / "two", blocks, version="2"), verifier=VERIFIER, output_path=tmp_path / "out")


def test_more_tokens_than_heads_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="speculative_tokens is 4, but the draft makes 3 at most"):
        convert_model(HEADS, verifier=VERIFIER, output_path=tmp_path / "out", speculative_tokens=4)
