"""Published checkpoints, rebuilt at 1/32 of their size: same names, config keys and layout.

`OUTCOMES` says for each record what a conversion must give. Sizes in configs and shapes are divided by
`SCALE`; counts of heads and layers are as published. Where a record leaves something open, the
case says what is assumed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, Tensors, read_tensors, write_checkpoint

from speculators import AlreadyConvertedError, MismatchError, SpeculatorsError, convert_model
from speculators.table import evaluate

RECORDS = {record["id"]: record for record in json.loads((DATA / "zoo.json").read_text())["records"]}
SCALE = 32
SCALED_KEYS = ("hidden_size", "intermediate_size", "vocab_size", "draft_vocab_size", "head_dim", "target_hidden_size")
SCALED_SYMBOLS = ("H", "TH", "I", "V", "DV", "head_dim")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}

LLAMA3 = {"H": 4096, "TH": 4096, "I": 14336, "V": 128256, "DV": 32000, "heads": 32, "kv_heads": 8, "head_dim": 128}
MINIMAL = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Case:
    """How to rebuild a record, and what its conversion must give.

    Attributes:
        like: Record whose config and sizes are taken first, as this one's are the same or unknown.
        config: Config keys in full size, over the record's.
        replace_config: Whether the record's own config is left out, as it is prose.
        dims: Sizes in full size, over the record's.
        absent: Patterns of tensors to leave out.
        extra: Tensors to add, with shapes in symbols.
        layout: Layout of the weights.
        options: Algorithm options to pass.
        verifier_layers: Decoder layers of the verifier.
        nested_verifier: Whether the verifier is multimodal, its text config nested.
        refused: What the message must match when the record is refused.
        error: The exception then.
        config_has: Config entries of the output, scaled sizes.
        layer_has: Entries of its ``transformer_layer_config``, scaled sizes.
        dropped: Source tensors that must be left out.
        notes: Patterns that the notes must match.
    """

    like: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    replace_config: bool = False
    dims: Mapping[str, int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    layout: str = "safetensors"
    options: Mapping[str, Any] = field(default_factory=dict)
    verifier_layers: int = 32
    nested_verifier: bool = False
    refused: str = ""
    error: type[SpeculatorsError] = MismatchError
    config_has: Mapping[str, Any] = field(default_factory=dict)
    layer_has: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def eagle(fusion_bias: bool, **more: Any) -> Case:
    """An EAGLE or HASS head whose embeddings are the verifier's."""
    expected = {"speculators_model_type": "eagle", "fusion_bias": fusion_bias, **more.pop("config_has", {})}
    more.setdefault("layout", "bin")
    return Case(config_has={"layernorms": False, **expected}, dropped=("embed_tokens.weight",), **more)


def eagle3(**more: Any) -> Case:
    """An EAGLE-3 head."""
    expected = {"speculators_model_type": "eagle3", "norm_before_residual": False, **more.pop("config_has", {})}
    return Case(config_has=expected, **more)


