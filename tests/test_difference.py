"""Comparing checkpoints: what is equal, what differs and by how much, and what a table explains."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, Copy, Tensors, read_tensors, write_checkpoint
from click.testing import CliRunner, Result
from loopback import Server
from safetensors.torch import save_file
from test_startup import modules_after

from speculators import (
    Checkpoint,
    Derive,
    Difference,
    Drop,
    Keep,
    Merge,
    Registry,
    Rename,
    Shared,
    Split,
    Table,
    convert_model,
    diff_models,
)
from speculators.cli import cli
from speculators.comparing import Numbers, measure, same_bytes, stored
from speculators.difference import TensorDifference, leaves
from speculators.errors import AlgorithmError, CheckpointError
from speculators.pairing import Couple, Shelf, Standard, of_conversion, of_natives


def converted(name: str | Path, out: Path, **more: Any) -> Path:
    source = DATA / name
    return convert_model(source, verifier=VERIFIER, output_path=out, validate=False, **more).output_path


def changed(folder: Path, to: Path, **tensors: torch.Tensor) -> Path:
    """Copy an output with other tensors."""
    shutil.copytree(folder, to)
    save_file(read_tensors(folder) | tensors, to / "model.safetensors")
    return to


def configured(folder: Path, **changes: Any) -> Path:
    """Change the layers' config of an output."""
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def differing(found: Difference) -> dict[tuple[str, ...], TensorDifference]:
    return {each.a or each.b: each for each in found.tensors if not each.equal}


def diff(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["diff", *map(str, arguments)])


@pytest.mark.parametrize("name", TRAINED)
def test_every_conversion_is_equal_to_its_source(name: str, tmp_path: Path) -> None:
    out = converted(name, tmp_path / "out")
    names = read_tensors(DATA / name).keys()

    forth, back, with_verifier = (
        diff_models(DATA / name, out),
        diff_models(out, DATA / name),
        diff_models(DATA / name, out, verifier=VERIFIER),
    )

    for found in (forth, back, with_verifier):
        assert found.equal
        assert found.notes == ()
        assert found.config.same >= 14
    assert {source for each in forth.tensors for source in each.a} == names
    assert {(each.a, each.b) for each in forth.tensors} == {(each.b, each.a) for each in back.tensors}
    left = {each.a[0]: each.why for each in forth.tensors if each.explained}
    assert left == (
        {"embed_tokens.weight": "left to the verifier, not compared"} if "embed_tokens.weight" in names else {}
    )
    assert {each.why for each in with_verifier.tensors if each.explained} <= {
        "left to the verifier, whose embed_tokens is equal"
    }
    assert with_verifier.config.compared == "expected"


@pytest.mark.parametrize("layout", ["bin", "legacy-bin", "safetensors", "sharded-bin", "sharded-safetensors"])
@pytest.mark.filterwarnings("ignore:.*format of before 1.6")
def test_the_same_tensors_in_any_files_are_equal(layout: str, variant: Copy) -> None:
    found = diff_models(DATA / "eagle3", variant("eagle3", layout=layout))

    assert found.equal
    assert {each.state for each in found.tensors} == {"equal"}
    assert found.algorithms == ("eagle3", "eagle3")


def test_one_flipped_bit_is_found_in_source_and_output(tmp_path: Path) -> None:
    out = converted("eagle3", tmp_path / "out")
    flipped = read_tensors(out)["fc.weight"].clone()
    flipped.view(torch.int16)[3, 17] ^= 1
    other = changed(out, tmp_path / "other", **{"fc.weight": flipped})

    for source in (out, DATA / "eagle3"):
        ((names, each),) = differing(diff_models(source, other)).items()

        assert (names, each.b, each.state) == (("fc.weight",), ("fc.weight",), "bytes")
        assert each.numbers is not None
        assert (each.numbers.elements, each.numbers.differing, each.numbers.first) == (128 * 384, 1, (3, 17))
        assert 0 < each.numbers.largest < 1e-3
        assert each.numbers.relative == each.numbers.largest / each.numbers.scale


