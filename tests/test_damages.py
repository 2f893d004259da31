"""Every damage that was measured on the original code, and more, is caught, with a word about where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import DATA, VERIFIER, Copy
from damaged import AUX, SPECS, configured, dropped, layers_configured, registry, rope
from golden import acceptance

from speculators import ConverterSpec, ValidationError, convert_model
from speculators_eagle import Eagle
from speculators_eagle3 import Eagle3

FED, MADE, IDLE = "is fed something else", "makes something else of the same input", "does not run in the output"

FOUND = {
    "eagle1-fc-bias": {
        "fc_bias_dropped": f"fc (fusion_fc in the output) {MADE}",
        "unit_input_layernorm_added": f"q_proj (transformer.self_attn.q_proj in the output) {FED}",
        "token_ids_not_shifted": f"fc (fusion_fc in the output) {FED}",
        "gate_and_up_swapped": "after layers.0.mlp.up_proj (transformer.mlp.gate_proj in the output), which agrees",
        "activation": f"layers.0.mlp.down_proj (transformer.mlp.down_proj in the output) {FED}",
        "rope_base": f"rotary {MADE}",
    },
    "eagle1-no-bias": {
        "unit_input_layernorm_added": f"q_proj (transformer.self_attn.q_proj in the output) {FED}",
        "token_ids_not_shifted": f"fc (fusion_fc in the output) {FED}",
    },
    "hass-fc-bias": {
        "fc_bias_dropped": f"fc (fusion_fc in the output) {MADE}",
        "unit_input_layernorm_added": f"q_proj (transformer.self_attn.q_proj in the output) {FED}",
        "token_ids_not_shifted": f"fc (fusion_fc in the output) {FED}",
    },
    "hass-layernorms": {
        "all_three_layernorms_ignored": f"embed_layernorm {IDLE}",
        "lm_head_layernorm_ignored": f"lm_head_layernorm (pre_lm_head_layernorm in the output) {IDLE}",
        "embed_layernorm_ignored": f"embed_layernorm (embedding_layernorm in the output) {IDLE}",
        "hidden_layernorm_ignored": f"hidden_layernorm {IDLE}",
        "hidden_layernorm_after_fc": f"hidden_layernorm {FED}",
        "hidden_layernorm_used_as_decoder_input_layernorm": f"hidden_layernorm {FED}",
        "embed_layernorm_after_fc_and_hidden_layernorm_ignored": "embed_layernorm (embedding_layernorm in the output) "
        + FED,
        "unit_input_layernorm_added": f"q_proj (transformer.self_attn.q_proj in the output) {FED}",
        "token_ids_not_shifted": f"embed_layernorm (embedding_layernorm in the output) {FED}",
    },
    "eagle3": {
        "d2t_ignored": "structure: draft_vocab_size is 64, the verifier knows 256 tokens",
        "d2t_read_as_absolute_ids": "draft tokens stand for other tokens of the verifier than in the source",
        "final_norm_ignored": "computes (allowed 2e-03); all modules agree, so it arises after norm",
        "hidden_norm_and_input_layernorm_swapped": "midlayer.hidden_norm (layers.0.input_layernorm in the output) "
        + FED,
        "aux_states_taken_one_layer_late": "enter layers [3, 5, 6] of the verifier, its source those of [2, 4, 5]",
        "aux_states_in_reverse_order": "enter layers [5, 4, 2] of the verifier, its source those of [2, 4, 5]",
        "token_ids_not_shifted": f"midlayer.input_layernorm (layers.0.input_layernorm in the output) {FED}",
        "norm_before_residual": f"post_attention_layernorm (layers.0.post_attention_layernorm in the output) {FED}",
        "norm_output": "all modules agree, so it arises after norm",
        "norm_after_fusion": f"midlayer.hidden_norm (layers.0.hidden_norm in the output) {FED}",
        "rope_base": f"rotary {MADE}",
        "norm_epsilon": f"{MADE}",
    },
}
"""Checkpoint → damage → what the comparison with the source says about it."""


@pytest.mark.parametrize("name", FOUND)
def test_every_damage_in_the_goldens_is_in_the_table(name: str) -> None:
    measured = acceptance(name)["wrong"]

    assert set(measured) <= set(FOUND[name])


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in FOUND for damage in FOUND[name]])
def test_a_converter_with_one_mistake_is_caught(name: str, damage: str, tmp_path: Path) -> None:
    spec = SPECS[name][damage]

    with pytest.raises(ValidationError) as caught:
        convert_model(
            DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", registry=registry(spec), algorithm=spec.name
        )

    assert ("" if damage == "d2t_ignored" else "parity: ") in str(caught.value)
    assert FOUND[name][damage] in str(caught.value)
    assert not (tmp_path / "out").exists()


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Llama 3.1's, which changes low frequencies alone: neighbouring positions hardly show it."""


