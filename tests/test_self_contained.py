"""Outputs that load without their verifier."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, Copy, read_tensors, write_checkpoint
from click.testing import CliRunner
from golden import difference, golden

from speculators import Checkpoint, MismatchError, Registry, Verifier, convert_model, validate_model
from speculators.cli import cli
from speculators.draft import of_output

EMBEDDING = read_tensors(VERIFIER)["model.embed_tokens.weight"]
HEAD = read_tensors(VERIFIER)["lm_head.weight"]


def config_alone(tmp_path: Path) -> Path:
    """A verifier without weights."""
    folder = tmp_path / "config-alone"
    folder.mkdir()
    shutil.copy(VERIFIER / "config.json", folder)
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_the_output_computes_what_the_original_did_without_the_verifier(name: str, tmp_path: Path) -> None:
    result = convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", self_contained=True)
    converted, spec = Checkpoint(tmp_path / "out"), Registry().get(result.algorithm).spec
    config = spec.config.model_validate(converted.config)
    draft = of_output(converted, config, spec, Verifier(config_alone(tmp_path)), dtype="float32")
    expected = golden(name)

    hidden, logits = draft.run(expected["draft_input_ids"], expected["verifier_hidden_states"])

    assert difference(hidden, expected["draft_hidden_states"]) < 1e-4
    if name == "eagle3":  # the only type that has room for an LM head
        assert difference(logits, expected["draft_logits"]) < 1e-4
    assert validate_model(tmp_path / "out", source=DATA / name, verifier=VERIFIER).passed


def test_a_head_without_embeddings_gets_the_verifiers(tmp_path: Path) -> None:
    result = convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", self_contained=True)

    assert result.completed["embed_tokens.weight"] == "the verifier's embed_tokens was written"
    assert read_tensors(tmp_path / "out")["embed_tokens.weight"].equal(EMBEDDING)


def test_a_head_without_lm_head_gets_the_verifiers(variant: Copy, tmp_path: Path) -> None:
    source = variant(
        "eagle3",
        tensors=dict.fromkeys(["lm_head.weight", "d2t", "t2d"]),
        config={"draft_vocab_size": len(HEAD)},
    )

    result = convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", self_contained=True)

    written = read_tensors(tmp_path / "out")
    assert written["lm_head.weight"].equal(HEAD)
    assert written["embed_tokens.weight"].equal(EMBEDDING)
    assert set(result.completed) == {"lm_head.weight", "embed_tokens.weight"}


def test_a_copy_of_the_verifiers_is_kept_as_it_is(tmp_path: Path) -> None:
    convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=tmp_path / "shared")
    result = convert_model(
        DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=tmp_path / "out", self_contained=True
    )

    own = read_tensors(DATA / "eagle1-no-bias")["embed_tokens.weight"]
    assert "embed_tokens.weight" not in read_tensors(tmp_path / "shared")
    assert read_tensors(tmp_path / "out")["embed_tokens.weight"].equal(own)
    assert "embed_tokens.weight" in result.renamed
    assert "the output type has no room for lm_head.weight, so engines use the verifier's" in result.notes


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_training_that_rounded_the_embeddings_gets_them_rounded(
    dtype: str | None, variant: Copy, tmp_path: Path
) -> None:
    source = variant("eagle1-no-bias", tensors={"embed_tokens.weight": None})

    result = convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", self_contained=True, dtype=dtype)

    assert EMBEDDING.dtype == torch.float32
    rounded = EMBEDDING.bfloat16() if dtype is None else EMBEDDING.bfloat16().float()
    assert read_tensors(tmp_path / "out")["embed_tokens.weight"].equal(rounded)
    assert result.validation is not None
    assert "exactly" in result.validation.checks[-1].detail


def test_dtype_casts_what_the_verifier_gives(tmp_path: Path) -> None:
    convert_model(
        DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", self_contained=True, dtype="bfloat16"
    )

    assert read_tensors(tmp_path / "out")["embed_tokens.weight"].equal(EMBEDDING.bfloat16())


@pytest.mark.parametrize("layout", ["safetensors", "sharded-safetensors", "bin", "sharded-bin"])
def test_a_padded_table_is_written_as_far_as_the_vocabulary_goes(layout: str, variant: Copy, tmp_path: Path) -> None:
    padded = torch.cat((EMBEDDING, torch.full((8, EMBEDDING.shape[1]), 7.0)))
    verifier = variant("verifier", tensors={"model.embed_tokens.weight": padded}, layout=layout)

    convert_model(DATA / "eagle3", verifier=verifier, output_path=tmp_path / "out", self_contained=True)

    assert read_tensors(tmp_path / "out")["embed_tokens.weight"].equal(EMBEDDING)


def test_tied_embeddings_serve_as_lm_head(variant: Copy, tmp_path: Path) -> None:
    verifier = variant("verifier", tensors={"lm_head.weight": None}, config={"tie_word_embeddings": True})
    source = variant(
        "eagle3",
        tensors=dict.fromkeys(["lm_head.weight", "d2t", "t2d"]),
        config={"draft_vocab_size": len(HEAD)},
        folder="head",
    )

    convert_model(source, verifier=verifier, output_path=tmp_path / "out", self_contained=True)

    assert read_tensors(tmp_path / "out")["lm_head.weight"].equal(EMBEDDING)


def test_what_was_asked_of_the_verifier_is_written_from_it(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", tensors={"embed_tokens.weight": torch.zeros_like(EMBEDDING)})

    convert_model(
        source, verifier=VERIFIER, output_path=tmp_path / "out", self_contained=True, use_verifier_embed_tokens=True
    )

    assert read_tensors(tmp_path / "out")["embed_tokens.weight"].equal(EMBEDDING)


def test_a_verifier_that_lacks_the_tensor_is_said(variant: Copy, tmp_path: Path) -> None:
    quantised = {"model.embed_tokens.weight": EMBEDDING.to(torch.int8), "lm_head.weight": HEAD}
    verifier = write_checkpoint(tmp_path / "quantised", json.loads((VERIFIER / "config.json").read_text()), quantised)

    for base, message in (
        (config_alone(tmp_path), r"embed_tokens\.weight would be the verifier's embed_tokens, which \S+ does not hold"),
        (verifier, r"embed_tokens\.weight would be the verifier's model\.embed_tokens\.weight, I8 .*, expected F"),
    ):
        with pytest.raises(MismatchError, match=message):
            convert_model(DATA / "eagle3", verifier=base, output_path=tmp_path / "out", self_contained=True)
        assert not (tmp_path / "out").exists()


def test_the_command_writes_it_in_shards_too(tmp_path: Path) -> None:
    arguments = ["convert", str(DATA / "eagle3"), "--verifier", str(VERIFIER), "--output-path", str(tmp_path / "out")]

    result = CliRunner().invoke(cli, [*arguments, "--self-contained", "--max-shard-size", "100KB"])

    assert result.exit_code == 0, result.output
    assert "embed_tokens.weight: the verifier's embed_tokens was written" in result.output
    assert read_tensors(tmp_path / "out")["embed_tokens.weight"].equal(EMBEDDING)