def test_a_cast_conversion_differs_by_rounding_alone(tmp_path: Path) -> None:
    out = converted("eagle3", tmp_path / "out", dtype="bfloat16")

    found = diff_models(DATA / "eagle3", out)

    assert not found.equal
    assert len(differing(found)) == 13
    for each in differing(found).values():
        assert each.state == "dtype"
        assert each.numbers is not None
        assert each.numbers.relative is not None
        assert each.numbers.rounded == (True, False)
        assert 0 < each.numbers.relative < 2**-7
    assert found.config.equal


def test_conversions_with_other_options_differ_in_their_configs_alone(tmp_path: Path) -> None:
    found = diff_models(
        converted("eagle3", tmp_path / "a"),
        converted("eagle3", tmp_path / "b", norm_before_residual=True, speculative_tokens=5),
    )

    assert not found.equal
    assert not differing(found)
    assert found.config.different == {
        "norm_before_residual": (False, True),
        "speculators_config.proposal_methods.0.speculative_tokens": (3, 5),
    }


def test_native_spellings_and_prefixes_are_the_same_names(variant: Copy) -> None:
    renamed = variant("eagle3", rename=lambda name: "module." + name.replace("midlayer.", "layers.0."))

    found = diff_models(DATA / "eagle3", renamed)

    assert found.equal
    assert ("midlayer.mlp.up_proj.weight", "module.layers.0.mlp.up_proj.weight") in {
        (*each.a, *each.b) for each in found.tensors
    }


def test_a_prefixed_source_is_equal_to_its_conversion(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle1-no-bias", rename=lambda name: f"ea_layer.{name}", layout="bin")

    assert diff_models(source, converted(source, tmp_path / "out"), verifier=VERIFIER).equal


def test_different_families_have_little_in_common() -> None:
    found = diff_models(DATA / "eagle1-fc-bias", DATA / "eagle3")

    assert found.algorithms == ("eagle", "eagle3")
    states = {each.a or each.b: each.state for each in found.tensors}
    assert states["fc.weight",] == "shape"
    assert states["fc.bias",] == "only_a"
    assert states["d2t",] == "only_b"


def test_a_source_of_another_conversion_is_no_source(tmp_path: Path) -> None:
    found = diff_models(DATA / "eagle3", converted("eagle1-no-bias", tmp_path / "out"))

    assert not found.equal
    assert differing(found)["d2t",].why == "matches no row of the table"


def test_base_models_are_compared_by_name(tmp_path: Path) -> None:
    tensors = read_tensors(VERIFIER)
    config = json.loads((VERIFIER / "config.json").read_text())
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"] + 1
    other = write_checkpoint(tmp_path / "other", config, tensors, "sharded-safetensors")

    assert diff_models(VERIFIER, VERIFIER).equal
    found = diff_models(VERIFIER, other, verifier=VERIFIER)
    assert found.notes == ("both are native, so that nothing was compared with the verifier",)
    assert list(differing(found)) == [("model.layers.3.mlp.up_proj.weight",)]
    assert found.algorithms == ("", "")


def test_a_type_without_its_plugin_is_compared_by_name_with_a_note(tmp_path: Path) -> None:
    out = converted("eagle3", tmp_path / "out")

    found = diff_models(DATA / "eagle3", out, registry=Registry(EntryPoints([])))

    assert not found.equal
    assert "no algorithm 'eagle3' is installed" in found.notes[0]
    assert f"names of {out} are compared as they are" in found.notes[0]
    assert differing(found)["midlayer.mlp.up_proj.weight",].state == "only_a"
    assert diff_models(out, out, registry=Registry(EntryPoints([]))).equal
    with pytest.raises(AlgorithmError):
        diff_models(DATA / "eagle3", out, algorithm="eagle9")


def test_what_is_left_to_the_verifier_is_compared_where_it_is_named(variant: Copy, tmp_path: Path) -> None:
    out = converted("eagle1-no-bias", tmp_path / "out")
    own = read_tensors(DATA / "eagle1-no-bias")["embed_tokens.weight"] + 1
    other = variant("eagle1-no-bias", tensors={"embed_tokens.weight": own})

    assert diff_models(other, out).equal  # nobody knows better
    found = diff_models(other, out, verifier=VERIFIER)
    assert differing(found)["embed_tokens.weight",].why == "left to the verifier, whose embed_tokens differs"
    asked = converted(other, tmp_path / "asked", use_verifier_embed_tokens=True)
    assert diff_models(other, asked, verifier=VERIFIER).equal


def test_a_verifier_with_which_nothing_can_be_converted_is_a_difference(tmp_path: Path) -> None:
    out = converted("eagle3", tmp_path / "out")
    config = json.loads((VERIFIER / "config.json").read_text())
    other = write_checkpoint(tmp_path / "other", config | {"hidden_size": 96}, {"w": torch.ones(1)})

    result = diff(DATA / "eagle3", out, "--verifier", other)

    assert result.exit_code == 4
    assert "note: what a conversion would write cannot be told:" in result.output
    assert result.output.endswith("\nDifferent: no conversion with this verifier\n")


def test_an_output_that_is_self_contained_holds_more(tmp_path: Path) -> None:
    out = converted("eagle1-no-bias", tmp_path / "out")
    whole = converted("eagle1-no-bias", tmp_path / "whole", self_contained=True)

    assert diff_models(DATA / "eagle1-no-bias", whole, verifier=VERIFIER).equal
    assert differing(diff_models(out, whole))["embed_tokens.weight",].why == "A leaves it to the verifier, not compared"
    assert diff_models(whole, out, verifier=VERIFIER).equal


def test_with_the_verifier_a_changed_setting_is_found_that_no_native_config_states(tmp_path: Path) -> None:
    out = configured(converted("eagle3", tmp_path / "out"), rope_theta=500000.0)

    assert diff_models(DATA / "eagle3", out).config.compared == "shared"
    found = diff_models(out, DATA / "eagle3", verifier=VERIFIER)
    assert not found.equal
    assert found.config.different == {"transformer_layer_config.rope_theta": (500000.0, 10000.0)}


def test_settings_that_a_conversion_changes_for_a_reason_are_no_difference(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", config={"max_position_embeddings": 128, "num_hidden_layers": 2})

    out = converted(source, tmp_path / "out")
    found = diff_models(source, out)

    assert found.equal
    assert found.config.explained == {
        "max_position_embeddings": "raised to the verifier's",
        "num_hidden_layers": "the tensors decide",
    }
    assert diff_models(source, out, verifier=VERIFIER).equal
    assert not diff_models(source, configured(out, rms_norm_eps=1e-5)).equal


def test_an_output_whose_config_is_another_types_is_compared_as_far_as_that_goes(tmp_path: Path) -> None:
    out = converted("eagle3", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"draft_vocab_size": "many"}))

    found = diff_models(DATA / "eagle3", out)

    assert not differing(found)
    assert found.notes[0].startswith(f"the config of {out} is not what eagle3 writes: draft_vocab_size 'many'")


