"""Operations of a table, from the files that training code saves to the files that engines read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import VERIFIER, read_tensors, write_checkpoint
from installing import TOY, Install

from speculators import Checkpoint, MismatchError, PluginError, ValidationError, convert_model, export_model
from speculators.cli.convert import blocks
from speculators.cli.screen import plain
from speculators.operations import Cut
from speculators.weights import read

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
                self.state_size = config.target_hidden_size
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


@pytest.mark.parametrize("stored", ["apart", "fused", "in pieces", "without what can be made"])
def test_what_was_cut_or_joined_is_exported_as_it_was(stored: str, install: Install, tmp_path: Path) -> None:
    registry, tensors = install("gated", GATED), {name: each.clone() for name, each in layouts()[stored].items()}
    source = write_checkpoint(tmp_path / "in", {}, tensors)
    convert_model(
        source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / "out", validate=False, registry=registry
    )

    export_model(tmp_path / "out", output_path=tmp_path / "exported", registry=registry)

    exported = read_tensors(tmp_path / "exported")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("stored", "reworked", "completed", "printed"),
    [
        ("apart", {}, {}, ""),
        (
            "fused",
            {"fused.weight": ("linear.weight", "gate.weight")},
            {},
            "cut or joined:\n    fused.weight -> linear.weight, gate.weight\n",
        ),
        (
            "in pieces",
            {"upper.weight": ("linear.weight",), "lower.weight": ("linear.weight",)},
            {},
            "cut or joined:\n    lower.weight -> linear.weight\n    upper.weight -> linear.weight\n",
        ),
        ("without what can be made", {}, {"scale": "ones"}, "completed:\n    scale: ones\n"),
    ],
)
def test_the_user_is_told_what_became_of_every_tensor(
    stored: str,
    reworked: dict[str, tuple[str, ...]],
    completed: dict[str, str],
    printed: str,
    install: Install,
    tmp_path: Path,
) -> None:
    registry = install("gated", GATED)
    tensors = layouts()[stored]
    source = write_checkpoint(tmp_path / "in", {}, {key: value.clone() for key, value in tensors.items()})

    result = convert_model(
        source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / "out", validate=False, registry=registry
    )

    assert result.reworked == reworked
    assert result.completed == completed
    assert result.renamed.keys() | result.reworked.keys() | result.dropped.keys() == tensors.keys()
    assert printed in "\n".join(line for block in blocks(result) for line in plain(block))


def test_parity_finds_an_error_behind_a_module_that_training_code_fuses(install: Install, tmp_path: Path) -> None:
    registry = install("gated", GATED + ORIGINAL)
    source = write_checkpoint(tmp_path / "in", {}, {key: value.clone() for key, value in layouts()["fused"].items()})

    with pytest.raises(ValidationError, match="the draft as a whole makes something else of the same input"):
        convert_model(source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / "out", registry=registry)


ORIGINAL = """

class Fused(Gated):
    def original(self, context, facts):
        import torch

        class Native(torch.nn.Module):
            state_size = context.verifier.hidden_size

            def __init__(self):
                super().__init__()
                self.fused = torch.nn.Linear(2 * self.state_size, 2 * self.state_size, bias=False)
                self.scale = torch.nn.Parameter(torch.ones(self.state_size))

            def combine(self, states):
                return states

            def forward(self, embeddings, hidden, positions):
                linear, gate = self.fused(torch.cat((embeddings, hidden), dim=-1)).chunk(2, dim=-1)
                output = self.scale * linear * gate.sigmoid() + 1
                return output, output

        names = {"fused.weight": "fused.weight", "scale": "scale"}
        return speculators.Original(Native(), names, self.state_layers(None, context.verifier.num_layers))


@hookimpl
def register_converter():
    return Fused
"""
"""The training code of the fused head, which adds one at the end."""


@pytest.mark.parametrize("stored", ["whole", "made"])
def test_a_head_and_a_map_that_are_made_from_other_tensors_are_compared(
    stored: str, install: Install, tmp_path: Path
) -> None:
    registry = install("headed", HEADED)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "toy.weight": torch.randn(WIDTH, 2 * WIDTH, generator=generator),
        "lm_head.weight": torch.randn(40, WIDTH, generator=generator),
        "d2t": torch.arange(40) * 2,
    }
    if stored == "made":
        head = tensors.pop("lm_head.weight")
        tensors |= {
            "upper": head[:24].clone(),
            "lower": head[24:].clone(),
            "ids": tensors.pop("d2t") + torch.arange(40),
        }
    source = write_checkpoint(tmp_path / "in", {}, tensors)

    result = convert_model(
        source, verifier=VERIFIER, algorithm="headed", output_path=tmp_path / "out", registry=registry
    )

    assert result.validation is not None
    assert result.validation.checks[-1].detail == "hidden states and logits are exactly what the source computes"


HEADED = (
    TOY
    + """

