"""Checkpoints of every family, made up by Hypothesis, and what must be in their output, byte for byte.

What is expected is written down here, apart from the tables that it tests.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "BOOL": 1}
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
FLOATS = ("F32", "F16", "BF16", "F64")
LAYOUTS = ("safetensors", "sharded-safetensors", "bin", "sharded-bin", "legacy-bin")


@dataclass(frozen=True)
class Stored:
    """One tensor: dtype as safetensors names it, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def torch(self) -> torch.Tensor:
        """Return it as torch has it."""
        if not self.data:
            return torch.empty(self.shape, dtype=TORCH[self.dtype])
        return torch.frombuffer(bytearray(self.data), dtype=TORCH[self.dtype]).view(self.shape)


Tensors = dict[str, Stored]


@dataclass
class Generated:
    """A draft and its verifier, and what must come of them.

    Attributes:
        algorithm: The draft's family.
        config: The draft's config.
        tensors: Its tensors.
        expected: Name in the output → tensor.
        verifier_config: The verifier's config.
        verifier_tensors: Its tensors; a config alone where there are none.
        layout: In which files the draft lies.
        seed: Of the order in which tensors lie there.
    """

    algorithm: str
    config: dict[str, Any]
    tensors: Tensors
    expected: Tensors
    verifier_config: dict[str, Any]
    verifier_tensors: Tensors = field(default_factory=dict)
    layout: str = "safetensors"
    seed: int = 0

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write both, and return where."""
        draft, verifier = folder / "draft", folder / "verifier"
        write(draft, self.config, self.tensors, self.layout, self.seed)
        write(verifier, self.verifier_config, self.verifier_tensors)
        return draft, verifier


def safetensors(tensors: Mapping[str, Stored]) -> bytes:
    """Return a file with tensors in the order in which they come."""
    header, data = {}, b""
    for name, each in tensors.items():
        start, data = len(data), data + each.data
        header[name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, layout: str = "safetensors", seed: int = 0
) -> None:
    """Write a checkpoint whose tensors lie in any order."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if not tensors:
        return
    names = sorted(tensors)
    random.Random(seed).shuffle(names)
    count = 3 if layout.startswith("sharded") else 1
    stem, suffix = ("model", "safetensors") if layout.endswith("safetensors") else ("pytorch_model", "bin")
    weight_map = {}
    for number in range(count):
        shard = {name: tensors[name] for name in names[number::count]}
        path = folder / (f"{stem}-{number + 1:05}-of-{count:05}.{suffix}" if count > 1 else f"{stem}.{suffix}")
        if suffix == "safetensors":
            path.write_bytes(safetensors(shard))
        else:
            saved = {name: each.torch() for name, each in shard.items()}
            torch.save(saved, path, _use_new_zipfile_serialization=layout != "legacy-bin")
        weight_map |= dict.fromkeys(shard, path.name)
    if count > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