def test_a_map_that_was_made_is_made_again_and_compared(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", tensors={"t2d": None})
    out = converted(source, tmp_path / "out")

    found = diff_models(source, out)

    assert found.equal
    assert {(each.a, each.b): each.why for each in found.tensors if each.why} == {(("d2t",), ("t2d",)): "made from d2t"}
    marked = read_tensors(out)["t2d"]
    other = changed(out, tmp_path / "other", t2d=~marked)
    assert diff_models(source, other).tensors[1].numbers == Numbers(256, 256, 1, 1, (0,))


def test_what_a_table_drops_or_does_not_use_says_why(variant: Copy, tmp_path: Path) -> None:
    full = {"lm_head.weight": torch.zeros(256, 128, dtype=torch.float16), "d2t": torch.zeros(64, dtype=torch.int64)}
    full |= {"d2t": torch.zeros(256, dtype=torch.int64), "t2d": torch.ones(256, dtype=torch.bool)}
    buffer = {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    source = variant("eagle3", config={"draft_vocab_size": 256}, tensors=full | buffer)

    found = diff_models(source, converted(source, tmp_path / "out"))

    assert found.equal
    assert {each.a[0]: each.why for each in found.tensors if each.explained} == {
        "d2t": "left out: the draft vocabulary is the verifier's, so the map is the identity",
        "t2d": "left out: the draft vocabulary is the verifier's, so the map is the identity",
        "midlayer.self_attn.rotary_emb.inv_freq": "left out: a buffer that every engine recomputes from the config",
    }


TABLE = Table(
    (
        Rename("q", "attn.q", "H, H"),
        Rename("k", "attn.k", "K, H"),
        Split("qk", ("attn.q", "attn.k")),
        Keep("gate_up", "2*I, H"),
        Merge("gate", "gate_up", 0, "I, H"),
        Merge("up", "gate_up", 1, "I, H"),
        Shared("head", "head", "V, H", verifier="lm_head"),
        Drop("extra.**", "nobody needs it"),
        Keep("bias", "H", part="bias", derive=Derive("speculators.decoder:zeros", ("attn.q",), "zeros")),
    ),
    prefixes=("model.",),
)
APART: Tensors = {"q": torch.randn(4, 3), "k": torch.randn(2, 3), "gate": torch.randn(5, 3), "up": torch.randn(5, 3)}
FUSED = {"qk": torch.cat([APART["q"], APART["k"]]), "gate_up": torch.cat([APART["gate"], APART["up"]])}
OUTPUT = {"attn.q": APART["q"], "attn.k": APART["k"], "gate_up": FUSED["gate_up"]}


def shelf(folder: Path, tensors: Tensors) -> Shelf:
    checkpoint = Checkpoint(write_checkpoint(folder, {}, dict(tensors)))
    return Shelf(checkpoint, checkpoint.tensors)


def outcome(couples: list[Couple]) -> dict[str, bool | str]:
    """Names of both halves → whether their bytes are equal, or why there is but one."""
    found: dict[str, bool | str] = {}
    for couple in couples:
        names = " = ".join("+".join(half.names) if half else "none" for half in (couple.a, couple.b))
        both = couple.a and couple.b and couple.a.data.info == couple.b.data.info
        found[names] = same_bytes(couple.a.data, couple.b.data) if both and couple.a and couple.b else couple.why
    return found


@pytest.mark.parametrize(
    ("native", "names"),
    [
        (APART, {"q = attn.q", "k = attn.k", "gate+up = gate_up"}),
        (FUSED, {"qk = attn.q", "qk = attn.k", "gate_up = gate_up"}),
        ({f"model.{name}": value for name, value in APART.items()}, {"model.q = attn.q", "model.k = attn.k"}),
    ],
)
def test_fused_tensors_and_pieces_are_compared_piece_by_piece(native: Tensors, names: set[str], tmp_path: Path) -> None:
    ours, theirs = shelf(tmp_path / "native", native), shelf(tmp_path / "output", OUTPUT)

    found = outcome(of_conversion(ours, theirs, Standard(TABLE)))

    assert names <= found.keys()
    assert set(found.values()) == {True}
    damaged = shelf(tmp_path / "damaged", OUTPUT | {"attn.k": APART["k"] + 1})
    (wrong,) = [name for name, equal in outcome(of_conversion(ours, damaged, Standard(TABLE))).items() if not equal]
    assert wrong.endswith("= attn.k")


def test_two_native_checkpoints_may_be_fused_and_apart(tmp_path: Path) -> None:
    found = outcome(of_natives(shelf(tmp_path / "a", FUSED), shelf(tmp_path / "b", APART), TABLE, TABLE))

    assert found == {"gate_up = gate+up": True, "qk = k": True, "qk = q": True}
    alone = {name: APART[name] for name in ("q", "gate", "up")}
    found = outcome(of_natives(shelf(tmp_path / "c", FUSED), shelf(tmp_path / "d", alone), TABLE, TABLE))
    assert found == {"gate_up = gate+up": True, "qk = none": "", "none = q": ""}


def test_pieces_that_are_not_all_there_are_no_tensor(tmp_path: Path) -> None:
    native = {"q": APART["q"], "gate": APART["gate"], "extra.x": torch.ones(1), "new": torch.ones(1)}
    output = OUTPUT | {"new": torch.ones(1), "head": torch.ones(2, 3), "odd": torch.ones(1)}

    found = outcome(of_conversion(shelf(tmp_path / "a", native), shelf(tmp_path / "b", output), Standard(TABLE)))

    assert found == {
        "q = attn.q": True,
        "new = new": True,
        "gate = none": "its pieces do not fit",
        "extra.x = none": "left out: nobody needs it",
        "none = attn.k": "",
        "none = gate_up": "",
        "none = head": "completed from the verifier, not compared",
        "none = odd": "no row of the table writes it",
    }


def numbers(a: torch.Tensor, b: torch.Tensor, tmp_path: Path) -> Numbers | None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "numbers", {}, {"a": a, "b": b}))
    return measure(stored(checkpoint, "a"), stored(checkpoint, "b"))


