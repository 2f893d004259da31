"""Make EAGLE-3 heads with random weights, of any size and in any layout.

Without ``--size`` a head has Llama-3.1-8B's shapes and its own token embeddings. Run by
``performance.py`` in a process of its own, as torch would weigh on what that measures.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KEY_WIDTH, HEAD_DIM = 4096, 14336, 1024, 128
VOCABULARY, DRAFT_VOCABULARY = 128256, 32000
"""Those of Llama-3.1-8B and its EAGLE-3 head."""


def shapes(hidden: int, layers: int, intermediate: int, embeddings: bool) -> dict[str, tuple[int, ...]]:
    """Name every floating tensor of a head."""
    found: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, 3 * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (DRAFT_VOCABULARY, hidden),
        "midlayer.hidden_norm.weight": (hidden,),
    }
    for number in range(layers):
        prefix, width = (f"layers.{number}.", hidden) if number else ("midlayer.", 2 * hidden)
        found |= {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{prefix}self_attn.{name}_proj.weight": (KEY_WIDTH, width) for name in "kv"}
        found[f"{prefix}self_attn.q_proj.weight"] = (hidden, width)
        found[f"{prefix}self_attn.o_proj.weight"] = (hidden, hidden)
        found |= {f"{prefix}mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (hidden, intermediate)
    if embeddings:
        found["embed_tokens.weight"] = (VOCABULARY, hidden)
    return found


def intermediate_for(size: int, hidden: int, layers: int) -> int:
    """Return the intermediate size that makes a head without embeddings about ``size`` bytes large."""
    rest = weight_bytes(hidden, layers, 0)
    found = (size - rest) // (2 * 3 * hidden * layers) // 64 * 64
    if found < 64:
        raise SystemExit(f"a head of {layers} layers with hidden size {hidden} has at least {rest} bytes, not {size}")
    return found


def weight_bytes(hidden: int, layers: int, intermediate: int) -> int:
    """Add up the floating tensors of a head without its token embeddings."""
    return sum(2 * math.prod(shape) for shape in shapes(hidden, layers, intermediate, embeddings=False).values())


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int, pickled: bool) -> None:
    """Write the weights in one file, or in shards with an index."""
    names = sorted(tensors)
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def main() -> None:
    """Write one head, and the config of its verifier into a folder ``verifier`` in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, help="bytes of a head without embeddings")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--bin", action="store_true", help="write pytorch_model.bin")
    arguments = parser.parse_args()

    hidden, layers = arguments.hidden, arguments.layers
    intermediate = intermediate_for(arguments.size, hidden, layers) if arguments.size else INTERMEDIATE
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes(hidden, layers, intermediate, embeddings=not arguments.size).items():
        mean, deviation = (1.0, 0.0) if "norm" in name else (0.0, 0.02)
        tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(mean, deviation, generator=generator)
    chosen = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    tensors["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, chosen, True)
    tensors["d2t"] = chosen - torch.arange(DRAFT_VOCABULARY)

    base = {
        "hidden_size": hidden,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": KEY_WIDTH // HEAD_DIM,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "model_type": "llama",
    }
    head = base | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "draft_vocab_size": DRAFT_VOCABULARY,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
    }
    verifier = base | {
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 32,
        "max_position_embeddings": 131072,
    }
    unfinished = arguments.folder.with_name(f"{arguments.folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "verifier").mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps(head))
    (unfinished / "verifier" / "config.json").write_text(json.dumps(verifier))
    save(unfinished, tensors, arguments.shards, arguments.bin)
    unfinished.rename(arguments.folder)


if __name__ == "__main__":
    main()