class _Maker:
    """Makes the tensors of one draft, and takes down what is expected of each."""

    def __init__(self, draw: st.DrawFn, prefixes: tuple[str, ...]) -> None:
        self.draw = draw
        self.seed = draw(st.integers(0, 2**32 - 1))
        self.random = random.Random(self.seed)
        self.prefix = draw(st.sampled_from(("", *prefixes)))
        self.dtypes = draw(st.lists(st.sampled_from(FLOATS), min_size=1, max_size=3))
        self.tensors: Tensors = {}
        self.expected: Tensors = {}

    def made(self, *shape: int, dtype: str = "") -> Stored:
        """Return random bytes, NaN, infinities and denormals among them."""
        dtype = dtype or self.random.choice(self.dtypes)
        size = SIZES[dtype]
        for dimension in shape:
            size *= dimension
        return Stored(dtype, shape, self.random.randbytes(size))

    def keep(self, name: str, target: str, *shape: int) -> None:
        """Make a tensor that is written as it is."""
        self.tensors[self.prefix + name] = self.expected[target] = self.made(*shape)

    def layer(self, source: str, target: str, sizes: Mapping[str, int], width: int, biases: frozenset[str]) -> None:
        """Make a decoder layer."""
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        queries = sizes["num_attention_heads"] * sizes["head_dim"]
        keys = sizes["num_key_value_heads"] * sizes["head_dim"]
        attention = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (hidden, queries)}
        for name, shape in attention.items():
            self.keep(f"{source}self_attn.{name}_proj.weight", f"{target}self_attn.{name}_proj.weight", *shape)
            if ("o" if name == "o" else "qkv") in biases:
                self.keep(f"{source}self_attn.{name}_proj.bias", f"{target}self_attn.{name}_proj.bias", shape[0])
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            self.keep(f"{source}mlp.{name}_proj.weight", f"{target}mlp.{name}_proj.weight", *shape)
            if "mlp" in biases:
                self.keep(f"{source}mlp.{name}_proj.bias", f"{target}mlp.{name}_proj.bias", shape[0])
        self.keep(f"{source}post_attention_layernorm.weight", f"{target}post_attention_layernorm.weight", hidden)

    def sizes(self) -> dict[str, int]:
        """Draw the sizes of the layers."""
        draw, kv_heads = self.draw, self.draw(st.integers(1, 2))
        return {
            "hidden_size": draw(st.integers(1, 8)),
            "intermediate_size": draw(st.integers(1, 8)),
            "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
            "num_key_value_heads": kv_heads,
            "head_dim": 2 * draw(st.integers(1, 3)),
        }

    def flag(self) -> bool:
        """Draw a truth value."""
        return self.draw(st.booleans())

    def finish(
        self, algorithm: str, config: dict[str, Any], verifier: dict[str, int], theirs: Mapping[str, Stored]
    ) -> Generated:
        """Return what was made."""
        if self.flag():
            self.tensors[f"{self.prefix}layers.0.self_attn.rotary_emb.inv_freq"] = self.made(2)
        layout = self.draw(st.sampled_from(LAYOUTS))
        base = {**verifier, "num_hidden_layers": 8, "architectures": ["LlamaForCausalLM"]}
        return Generated(algorithm, config, self.tensors, self.expected, base, dict(theirs), layout, self.seed)


@st.composite
def eagle(draw: st.DrawFn, algorithm: str = "eagle") -> Generated:
    """EAGLE, and HASS with its norms or without."""
    make = _Maker(draw, ("model.", "module.", "ea_layer.", "module.model."))
    sizes = make.sizes()
    hidden, vocabulary = sizes["hidden_size"], draw(st.integers(1, 9))
    biases = draw(st.sampled_from((frozenset[str](), frozenset({"qkv"}), frozenset({"qkv", "o"}), frozenset({"mlp"}))))
    make.keep("fc.weight", "fusion_fc.weight", hidden, 2 * hidden)
    if make.flag():
        make.keep("fc.bias", "fusion_fc.bias", hidden)
    if algorithm == "hass" and make.flag():
        make.keep("embed_layernorm.weight", "embedding_layernorm.weight", hidden)
        make.keep("hidden_layernorm.weight", "hidden_layernorm.weight", hidden)
        make.keep("lm_head_layernorm.weight", "pre_lm_head_layernorm.weight", hidden)
    make.layer("layers.0.", "transformer.", sizes, hidden, biases)
    theirs = _shared(make, vocabulary, hidden)
    head = theirs.get("lm_head.weight")
    if head is not None and make.flag():
        make.tensors[f"{make.prefix}lm_head.weight"] = head
    config = {**sizes, "vocab_size": vocabulary, "num_hidden_layers": 1, "torch_dtype": "float16"}
    return make.finish(algorithm, config, {"hidden_size": hidden, "vocab_size": vocabulary}, theirs)


def _shared(make: _Maker, vocabulary: int, hidden: int) -> Tensors:
    """Draw a verifier's tables, and the draft's own embeddings: none, others, or a copy."""
    theirs: Tensors = {}
    if make.flag():
        theirs["model.embed_tokens.weight"] = make.made(vocabulary, hidden)
        theirs["lm_head.weight"] = make.made(vocabulary, hidden)
    own = make.draw(st.sampled_from(("none", "own", "copy")))
    if own == "copy" and theirs:
        make.tensors[f"{make.prefix}embed_tokens.weight"] = theirs["model.embed_tokens.weight"]
    elif own == "own":
        make.keep("embed_tokens.weight", "embed_tokens.weight", vocabulary, hidden)
        theirs.pop("model.embed_tokens.weight", None)  # random bytes of one value might be equal
        theirs.pop("lm_head.weight", None)
    return theirs