INFINITE, ABSENT = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (
            torch.tensor([1.0, ABSENT, INFINITE, 0.0, ABSENT]),
            torch.tensor([1.5, ABSENT, 2.0, -0.0, 7.0]),
            Numbers(5, 3, 0.5, 1.0, (0,), (2, 1), (1, 0)),
        ),
        (torch.tensor([0.0]), torch.tensor([-0.0]), Numbers(1, 0, 0.0, 0.0, None)),
        (torch.tensor(3.0), torch.tensor(5.0), Numbers(1, 1, 2.0, 3.0, ())),
        (torch.tensor([[2, -3]]), torch.tensor([[2, 4]]), Numbers(2, 1, 7, 3, (0, 1))),
        (
            torch.tensor([2**63 - 1, -(2**63)]),
            torch.tensor([-(2**63), -(2**63)]),
            Numbers(2, 1, 2**64 - 1, 2**63, (0,)),
        ),
        (torch.tensor([True, False]), torch.tensor([True, True]), Numbers(2, 1, 1, 1, (1,))),
        (torch.tensor([5], dtype=torch.int32), torch.tensor([6]), Numbers(1, 1, 1, 5, (0,))),
        (torch.tensor([5]), torch.tensor([5.5]), Numbers(1, 1, 0.5, 5.0, (0,))),
        (
            torch.tensor([1.0], dtype=torch.float16),
            torch.tensor([1.0], dtype=torch.float64),
            Numbers(1, 0, 0.0, 1.0, None, rounded=(True, True)),
        ),
        (
            torch.tensor([1.00390625], dtype=torch.float16),
            torch.tensor([1.0], dtype=torch.bfloat16),
            Numbers(1, 1, 0.00390625, 1.00390625, (0,), rounded=(True, False)),
        ),
        (
            torch.tensor([1e30]),
            torch.tensor([INFINITE], dtype=torch.float16),
            Numbers(1, 1, 0.0, float(torch.tensor(1e30)), (0,), infinite=(0, 1)),
        ),
    ],
)
def test_numbers_are_compared_as_what_they_are(
    a: torch.Tensor, b: torch.Tensor, expected: Numbers, tmp_path: Path
) -> None:
    assert numbers(a, b, tmp_path) == expected


