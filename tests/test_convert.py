"""Whole conversions of trained checkpoints: real files in, real files out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, Copy, read_tensors, write_checkpoint
from safetensors import safe_open

from speculators import (
    AlgorithmError,
    AlreadyConvertedError,
    CheckpointError,
    MismatchError,
    OptionError,
    OutputError,
    ValidationError,
    convert_model,
    validate_model,
)

EAGLE_NAMES = {
    "fc.weight": "fusion_fc.weight",
    "fc.bias": "fusion_fc.bias",
    "layers.0.self_attn.q_proj.weight": "transformer.self_attn.q_proj.weight",
    "layers.0.self_attn.k_proj.weight": "transformer.self_attn.k_proj.weight",
    "layers.0.self_attn.v_proj.weight": "transformer.self_attn.v_proj.weight",
    "layers.0.self_attn.o_proj.weight": "transformer.self_attn.o_proj.weight",
    "layers.0.mlp.gate_proj.weight": "transformer.mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight": "transformer.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight": "transformer.mlp.down_proj.weight",
    "layers.0.post_attention_layernorm.weight": "transformer.post_attention_layernorm.weight",
    "embed_layernorm.weight": "embedding_layernorm.weight",
    "hidden_layernorm.weight": "hidden_layernorm.weight",
    "lm_head_layernorm.weight": "pre_lm_head_layernorm.weight",
}
EAGLE3_NAMES = {
    "fc.weight": "fc.weight",
    "midlayer.hidden_norm.weight": "layers.0.hidden_norm.weight",
    "midlayer.input_layernorm.weight": "layers.0.input_layernorm.weight",
    "midlayer.post_attention_layernorm.weight": "layers.0.post_attention_layernorm.weight",
    "midlayer.self_attn.q_proj.weight": "layers.0.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight": "layers.0.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight": "layers.0.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight": "layers.0.self_attn.o_proj.weight",
    "midlayer.mlp.gate_proj.weight": "layers.0.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight": "layers.0.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight": "layers.0.mlp.down_proj.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    "d2t": "d2t",
    "t2d": "t2d",
}
NAMED = [(name, algorithm) for name, found in TRAINED.items() for algorithm in {found, "auto"}]
NAMED += [(name, "hass" if found == "eagle" else "eagle") for name, found in TRAINED.items() if found != "eagle3"]


@pytest.mark.parametrize(("name", "algorithm"), NAMED)
def test_every_tensor_arrives_bit_for_bit_under_its_name(name: str, algorithm: str, tmp_path: Path) -> None:
    source = read_tensors(DATA / name)
    names = EAGLE3_NAMES if name == "eagle3" else EAGLE_NAMES
    expected = {names[old]: tensor for old, tensor in source.items() if old != "embed_tokens.weight"}

    result = convert_model(DATA / name, verifier=VERIFIER, algorithm=algorithm, output_path=tmp_path / "out")

    output = read_tensors(tmp_path / "out")
    assert output.keys() == expected.keys()
    for new, tensor in expected.items():
        assert output[new].dtype == tensor.dtype
        assert torch.equal(output[new].view(torch.uint8), tensor.view(torch.uint8)), new
    assert result.algorithm == (TRAINED[name] if algorithm == "auto" else algorithm)
    assert result.validation is not None
    assert result.validation.passed


@pytest.mark.parametrize("name", ["eagle1-fc-bias", "hass-fc-bias"])
def test_eagle_and_hass_convert_a_head_without_norms_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    for algorithm in ("eagle", "hass"):
        convert_model(DATA / name, verifier=VERIFIER, algorithm=algorithm, output_path=tmp_path / algorithm)

    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "eagle" / file).read_bytes() == (tmp_path / "hass" / file).read_bytes()


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy-bin", "sharded-safetensors", "sharded-bin"])
@pytest.mark.filterwarnings("ignore:.*before 1.6")
def test_the_layout_of_the_source_does_not_matter(name: str, layout: str, variant: Copy, tmp_path: Path) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "from-original")

    convert_model(variant(name, layout=layout), verifier=VERIFIER, output_path=tmp_path / "from-variant")

    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "from-original" / file).read_bytes() == (tmp_path / "from-variant" / file).read_bytes()


def test_the_output_is_four_files_that_others_can_read(tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out")

    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "native_config.json",
        "provenance.json",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_config_of_an_eagle3_head(tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out")

    text = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    layer = config.pop("transformer_layer_config")
    assert config == {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": 64,
        "dtype": "float16",
        "eagle_aux_hidden_state_layer_ids": None,
        "fc_norm": False,
        "norm_before_fc": False,
        "norm_before_residual": False,
        "norm_output": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": str(VERIFIER)},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "1.0.0",
        "target_hidden_size": 128,
    }
    assert layer == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": "float16",
        "eos_token_id": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 256,
    }


@pytest.mark.parametrize(
    ("name", "layernorms", "fusion_bias"),
    [("eagle1-fc-bias", False, True), ("eagle1-no-bias", False, False), ("hass-layernorms", True, False)],
)
def test_the_config_of_an_eagle_head_says_what_it_has(
    name: str, layernorms: bool, fusion_bias: bool, tmp_path: Path
) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle"
    assert config["speculators_config"]["algorithm"] == "eagle"
    assert (config["layernorms"], config["fusion_bias"]) == (layernorms, fusion_bias)


def test_the_result_says_what_was_renamed_dropped_and_completed(tmp_path: Path) -> None:
    result = convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=tmp_path / "out")

    assert result.output_path == tmp_path / "out"
    assert result.package == "speculators-eagle 1.0.0"
    assert result.renamed["fc.weight"] == "fusion_fc.weight"
    assert result.dropped == {"embed_tokens.weight": "equal to the verifier's embed_tokens"}
    assert result.completed == {
        "embed_tokens.weight": "the verifier's embed_tokens is used",
        "lm_head.weight": "the verifier's lm_head is used",
    }


def test_embeddings_that_differ_from_the_verifiers_are_kept_and_the_user_is_told(variant: Copy, tmp_path: Path) -> None:
    embeddings = read_tensors(DATA / "eagle1-no-bias")["embed_tokens.weight"].clone()
    embeddings[7, 3] += 1
    source = variant("eagle1-no-bias", tensors={"embed_tokens.weight": embeddings})

    result = convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")

    assert torch.equal(read_tensors(tmp_path / "out")["embed_tokens.weight"], embeddings)
    assert "embed_tokens.weight differs from the verifier's embed_tokens; it is kept" in result.notes


def test_embeddings_that_were_never_trained_can_be_replaced_by_the_verifiers(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", tensors={"embed_tokens.weight": torch.randn(256, 128).half()})

    result = convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", use_verifier_embed_tokens=True)

    assert "embed_tokens.weight" not in read_tensors(tmp_path / "out")
    assert result.dropped == {"embed_tokens.weight": "the verifier's embed_tokens was asked for"}


def test_a_verifier_of_config_alone_is_enough_and_nothing_is_dropped_unproven(tmp_path: Path) -> None:
    (tmp_path / "verifier").mkdir()
    (tmp_path / "verifier" / "config.json").write_text((VERIFIER / "config.json").read_text())

    result = convert_model(DATA / "eagle1-no-bias", verifier=tmp_path / "verifier", output_path=tmp_path / "out")

    assert "embed_tokens.weight" in read_tensors(tmp_path / "out")
    assert any("could not be compared" in note for note in result.notes)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_casts_as_torch_does_and_leaves_integers_alone(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    source = read_tensors(DATA / "eagle3")

    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", dtype=dtype)

    output = read_tensors(tmp_path / "out")
    assert torch.equal(output["fc.weight"], source["fc.weight"].to(expected))
    assert output["d2t"].dtype == torch.int64
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_a_value_that_overflows_the_asked_dtype_stops_the_conversion(variant: Copy, tmp_path: Path) -> None:
    source = variant("hass-layernorms", tensors={"fc.weight": torch.full((128, 256), 1e5)})

    with pytest.raises(CheckpointError, match=r"fc\.weight cannot be cast to float16"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", dtype="float16")

    assert not (tmp_path / "out").exists()


def test_speculative_tokens_reach_the_config(tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", speculative_tokens=5)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5


def test_findings_are_reported_together_and_nothing_is_written(variant: Copy, tmp_path: Path) -> None:
    source = variant(
        "eagle3",
        tensors={
            "midlayer.mlp.up_proj.weight": None,
            "norm.weight": torch.ones(64),
            "surprise.weight": torch.ones(2),
        },
    )

    with pytest.raises(MismatchError) as caught:
        convert_model(source, verifier=VERIFIER, algorithm="eagle3", output_path=tmp_path / "out")

    assert caught.value.findings == (
        "surprise.weight F32 [2]: matches no row of the table",
        "missing: midlayer.mlp.up_proj.weight [I, H] = [256, 128]",
        "norm.weight is F32 [64], expected [H] = [128]",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("name", TRAINED)
def test_each_missing_tensor_is_refused(name: str, variant: Copy, tmp_path: Path) -> None:
    optional = {"embed_tokens.weight", "fc.bias", "d2t", "t2d"}
    for number, tensor in enumerate(sorted(read_tensors(DATA / name).keys() - optional)):
        source = variant(name, tensors={tensor: None}, folder=f"source-{number}")

        with pytest.raises(MismatchError, match=tensor.replace(".", r"\.")):
            convert_model(source, verifier=VERIFIER, algorithm=TRAINED[name], output_path=tmp_path / "out")


@pytest.mark.parametrize("name", TRAINED)
def test_each_reshaped_tensor_is_refused(name: str, variant: Copy, tmp_path: Path) -> None:
    for number, (tensor, value) in enumerate(sorted(read_tensors(DATA / name).items())):
        source = variant(name, tensors={tensor: value[:-1].clone()}, folder=f"source-{number}")

        with pytest.raises(MismatchError):
            convert_model(source, verifier=VERIFIER, algorithm=TRAINED[name], output_path=tmp_path / "out")

        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"vocab_size": 300}, "vocabulary", id="vocabulary"),
        pytest.param({"hidden_size": 64}, "hidden size", id="hidden size"),
    ],
)
@pytest.mark.parametrize("name", ["eagle1-no-bias", "eagle3"])
def test_a_verifier_of_other_dimensions_is_refused(
    name: str, change: dict[str, int], message: str, tmp_path: Path
) -> None:
    config = json.loads((VERIFIER / "config.json").read_text()) | change
    (tmp_path / "verifier").mkdir()
    (tmp_path / "verifier" / "config.json").write_text(json.dumps(config))

    if name == "eagle3" and "hidden_size" in change:
        message = "embed_tokens"  # fc reads six states of 64 as well as three of 128; the embeddings do not fit
    with pytest.raises(MismatchError, match=message):
        convert_model(DATA / name, verifier=tmp_path / "verifier", output_path=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param("eagle1-no-bias", {"fusion_bias": True}, "holds none of the tensors", id="bias not there"),
        pytest.param("eagle1-fc-bias", {"fusion_bias": False}, r"holds fc\.bias", id="bias there"),
        pytest.param("eagle1-fc-bias", {"layernorms": True}, "holds none of the tensors", id="norms not there"),
        pytest.param("hass-layernorms", {"layernorms": False}, r"holds embed_layernorm\.weight", id="norms there"),
        pytest.param("eagle3", {"norm_before_fc": True}, "holds none of the tensors", id="norm not there"),
    ],
)
def test_an_option_that_contradicts_the_tensors_is_refused(
    name: str, options: dict[str, bool], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=message):
        convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", **options)


def test_an_option_that_agrees_with_the_tensors_is_accepted(tmp_path: Path) -> None:
    convert_model(
        DATA / "eagle1-fc-bias", verifier=VERIFIER, output_path=tmp_path / "out", fusion_bias=True, layernorms=False
    )


def test_a_misspelt_option_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"eagle3 has no option 'norm_befor_residual'.*norm_before_residual"):
        convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", norm_befor_residual=True)


def test_an_unknown_algorithm_lists_what_is_installed(tmp_path: Path) -> None:
    with pytest.raises(AlgorithmError, match="installed: eagle, eagle3, hass"):
        convert_model(DATA / "eagle3", verifier=VERIFIER, algorithm="eagle4", output_path=tmp_path / "out")


def test_auto_says_so_when_nothing_recognises_the_checkpoint(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", rename=lambda name: f"other.{name}".replace("midlayer", "block"))

    with pytest.raises(AlgorithmError, match="no installed algorithm recognises"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out")

    with pytest.raises(AlreadyConvertedError, match=r"in the speculators format already \(type 'eagle3'.*1\.0\.0"):
        convert_model(tmp_path / "out", verifier=VERIFIER, output_path=tmp_path / "again")


def test_an_existing_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()

    with pytest.raises(OutputError, match="pass --overwrite"):
        convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == before

    convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_readers_see_the_previous_output_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    seen: dict[str, int] = {}

    def look(task: str, done: int, total: int) -> None:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        seen[task] = seen.get(task, 0) + 1

    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=out, overwrite=True, progress=look)

    assert seen.keys() == {"writing", "validating"}
    assert seen["writing"] > 10
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []

    convert_model(
        DATA / "eagle1-no-bias",
        verifier=VERIFIER,
        output_path=tmp_path / "out",
        validate=False,
        progress=lambda *call: calls.append(call),
    )

    tensors = read_tensors(tmp_path / "out").values()
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    written = [call for call in calls if call[0] == "writing"]
    assert written[-1] == ("writing", total, total)
    assert [done for _, done, _ in written] == sorted({done for _, done, _ in written})
    shared = read_tensors(VERIFIER)["model.embed_tokens.weight"]
    compared = shared.numel() * 2  # the head is stored in bfloat16
    assert calls[0] == ("comparing embed_tokens", compared, compared)


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")

    with pytest.raises(OutputError, match=r"has chapter\.tex beside"):
        convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "thesis", overwrite=True)

    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_the_output_may_not_replace_its_source(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3")

    for target in (source, tmp_path):
        with pytest.raises(OutputError, match="would replace its own source"):
            convert_model(source, verifier=VERIFIER, output_path=target, overwrite=True)


def test_a_failed_validation_leaves_the_previous_output_in_place(variant: Copy, tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    poisoned = variant("eagle3", tensors={"norm.weight": torch.full((128,), float("nan")).half()})

    with pytest.raises(ValidationError, match="NaN"):
        convert_model(poisoned, verifier=VERIFIER, output_path=tmp_path / "out", overwrite=True)

    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_unknown_device_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the device 'cuba' cannot be used"):
        convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", validate_device="cuba")

    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", "4"),
        ("rope_theta", -1),
        ("rms_norm_eps", [1]),
        ("hidden_act", 3),
        ("max_position_embeddings", "512"),
        ("hidden_size", True),
        ("num_attention_heads", 0),
        ("norm_before_residual", "false"),
        ("draft_vocab_size", "64"),
        ("eagle_aux_hidden_state_layer_ids", "2,4,5"),
        ("rope_scaling", [1]),
    ],
)
def test_a_config_value_of_another_type_is_refused_by_name(
    key: str, value: object, variant: Copy, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json says .*{key}"):
        convert_model(variant("eagle3", config={key: value}), verifier=VERIFIER, output_path=tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "unheard-of", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear"}},
    ],
)
def test_a_rotary_scaling_that_cannot_be_is_refused_before_anything_is_written(
    change: dict[str, object], variant: Copy, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="rope_type"):
        convert_model(variant("eagle3", config=change), verifier=VERIFIER, output_path=tmp_path / "out", validate=False)


@pytest.mark.parametrize("change", [{"hidden_act": "unheard-of"}])
def test_a_config_from_which_no_draft_can_be_built_fails_validation(
    change: dict[str, object], variant: Copy, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="cannot be built from the written config"):
        convert_model(variant("eagle3", config=change), verifier=VERIFIER, output_path=tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 0), ("vocab_size", "256"), ("max_position_embeddings", "512"), ("architectures", "Llama")],
)
def test_a_verifier_config_of_another_type_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    config = json.loads((VERIFIER / "config.json").read_text()) | {key: value}
    (tmp_path / "verifier").mkdir()
    (tmp_path / "verifier" / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=rf"config\.json says {key}"):
        convert_model(DATA / "eagle3", verifier=tmp_path / "verifier", output_path=tmp_path / "out")


def test_a_shard_without_its_index_is_not_taken_for_the_whole(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle1-fc-bias", tensors={"fc.bias": None})
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")

    with pytest.raises(CheckpointError, match="is one shard of several, and their index is missing"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


def test_a_stray_weight_file_is_not_taken_for_the_conventional_one(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle1-fc-bias", layout="bin")
    (source / "notes.safetensors").write_bytes((DATA / "eagle1-no-bias" / "model.safetensors").read_bytes())

    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")

    assert "fusion_fc.bias" in read_tensors(tmp_path / "out")


def test_an_lm_head_that_cannot_be_read_is_said_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    tensors = read_tensors(VERIFIER)
    packed = {"lm_head.qweight": torch.zeros(4, dtype=torch.int32)}
    kept = {name: tensor for name, tensor in tensors.items() if name == "model.norm.weight"}
    config = json.loads((VERIFIER / "config.json").read_text())
    verifier = write_checkpoint(tmp_path / "verifier", config, packed | kept)

    result = convert_model(DATA / "eagle1-no-bias", verifier=verifier, output_path=tmp_path / "out")

    assert result.validation is not None
    assert [check.detail for check in result.validation.checks[1:]] == [
        "hidden states [1, 16, 128] finite and repeatable in bfloat16 on cpu; no logits, as no file holds the LM head",
        "hidden states are exactly what the source computes",
    ]


def test_a_pickle_whose_bytes_were_changed_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(DATA / "eagle1-fc-bias", tmp_path / "source")
    content = bytearray((source / "pytorch_model.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (source / "pytorch_model.bin").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"Bad CRC-32 for file '\w+/(data/\d+|data\.pkl)'"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


def test_validating_against_a_pickle_whose_bytes_were_changed_is_refused(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", layout="bin")
    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")
    path = source / "pytorch_model.bin"
    weight = read_tensors(source)["norm.weight"].numpy().tobytes()
    data = path.read_bytes()
    assert data.count(weight) == 1
    path.write_bytes(data.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))

    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is damaged: Bad CRC-32 for file '\w+/(data/\d+|data\.pkl)'"
    ):
        validate_model(tmp_path / "out", source=source)


def test_damage_explains_a_value_that_cannot_be_cast(variant: Copy, tmp_path: Path) -> None:
    weight = read_tensors(DATA / "eagle3")["norm.weight"].bfloat16()
    source = variant("eagle3", layout="bin", tensors={"norm.weight": weight})
    path = source / "pytorch_model.bin"
    stored = weight.view(torch.uint8).numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(stored, b"\x00\x7f" + stored[2:]))

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged: Bad CRC-32"):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", dtype="float16")


def test_damage_explains_what_it_brings_about(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", layout="bin")
    path = source / "pytorch_model.bin"
    offsets = read_tensors(source)["d2t"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(offsets, b"\x7f" + offsets[1:]))

    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is damaged: Bad CRC-32 for file '\w+/(data/\d+|data\.pkl)'"
    ):
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out")


def test_a_padded_table_of_the_verifier_is_read_up_to_its_vocabulary(tmp_path: Path) -> None:
    tensors = read_tensors(VERIFIER)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], torch.ones(64, 128)))
    config = json.loads((VERIFIER / "config.json").read_text())
    verifier = write_checkpoint(tmp_path / "verifier", config, tensors)

    result = convert_model(DATA / "eagle1-no-bias", verifier=verifier, output_path=tmp_path / "out")

    assert result.dropped == {"embed_tokens.weight": "equal to the verifier's embed_tokens"}
    assert result.validation is not None
    assert "logits [1, 16, 256]" in result.validation.checks[1].detail


def test_a_verifier_may_be_a_weight_file_with_its_config_beside_it(tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER / "model.safetensors", output_path=tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(VERIFIER)
