"""What strangers may write into JSON files, as changes to sound ones; for Hypothesis."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 64, 128, 2**31, 2**32, 2**48, 2**63 - 1, 2**63, 2**64, 10**9, 10**12, 10**30, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, 1e400, -1e400, float("nan"), True, False, None),
)
NAMES = (
    *(
        "",
        "x",
        "../x",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "a/b",
        "..",
        ".",
        "~",
        "con",
        "a\x00b",
        "a\nb\x1b[2J",
    ),
    *(
        "\ud800",
        "\udfff\ud800",
        "\u202enib.exe",
        "é" * 300,
        "x" * 5000,
        "０",
        "model.safetensors",
        "float32",
        "silu",
        "NaN",
    ),
    *("int8", "torch.float16", "default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "gelu"),
)
SCALING = [
    "rope_type",
    "type",
    "factor",
    "rope_theta",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "partial_rotary_factor",
    "truncate",
    "mrope_section",
]
KEYS = [
    "architectures",
    "attention_bias",
    "bias",
    "bos_token_id",
    "draft_vocab_size",
    "dtype",
    "eagle_aux_hidden_state_layer_ids",
    "eagle_config",
    "eos_token_id",
    "fc_norm",
    "fusion_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layernorms",
    "max_position_embeddings",
    "max_sequence_length",
    "mlp_bias",
    "model",
    "model_type",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "num_attention_heads",
    "num_aux_hidden_states",
    "num_hidden_layers",
    "num_key_value_heads",
    "output",
    "pad_token_id",
    "partial_rotary_factor",
    "qkv_bias",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "speculative_tokens",
    "speculators_config",
    "speculators_model_type",
    "target_hidden_size",
    "text_config",
    "tie_word_embeddings",
    "torch_dtype",
    "transformer_layer_config",
    "use_aux_hidden_state",
    "verifier",
    "vocab_size",
    "weight_map",
    "shape",
    "data_offsets",
    "__metadata__",
    "size",
    "sha256",
    "name_or_path",
]

SIMPLE = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(NAMES), st.integers(-3, 20))


def values() -> st.SearchStrategy[Any]:
    """Anything of any type, and blocks of rotary parameters."""
    blocks = st.dictionaries(st.sampled_from(SCALING), st.one_of(SIMPLE, st.lists(SIMPLE, max_size=4)), max_size=5)
    nested = st.one_of(st.lists(SIMPLE, max_size=4), st.dictionaries(st.sampled_from(KEYS), SIMPLE, max_size=4))
    return st.one_of(SIMPLE, SIMPLE, blocks, nested, st.just([[[[{}]]]]), st.lists(nested, max_size=2))


def places(content: Any) -> list[tuple[Any, Any]]:
    """List all objects and lists in a value, with each key or number of theirs."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            pairs += [(content, key), *places(content[key])]
    return pairs


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Draw what becomes of a JSON text: values, names or keys changed, or bytes of it damaged."""
    kinds = draw(st.lists(st.sampled_from(("value", "value", "value", "add", "remove", "rename")), max_size=3))
    steps = [
        (kind, draw(st.integers(0, 10**6)), draw(values()), draw(st.sampled_from((*KEYS, *NAMES)))) for kind in kinds
    ]
    raw = draw(st.sampled_from(("", "", "", "", "cut", "flip", "twice", "bom"))) if kinds else "flip"
    position, byte = draw(st.integers(0, 10**6)), draw(st.integers(0, 255))

    def change(data: bytes) -> bytes:
        content = json.loads(data)
        for kind, number, value, name in steps:
            found = places(content)
            holder, key = found[number % len(found)] if found else (content, "")
            if kind == "value":
                holder[key] = value
            elif kind == "remove":
                del holder[key]
            elif isinstance(holder, dict):
                holder[name] = holder.pop(key) if kind == "rename" and key in holder else value
            else:
                holder.append(value)
        text = json.dumps(content).encode()
        place = position % (len(text) + 1)
        return {
            "cut": text[:place],
            "flip": text[:place] + bytes([byte]) + text[place + 1 :],
            "twice": b'{"hidden_size": 3, ' + text[1:],
            "bom": b"\xef\xbb\xbf" + text,
        }.get(raw, text)

    return change
