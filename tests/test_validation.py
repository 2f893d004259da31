"""Checking converted models: what passes, and what each damage is called."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, read_tensors
from click.testing import CliRunner
from golden import PROMPTS, acceptance
from safetensors.torch import save_file
from snippets import blocks, compare, elsewhere

from speculators import AlgorithmError, CheckpointError, OptionError, Verifier, convert_model, validate_model
from speculators import prompts as prompting
from speculators.cli import cli

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", validate=False)
    return tmp_path / "out"


def change_config(folder: Path, **changes: Any) -> None:
    forget(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def forget(folder: Path) -> None:
    """Let a folder be one of another writer, of which nothing tells what was written."""
    (folder / "provenance.json").unlink(missing_ok=True)


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    forget(folder)
    tensors = read_tensors(folder) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("name", TRAINED)
def test_every_conversion_passes_with_the_verifier_that_its_config_names(name: str, tmp_path: Path) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", validate=False)

    report = validate_model(tmp_path / "out")

    assert [(check.name, check.passed) for check in report.checks] == [
        ("files", True),
        ("structure", True),
        ("forward", True),
    ]


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


def test_a_file_that_was_cut_short_is_an_error_and_not_a_pass(converted: Path) -> None:
    content = (converted / "model.safetensors").read_bytes()
    (converted / "model.safetensors").write_bytes(content[:-1])

    report = validate_model(converted, level="structure")
    (finding,) = [check.detail for check in report.checks if not check.passed]
    forget(converted)

    assert finding.startswith(f"model.safetensors has {len(content) - 1} bytes, {len(content)} were written")
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        validate_model(converted, level="structure")


def test_maps_that_disagree_fail_the_structure(converted: Path) -> None:
    change_tensors(converted, t2d=read_tensors(converted)["t2d"].roll(1))

    report = validate_model(converted, level="structure")

    assert "d2t and t2d disagree about" in report.checks[-1].detail


def test_weights_that_compute_nan_fail_the_forward(converted: Path) -> None:
    change_tensors(converted, norm__weight=torch.full((128,), float("nan")).half())

    report = validate_model(converted)

    assert [check.passed for check in report.checks] == [True, False]
    assert "norm.weight holds 128 values that are NaN or infinite: the weights are unsound" in report.checks[-1].detail


def test_acceptance_equals_the_counts_of_the_original_code(converted: Path) -> None:
    expected = acceptance("eagle3")
    expected = expected["reference_same_prompts_as_wrong"]

    report = validate_model(converted, level="acceptance", prompts=PROMPTS[: expected["prompts"]])

    assert report.acceptance is not None
    assert report.acceptance.drafts == expected["drafts"]
    assert list(report.acceptance.accepted) == expected["accepted_per_position"]
    assert report.acceptance.length == pytest.approx(expected["mean_acceptance_length"], abs=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_a_folder_is_compared_with_the_source_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", validate=False)

    report = validate_model(tmp_path / "out", source=DATA / name, level="acceptance", prompts=PROMPTS[:2])

    assert [check.name for check in report.checks] == [
        "files",
        "structure",
        "forward",
        "parity",
        "acceptance",
        "acceptance parity",
    ]
    assert report.passed
    assert report.checks[3].detail == "hidden states and logits are exactly what the source computes"
    assert "exactly as the output does" in report.checks[5].detail


def test_one_changed_weight_shows_beside_the_source(converted: Path) -> None:
    weight = read_tensors(converted)["norm.weight"]
    weight[7] *= 2
    change_tensors(converted, norm__weight=weight)

    assert validate_model(converted).passed
    report = validate_model(converted, source=DATA / "eagle3")

    assert [check.name for check in report.checks if not check.passed] == ["parity"]
    assert "norm makes something else of the same input" in report.checks[-1].detail


def test_options_of_the_conversion_belong_to_its_source(converted: Path) -> None:
    change_config(converted, norm_before_residual=True)

    assert not validate_model(converted, source=DATA / "eagle3").passed
    assert validate_model(converted, source=DATA / "eagle3", norm_before_residual=True).passed
    with pytest.raises(OptionError, match="pass the source as well"):
        validate_model(converted, norm_before_residual=True)


def test_a_cast_output_is_compared_in_the_dtype_that_it_has(tmp_path: Path) -> None:
    convert_model(DATA / "hass-layernorms", verifier=VERIFIER, output_path=tmp_path / "out", dtype="bfloat16")

    report = validate_model(tmp_path / "out", source=DATA / "hass-layernorms")

    assert report.checks[2].detail.endswith("finite and repeatable in bfloat16 on cpu")
    assert report.checks[3].detail == "hidden states and logits are exactly what the source computes"


@pytest.mark.parametrize("name", ["eagle1-fc-bias", "eagle1-no-bias", "hass-fc-bias"])
def test_rounded_embeddings_that_are_shared_unrounded_stay_within_their_rounding(name: str, tmp_path: Path) -> None:
    result = convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", dtype="float32")

    assert result.validation is not None
    assert "of what the source computes (allowed 2e-0" in result.validation.checks[-1].detail


def permuted_map(folder: Path) -> dict[str, torch.Tensor | None]:
    """A vocabulary map that leads every draft token to the next one's target."""
    targets = torch.arange(64) + read_tensors(folder)["d2t"]
    return {"d2t": targets.roll(1) - torch.arange(64)}


