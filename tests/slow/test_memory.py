"""How much memory conversions take: none that grows with the draft, and one copy of it for validation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, VERIFIER, read_tensors, write_checkpoint

pytestmark = pytest.mark.slow

WIDTH, INNER, VOCABULARY = 2048, 8192, 4096

PROGRAM = """
import json, re, sys
from speculators import convert_model
convert_model(sys.argv[1], verifier=sys.argv[2], output_path=sys.argv[3], **json.loads(sys.argv[4]))
status = open("/proc/self/status").read()  # getrusage would answer with the peak of the parent if that is higher
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""


def peak(source: Path, verifier: Path, output: Path, **options: Any) -> int:
    """Convert in a process of its own and return its peak memory in bytes."""
    arguments = [sys.executable, "-c", PROGRAM, str(source), str(verifier), str(output), json.dumps(options)]
    return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()[-1])


def large_head(folder: Path, layout: str = "safetensors", strided: bool = False) -> tuple[Path, Path]:
    """Blow the trained EAGLE head up to about 84 million weights, with a verifier that is a config alone."""
    sizes = {
        "embed_tokens.weight": (VOCABULARY, WIDTH),
        "fc.weight": (WIDTH, 2 * WIDTH),
        "fc.bias": (WIDTH,),
        "layers.0.post_attention_layernorm.weight": (WIDTH,),
        **{f"layers.0.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")},
        "layers.0.mlp.down_proj.weight": (WIDTH, INNER),
        **{f"layers.0.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"},
    }
    assert sizes.keys() == read_tensors(DATA / "eagle1-fc-bias").keys()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in sizes.items()}
    if strided:
        tensors = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    shared = {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
    config = json.loads((DATA / "eagle1-fc-bias" / "config.json").read_text()) | shared | heads
    source = write_checkpoint(folder / "source", config | {"torch_dtype": "float32"}, tensors, layout)
    verifier = folder / "verifier"
    verifier.mkdir()
    base = json.loads((VERIFIER / "config.json").read_text()) | shared
    (verifier / "config.json").write_text(json.dumps(base))
    return source, verifier


def test_comparing_output_and_source_holds_one_of_them_at_a_time(tmp_path: Path) -> None:
    source, verifier = large_head(tmp_path)
    weights = (source / "model.safetensors").stat().st_size

    around = peak(DATA / "eagle1-fc-bias", VERIFIER, tmp_path / "small")
    total = peak(source, verifier, tmp_path / "large")

    assert weights > 300e6
    assert 0.5 * weights < total - around < 1.25 * weights


LARGEST = INNER * WIDTH * 4
"""Bytes of the largest tensors."""

CHECKED = 3 * (16 << 20)
"""What the comparison of checksums may hold: three times what it reads at once, which a small file does not fill."""


@pytest.mark.parametrize(
    ("layout", "strided", "options", "bound"),
    [
        pytest.param("safetensors", False, {}, 16e6, id="safetensors"),
        pytest.param("sharded-safetensors", False, {"max_shard_size": "50MB"}, 16e6, id="shards to shards"),
        pytest.param("safetensors", False, {"dtype": "bfloat16"}, 64e6, id="cast"),
        pytest.param("bin", False, {}, CHECKED, id="bin"),
        pytest.param("sharded-bin", False, {}, CHECKED, id="sharded bin"),
        pytest.param("bin", False, {"dtype": "bfloat16"}, 64e6 + CHECKED, id="bin, cast"),
        pytest.param("bin", True, {}, 2 * LARGEST + CHECKED, id="bin of strided tensors"),
    ],
)
def test_writing_takes_no_memory_that_grows_with_the_draft(
    layout: str, strided: bool, options: dict[str, Any], bound: float, tmp_path: Path
) -> None:
    source, verifier = large_head(tmp_path, layout, strided)
    small = write_checkpoint(
        tmp_path / "small",
        json.loads((DATA / "eagle1-fc-bias" / "config.json").read_text()),
        read_tensors(DATA / "eagle1-fc-bias"),
        layout,
    )
    weights = sum(file.stat().st_size for file in source.iterdir())

    around = peak(small, VERIFIER, tmp_path / "small-out", validate=False, **options)
    total = peak(source, verifier, tmp_path / "large-out", validate=False, **options)

    assert weights > 300e6
    assert total - around < bound