def test_numbers_far_into_a_large_tensor_are_found(tmp_path: Path) -> None:
    a = torch.ones(700_001, 3)
    b = a.clone()
    b[700_000, 1] = 3

    assert numbers(a, b, tmp_path) == Numbers(2_100_003, 1, 2.0, 1.0, (700_000, 1))
    checkpoint = Checkpoint(tmp_path / "numbers")
    assert not same_bytes(stored(checkpoint, "a"), stored(checkpoint, "b"))
    assert same_bytes(stored(checkpoint, "a"), stored(checkpoint, "a"))


def test_eight_bit_floats_are_compared_as_bytes(tmp_path: Path) -> None:
    eight = torch.ones(4).to(torch.float8_e4m3fn)
    one = write_checkpoint(tmp_path / "a", {}, {"w": eight})
    other = write_checkpoint(tmp_path / "b", {}, {"w": (2 * torch.ones(4)).to(torch.float8_e4m3fn)})

    (each,) = diff_models(one, other).tensors
    assert (each.state, each.numbers) == ("bytes", None)
    assert "w  F8_E4M3 [4]  its bytes differ" in diff(one, other).output
    assert diff_models(one, one).equal


def test_settings_are_compared_as_json_means_them(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(1)}
    a = {"theta": 10000, "on": True, "ids": [1, 2], "x.y": 1, "x": {"y": 1, "z": {}}, "bad": ABSENT, "gone": None}
    b = {"theta": 10000.0, "on": 1, "ids": [1, 3], "x.y": 2, "x": {"y": 1, "z": {}}, "bad": ABSENT}

    found = diff_models(
        write_checkpoint(tmp_path / "a", a, tensors), write_checkpoint(tmp_path / "b", b, tensors)
    ).config

    assert found.different == {"on": (True, 1), "ids": ([1, 2], [1, 3]), '"x.y"': (1, 2)}
    assert (found.only_a, found.only_b, found.same) == ({"gone": None}, {}, 4)
    assert leaves({"blocks": [{"a": 1}, {"a": 2}]}) == {"blocks.0.a": 1, "blocks.1.a": 2}


