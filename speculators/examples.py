"""Write tiny checkpoints to try plugins on: a verifier, and what a plugin's `ConverterSpec.example` describes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators import output
from speculators.dtypes import FLOATS
from speculators.errors import PluginError
from speculators.sources import local_path
from speculators.table import Shared, evaluate_shape, fill
from speculators.verifier import Verifier

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from speculators.spec import ConverterSpec, Example

VERIFIER_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
"""The verifier for which examples are made: a Llama that runs in milliseconds."""


def write_verifier(folder: Path) -> Path:
    """Write a Llama of `VERIFIER_CONFIG` with random weights, always the same, and return its folder."""
    sizes = VERIFIER_CONFIG
    hidden, inner, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(sizes["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes |= {
        "model.embed_tokens.weight": (sizes["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (sizes["vocab_size"], hidden),
    }
    return _write(folder, sizes, {name: _random(name, shape) for name, shape in shapes.items()}, "model.safetensors")


def write_example(spec: ConverterSpec, folder: Path) -> tuple[Path, Path, Example]:
    """Write a plugin's example and its verifier below ``folder``.

    Returns:
        The folders of the draft and of the verifier, and what the plugin said about the draft.

    Raises:
        PluginError: The plugin brings no example, or one that its own table does not describe.
    """
    base = write_verifier(folder / "verifier")
    example = spec.example(Verifier(base))
    if example is None:
        raise PluginError(f"the plugin of {spec.name!r} brings no example: its ConverterSpec does not define example()")
    return _write(folder / "draft", example.config, _tensors(spec, example), example.file), base, example


def place_example(spec: ConverterSpec, output_path: str | Path) -> tuple[Path, Path]:
    """Write a plugin's example for users, whole or not at all; return the folders of draft and verifier.

    Raises:
        OutputError: Something stands there already, or it cannot be written.
        PluginError: The plugin brings no example, or one that its own table does not describe.
    """
    target = local_path(output_path)
    output.check_vacant(target)
    with output.staged(target) as folder, output.writing(target):
        draft, verifier, _ = write_example(spec, folder)
    return target / draft.name, target / verifier.name


def _tensors(spec: ConverterSpec, example: Example) -> dict[str, NDArray[Any]]:
    """Make the tensors that the table asks for, unless the example brings them."""
    tensors: dict[str, NDArray[Any]] = {}
    for row in spec.table.moving:
        if isinstance(row, Shared) or (row.part and row.part not in example.parts):
            continue
        try:
            names = [fill(row.name, numbers) for numbers in row.expansions(example.dims)]
            shape = evaluate_shape(row.shape, example.dims)
        except KeyError as error:
            raise PluginError(
                f"the example of {spec.name!r} gives no size to {error}, which {row.source} has"
            ) from error
        for name in names:
            if name in example.tensors:
                continue
            if row.dtypes != FLOATS:
                raise PluginError(f"the example of {spec.name!r} lacks {name}, which holds {' or '.join(row.dtypes)}")
            tensors[name] = _random(name, shape)
    return tensors | dict(example.tensors)


def _random(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Make weights as they are after some training: norms near one, biases small, matrices that keep sizes."""
    import numpy as np

    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    scaled = values / shape[-1] ** 0.5 if len(shape) > 1 else 0.1 * values + name.endswith("norm.weight")
    made: NDArray[Any] = scaled.astype(np.float32)
    return made


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], file: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if file.endswith(".safetensors"):
        from safetensors.numpy import save_file

        save_file(dict(tensors), folder / file, {"format": "pt"})
    else:
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / file)
    return folder