@pytest.mark.parametrize(
    ("config", "tensors", "spec", "message"),
    [
        pytest.param(
            {"rope_scaling": SCALING | {"original_max_position_embeddings": 8192}, "max_position_embeddings": 131072},
            {},
            layers_configured(Eagle3, lambda layer: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
            f"rotary {MADE}",
            id="rotary scaling lost",
        ),
        pytest.param(
            {"rope_theta": 1e6},
            {},
            layers_configured(Eagle3, rope(1e4)),
            f"rotary {MADE}",
            id="the base's default",
        ),
        pytest.param(
            {},
            {"embed_tokens.weight": torch.randn(256, 128, generator=torch.Generator().manual_seed(1)).half()},
            dropped(Eagle3, "embed_tokens.weight"),
            f"midlayer.input_layernorm (layers.0.input_layernorm in the output) {FED}",
            id="own embeddings lost",
        ),
        pytest.param(
            {AUX: [1, 3, 6]},
            {},
            configured(Eagle3, lambda config: {AUX: None}),
            "enter layers [2, 4, 5] of the verifier, its source those of [1, 3, 6]",
            id="layers forgotten",
        ),
        pytest.param(
            {},
            {
                f"midlayer.self_attn.{kind}_proj.bias": torch.full((64 * (2 if kind == "q" else 1),), 0.5).half()
                for kind in "qkv"
            },
            dropped(Eagle3, *(f"(midlayer|layers.0).self_attn.{kind}_proj.bias" for kind in "qkv")),
            f"midlayer.self_attn.q_proj (layers.0.self_attn.q_proj in the output) {MADE}",
            id="biases lost",
        ),
    ],
)
def test_what_only_some_checkpoints_have_is_not_lost(
    config: dict[str, object],
    tensors: dict[str, torch.Tensor],
    spec: type[ConverterSpec],
    message: str,
    variant: Copy,
    tmp_path: Path,
) -> None:
    source = variant("eagle3", config=config, tensors=tensors)
    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "right")

    with pytest.raises(ValidationError) as caught:
        convert_model(
            source, verifier=VERIFIER, output_path=tmp_path / "wrong", registry=registry(spec), algorithm="eagle3"
        )

    assert message in str(caught.value)


LONG = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize("name", ["eagle1-fc-bias", "eagle3"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5}, id="linear"),
        pytest.param({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64}, id="dynamic"),
        pytest.param({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 128}}, id="yarn"),
        pytest.param({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, id="yarn without positions"),
        pytest.param({"rope_scaling": SCALING | {"original_max_position_embeddings": 64}}, id="llama3"),
        pytest.param({"rope_scaling": {"type": "su"} | LONG, "original_max_position_embeddings": 64}, id="longrope"),
        pytest.param({"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}, id="mrope"),
        pytest.param({"partial_rotary_factor": 0.5}, id="partial"),
        pytest.param({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, id="new spelling"),
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 5e5}}, id="both"
        ),
    ],
)
def test_right_rotary_parameters_raise_no_alarm(
    name: str, config: dict[str, object], variant: Copy, tmp_path: Path
) -> None:
    result = convert_model(variant(name, config=config), verifier=VERIFIER, output_path=tmp_path / "out")

    assert result.validation is not None
    assert result.validation.checks[-1].detail == "hidden states and logits are exactly what the source computes"


def test_a_failed_comparison_leaves_what_stood_there(tmp_path: Path) -> None:
    convert_model(DATA / "eagle1-fc-bias", verifier=VERIFIER, output_path=tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    with pytest.raises(ValidationError):
        convert_model(
            DATA / "eagle1-fc-bias",
            verifier=VERIFIER,
            output_path=tmp_path / "out",
            overwrite=True,
            registry=registry(dropped(Eagle, "fc.bias")),
        )

    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