OUTCOMES: dict[str, list[Case]] = {
    "yuhuili/EAGLE-llama2-chat-7B": [eagle(True, config_has={"dtype": "float16"}, layer_has={"rope_theta": 10000.0})],
    "yuhuili/EAGLE-llama2-chat-13B": [eagle(True, layer_has={"rms_norm_eps": 1e-5})],
    "yuhuili/EAGLE-llama2-chat-70B": [eagle(True, verifier_layers=80, layer_has={"num_key_value_heads": 8})],
    "yuhuili/EAGLE-Vicuna-7B-v1.3": [
        eagle(True, layer_has={"num_key_value_heads": 32}),
        # The 33B sibling names its positions differently.
        eagle(
            True,
            config={"max_position_embeddings": None, "max_sequence_length": 4096},
            layer_has={"max_position_embeddings": 8192},
        ),
    ],
    "yuhuili/EAGLE-Vicuna-13B-v1.3": [eagle(True, layer_has={"num_key_value_heads": 40})],
    "yuhuili/EAGLE-LLaMA3-Instruct-8B": [
        eagle(False, layer_has={"rope_theta": 500000.0, "max_position_embeddings": 8192}),
        # EAGLE-mixtral: the layer is Llama's under another model_type.
        eagle(False, config={"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}),
    ],
    "yuhuili/EAGLE-LLaMA3-Instruct-70B": [eagle(False, layout="bin+safetensors", verifier_layers=80)],
    "yuhuili/EAGLE-LLaMA3.1-Instruct-8B": [eagle(False, layer_has={"rope_scaling": None, "rope_theta": 500000.0})],
    "yuhuili/EAGLE-Qwen2-7B-Instruct": [
        eagle(
            True,
            verifier_layers=28,
            layer_has={"model_type": "llama", "attention_bias": False, "qkv_bias": True, "num_key_value_heads": 28},
        )
    ],
    "lmsys/sglang-EAGLE-llama2-chat-70B (formerly lmzheng/...)": [
        eagle(True, like="yuhuili/EAGLE-llama2-chat-70B", verifier_layers=80)
    ],
    "leptonai/EAGLE-Llama-3.1-{8B,70B,405B}-Instruct": [
        eagle(True, like="yuhuili/EAGLE-LLaMA3.1-Instruct-8B", notes=("bias False, but fc.bias is there",)),
        eagle(False, like="yuhuili/EAGLE-LLaMA3.1-Instruct-8B", absent=(r"fc\.bias",)),
    ],
    "abhigoyal/EAGLE-LLaMA3-Instruct-8B-vllm (output of the community vLLM script)": [
        Case(
            like="yuhuili/EAGLE-LLaMA3-Instruct-8B",
            config={"nest_in_model": True, "model_type": "eagle", "eagle_fc_bias": True},
            extra={"fc.bias": "H", "lm_head.weight": "V, H"},
            config_has={"speculators_model_type": "eagle", "fusion_bias": True},
            layer_has={"rope_theta": 500000.0},
            dropped=("embed_tokens.weight", "lm_head.weight"),
        )
    ],
    "HArmonizedSS/HASS-LLaMA2-Chat-13B": [eagle(True), eagle(True, layout="safetensors")],
    "nm-testing/Eagle_Speculator_Llama_3_1_8B_TTT": [
        Case(
            like="yuhuili/EAGLE-LLaMA3.1-Instruct-8B",
            config_has={"speculators_model_type": "eagle", "layernorms": True, "fusion_bias": False},
            dropped=("embed_tokens.weight",),
        )
    ],
    "nm-testing/hass-llama3.1-8b-layernorms": [
        Case(
            like="yuhuili/EAGLE-LLaMA3.1-Instruct-8B",
            absent=(r"transformer.*",),
            error=AlreadyConvertedError,
            refused="in the speculators format already",
        )
    ],
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": [
        eagle3(
            layout="bin",
            config_has={"eagle_aux_hidden_state_layer_ids": None, "draft_vocab_size": 1000, "target_hidden_size": 128},
            layer_has={"rope_theta": 10000.0, "rope_scaling": None},
            notes=(r"inputs of layers \[2, 16, 29\]",),
        )
    ],
    "jamesliu1/sglang-EAGLE3-Llama-3.1-Instruct-8B": [eagle3(like="yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", layout="bin")],
    "yuhuili/EAGLE3-LLaMA3.3-Instruct-70B": [
        eagle3(  # the draft's width is not known; 6144 is narrower than the verifier's 8192
            replace_config=True,
            config={**MINIMAL, "target_hidden_size": 8192, "num_attention_heads": 48, "draft_vocab_size": 32000},
            dims={"H": 6144, "I": 16384, "DV": 32000, "heads": 48, "kv_heads": 8, "head_dim": 128},
            verifier_layers=80,
            config_has={"target_hidden_size": 256},
            layer_has={"hidden_size": 192},
        )
    ],
    "yuhuili/EAGLE3-Vicuna1.3-13B": [
        eagle3(
            replace_config=True,
            config={**MINIMAL, "num_hidden_layers": 40, "num_attention_heads": 40, "hidden_size": 5120},
            layout="bin",
            verifier_layers=40,
            config_has={"draft_vocab_size": 1000},
            layer_has={"num_hidden_layers": 1, "num_key_value_heads": 40},
            dropped=maps,
            notes=("num_hidden_layers 40",),
        )
        for maps in (("d2t", "t2d"),)
    ]
    + [
        eagle3(
            replace_config=True,
            config={**MINIMAL, "num_attention_heads": 40, "hidden_size": 5120},
            absent=("d2t", "t2d"),
            verifier_layers=40,
            config_has={"draft_vocab_size": 1000},
        )
    ],
    "yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B": [
        eagle3(
            like="yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
            config={"draft_vocab_size": None},
            config_has={"draft_vocab_size": 1000},
        )
    ],
    "SpecForge EAGLE-3 output (to_sglang and to_hf exporters)": [
        eagle3(
            like="yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
            absent=("embed_tokens.*",),
            config={"rope_theta": 1000000, "torch_dtype": "bfloat16", "rope_scaling": None},
            layer_has={"rope_theta": 1000000},
        ),
        eagle3(
            like="yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
            layout="sharded-safetensors",
            dropped=("embed_tokens.weight",),
            config={
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 40.0,
                    "original_max_position_embeddings": 4096,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 0.707,
                    "mscale_all_dim": 0.707,
                }
            },
            layer_has={
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 40.0,
                    "original_max_position_embeddings": 4096,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 0.707,
                    "mscale_all_dim": 0.707,
                }
            },
        ),
        eagle3(  # full draft vocabulary with maps, both RoPE spellings, ids in eagle_config
            like="yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
            dims={"DV": 128256},
            config={
                "draft_vocab_size": 128256,
                "rope_theta": 500000.0,
                "rope_scaling": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
                "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28], "use_aux_hidden_state": True},
            },
            dropped=("d2t", "t2d", "embed_tokens.weight"),
            config_has={"draft_vocab_size": 4008, "eagle_aux_hidden_state_layer_ids": [1, 15, 28]},
            layer_has={"rope_theta": 500000.0},
        ),
        eagle3(  # a vision-language verifier's draft: sections of positions, text rotates as by default
            like="yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
            config={"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
            dropped=("embed_tokens.weight",),
            layer_has={
                "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 10000.0}
            },
        ),
    ],
    "SpecForge qwen3-30B-A3B-eagle3.1 / Dogacel specdrift / other EAGLE-3.1 drafts": [
        eagle3(verifier_layers=48, config_has={"fc_norm": True, "norm_output": True}, layer_has={"head_dim": 4}),
        eagle3(
            dims={"naux": 5},
            verifier_layers=48,
            config={"eagle_aux_hidden_state_layer_ids": [1, 12, 23, 34, 45]},
            config_has={"fc_norm": True, "eagle_aux_hidden_state_layer_ids": [1, 12, 23, 34, 45]},
            layer_has={"num_aux_hidden_states": 5},
        ),
        eagle3(dims={"naux": 5}, verifier_layers=48, refused="nothing says which layers"),
    ],
    "lmsys/sglang-EAGLE3-Llama-4-{Scout,Maverick}-*-Instruct-v1": [
        eagle3(
            replace_config=True,
            config=RECORDS["lmsys/sglang-EAGLE3-Llama-4-{Scout,Maverick}-*-Instruct-v1"]["config"]["scout template"],
            nested_verifier=True,
            verifier_layers=48,
            layer_has={"rope_theta": 10000.0, "vocab_size": 6314},
        )
    ],
    "lmsys/EAGLE3-gpt-oss-120b-bf16": [
        eagle3(
            verifier_layers=36,
            config_has={"eagle_aux_hidden_state_layer_ids": [1, 17, 33], "dtype": "bfloat16"},
            layer_has={"head_dim": 2, "hidden_size": 90, "num_attention_heads": 64},
        )
    ],
    "lmsys/Qwen3-235B-A22B-EAGLE3": [
        eagle3(
            dims={"head_dim": 64},
            verifier_layers=94,
            config_has={"eagle_aux_hidden_state_layer_ids": [1, 46, 90]},
            layer_has={"head_dim": 2},
        )
    ],
    "nvidia/gpt-oss-120b-Eagle3 (v3, long-context, short-context, throughput)": [
        eagle3(
            like="lmsys/EAGLE3-gpt-oss-120b-bf16",
            replace_config=True,
            config={"eagle_config": {"eagle_aux_hidden_state_layer_ids": [24, 30, 36], "norm_before_fc": True}},
            verifier_layers=36,
            config_has={"norm_before_fc": True, "eagle_aux_hidden_state_layer_ids": [24, 30, 36]},
        ),
        eagle3(
            like="lmsys/EAGLE3-gpt-oss-120b-bf16",
            replace_config=True,
            config={"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}, "draft_vocab_size": None},
            absent=("input_norm.*", "lm_head.*", "d2t"),
            verifier_layers=36,
            config_has={"norm_before_fc": False, "draft_vocab_size": 6284},
        ),
        eagle3(
            like="lmsys/EAGLE3-gpt-oss-120b-bf16",
            replace_config=True,
            config={"eagle_config": {"use_aux_hidden_state": False}},
            absent=("fc.*", "input_norm.*", ".*hidden_norm.*"),
            verifier_layers=36,
            refused="use_aux_hidden_state is false",
        ),
    ],
    "nvidia/Llama-3.3-70B-Instruct-Eagle3": [
        eagle3(  # its tensors were not seen; rebuilt as its exporter writes them
            like="ModelOpt EagleExporter output, llama decoder",
            replace_config=True,
            config={
                **MINIMAL,
                "num_attention_heads": 32,
                "rope_scaling": None,
                "eagle_config": {"use_aux_hidden_state": True},
            },
            dims=LLAMA3,
            **outcome,
        )
        for outcome in (
            {"refused": "eagle_config does not say which layers"},
            {
                "options": {"eagle_aux_hidden_state_layer_ids": [1, 16, 30]},
                "config_has": {"eagle_aux_hidden_state_layer_ids": [1, 16, 30]},
            },
        )
    ],
    "ModelOpt EagleExporter output, llama decoder": [
        eagle3(
            replace_config=True,
            config={
                **MINIMAL,
                "num_attention_heads": 32,
                "rope_scaling": {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 2048},
                "eagle_config": {"eagle_aux_hidden_state_layer_ids": [], "use_last_layernorm": True},
            },
            dims=LLAMA3,
            config_has={"eagle_aux_hidden_state_layer_ids": None},
            layer_has={
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "original_max_position_embeddings": 2048,
                    "rope_theta": 10000.0,
                }
            },
        ),
        eagle3(  # the base model's LM head copied in
            replace_config=True,
            config={**MINIMAL, "num_attention_heads": 32},
            dims={**LLAMA3, "DV": 128256},
            absent=("d2t",),
            config_has={"draft_vocab_size": 4008},
        ),
        eagle3(  # a second layer without the input norm that engines apply
            replace_config=True,
            config={**MINIMAL, "num_attention_heads": 32, "num_hidden_layers": 2},
            dims=LLAMA3,
            extra={
                "layers.1.self_attn.q_proj.weight": "heads*head_dim, H",
                "layers.1.self_attn.k_proj.weight": "kv_heads*head_dim, H",
                "layers.1.self_attn.v_proj.weight": "kv_heads*head_dim, H",
                "layers.1.self_attn.o_proj.weight": "H, heads*head_dim",
                "layers.1.mlp.gate_proj.weight": "I, H",
                "layers.1.mlp.up_proj.weight": "I, H",
                "layers.1.mlp.down_proj.weight": "H, I",
                "layers.1.post_attention_layernorm.weight": "H",
            },
            refused=r"missing: layers\.1\.input_layernorm\.weight",
        ),
        eagle3(
            replace_config=True,
            config={**MINIMAL, "num_attention_heads": 32},
            dims=LLAMA3,
            extra={"layers.0.mlp.up_proj.weight_scale": "I"},
            refused="quantised weights are not supported",
        ),
    ],
    "ModelOpt / lightseekorg / nvidia Kimi drafts (MLA), e.g. nvidia/Kimi-K2.6-Eagle3, lightseekorg/kimi-k2.5-eagle3-mla": [
        eagle3(
            dims={**LLAMA3, "q_rank": 48, "kv_rank": 16, "nope": 4, "rope": 2, "vdim": 4},
            absent=("norm/fc.*",),
            refused="an MLA draft",
        )
    ],
    "AngelSlim/Qwen3-{1.7B,4B,8B,14B,32B,a3B}_eagle3": [
        eagle3(
            replace_config=True,
            config={
                **RECORDS["AngelSlim/Qwen3-{1.7B,4B,8B,14B,32B,a3B}_eagle3"]["config"]["4B"],
                "architectures": ["LlamaForCausalLMEagle3"],
                "model_type": "qwen3",
                "head_dim": 80,
            },
            dims=RECORDS["AngelSlim/Qwen3-{1.7B,4B,8B,14B,32B,a3B}_eagle3"]["dims"]["4B"],
            options=options,
            verifier_layers=36,
            layer_has={"head_dim": 4, "tie_word_embeddings": False, "model_type": "llama", "rope_theta": theta},
            notes=("head_dim",),
        )
        for options, theta in (({}, 1000000), ({"rope_theta": 10000}, 10000))
    ],
    "Tengyunw/qwen3_8b_eagle3 and qwen3_30b_moe_eagle3": [
        eagle3(
            replace_config=True,
            config={**MINIMAL, "num_attention_heads": 32},
            dims={**LLAMA3, "V": 151936},
            layer_has={"rope_theta": 10000.0},
        )
    ],
    "zjxia/step-3.5-flash-eagle3-SpecForge-draft": [
        eagle3(
            verifier_layers=45,
            config_has={"eagle_aux_hidden_state_layer_ids": [4, 20, 40], "dtype": "bfloat16"},
            layer_has={"max_position_embeddings": 262144},
        )
    ],
    "nm-testing/Speculator-Qwen3-8B-Eagle3 and nm-testing/SpeculatorLlama3-1-8B-Eagle3 (Neural Magic research trainer)": [
        eagle3(
            replace_config=True,
            config=RECORDS[
                "nm-testing/Speculator-Qwen3-8B-Eagle3 and nm-testing/SpeculatorLlama3-1-8B-Eagle3 "
                "(Neural Magic research trainer)"
            ]["config"]["qwen trainer template"],
            dims={**LLAMA3, "I": 12288, "V": 151936},
            verifier_layers=36,
            options={"norm_before_residual": True},
            dropped=("embed_tokens.weight",),
            config_has={"norm_before_residual": True},
            layer_has={
                "eos_token_id": [151645],
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
        )
    ],
    "nm-testing/EAGLE3-LLaMA3.1-Instruct-8B-converted": [
        Case(like="yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", error=AlreadyConvertedError, refused="already")
    ],
    "RedHatAI/*-speculator.eagle3": [Case(dims=LLAMA3, error=AlreadyConvertedError, refused="already")],
    "TorchSpec exports before March 2026": [
        eagle3(
            replace_config=True,
            config={**MINIMAL, "num_attention_heads": 32, "own_embeddings": True},
            dims=LLAMA3,
            options=options,
            dropped=dropped,
            notes=notes,
        )
        for options, dropped, notes in (
            ({}, (), ("embed_tokens.weight differs from the verifier's",)),
            ({"use_verifier_embed_tokens": True}, ("embed_tokens.weight",), ()),
        )
    ],
    "amazon/gpt-oss-20b-p-eagle, gpt-oss-120b-p-eagle and the -long-context variants": [
        eagle3(
            like="lmsys/EAGLE3-gpt-oss-120b-bf16",
            absent=(r"layers\.\{1.*",),
            verifier_layers=36,
            refused="P-EAGLE",
        )
    ],
    "SpecForge P-EAGLE output / thyways/qwen3_8b_peagle_demo; RedHatAI/Qwen3-8B-speculator.peagle (speculators format)": [
        eagle3(
            dims={**LLAMA3, "I": 12288, "V": 151936},
            absent=(r"layers\.\{i.*",),
            verifier_layers=36,
            refused="P-EAGLE",
        )
    ],
}


def test_every_record_has_an_outcome() -> None:
    assert OUTCOMES.keys() == RECORDS.keys()


def scaled(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Divide the sizes among ``values``, also in nested blocks."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result[key] = scaled(value, keys)
        else:
            result[key] = value // SCALE if key in keys and isinstance(value, int) else value
    return result


def sizes(record: Mapping[str, Any], case: Case) -> dict[str, int]:
    """Collect what the symbols of a record's shapes stand for, in reduced size."""
    known: dict[str, Any] = {}
    for source in (RECORDS.get(case.like, {}).get("dims"), record.get("dims")):
        if isinstance(source, Mapping):
            known |= {key: value for key, value in source.items() if isinstance(value, int)}
    known |= case.dims
    known.setdefault("TH", known.get("H"))
    known.setdefault("naux", 3)
    known.setdefault("head_dim", 128)
    return scaled(known, SCALED_SYMBOLS)


def config_of(record: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """Build the native config in reduced size."""
    config: dict[str, Any] = dict(RECORDS[case.like]["config"]) if case.like and case.like in RECORDS else {}
    if isinstance(record["config"], Mapping) and not case.replace_config and "others" not in config:
        config |= {
            key: value for key, value in record["config"].items() if key not in ("others", "model", "eagle_fc_bias")
        }
    config |= case.config
    config.pop("own_embeddings", None)
    nested = config.pop("nest_in_model", False)
    config = {key: value for key, value in scaled(config, SCALED_KEYS).items() if value is not None}
    if nested:
        outer = {key: config.pop(key) for key in ("model_type", "eagle_fc_bias")}
        config = {**outer, "model": config}
    return config


def tensors_of(record: Mapping[str, Any], case: Case, dims: Mapping[str, int], embeddings: torch.Tensor) -> Tensors:
    """Build the record's tensors in reduced size; embeddings and LM-head copies are the verifier's."""
    listed = record["tensors"] if isinstance(record["tensors"], list) else []
    if not listed or not isinstance(listed[0], Mapping) or "everything" in listed[0]["name"]:
        listed = RECORDS[case.like]["tensors"]
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    rows = [
        (tensor["name"], ", ".join(map(str, tensor["shape"])).replace("3*", "naux*"), tensor["dtype"])
        for tensor in listed
        if isinstance(tensor["shape"], list)
    ]
    for name, shape, dtype in [*rows, *((name, shape, "unknown") for name, shape in case.extra.items())]:
        if any(re.fullmatch(pattern, name) for pattern in case.absent):
            continue
        extent = [
            evaluate(part.replace("(", "").replace(")", ""), dims) if "+" not in part else 8
            for part in shape.split(", ")
        ]
        kind = DTYPES.get(dtype, torch.bfloat16)
        for full in [name.format(i=number) for number in range(dims["naux"])] if "{i}" in name else [name]:
            spelled = full.replace("layers.0 or midlayer", "midlayer")
            tensors[spelled] = _values(spelled, extent, kind, dims, generator)
    if "embed_tokens.weight" in tensors and not case.config.get("own_embeddings") and dims["H"] == dims["TH"]:
        tensors["embed_tokens.weight"] = embeddings.to(tensors["embed_tokens.weight"].dtype)
    if "lm_head.weight" in case.extra:
        tensors["lm_head.weight"] = embeddings.to(tensors["lm_head.weight"].dtype)
    return tensors


def _values(
    name: str, extent: list[int], dtype: torch.dtype, dims: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    if name in ("d2t", "t2d"):
        full = dims["DV"] == dims["V"]
        chosen = torch.randperm(dims["V"], generator=torch.Generator().manual_seed(2))[: dims["DV"]]
        kept = torch.arange(dims["DV"]) if full else chosen.sort().values
        mask = torch.zeros(dims["V"], dtype=torch.bool)
        mask[kept] = True
        return mask if name == "t2d" else kept - torch.arange(dims["DV"])
    return (torch.randn(extent, generator=generator) * 0.05).to(dtype)


def write_verifier(folder: Path, case: Case, dims: Mapping[str, int]) -> torch.Tensor:
    """Write a verifier whose embeddings and LM head are one random table, and return it."""
    text = {
        "hidden_size": dims["TH"],
        "vocab_size": dims["V"],
        "num_hidden_layers": case.verifier_layers,
        "num_attention_heads": 32,
        "max_position_embeddings": 8192,
        "rope_theta": 123456.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 3.0},
        "tie_word_embeddings": True,
    }
    config = {"architectures": ["TheVerifierForCausalLM"], **({"text_config": text} if case.nested_verifier else text)}
    table = (torch.randn(dims["V"], dims["TH"], generator=torch.Generator().manual_seed(1)) * 0.05).half()
    name = "language_model.model.embed_tokens.weight" if case.nested_verifier else "model.embed_tokens.weight"
    write_checkpoint(folder, config, {name: table})
    return table


@pytest.mark.parametrize(
    ("record_id", "case"),
    [
        pytest.param(key, case, id=f"{key[:50]}-{number}")
        for key, cases in OUTCOMES.items()
        for number, case in enumerate(cases)
    ],
)
def test_record(record_id: str, case: Case, tmp_path: Path) -> None:
    record = RECORDS[record_id]
    dims = sizes(record, case)
    embeddings = write_verifier(tmp_path / "verifier", case, dims)
    tensors = tensors_of(record, case, dims, embeddings)
    layout = case.layout.removeprefix("bin+")
    source = write_checkpoint(tmp_path / "source", config_of(record, case), tensors, layout)
    if case.layout.startswith("bin+"):
        torch.save(tensors, source / "pytorch_model.bin")
    arguments: dict[str, Any] = {"verifier": tmp_path / "verifier", "output_path": tmp_path / "out", **case.options}

    if case.refused:
        with pytest.raises(case.error, match=case.refused):
            convert_model(source, **arguments)
        assert not (tmp_path / "out").exists()
        return
    result = convert_model(source, **arguments)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layer = config["transformer_layer_config"]
    assert {key: config[key] for key in case.config_has} == dict(case.config_has)
    assert {key: layer.get(key) for key in case.layer_has} == dict(case.layer_has)
    assert config["speculators_config"]["verifier"]["architectures"] == ["TheVerifierForCausalLM"]
    assert set(result.dropped) == set(case.dropped)
    for pattern in case.notes:
        assert any(re.search(pattern, note) for note in result.notes), result.notes
    output = read_tensors(tmp_path / "out")
    assert tensors.keys() == result.renamed.keys() | result.dropped.keys()
    for old, new in result.renamed.items():
        assert torch.equal(output.pop(new), tensors[old]), old
    assert output.keys() <= result.completed.keys()
    assert result.validation is not None
    assert result.validation.passed