def test_a_config_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {}
    for _ in range(70):
        config = {"a": config}
    folder = write_checkpoint(tmp_path / "a", config, {"w": torch.ones(1)})

    with pytest.raises(CheckpointError, match="nested too deep, expected 64 levels at most"):
        diff_models(folder, folder)


def test_configs_alone_can_be_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(VERIFIER / "config.json", tmp_path / name)

    found = diff_models(tmp_path / "a", tmp_path / "b")

    assert found.equal
    assert found.notes == tuple(f"{tmp_path / name} holds no weights" for name in ("a", "b"))


def test_a_head_of_the_hub_is_equal_to_its_files(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.add("org/head", DATA / "eagle3")
    server.add("org/out", converted("eagle3", tmp_path / "out"))

    found = diff_models("org/head", "org/out", cache_dir=tmp_path / "cache")

    assert found.equal
    assert (found.a, found.b) == ("org/head", "org/out")
    assert diff_models("org/out", tmp_path / "out", cache_dir=tmp_path / "cache").equal


def test_the_command_says_what_is_equal(tmp_path: Path) -> None:
    out = converted("eagle1-no-bias", tmp_path / "out")

    result = diff(DATA / "eagle1-no-bias", out)

    assert result.exit_code == 0
    assert (
        result.output
        == f"""\
A: {DATA / "eagle1-no-bias"} (native)
B: {out} (converted, eagle)
config: 14 of 14 settings that both state are the same; --verifier compares all
tensors: 9 of 10 with equal bytes, 9 of them under another name
changed names:
    fc.weight -> fusion_fc.weight
    layers.0.mlp.down_proj.weight -> transformer.mlp.down_proj.weight
    layers.0.mlp.gate_proj.weight -> transformer.mlp.gate_proj.weight
    layers.0.mlp.up_proj.weight -> transformer.mlp.up_proj.weight
    layers.0.post_attention_layernorm.weight -> transformer.post_attention_layernorm.weight
    layers.0.self_attn.k_proj.weight -> transformer.self_attn.k_proj.weight
    layers.0.self_attn.o_proj.weight -> transformer.self_attn.o_proj.weight
    layers.0.self_attn.q_proj.weight -> transformer.self_attn.q_proj.weight
    layers.0.self_attn.v_proj.weight -> transformer.self_attn.v_proj.weight
in one of them, for a reason:
    embed_tokens.weight  only in A  left to the verifier, not compared
Equal
"""
    )


def test_the_command_says_what_differs_and_exits_with_4(tmp_path: Path) -> None:
    tensors = read_tensors(VERIFIER)
    for number in range(8):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][0, :3] = 100.0
        tensors[f"model.layers.{number}.mlp.down_proj.weight"] = torch.ones(2, 2)
    tensors |= {"new": torch.ones(3), "model.norm.weight": tensors["model.norm.weight"].half()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][5] = ABSENT
    del tensors["model.embed_tokens.weight"]
    config = json.loads((VERIFIER / "config.json").read_text()) | {"vocab_size": 300, "note": "x" * 70}
    del config["head_dim"]
    other = write_checkpoint(tmp_path / "other", config, tensors)

    result = diff(VERIFIER, other)

    assert result.exit_code == 4
    lines = result.output.splitlines()
    head, rest = lines[:11], lines[11:]
    assert head == [
        f"A: {VERIFIER} (native)",
        f"B: {other} (native)",
        "config: 24 of 27 settings are the same",
        "settings that differ:",
        "    vocab_size  256  300",
        "    head_dim  32  -",
        f'    note  -  "{"x" * 59}…',
        "tensors: 56 of 76 with equal bytes",
        "only in A:",
        "    model.embed_tokens.weight  F32 [256, 128]",
        "only in B:",
    ]
    assert rest[:4] == [
        "    new  F32 [3]",
        "different:",
        "    lm_head.weight  F32 [256, 128]  128 of 32768 differ; 128 NaN in B",
        "    model.layers.{0…7}.mlp.down_proj.weight  F32 [128, 256] -> F32 [2, 2]  its shape differs",
    ]
    up, norm, last = rest[4:]
    assert up.startswith(
        "    model.layers.{0…7}.mlp.up_proj.weight  F32 [256, 128]  24 of 262144 differ by up to 100 ("
    )
    assert norm.startswith("    model.norm.weight  F32 -> F16 [128]  ")
    assert norm.endswith("; B is A cast to F16")
    assert last == "Different: 3 settings, 20 tensors"
    assert "model.layers.5.mlp.up_proj.weight  F32 [256, 128]  3 of 32768" in diff(VERIFIER, other, "--verbose").output


