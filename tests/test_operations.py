"""Operations of a table, from the files that training code saves to the files that engines read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import VERIFIER, read_tensors, write_checkpoint
from installing import TOY, Install

from speculators import MismatchError, PluginError, convert_model

GATED = (
    TOY
    + """

class Gated(Toy):
    name = "gated"
    table = Table((
        Rename("toy.weight", "linear.weight", "H, 2*H"),
        speculators.Keep("gate.weight", "H, 2*H"),
        speculators.Split("fused.weight", ("linear.weight", "gate.weight")),
        speculators.Merge("upper.weight", "linear.weight", 0, "U, 2*H"),
        speculators.Merge("lower.weight", "linear.weight", 1, "W, 2*H"),
        speculators.Keep("scale", "H", derive=speculators.Derive("speculators_gated:ones", ("gate.weight",), "ones")),
    ))

    def examine(self, context):
        sizes = {name: info.shape[0] for name, info in context.source.tensors.items()}
        heights = {"U": sizes.get("upper.weight", 1), "W": sizes.get("lower.weight", 1)}
        return Facts({"H": context.verifier.hidden_size} | heights)

    def build(self, config):
        import torch

        class GatedDraft(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.state_size = config.transformer_layer_config.hidden_size
                self.linear = torch.nn.Linear(2 * self.state_size, self.state_size, bias=False)
                self.gate = torch.nn.Linear(2 * self.state_size, self.state_size, bias=False)
                self.scale = torch.nn.Parameter(torch.ones(self.state_size))

            def combine(self, states):
                return states

            def forward(self, embeddings, hidden, positions):
                both = torch.cat((embeddings, hidden), dim=-1)
                output = self.scale * self.linear(both) * self.gate(both).sigmoid()
                return output, output

        return GatedDraft()


def ones(source, names, shape):
    return "F32", [b"\\0\\0\\x80\\x3f" * (shape[0] // 2)] * 2


@hookimpl
def register_converter():
    return Gated
"""
)
"""The toy with a gate and a scale: three tensors, which come apart, fused, or in pieces."""

WIDTH = 128


def layouts() -> dict[str, dict[str, torch.Tensor]]:
    """Store one head in every way that its table knows."""
    generator = torch.Generator().manual_seed(0)
    linear, gate = (torch.randn(WIDTH, 2 * WIDTH, generator=generator) for _ in range(2))
    scale = torch.ones(WIDTH)
    return {
        "apart": {"toy.weight": linear, "gate.weight": gate, "scale": scale},
        "fused": {"fused.weight": torch.cat((linear, gate)), "scale": scale},
        "in pieces": {"upper.weight": linear[:40], "lower.weight": linear[40:], "gate.weight": gate, "scale": scale},
        "without what can be made": {"toy.weight": linear, "gate.weight": gate},
    }


@pytest.mark.parametrize("file", ["safetensors", "bin", "sharded-bin"])
@pytest.mark.parametrize("stored", ["fused", "in pieces", "without what can be made"])
def test_a_head_gives_the_same_output_however_it_is_stored(
    stored: str, file: str, install: Install, tmp_path: Path
) -> None:
    registry = install("gated", GATED)
    for name in ("apart", stored):
        tensors = {key: value.clone() for key, value in layouts()[name].items()}
        source = write_checkpoint(tmp_path / name, {}, tensors, "safetensors" if name == "apart" else file)
        result = convert_model(
            source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / f"{name}-out", registry=registry
        )
        assert result.validation is not None
        assert result.validation.passed

    one, other = (tmp_path / f"{name}-out" / "model.safetensors" for name in ("apart", stored))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ("apart", {}),
        ("fused", {"linear.weight": "a piece of fused.weight", "gate.weight": "a piece of fused.weight"}),
        ("in pieces", {"linear.weight": "joined from upper.weight, lower.weight"}),
        ("without what can be made", {"scale": "ones"}),
    ],
)
def test_the_user_is_told_what_was_cut_joined_and_made(
    stored: str, told: dict[str, str], install: Install, tmp_path: Path
) -> None:
    registry = install("gated", GATED)
    source = write_checkpoint(tmp_path / "in", {}, {key: value.clone() for key, value in layouts()[stored].items()})

    result = convert_model(
        source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / "out", validate=False, registry=registry
    )

    assert result.completed == told


def test_a_cast_reaches_what_was_cut_joined_and_made(install: Install, tmp_path: Path) -> None:
    registry = install("gated", GATED)
    expected = {
        "linear.weight": layouts()["apart"]["toy.weight"].bfloat16(),
        "gate.weight": layouts()["apart"]["gate.weight"].bfloat16(),
        "scale": torch.ones(WIDTH, dtype=torch.bfloat16),
    }
    for name, tensors in layouts().items():
        source = write_checkpoint(tmp_path / name, {}, {key: value.clone() for key, value in tensors.items()})
        out = tmp_path / f"{name}-out"
        convert_model(
            source,
            verifier=VERIFIER,
            algorithm="gated",
            output_path=out,
            dtype="bfloat16",
            validate=False,
            registry=registry,
        )

        found = read_tensors(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize(
    ("made", "message"),
    [
        pytest.param('"F32", [bytes(8)]', "8 bytes were made for 'scale', expected 512 of F32 [128]", id="too few"),
        pytest.param('"F32", [bytes(512), bytes(4)]', "516 bytes were made for 'scale'", id="too many"),
        pytest.param('"float32", [bytes(512)]', "'scale' was made as 'float32', which is no dtype", id="no dtype"),
    ],
)
def test_an_operation_that_makes_something_else_is_refused(
    made: str, message: str, install: Install, tmp_path: Path
) -> None:
    registry = install("gated", GATED + f"\n\ndef ones(source, names, shape):\n    return {made}\n")
    source = write_checkpoint(tmp_path / "in", {}, layouts()["without what can be made"])

    with pytest.raises(PluginError) as caught:
        convert_model(source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / "out", registry=registry)

    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "site"]


def test_a_fused_tensor_of_another_size_is_refused_before_anything_is_written(install: Install, tmp_path: Path) -> None:
    registry = install("gated", GATED)
    source = write_checkpoint(tmp_path / "in", {}, {"fused.weight": torch.ones(WIDTH, 2 * WIDTH)})

    with pytest.raises(MismatchError, match=r"fused\.weight is F32 \[128, 256\], expected \[256, 256\]"):
        convert_model(source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / "out", registry=registry)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "site"]
