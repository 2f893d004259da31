"""Drafts that are unlike EAGLE: all tokens in one pass, LM heads and embeddings of their own, few steps."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from checkpoints import VERIFIER, write_checkpoint
from installing import TOY, Install
from safetensors.torch import save_file

from speculators import Registry, ValidationError, Verifier, convert_model, validate_model
from speculators.checkpoint import Checkpoint
from speculators.draft import of_output

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


@pytest.mark.parametrize("size", [128, 512])
def test_a_draft_for_another_vocabulary_is_refused_without_layers_too(
    size: int, registry: Registry, tmp_path: Path
) -> None:
    convert_model(HEADS, verifier=VERIFIER, output_path=tmp_path / "out", registry=registry)
    (tmp_path / "base").mkdir()
    config = json.loads((VERIFIER / "config.json").read_text()) | {"vocab_size": size}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))

    report = validate_model(tmp_path / "out", verifier=tmp_path / "base", registry=registry)

    with pytest.raises(
        ValidationError, match=f"draft_vocab_size is 256, the verifier knows {size} tokens, and nothing"
    ):
        report.raise_on_failure()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param(
            "self.draft_tokens = config.num_heads", "self.draft_tokens = 2", "proposes 3 tokens per step", id="too few"
        ),
        pytest.param(
            "self.draft_tokens = config.num_heads",
            "self.draft_tokens = 4",
            r"gives the LM head \[1, 16, 3, 128\], expected \[1, 16, 4, 'H'\], as one pass proposes 4 tokens",
            id="too many",
        ),
        pytest.param(
            "        self.draft_tokens = config.num_heads\n",
            "",
            r"gives the LM head \[1, 16, 3, 128\], expected \[1, 16, 'H'\]",
            id="unsaid",
        ),
        pytest.param("dim=-2)\n", "dim=-2)[..., :200]\n", "the logits are for 200 tokens", id="logits"),
    ],
)
def test_a_model_that_does_not_keep_to_the_shapes_that_it_promises_fails(
    old: str, new: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("__init__", "draft", "original"):
        source = (
            (EXAMPLE / "speculators_medusa" / f"{module}.py").read_text().replace("speculators_medusa", "odd_medusa")
        )
        if module == "draft":
            assert old in source
            source = new.join(source.rsplit(old, 1))
        (tmp_path / "odd_medusa").mkdir(exist_ok=True)
        (tmp_path / "odd_medusa" / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [name for name in sys.modules if name.startswith("odd_medusa")]:
        monkeypatch.delitem(sys.modules, module)
    plugins = Registry(EntryPoints([EntryPoint("medusa", "odd_medusa", "speculators")]))

    with pytest.raises(ValidationError, match=says):
        convert_model(HEADS, verifier=VERIFIER, output_path=tmp_path / "out", registry=plugins)


def test_weights_are_looked_for_as_before_where_there_are_any_of_the_usual_kinds(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HEADS, tmp_path / "head"))
    save_file({"fc.weight": torch.ones(1)}, folder / "head.safetensors")
    shutil.copy(folder / "medusa_lm_head.pt", folder / "model.pt")

    assert list(Checkpoint(folder).tensors) == ["fc.weight"]


@pytest.mark.parametrize(
    "files", [["consolidated.00.pth"], ["consolidated.00.pth", "consolidated.01.pth"], ["notes.pt"]]
)
def test_a_verifier_s_original_release_is_no_weights_of_it(files: list[str], tmp_path: Path) -> None:
    shutil.copy(VERIFIER / "config.json", tmp_path)
    for file in files:
        torch.save({"output.weight": torch.ones(2, 2)}, tmp_path / file)

    assert Verifier(tmp_path).weights is None


def test_a_name_like_a_trainer_s_is_still_the_draft_s_in_safetensors(tmp_path: Path) -> None:
    shutil.copy(HEADS / "config.json", tmp_path)
    save_file({"fc.weight": torch.ones(1)}, tmp_path / "optimizer-tuned.safetensors")

    assert list(Checkpoint(tmp_path).tensors) == ["fc.weight"]


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin", "rng_state_1.pth", "sampler.bin"]
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


STATE = "                self.state_size = config.target_hidden_size\n"
ROW = 'Rename("toy.weight", "linear.weight", "H, 2*H"),'


def test_a_draft_says_how_many_steps_it_was_trained_for(install: Install, tmp_path: Path) -> None:
    limited = TOY.replace(STATE, f"{STATE}                self.most_tokens = 2\n")
    head = write_checkpoint(tmp_path / "head", {}, {"toy.weight": torch.full((128, 256), 0.01)})
    plugins = install("toy", limited)

    with pytest.raises(ValidationError, match="proposes 3 tokens per step, the draft makes no more than 2"):
        convert_model(head, verifier=VERIFIER, output_path=tmp_path / "out", registry=plugins)
    convert_model(head, verifier=VERIFIER, output_path=tmp_path / "out", registry=plugins, speculative_tokens=2)


def test_embeddings_may_be_parameters_of_the_draft(install: Install, tmp_path: Path) -> None:
    own = TOY.replace(ROW, f'{ROW} speculators.Keep("own.weight", "V, H"),')
    own = own.replace('set(source.tensors) == {"toy.weight"}', "True").replace(
        '"H": context.verifier.hidden_size', '"H": context.verifier.hidden_size, "V": context.verifier.vocab_size'
    )
    own = own.replace('"H": config.target_hidden_size', '"H": config.target_hidden_size, "V": config.draft_vocab_size')
    embedding = "torch.nn.Embedding(config.draft_vocab_size, self.state_size)"
    own = own.replace(STATE, f"{STATE}                self.own = {embedding}\n                self.embed = self.own\n")
    tensors = {"toy.weight": torch.randn(128, 256) / 16, "own.weight": torch.randn(256, 128)}
    head = write_checkpoint(tmp_path / "head", {}, tensors)
    plugins = install("toy", own)

    convert_model(head, verifier=VERIFIER, output_path=tmp_path / "out", registry=plugins)

    converted = Checkpoint(tmp_path / "out")
    spec, verifier = plugins.get("toy").spec, Verifier(VERIFIER)
    draft = of_output(converted, spec.config.read(converted.config), spec, verifier, dtype="float32")
    tokens, states = torch.tensor([[3, 7]]), torch.randn(1, 2, 128)
    hidden, _ = draft.run(tokens, states)
    expected = torch.cat((tensors["own.weight"][tokens], states), dim=-1) @ tensors["toy.weight"].T
    assert torch.allclose(hidden, expected, atol=1e-5)