def test_the_command_prints_a_document(tmp_path: Path) -> None:
    out = converted("eagle3", tmp_path / "out")
    damaged = read_tensors(out)["norm.weight"].clone()
    damaged[7] = ABSENT
    other = changed(out, tmp_path / "other", **{"norm.weight": damaged})

    result = diff(DATA / "eagle3", other, "--json")

    assert result.exit_code == 4
    document = json.loads(result.output, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["schema"] == "speculators.difference/1"
    assert document["a"] == {"name": str(DATA / "eagle3"), "kind": "native", "algorithm": None}
    assert document["b"] == {"name": str(other), "kind": "converted", "algorithm": "eagle3"}
    assert document["config"]["compared"] == "shared"
    assert document["config"]["equal"] is True
    assert len(document["tensors"]) == 15
    (norm,) = [each for each in document["tensors"] if not each["equal"]]
    largest, scale = norm["numbers"].pop("largest"), norm["numbers"].pop("scale")
    assert (largest, scale > 0) == (0.0, True)
    assert norm == {
        "a": ["norm.weight"],
        "b": ["norm.weight"],
        "state": "bytes",
        "equal": False,
        "stored_a": {"dtype": "F16", "shape": [128], "bytes": 256},
        "stored_b": {"dtype": "F16", "shape": [128], "bytes": 256},
        "numbers": {
            "elements": 128,
            "differing": 1,
            "relative": 0.0,
            "first": [7],
            "nan": [0, 1],
            "infinite": [0, 0],
            "rounded": [False, False],
        },
        "why": "",
        "explained": False,
    }


def test_what_cannot_be_compared_is_an_error_of_one_line(tmp_path: Path) -> None:
    missing, unknown = diff(DATA / "eagle3", tmp_path / "nowhere"), diff(VERIFIER, VERIFIER, "--algorithm", "eagle9")

    assert missing.exit_code == 3
    assert unknown.exit_code == 3
    assert [len(each.output.splitlines()) for each in (missing, unknown)] == [1, 1]
    assert diff(DATA / "eagle3").exit_code == 2


def test_control_characters_in_names_are_escaped(variant: Copy) -> None:
    evil = variant("eagle3", tensors={"evil\x1b[2J": torch.ones(1)}, config={"\x1b[2Jkey": 1})

    result = diff(DATA / "eagle3", evil)

    assert "\x1b" not in result.output
    assert r"evil\x1b[2J  F32 [1]" in result.output


def test_equal_bytes_are_compared_without_numpy() -> None:
    loaded = modules_after(
        f"from speculators.cli import cli\ncli(['diff', {str(VERIFIER)!r}, {str(VERIFIER)!r}], standalone_mode=False)"
    )

    assert "speculators.comparing" in loaded
    assert not loaded & {"numpy", "torch", "transformers", "safetensors", "huggingface_hub"}


def test_a_config_that_its_own_tensors_contradict_is_not_excused(tmp_path: Path) -> None:
    output = configured(converted("eagle3", tmp_path / "out"), head_dim=7, num_attention_heads=5)

    found = diff_models(DATA / "eagle3", output)

    assert not found.equal
    assert found.config.different.keys() >= {"num_attention_heads"}
    assert found.config.explained == {}
    assert any("is not fit to serve" in note for note in found.notes)