def test_a_draft_of_which_nothing_is_accepted_fails(converted: Path) -> None:
    change_tensors(converted, **permuted_map(converted))

    report = validate_model(converted, level="acceptance", prompts=PROMPTS[:2])

    assert [check.passed for check in report.checks] == [True, True, False]
    assert "accepts nothing that the draft proposes" in report.checks[-1].detail


def test_a_draft_that_does_worse_than_one_token_for_all_fails(tmp_path: Path) -> None:
    convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=tmp_path / "out")
    shape = (128, 256)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    change_tensors(tmp_path / "out", fusion_fc__weight=noise)

    report = validate_model(tmp_path / "out", level="acceptance", prompts=PROMPTS[:16])

    assert not report.passed
    assert "always proposing the commonest token would do better" in report.checks[-1].detail


def test_without_prompts_the_verifier_makes_some_up_and_they_are_always_the_same(converted: Path) -> None:
    torch.manual_seed(1)
    once = validate_model(converted, level="acceptance").acceptance
    state = torch.random.get_rng_state()
    again = validate_model(converted, level="acceptance").acceptance

    assert once is not None
    assert once == again
    assert once.prompts == 16
    assert once.length > 3
    assert torch.equal(torch.random.get_rng_state(), state)


def test_text_goes_through_the_tokenizer_of_the_verifier(converted: Path, speaking: Path) -> None:
    texts = [bytes(prompt).decode() for prompt in PROMPTS[:4]]

    by_text = validate_model(converted, verifier=speaking, level="acceptance", prompts=texts).acceptance
    by_ids = validate_model(converted, level="acceptance", prompts=PROMPTS[:4]).acceptance

    assert by_text == by_ids


def test_a_chat_template_is_used_where_there_is_one(speaking: Path) -> None:
    template = "<{{ messages[0]['content'] }}>{% if add_generation_prompt %}:{% endif %}"
    (speaking / "chat_template.jinja").write_text(template)

    assert prompting.token_ids(["abc", [1, 2]], Verifier(speaking)) == [list(b"<abc>:"), [1, 2]]


def test_bundled_text_stands_in_for_prompts_where_there_is_a_tokenizer(converted: Path, speaking: Path) -> None:
    report = validate_model(converted, verifier=speaking, level="acceptance")

    assert report.acceptance is not None
    assert report.acceptance.prompts == len(prompting.TEXTS)


def test_text_for_a_verifier_without_tokenizer_is_refused(converted: Path) -> None:
    with pytest.raises(OptionError, match="has no tokenizer; give lists of token ids"):
        validate_model(converted, level="acceptance", prompts=["def f():"])
    with pytest.raises(OptionError, match="a prompt holds token 256, the verifier's vocabulary ends at 256"):
        validate_model(converted, level="acceptance", prompts=[[256]])
    with pytest.raises(OptionError, match="list of prompts is empty"):
        validate_model(converted, level="acceptance", prompts=[])