@st.composite
def eagle3(draw: st.DrawFn) -> Generated:
    """EAGLE-3, with everything that its trainers add."""
    make = _Maker(draw, ("model.", "module.", "draft_model.", "ea_layer.", "module.model."))
    sizes = make.sizes()
    hidden, vocabulary = sizes["hidden_size"], draw(st.integers(2, 12))
    verifier_hidden = draw(st.sampled_from((hidden, 5)))
    states = draw(st.sampled_from((3, 1, 2)))
    layers = draw(st.integers(1, 3))
    biases = draw(st.sampled_from((frozenset[str](), frozenset({"qkv"}), frozenset({"qkv", "o"}), frozenset({"mlp"}))))
    make.keep("fc.weight", "fc.weight", hidden, states * verifier_hidden)
    norms = draw(st.sampled_from(("none", "fc_norm", "input_norm")))
    if norms == "input_norm":
        make.keep("input_norm.weight", "input_norm.weight", states * verifier_hidden)
    for number in range(states if norms == "fc_norm" else 0):
        make.keep(f"fc_norm.{number}.weight", f"fc_norm.{number}.weight", verifier_hidden)
    first = draw(st.sampled_from(("midlayer.", "layers.0.")))
    make.keep(f"{first}hidden_norm.weight", "layers.0.hidden_norm.weight", hidden)
    make.keep(f"{first}input_layernorm.weight", "layers.0.input_layernorm.weight", hidden)
    make.layer(first, "layers.0.", sizes, 2 * hidden, biases)
    for number in range(1, layers):
        make.keep(f"layers.{number}.input_layernorm.weight", f"layers.{number}.input_layernorm.weight", hidden)
        make.layer(f"layers.{number}.", f"layers.{number}.", sizes, hidden, biases)
    for number in range(layers if biases == {"qkv"} else 0):
        dtype = make.expected[f"layers.{number}.self_attn.q_proj.bias"].dtype
        zeros = Stored(dtype, (hidden,), bytes(hidden * SIZES[dtype]))
        make.expected[f"layers.{number}.self_attn.o_proj.bias"] = zeros
    make.keep("norm.weight", "norm.weight", hidden)
    size = draw(st.integers(1, vocabulary))
    make.keep("lm_head.weight", "lm_head.weight", size, hidden)
    _maps(make, size, vocabulary)
    theirs = _shared(make, vocabulary, hidden) if hidden == verifier_hidden else {}
    if hidden != verifier_hidden:
        make.keep("embed_tokens.weight", "embed_tokens.weight", vocabulary, hidden)
    config = {**sizes, "vocab_size": vocabulary, "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    if states != 3:
        config["eagle_aux_hidden_state_layer_ids"] = list(range(states))
    return make.finish("eagle3", config, {"hidden_size": verifier_hidden, "vocab_size": vocabulary}, theirs)


def _maps(make: _Maker, size: int, vocabulary: int) -> None:
    """Draw the maps between the vocabularies: both, one of them, and none or the identity where it is full."""
    marked = sorted(make.random.sample(range(vocabulary), size))
    offsets = struct.pack(f"<{size}q", *(token - position for position, token in enumerate(marked)))
    maps = {
        "d2t": Stored("I64", (size,), offsets),
        "t2d": Stored("BOOL", (vocabulary,), bytes(token in marked for token in range(vocabulary))),
    }
    if size == vocabulary:
        saved: tuple[str, ...] = make.draw(st.sampled_from(((), ("d2t", "t2d"))))
    else:
        make.expected |= maps
        # A map of zeros alone may as well have never been filled, which is refused.
        saved = make.draw(st.sampled_from((("d2t", "t2d"), ("t2d",), ("d2t",) if any(offsets) else ("t2d",))))
    make.tensors |= {make.prefix + name: maps[name] for name in saved}


def checkpoints() -> st.SearchStrategy[Generated]:
    """Checkpoints of all families."""
    return st.one_of(eagle(), eagle("hass"), eagle3())
