"""Make EAGLE-3 heads with Llama-3.1-8B's shapes and random weights, of any size and in any layout.

Run by ``performance.py`` in a process of its own, as torch would weigh on what that measures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, KEY_WIDTH, VOCABULARY, DRAFT_VOCABULARY = 4096, 32, 1024, 128256, 32000
INTERMEDIATE = 14336


def shapes(layers: int, intermediate: int, embeddings: bool) -> dict[str, tuple[int, ...]]:
    """Name every floating tensor of a head."""
    found: dict[str, tuple[int, ...]] = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (DRAFT_VOCABULARY, HIDDEN),
        "midlayer.hidden_norm.weight": (HIDDEN,),
    }
    for number in range(layers):
        prefix, width = (f"layers.{number}.", HIDDEN) if number else ("midlayer.", 2 * HIDDEN)
        found |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{prefix}self_attn.{name}_proj.weight": (KEY_WIDTH, width) for name in "kv"}
        found[f"{prefix}self_attn.q_proj.weight"] = (HIDDEN, width)
        found[f"{prefix}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found |= {f"{prefix}mlp.{name}_proj.weight": (intermediate, HIDDEN) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, intermediate)
    if embeddings:
        found["embed_tokens.weight"] = (VOCABULARY, HIDDEN)
    return found


def intermediate_for(size: int, layers: int) -> int:
    """Return the intermediate size that makes a head without embeddings about ``size`` bytes large."""
    rest = sum(2 * torch.Size(shape).numel() for shape in shapes(layers, 0, embeddings=False).values())
    return max(256, (size - rest) // (2 * 3 * HIDDEN * layers) // 256 * 256)


def main() -> None:
    """Write one head, and the config of its verifier beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, help="bytes; of a real head with its embeddings by default")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--bin", action="store_true", help="write pytorch_model.bin")
    arguments = parser.parse_args()

    layers = arguments.layers
    intermediate = intermediate_for(arguments.size, layers) if arguments.size else INTERMEDIATE
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes(layers, intermediate, embeddings=arguments.size is None).items():
        scale = 0.0 if "norm" in name else 0.02
        tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(
            1.0 if not scale else 0.0, scale, generator=generator
        )
    chosen = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    tensors["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, chosen, True)
    tensors["d2t"] = chosen - torch.arange(DRAFT_VOCABULARY)

    arguments.folder.mkdir(parents=True)
    base = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_WIDTH * HEADS // HIDDEN,
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
    (arguments.folder / "config.json").write_text(json.dumps(head))
    verifier = arguments.folder / "verifier"
    verifier.mkdir()
    whole = base | {"architectures": ["LlamaForCausalLM"], "intermediate_size": INTERMEDIATE, "num_hidden_layers": 32}
    (verifier / "config.json").write_text(json.dumps(whole | {"max_position_embeddings": 131072}))

    if arguments.bin:
        torch.save(tensors, arguments.folder / "pytorch_model.bin")
    elif arguments.shards == 1:
        save_file(tensors, arguments.folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for number in range(arguments.shards):
            part = {name: tensors[name] for name in sorted(tensors)[number :: arguments.shards]}
            file = f"model-{number + 1:05}-of-{arguments.shards:05}.safetensors"
            save_file(part, arguments.folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (arguments.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    main()