def test_the_diagnosis_confirms_what_is_right(converted: Path) -> None:
    report = validate_model(converted, level="acceptance", prompts=PROMPTS[:32], diagnose=True)

    assert report.passed
    assert {(trial.option, str(trial.value)): trial.verdict for trial in report.trials} == {
        ("norm_before_residual", "True"): "evidently worse",
        ("norm_output", "True"): "evidently worse",
        (LAYER_IDS, "[1, 3, 4]"): "evidently worse",
        (LAYER_IDS, "[3, 5, 6]"): "evidently worse",
    }
    assert "nothing accepts evidently more than as converted, 2.29 tokens per step" in report.checks[-1].detail


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        pytest.param({"norm_before_residual": True}, {"norm_before_residual": False}, id="residual"),
        pytest.param({LAYER_IDS: [3, 5, 6]}, {LAYER_IDS: [2, 4, 5]}, id="layers"),
        pytest.param(
            {"norm_before_residual": True, LAYER_IDS: [3, 5, 6]},
            {"norm_before_residual": False, LAYER_IDS: [2, 4, 5]},
            id="two at once",
        ),
    ],
)
def test_the_diagnosis_finds_what_the_head_was_trained_with(
    wrong: dict[str, Any], right: dict[str, Any], tmp_path: Path
) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", **wrong)

    report = validate_model(tmp_path / "out", level="acceptance", prompts=PROMPTS[:32], diagnose=True)

    assert not report.passed
    detail = report.checks[-1].detail
    assert "accepts 2.29 tokens per step, as converted" in detail
    assert json.loads(detail.split("'")[1]) == right


def test_a_diagnosis_needs_acceptance(converted: Path) -> None:
    with pytest.raises(OptionError, match="ask for the level 'acceptance', not 'forward'"):
        validate_model(converted, diagnose=True)


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
        "files      passed  3 files with the sizes that provenance.json says\n"
        "structure  passed  15 tensors with the names, shapes and dtypes that config.json requires\n"
        "Everything that was checked is right\n"
    )
    assert failed.exit_code == 4
    assert json.loads(failed.output)["passed"] is False


def test_the_command_draws_acceptance_by_position(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS[:1]))

    result = CliRunner().invoke(
        cli, ["validate", str(converted), "--level", "acceptance", "--prompts", str(tmp_path / "prompts.json")]
    )

    assert result.exit_code == 0
    assert "acceptance  passed  each pass of the verifier yields 3." in result.output
    assert "    draft token 1  ####" in result.output


def test_the_command_reports_a_diagnosis(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(converted, norm_before_residual=True)
    (tmp_path / "converted").symlink_to(converted)
    monkeypatch.chdir(tmp_path)
    (page, command), *_ = elsewhere("test_the_command_reports_a_diagnosis").items()

    result = CliRunner().invoke(cli, shlex.split(command)[1:])
    facts = json.loads(CliRunner().invoke(cli, ["validate", str(converted), "--diagnose", "--json"]).output)

    assert result.exit_code == 4
    compare(blocks(page, "output")[-1], result.output)
    assert "diagnosis   FAILED  norm_before_residual=false accepts 2." in result.output
    assert re.search(r"norm_before_residual=false +#+ +2\.\d\d  evidently better", result.output)
    assert "Not fit to serve: diagnosis failed" in result.output
    assert facts["trials"][0]["verdict"] == "evidently better"
    assert facts["trials"][0]["acceptance"]["length"] > 3


def test_the_command_compares_with_a_source(converted: Path) -> None:
    arguments = ["validate", str(converted), "--source", str(DATA / "eagle3"), "--algorithm-kwargs"]

    right = CliRunner().invoke(cli, [*arguments, "{}"])
    wrong = CliRunner().invoke(cli, [*arguments, '{"norm_output": true}'])
    clash = CliRunner().invoke(cli, [*arguments, '{"level": "structure"}'])

    assert "parity     passed  hidden states and logits are exactly" in right.output
    assert "parity     FAILED  hidden states by" in wrong.output
    assert (right.exit_code, wrong.exit_code, clash.exit_code) == (0, 4, 2)


@pytest.mark.parametrize("content", ["{", "[]", '[""]', "[[1.5]]", '{"prompts": [[]]}'])
def test_prompts_of_another_kind_are_refused(content: str, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(content)

    result = CliRunner().invoke(
        cli, ["validate", str(converted), "--level", "acceptance", "--prompts", str(tmp_path / "prompts.json")]
    )

    assert result.exit_code == 2
    assert "prompts.json" in result.output
