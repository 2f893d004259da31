"""EAGLE-3: parity with ``eagle/model/cnets.py``, vocabulary maps, flags, and several layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, VERIFIER, Copy, read_tensors
from golden import TOLERANCE, assert_parity, converted_draft, difference, golden

from speculators import MismatchError, convert_model

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def second_layer(bias: bool = False) -> dict[str, torch.Tensor]:
    """A later layer: ordinary, as wide as the hidden size."""
    source = read_tensors(DATA / "eagle3")
    layer = {name.replace("midlayer", "layers.1"): tensor for name, tensor in source.items() if "midlayer" in name}
    del layer["layers.1.hidden_norm.weight"]
    return {
        name: tensor[:, :128].clone() if "q_proj" in name or "k_proj" in name or "v_proj" in name else tensor
        for name, tensor in layer.items()
    }


def test_the_converted_head_computes_what_the_original_code_computed(tmp_path: Path) -> None:
    assert_parity("eagle3", tmp_path / "out")


@pytest.mark.parametrize("rename", [lambda name: name.replace("midlayer", "layers.0"), lambda name: f"model.{name}"])
def test_other_spellings_of_the_names_give_the_same_bytes(rename: Any, variant: Copy, tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "plain")

    convert_model(variant("eagle3", rename=rename), verifier=VERIFIER, output_path=tmp_path / "other")

    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_both_spellings_of_the_first_layer_at_once_are_refused(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", tensors={"layers.0.hidden_norm.weight": torch.ones(128).half()})

    with pytest.raises(MismatchError, match="only one can be meant"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


@pytest.mark.parametrize("missing", ["d2t", "t2d"])
def test_a_missing_map_is_made_from_the_other(missing: str, variant: Copy, tmp_path: Path) -> None:
    result = convert_model(variant("eagle3", tensors={missing: None}), verifier=VERIFIER, output_path=tmp_path / "out")

    assert torch.equal(read_tensors(tmp_path / "out")[missing], read_tensors(DATA / "eagle3")[missing])
    assert result.completed[missing] == f"made from {'t2d' if missing == 'd2t' else 'd2t'}"


D2T = read_tensors(DATA / "eagle3")["d2t"]
T2D = read_tensors(DATA / "eagle3")["t2d"]


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        pytest.param({"d2t": None, "t2d": None}, r"missing: d2t(.|\n)*missing: t2d", id="neither map"),
        pytest.param({"d2t": torch.arange(64) + D2T, "t2d": None}, "seems to hold token ids", id="absolute ids"),
        pytest.param({"d2t": D2T + 1000}, r"leads to tokens \d+ to \d+ of 256", id="out of range"),
        pytest.param({"d2t": D2T * 0, "t2d": T2D & False}, "never filled", id="both never filled"),
        pytest.param({"d2t": D2T * 0, "t2d": None}, "never filled", id="zeros alone"),
        pytest.param({"t2d": T2D & False}, "marks 0 tokens, expected the 64", id="mask of nothing"),
        pytest.param({"t2d": T2D.roll(1)}, "disagree about", id="shifted mask"),
        pytest.param({"d2t": D2T - torch.arange(64)}, "twice|disagree|leads", id="one token for all"),
        pytest.param({"d2t": D2T.float()}, "d2t is F32", id="floats"),
    ],
)
def test_a_wrong_vocabulary_map_is_refused(
    maps: dict[str, torch.Tensor | None], message: str, variant: Copy, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=message):
        convert_model(variant("eagle3", tensors=maps), verifier=VERIFIER, output_path=tmp_path / "out")


FULL_HEAD = torch.randn(256, 128).half()


@pytest.mark.parametrize(
    "maps",
    [
        pytest.param({"d2t": None, "t2d": None}, id="none"),
        pytest.param(
            {"d2t": torch.zeros(256, dtype=torch.long), "t2d": torch.ones(256, dtype=torch.bool)}, id="identity"
        ),
        pytest.param(
            {"d2t": torch.zeros(256, dtype=torch.long), "t2d": torch.zeros(256, dtype=torch.bool)}, id="never filled"
        ),
        pytest.param({"d2t": torch.zeros(256, dtype=torch.long), "t2d": None}, id="d2t alone"),
    ],
)
def test_maps_of_a_full_vocabulary_are_left_out(maps: dict[str, Any], variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", tensors={"lm_head.weight": FULL_HEAD, **maps})

    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")

    assert not {"d2t", "t2d"} & read_tensors(tmp_path / "out").keys()
    assert config_of(tmp_path / "out")["draft_vocab_size"] == 256


def test_a_permutation_of_the_full_vocabulary_is_refused(variant: Copy, tmp_path: Path) -> None:
    swapped = torch.zeros(256, dtype=torch.long)
    swapped[0], swapped[1] = 1, -1
    source = variant("eagle3", tensors={"lm_head.weight": FULL_HEAD, "d2t": swapped, "t2d": None})

    with pytest.raises(MismatchError, match="d2t is not the identity"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


def test_without_an_lm_head_the_verifiers_serves_a_full_vocabulary(variant: Copy, tmp_path: Path) -> None:
    source = variant(
        "eagle3", config={"draft_vocab_size": 256}, tensors=dict.fromkeys(["lm_head.weight", "d2t", "t2d"])
    )

    result = convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")

    assert result.completed["lm_head.weight"] == "the verifier's lm_head is used"
    assert "logits [1, 16, 256]" in result.validation.checks[1].detail


def test_an_lm_head_equal_to_the_verifiers_is_kept_for_readers_that_do_not_share(variant: Copy, tmp_path: Path) -> None:
    head = read_tensors(VERIFIER)["lm_head.weight"].half()
    source = variant(
        "eagle3", config={"draft_vocab_size": 256}, tensors={"lm_head.weight": head, "d2t": None, "t2d": None}
    )

    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")

    assert torch.equal(read_tensors(tmp_path / "out")["lm_head.weight"], head)


def test_an_lm_head_tied_to_the_drafts_own_embeddings_is_not_taken_for_the_verifiers(
    variant: Copy, tmp_path: Path
) -> None:
    source = variant(
        "eagle3",
        config={"draft_vocab_size": 256, "tie_word_embeddings": True},
        tensors={**dict.fromkeys(["lm_head.weight", "d2t", "t2d"]), "embed_tokens.weight": FULL_HEAD},
    )

    with pytest.raises(MismatchError, match="ties the missing lm_head"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


def test_without_an_lm_head_a_draft_vocabulary_is_refused(variant: Copy, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"missing: lm_head\.weight .* cannot stand in"):
        convert_model(
            variant("eagle3", tensors={"lm_head.weight": None}), verifier=VERIFIER, output_path=tmp_path / "out"
        )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_before_residual", True), ("norm_output", True), (LAYER_IDS, [1, 3, 6])],
)
def test_flags_that_no_tensor_shows_come_from_the_config_or_the_options(
    key: str, value: Any, nested: bool, variant: Copy, tmp_path: Path
) -> None:
    said = {"eagle_config": {LAYER_IDS: [2, 4, 5], key: value}} if nested else {key: value}

    convert_model(variant("eagle3", config=said), verifier=VERIFIER, output_path=tmp_path / "from-config")
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "from-option", **{key: value})

    assert config_of(tmp_path / "from-config")[key] == value
    assert config_of(tmp_path / "from-option")[key] == value


@pytest.mark.parametrize(
    ("key", "said", "given"),
    [("norm_before_residual", False, True), ("norm_output", True, False), (LAYER_IDS, [1, 3, 6], [2, 4, 5])],
)
def test_an_option_that_contradicts_the_config_is_refused(
    key: str, said: Any, given: Any, variant: Copy, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="correct the wrong one"):
        convert_model(
            variant("eagle3", config={key: said}), verifier=VERIFIER, output_path=tmp_path / "out", **{key: given}
        )


@pytest.mark.parametrize("ids", [[2, 4], [2, 4, 9], [2, 2, 5], [-1, 4, 5], [5, 2, 4]])
def test_layer_ids_that_the_verifier_does_not_have_are_refused(ids: list[int], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=LAYER_IDS):
        convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", **{LAYER_IDS: ids})


def test_norm_before_residual_changes_what_is_computed(tmp_path: Path) -> None:
    expected = golden("eagle3")

    hidden, _ = converted_draft(DATA / "eagle3", tmp_path / "out", norm_before_residual=True).run(
        expected["draft_input_ids"], expected["verifier_hidden_states"]
    )

    assert difference(hidden, expected["draft_hidden_states"]) > 100 * TOLERANCE


def test_a_norm_that_the_config_names_and_the_file_lacks_is_refused_until_the_user_says_so(
    variant: Copy, tmp_path: Path
) -> None:
    source = variant("eagle3", config={"norm_before_fc": True})

    with pytest.raises(MismatchError, match="the weights of that norm are missing"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")
    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", norm_before_fc=False)

    assert config_of(tmp_path / "out")["norm_before_fc"] is False


@pytest.mark.parametrize(
    ("norms", "flag"),
    [
        ({"input_norm.weight": torch.ones(384).half()}, "norm_before_fc"),
        ({f"fc_norm.{i}.weight": torch.ones(128).half() for i in range(3)}, "fc_norm"),
    ],
)
def test_norms_before_fc_are_kept_and_declared(
    norms: dict[str, torch.Tensor], flag: str, variant: Copy, tmp_path: Path
) -> None:
    convert_model(variant("eagle3", tensors=norms), verifier=VERIFIER, output_path=tmp_path / "out")

    assert norms.keys() <= read_tensors(tmp_path / "out").keys()
    assert config_of(tmp_path / "out")[flag] is True


def test_one_missing_norm_of_three_is_refused(variant: Copy, tmp_path: Path) -> None:
    norms = {f"fc_norm.{i}.weight": torch.ones(128).half() for i in (0, 2)}

    with pytest.raises(MismatchError, match=r"missing: fc_norm\.1\.weight"):
        convert_model(variant("eagle3", tensors=norms), verifier=VERIFIER, output_path=tmp_path / "out")


def test_several_layers_are_kept_and_run(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", config={"num_hidden_layers": 2}, tensors=second_layer())

    result = convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")

    assert config_of(tmp_path / "out")["transformer_layer_config"]["num_hidden_layers"] == 2
    assert "layers.1.self_attn.q_proj.weight" in read_tensors(tmp_path / "out")
    assert result.validation.passed


def test_a_gap_in_the_layers_is_refused(variant: Copy, tmp_path: Path) -> None:
    third = {name.replace("layers.1", "layers.2"): tensor for name, tensor in second_layer().items()}

    with pytest.raises(MismatchError, match=r"layers\.2\.\S+ is outside layers\.\{1:L\}\S+ with L = 1"):
        convert_model(variant("eagle3", tensors=third), verifier=VERIFIER, output_path=tmp_path / "out")


def test_biases_without_an_output_bias_are_completed_with_zeros_that_change_nothing(
    variant: Copy, tmp_path: Path
) -> None:
    sizes = (("q", 128), ("k", 64), ("v", 64))
    biases = {f"midlayer.self_attn.{name}_proj.bias": torch.randn(size).half() for name, size in sizes}

    result = convert_model(variant("eagle3", tensors=biases), verifier=VERIFIER, output_path=tmp_path / "out")

    completed = read_tensors(tmp_path / "out")["layers.0.self_attn.o_proj.bias"]
    assert torch.equal(completed, torch.zeros(128, dtype=torch.float16))
    assert result.completed["layers.0.self_attn.o_proj.bias"].startswith("zeros")
    assert config_of(tmp_path / "out")["transformer_layer_config"]["attention_bias"] is True


def test_a_draft_narrower_than_its_verifier_needs_its_own_embeddings(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3")
    config = json.loads((VERIFIER / "config.json").read_text()) | {"hidden_size": 192}
    (tmp_path / "verifier").mkdir()
    (tmp_path / "verifier" / "config.json").write_text(json.dumps(config))

    with pytest.raises(MismatchError, match=r"missing: embed_tokens\.weight .* cannot stand in"):
        convert_model(source, verifier=tmp_path / "verifier", output_path=tmp_path / "out")
