"""What is converted is read by others: speculators 0.9.0 loads it, vLLM 0.32 parses it.

Both run in environments of their own, which .ci/run makes (see tests/compat); their interpreters are
named by ``SPECULATORS_09_PYTHON`` and ``VLLM_PYTHON``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from checkpoints import VERIFIER, Copy

from speculators import convert_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0}
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

pytestmark = pytest.mark.slow


def ask(variable: str, script: str, folders: list[Path]) -> list[dict[str, Any]]:
    """Run a script of tests/compat on converted folders and return what it printed."""
    result = engines.run(variable, engines.COMPAT / script, *folders)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def converted(variant: Copy, tmp_path: Path) -> dict[str, Path]:
    """EAGLE-3 heads with every option that reaches an engine."""
    sizes = (("q", 128), ("k", 64), ("v", 64))
    sources: dict[str, Any] = {
        "plain": {},
        "yarn": {"config": {"rope_scaling": YARN, "rope_theta": 50000.0}},
        "linear": {"config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
        "flags": {"config": {"norm_before_residual": True, "norm_output": True, LAYER_IDS: [1, 3, 6]}},
        "norm_before_fc": {"tensors": {"input_norm.weight": torch.ones(384).half()}},
        "fc_norm": {"tensors": {f"fc_norm.{i}.weight": torch.ones(128).half() for i in range(3)}},
        "biases": {
            "tensors": {f"midlayer.self_attn.{name}_proj.bias": torch.ones(size).half() for name, size in sizes}
        },
        "full": {
            "tensors": {"lm_head.weight": torch.ones(256, 128).half(), "d2t": None, "t2d": None},
            "config": {"draft_vocab_size": 256},
        },
        "verifier's head": {
            "tensors": dict.fromkeys(["lm_head.weight", "d2t", "t2d"]),
            "config": {"draft_vocab_size": 256},
        },
    }
    for name, changes in sources.items():
        source = variant("eagle3", folder=f"{name}-source", **changes)
        convert_model(source, verifier=VERIFIER, output_path=tmp_path / name)
    own = tmp_path / "self-contained"
    convert_model(tmp_path / "plain-source", verifier=VERIFIER, output_path=own, self_contained=True)
    return {name: tmp_path / name for name in (*sources, own.name)}


def test_speculators_0_9_finds_nothing_missing_and_nothing_unexpected(converted: dict[str, Path]) -> None:
    reports = ask("SPECULATORS_09_PYTHON", "load_with_speculators.py", list(converted.values()))

    assert len(reports) == len(converted)
    for name, report in zip(converted, reports, strict=True):
        missing = ["lm_head.weight"] if name == "verifier's head" else []
        assert (report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"]) == (missing, [], []), name
    scaling = dict(zip(converted, reports, strict=True))["yarn"]["rope_parameters"]
    assert scaling == {**YARN, "rope_theta": 50000.0}


def test_vllm_sees_every_flag(converted: dict[str, Path]) -> None:
    parsed = ask("VLLM_PYTHON", "parse_with_vllm.py", list(converted.values()))

    seen = {name: answer["config"] for name, answer in zip(converted, parsed, strict=True)}
    assert {answer["verifier"] for answer in parsed} == {str(VERIFIER)}
    assert parsed[0]["speculative"] == {
        "method": "eagle3",
        "num_speculative_tokens": 3,
        "model": str(converted["plain"]),
    }
    assert seen["plain"]["architectures"] == ["Eagle3LlamaForCausalLM"]
    assert seen["plain"]["norm_before_residual"] is False
    assert seen["plain"]["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert seen["plain"]["draft_vocab_size"] == 64
    assert seen["flags"]["norm_before_residual"] is True
    assert seen["flags"]["norm_output"] is True
    assert seen["flags"][LAYER_IDS] == [1, 3, 6]
    assert seen["norm_before_fc"]["norm_before_fc"] is True
    assert seen["fc_norm"]["fc_norm"] is True
    assert seen["yarn"]["rope_parameters"] == {**YARN, "rope_theta": 50000.0}
    assert seen["linear"]["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert seen["biases"]["attention_bias"] is True
