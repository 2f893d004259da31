"""Drafts that propose all their tokens in one pass, with LM heads of their own: the example of Medusa heads."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from checkpoints import VERIFIER

from speculators import Registry, ValidationError, convert_model, validate_model
from speculators.checkpoint import Checkpoint

EXAMPLE = Path(__file__).parents[1] / "examples" / "speculators-medusa"
HEADS = EXAMPLE / "tests" / "data" / "medusa"
GOLDEN = json.loads((HEADS / "golden" / "golden.json").read_text())["acceptance"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return Registry(EntryPoints([EntryPoint("medusa", "speculators_medusa", "speculators")]))


def test_every_token_comes_from_one_pass_and_is_accepted_as_of_the_original(registry: Registry, tmp_path: Path) -> None:
    prompts = json.loads((VERIFIER / "golden" / "prompts.json").read_text())["prompts"][:16]
    result = convert_model(HEADS, verifier=VERIFIER, output_path=tmp_path / "out", registry=registry)

    measured = validate_model(
        tmp_path / "out", source=HEADS, level="acceptance", prompts=prompts, registry=registry
    ).acceptance

    assert result.validation is not None
    assert "logits [1, 16, 3, 256]" in result.validation.checks[1].detail
    assert measured is not None
    assert (measured.drafts, list(measured.accepted)) == (
        GOLDEN["reference_16"]["drafts"],
        GOLDEN["reference_16"]["accepted_per_position"],
    )


def test_fewer_tokens_than_one_pass_makes_may_be_proposed(registry: Registry, tmp_path: Path) -> None:
    convert_model(
        HEADS, verifier=VERIFIER, output_path=tmp_path / "out", validate=False, registry=registry, speculative_tokens=2
    )

    measured = validate_model(tmp_path / "out", level="acceptance", prompts=[[7] * 8], registry=registry).acceptance

    assert measured is not None
    assert len(measured.accepted) == 2


def test_a_config_that_proposes_more_tokens_than_one_pass_makes_is_refused(registry: Registry, tmp_path: Path) -> None:
    convert_model(HEADS, verifier=VERIFIER, output_path=tmp_path / "out", registry=registry)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 4
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))

    report = validate_model(tmp_path / "out", registry=registry)

    with pytest.raises(ValidationError, match="proposes 4 tokens per step, the draft makes no more than 3"):
        report.raise_on_failure()


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin", "rng_state.pth"]
)
def test_what_a_trainer_resumes_from_is_not_taken_for_the_draft(file: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HEADS, tmp_path / "head"))
    torch.save({"state": torch.ones(1)}, folder / file)

    assert list(Checkpoint(folder).tensors) == list(Checkpoint(HEADS).tensors)


def test_two_files_of_weights_are_alternatives_to_choose_from(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HEADS, tmp_path / "head"))
    shutil.copy(folder / "medusa_lm_head.pt", folder / "older.pt")

    with pytest.raises(Exception, match=r"alternative weight files \(medusa_lm_head\.pt, older\.pt\); name the one"):
        _ = Checkpoint(folder).tensors
    assert Checkpoint(folder / "older.pt").tensors == Checkpoint(HEADS).tensors
