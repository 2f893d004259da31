"""Checking converted models: what passes, and what each damage is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, read_tensors
from click.testing import CliRunner
from safetensors.torch import save_file

from speculators import AlgorithmError, CheckpointError, OptionError, convert_model, validate_model
from speculators.cli import cli

PROMPTS = json.loads((VERIFIER / "golden" / "prompts.json").read_text())["prompts"]


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", validate=False)
    return tmp_path / "out"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = read_tensors(folder) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("name", TRAINED)
def test_every_conversion_passes_with_the_verifier_that_its_config_names(name: str, tmp_path: Path) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", validate=False)

    report = validate_model(tmp_path / "out")

    assert [(check.name, check.passed) for check in report.checks] == [("structure", True), ("forward", True)]


@pytest.mark.parametrize(
    ("tensors", "config", "finding"),
    [
        pytest.param({"norm__weight": None}, {}, "missing: norm.weight [H] = [128]", id="a tensor lost"),
        pytest.param({"extra": torch.ones(1)}, {}, "extra F32 [1]: matches no row", id="a tensor invented"),
        pytest.param({"norm__weight": torch.ones(64)}, {}, "norm.weight is F32 [64]", id="another shape"),
        pytest.param({"d2t": None}, {}, "missing: d2t", id="a map lost"),
        pytest.param({}, {"draft_vocab_size": 65}, "expected [DV, H] = [65, 128]", id="config of another size"),
        pytest.param({}, {"norm_before_fc": True}, "missing: input_norm.weight", id="a norm declared"),
        pytest.param({}, {"draft_vocab_size": None}, "draft_vocab_size", id="a field of another type"),
    ],
)
def test_a_damaged_output_fails_by_name(
    tensors: dict[str, torch.Tensor | None], config: dict[str, Any], finding: str, converted: Path
) -> None:
    change_tensors(converted, **tensors)
    change_config(converted, **config)

    report = validate_model(converted, level="structure")

    assert not report.passed
    assert finding in report.checks[-1].detail


def test_weights_that_compute_nan_fail_the_forward(converted: Path) -> None:
    change_tensors(converted, norm__weight=torch.full((128,), float("nan")).half())

    report = validate_model(converted)

    assert [check.passed for check in report.checks] == [True, False]
    assert "NaN or infinity" in report.checks[-1].detail


def test_acceptance_equals_the_counts_of_the_original_code(converted: Path) -> None:
    expected = json.loads((DATA / "eagle3" / "golden" / "golden.json").read_text())["acceptance"]
    expected = expected["reference_same_prompts_as_wrong"]

    report = validate_model(converted, level="acceptance", prompts=PROMPTS[: expected["prompts"]])

    assert report.acceptance is not None
    assert report.acceptance.drafts == expected["drafts"]
    assert list(report.acceptance.accepted) == expected["accepted_per_position"]
    assert report.acceptance.length == pytest.approx(expected["mean_acceptance_length"], abs=1e-4)


def test_a_draft_of_which_nothing_is_accepted_fails(converted: Path) -> None:
    offsets = torch.zeros(64, dtype=torch.long)
    change_tensors(converted, d2t=offsets)

    report = validate_model(converted, level="acceptance", prompts=PROMPTS[:2])

    assert not report.passed
    assert "accepts nothing that the draft proposes" in report.checks[-1].detail


def test_acceptance_needs_prompts(converted: Path) -> None:
    with pytest.raises(OptionError, match="needs prompts"):
        validate_model(converted, level="acceptance")


def test_what_cannot_be_checked_is_an_error(converted: Path) -> None:
    with pytest.raises(CheckpointError, match="is not in the speculators format"):
        validate_model(DATA / "eagle3")
    with pytest.raises(OptionError, match="level 'all' is none of structure, forward, acceptance"):
        validate_model(converted, level="all")
    change_config(converted, speculators_config={"algorithm": "unheard-of"})
    with pytest.raises(AlgorithmError, match="no algorithm 'unheard-of' is installed"):
        validate_model(converted)


def test_the_command_prints_a_verdict_and_sets_the_exit_code(converted: Path) -> None:
    passed = CliRunner().invoke(cli, ["validate", str(converted), "--level", "structure"])
    change_tensors(converted, norm__weight=None)
    failed = CliRunner().invoke(cli, ["validate", str(converted), "--json"])

    assert passed.exit_code == 0
    assert passed.output == (
        "passed structure: 15 tensors with the names, shapes and dtypes that config.json requires\n"
    )
    assert failed.exit_code == 4
    assert json.loads(failed.output)["passed"] is False


def test_the_command_draws_acceptance_by_position(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS[:1]))

    result = CliRunner().invoke(
        cli, ["validate", str(converted), "--level", "acceptance", "--prompts", str(tmp_path / "prompts.json")]
    )

    assert result.exit_code == 0
    assert "passed acceptance: mean acceptance length" in result.output
    assert "    token 1  ####" in result.output


@pytest.mark.parametrize("content", ["{", "[]", '["text"]', "[[1.5]]", '{"prompts": [[]]}'])
def test_prompts_of_another_kind_are_refused(content: str, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(content)

    result = CliRunner().invoke(
        cli, ["validate", str(converted), "--level", "acceptance", "--prompts", str(tmp_path / "prompts.json")]
    )

    assert result.exit_code == 2
    assert "prompts.json" in result.output