MADE = speculators.Derive("speculators_headed:offsets", ("ids",), "made from ids")


class Headed(Toy):
    name = "headed"
    draft_to_target = "d2t"
    buffers = ("d2t", "ids")
    table = Table((
        Rename("toy.weight", "linear.weight", "H, 2*H"),
        speculators.Keep("lm_head.weight", "DV, H"),
        speculators.Merge("upper", "lm_head.weight", 0, "U, H"),
        speculators.Merge("lower", "lm_head.weight", 1, "W, H"),
        speculators.Keep("d2t", "DV", dtypes=("I64",), derive=MADE),
        speculators.Keep("ids", "DV", dtypes=("I64",), part="ids"),
    ))

    def examine(self, context):
        parts = frozenset(["ids"]) if context.matching.present("ids") else frozenset()
        return Facts({"H": context.verifier.hidden_size, "DV": 40, "U": 24, "W": 16}, parts)

    def configure(self, context, facts):
        config, notes = super().configure(context, facts)
        return config.model_copy(update={"draft_vocab_size": 40, "with_ids": "ids" in facts.parts}), notes

    def dims(self, config):
        return {"H": config.target_hidden_size, "DV": 40}

    def parts(self, config):
        return frozenset(["ids"]) if config.with_ids else frozenset()


def offsets(source, names, shape):
    import numpy as np

    ids = source.array(names[0])
    return "I64", [(ids - np.arange(len(ids))).tobytes()]


@hookimpl
def register_converter():
    return Headed
"""
)
"""The toy with a draft vocabulary; LM head and map may come in other shapes."""


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
        pytest.param('"F32", [bytes(8)]', "made 8 bytes for 'scale', expected 512 of F32 [128]", id="too few"),
        pytest.param('"F32", [bytes(512), bytes(4)]', "made 516 bytes for 'scale'", id="too many"),
        pytest.param('"F32", [bytes(6)] * 2', "made 6 bytes, which are no whole elements of F32", id="odd chunks"),
        pytest.param('"float32", [bytes(512)]', "made 'scale' as 'float32', expected F64 or F32", id="no dtype"),
        pytest.param('"I32", [bytes(512)]', "made 'scale' as 'I32', expected F64 or F32", id="another dtype"),
        pytest.param('"F32", bytes(512)', "cannot make 'scale': TypeError", id="bytes instead of chunks"),
        pytest.param('"F32", ["text"]', "cannot make 'scale': TypeError", id="text"),
        pytest.param("None", "cannot make 'scale': TypeError", id="nothing"),
        pytest.param('"F32", map(open, ["nowhere"])', "cannot make 'scale': FileNotFoundError", id="misses a file"),
        pytest.param('"F32", (1 / 0 for _ in range(1))', "cannot make 'scale': ZeroDivisionError", id="fails late"),
    ],
)
def test_an_operation_that_makes_something_else_is_refused(
    made: str, message: str, install: Install, tmp_path: Path
) -> None:
    registry = install("gated", GATED + f"\n\ndef ones(source, names, shape):\n    return {made}\n")
    source = write_checkpoint(tmp_path / "in", {}, layouts()["without what can be made"])

    with pytest.raises(PluginError) as caught:
        convert_model(source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / "out", registry=registry)

    assert f"speculators_gated:ones {message}" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "site"]


def test_a_fused_tensor_of_another_size_is_refused_before_anything_is_written(install: Install, tmp_path: Path) -> None:
    registry = install("gated", GATED)
    source = write_checkpoint(tmp_path / "in", {}, {"fused.weight": torch.ones(WIDTH, 2 * WIDTH)})

    with pytest.raises(MismatchError, match=r"fused\.weight is F32 \[128, 256\], expected \[256, 256\]"):
        convert_model(source, verifier=VERIFIER, algorithm="gated", output_path=tmp_path / "out", registry=registry)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "site"]


def test_pieces_of_a_strided_tensor_are_laid_out_when_they_are_written(tmp_path: Path) -> None:
    strided = torch.arange(32.0).view(4, 8).T
    source = Checkpoint(write_checkpoint(tmp_path / "in", {}, {"a": strided}, "bin"))
    _ = source.tensors
    (file,) = vars(source)["_opened"].values()

    dtype, chunks = Cut(8)(source, ("a",), (4, 4))
    assert (dtype, vars(file)["_flat"]) == ("F32", None)
    data = b"".join(map(read, chunks))

    assert torch.frombuffer(bytearray(data), dtype=torch.float32).view(4, 4).equal(strided[2:6])
    assert vars(file)["_flat"] is not None
