"""Inspecting says what a checkpoint is, why, and what is odd about it, from headers alone."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, Copy, read_tensors
from click.testing import CliRunner, Result
from installing import TOY, Announce, Install
from loopback import Server
from test_operations import GATED, layouts
from test_startup import modules_after

from speculators import Registry, convert_model, inspect_model
from speculators.cli import cli
from speculators.inspection import Evidence, Inspection


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)])


def converted(name: str, folder: Path, **more: Any) -> Path:
    return convert_model(DATA / name, verifier=VERIFIER, output_path=folder, validate=False, **more).output_path


def of(found: Inspection, algorithm: str) -> Evidence:
    return next(each for each in found.evidence if each.algorithm == algorithm)


@pytest.mark.parametrize("name", TRAINED)
def test_a_native_checkpoint_is_recognised_and_counted(name: str) -> None:
    found = inspect_model(DATA / name)

    assert (found.kind, found.algorithm, found.verifier) == ("native", TRAINED[name], None)
    assert [each.algorithm for each in found.evidence if each.recognises] == [TRAINED[name]]
    tensors = read_tensors(DATA / name)
    assert {key: list(info.shape) for key, info in found.tensors.items()} == {
        key: list(value.shape) for key, value in tensors.items()
    }
    assert found.parameters == sum(value.numel() for value in tensors.values() if value.is_floating_point())
    assert found.bytes == sum(value.numel() * value.element_size() for value in tensors.values())
    assert sum(tally.tensors for tally in found.dtypes) == len(tensors)
    file = next(path for path in (DATA / name).iterdir() if path.suffix in (".bin", ".safetensors"))
    kind = "pickle" if file.suffix == ".bin" else "safetensors"
    assert [(each.name, each.format, each.bytes) for each in found.files] == [(file.name, kind, file.stat().st_size)]
    assert found.quirks == ()
    assert run(DATA / name).exit_code == 0


@pytest.mark.parametrize("name", TRAINED)
def test_a_conversion_is_what_its_config_says(name: str, tmp_path: Path) -> None:
    folder = converted(name, tmp_path / "out", max_shard_size="200KB")

    found = inspect_model(folder)

    kind = "eagle3" if name == "eagle3" else "eagle"
    assert (found.kind, found.algorithm, found.verifier) == ("converted", kind, str(VERIFIER))
    assert found.format is not None
    assert (found.format.type, found.format.findings, found.format.speculative_tokens) == (kind, (), 3)
    assert found.format.architectures == ("LlamaForCausalLM",)
    assert found.format.origin["folder"] == name
    assert found.format.converter["package"] == f"speculators-{TRAINED[name]}"
    assert [file.name for file in found.files] == sorted(path.name for path in folder.glob("*.safetensors"))
    assert found.evidence == found.quirks == ()
    assert "Its tensors are those that config.json requires\n" in run(folder).output


def test_each_algorithm_is_told_what_speaks_against_it() -> None:
    found = inspect_model(DATA / "hass-layernorms")

    assert of(found, "hass").matched == of(found, "eagle").matched == len(found.tensors)
    assert of(found, "eagle").recognises is False
    assert of(found, "eagle").seeks == "EAGLE's modules without the norms of the HASS variant."
    eagle3 = of(found, "eagle3")
    assert eagle3.matched == len(found.tensors) - 3
    assert eagle3.unmatched[0] == "embed_layernorm.weight F32 [128]"
    assert eagle3.missing == (
        "midlayer.hidden_norm.weight [H]",
        "midlayer.input_layernorm.weight [H]",
        "norm.weight [H]",
    )


def test_a_base_model_is_shown_with_what_its_config_says() -> None:
    found = inspect_model(VERIFIER)

    assert (found.kind, found.algorithm) == ("unrecognised", None)
    assert found.summary == (
        "no installed algorithm recognises it; its config says LlamaForCausalLM, model_type 'llama'"
    )
    (refused,) = of(found, "eagle").refused
    assert refused.startswith("model.layers.1.input_layernorm.weight and 62 more: more than one decoder layer")
    result = run(VERIFIER)
    assert result.exit_code == 0
    assert "    model.layers.{0…7}.mlp.down_proj.weight F32 [128, 256]\n" in result.output


def test_parts_and_numbered_layers_are_missed_as_far_as_they_are_begun(variant: Copy) -> None:
    head = variant(
        "eagle3",
        tensors={
            "midlayer.self_attn.q_proj.bias": torch.zeros(128),
            "layers.2.mlp.up_proj.weight": torch.zeros(256, 128),
            "t2d": None,
        },
    )

    missing = of(inspect_model(head), "eagle3").missing

    assert "midlayer.self_attn.k_proj.bias [kv_heads*head_dim]" in missing
    assert "layers.1.mlp.up_proj.weight [I, H]" in missing
    assert "layers.{1…2}.mlp.down_proj.weight [H, I]" in missing
    assert not any(line.startswith(("t2d", "midlayer.self_attn.o_proj.bias", "fc_norm")) for line in missing)


def test_what_is_unusual_is_named(variant: Copy) -> None:
    head = variant(
        "eagle3",
        config={
            "num_key_value_heads": 4,
            "draft_vocab_size": 100,
            "hidden_size": 64,
            "torch_dtype": "bfloat16",
            "norm_output": True,
            "eagle_config": {"norm_output": False, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        },
        tensors={"rotary_emb.inv_freq": torch.ones(3)},
        rename=lambda name: f"model.{name.replace('midlayer', 'layers.0')}",
        layout="sharded-bin",
    )
    (head / "pytorch_model.pt").write_bytes(b"")
    (head / "optimizer.pt").write_bytes(b"")

    found = inspect_model(head)

    assert found.algorithm == "eagle3"
    assert set(found.quirks) == {
        "pytorch_model.pt lies beside the weights that are read, and is not",
        "15 of 16 names begin with 'model.', which is passed over",
        "10 of 16 names have 'layers.0' where training code has 'midlayer'",
        "rotary_emb.inv_freq would be left out: a buffer that every engine recomputes from the config",
        "config.json says hidden_size 64, the tensors say 128",
        "config.json says draft_vocab_size 100, the tensors say 64",
        "config.json says num_key_value_heads 4, the tensors say 2",
        "config.json says dtype 'bfloat16', most tensors are stored as float16",
        "config.json says norm_output both true and false",
    }
    settings = {each.key: each.values for each in found.settings}
    assert settings["norm_output"] == (True, False)
    assert settings["eagle_aux_hidden_state_layer_ids"] == ([1, 2, 3],)
    assert len(found.files) == 3


@pytest.mark.parametrize("stored", ["fused", "in pieces"])
def test_tensors_that_are_cut_or_joined_are_named(stored: str, install: Install, variant: Copy) -> None:
    registry = install("gated", GATED.replace("set(source.tensors) == {", "{'scale'} <= set(source.tensors) or {"))
    nothing = dict.fromkeys(read_tensors(DATA / "eagle3"))
    tensors = {name: value.clone() for name, value in layouts()[stored].items()}

    found = inspect_model(variant("eagle3", tensors=nothing | tensors), registry=registry)

    assert found.algorithm == "gated"
    assert of(found, "gated").missing == ()
    expected = {
        "fused": {"fused.weight holds several tensors, and is cut into linear.weight and gate.weight"},
        "in pieces": {
            "upper.weight is stored as a piece of linear.weight",
            "lower.weight is stored as a piece of linear.weight",
        },
    }
    assert expected[stored] <= set(found.quirks)


def test_an_old_pickle_is_a_quirk_and_no_warning(variant: Copy) -> None:
    head = variant("eagle1-fc-bias", layout="legacy-bin")

    result = run(head)

    assert result.stderr == ""
    assert (
        f"{head}/pytorch_model.bin is in PyTorch's format of before 1.6 and is read into memory whole" in result.stdout
    )


def test_one_weight_file_and_a_config_alone_can_be_looked_at(tmp_path: Path) -> None:
    file = inspect_model(DATA / "eagle1-no-bias" / "model.safetensors")
    assert (file.algorithm, [each.name for each in file.files]) == ("eagle", ["model.safetensors"])
    for name, source in {"native": DATA / "eagle3", "made": converted("eagle3", tmp_path / "out")}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((source / "config.json").read_bytes())

    native, made = inspect_model(tmp_path / "native"), inspect_model(tmp_path / "made")

    assert native.summary.startswith("it holds no weights that an algorithm could be by; its config says Llama")
    assert (native.files, native.evidence, native.bytes) == ((), (), 0)
    assert (made.kind, made.algorithm) == ("converted", "eagle3")
    assert made.format is not None
    assert made.format.findings is None
    assert run(tmp_path / "native").exit_code == run(tmp_path / "made").exit_code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "no complete safetensors file"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is no JSON object"),
    ],
)
def test_what_cannot_be_read_is_one_line(change: Callable[[Path], object], message: str, variant: Copy) -> None:
    folder = variant("eagle3")
    change(folder)

    result = run(folder)

    assert result.exit_code == 3
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert run(folder / "nowhere").exit_code == 3


def test_tensors_that_a_config_does_not_fit_are_named(tmp_path: Path) -> None:
    folder = converted("eagle3", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"]["intermediate_size"] = 512
    config["norm_before_fc"] = True
    (folder / "config.json").write_text(json.dumps(config))

    found = inspect_model(folder)

    assert found.format is not None
    assert found.format.findings is not None
    assert "layers.0.mlp.up_proj.weight is F16 [256, 128], expected [I, H] = [512, 128]" in found.format.findings
    assert any(line.startswith("missing: input_norm.weight") for line in found.format.findings)
    assert any("config.json has" in line for line in found.format.findings)  # which provenance.json says
    result = run(folder)
    assert result.exit_code == 0
    assert "what does not fit:\n" in result.output


def test_a_type_that_nothing_reads_is_shown_all_the_same(tmp_path: Path) -> None:
    folder = converted("eagle3", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    block = {"algorithm": "tomorrow", "verifier": {"name_or_path": "https://me:s3cret@example.org/base?sig=s3cret"}}
    config |= {
        "speculators_model_type": "tomorrow",
        "speculators_config": block,
        "_name_or_path": "http://x/?sig=s3cret",
    }
    (folder / "config.json").write_text(json.dumps(config))

    found = inspect_model(folder)

    assert found.summary == (
        "a model in the speculators format, type 'tomorrow', written by speculators 1.0.0; "
        "no installed algorithm reads it"
    )
    assert found.format is not None
    assert (found.format.findings, found.format.readers, found.algorithm) == (None, (), None)
    for more in ([], ["--json"]):
        assert "s3cret" not in run(folder, *more).output


def test_several_plugins_failing_ones_and_broken_ones_are_findings(beside_ours: Announce) -> None:
    greedy = TOY.replace('name = "toy"', 'name = "greedy"').replace('("plaything",)', "()")
    beside_ours("greedy", greedy.replace("return set(source.tensors)", "return True or set(source.tensors)"))
    failing = TOY.replace('name = "toy"', 'name = "failing"').replace('("plaything",)', "()")
    beside_ours("failing", failing.replace("return set(source.tensors)", "return source.config['x'] or set()"))
    beside_ours("bad", "import a_package_that_is_not_there")

    result = run(DATA / "eagle3")

    found = inspect_model(DATA / "eagle3")
    assert found.algorithm is None
    assert found.kind == "native"
    assert of(found, "failing").recognises is None
    assert of(found, "failing").failure == "recognises raised KeyError: 'x'"
    assert result.exit_code == 0
    assert "could be any of eagle3, greedy; choose one with --algorithm\n" in result.output
    assert "    failed: recognises raised KeyError: 'x'\n" in result.output
    assert "broken plugin, not asked: bad (speculators-bad 0.3.0): ModuleNotFoundError: No module" in result.output


def test_without_plugins_everything_else_is_said() -> None:
    found = inspect_model(DATA / "eagle3", registry=Registry([]))

    assert (found.kind, found.evidence) == ("unrecognised", ())
    assert len(found.tensors) == 15


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what is read")
def test_no_more_than_headers_is_read(variant: Copy) -> None:
    head, rows = variant("eagle3"), 1 << 22
    header = {"fc.weight": {"dtype": "F16", "shape": [rows, 1024], "data_offsets": [0, 2048 * rows]}}
    text = json.dumps(header).encode()
    file = head / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + 2048 * rows)

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    inspect_model(DATA / "eagle1-no-bias")  # loads the plugins
    before = count()
    found = inspect_model(head)

    assert found.bytes == 2048 * rows
    assert count() - before < 1 << 20


def test_it_imports_no_torch() -> None:
    arguments = ["inspect", str(DATA / "eagle1-no-bias")]

    loaded = modules_after(f"from speculators.cli import cli\ncli({arguments!r}, standalone_mode=False)")

    assert "speculators.inspection" in loaded
    assert not loaded & {"torch", "transformers", "huggingface_hub", "numpy", "rich"}


def test_a_repository_of_the_hub_is_looked_at(server: Server, tmp_path: Path) -> None:
    server.add("org/head", DATA / "hass-layernorms")

    found = inspect_model("org/head", cache_dir=tmp_path)

    assert (found.source, found.algorithm) == ("org/head", "hass")
    assert [file.bytes for file in found.files] == [(DATA / "hass-layernorms" / "model.safetensors").stat().st_size]


def test_what_is_printed() -> None:
    assert (
        run(DATA / "eagle1-fc-bias").output
        == f"""\
{DATA / "eagle1-fc-bias"}
a native checkpoint, recognised as eagle (speculators-eagle 1.0.0)
algorithms:
    eagle   recognised      11 of 11 tensors  EAGLE's modules without the norms of the HASS variant.
    eagle3  not recognised  10 of 11 tensors  A first layer that norms embeddings and states apart, \
or the architecture's name.
    hass    not recognised  11 of 11 tensors  EAGLE's modules with the norms, the variant that can be told from EAGLE.
against eagle3:
    missing: midlayer.hidden_norm.weight [H]
    missing: midlayer.input_layernorm.weight [H]
    missing: norm.weight [H]
    not in its table: fc.bias F16 [128]
files:
    pytorch_model.bin  pickle  {(DATA / "eagle1-fc-bias" / "pytorch_model.bin").stat().st_size / 1000:.1f} kB
dtypes:
    F16  11 tensors  213,248  426.5 kB
11 tensors, 213,248 parameters, 426.5 kB
config:
    architectures: ["LlamaForCausalLM"]
    model_type: llama
    hidden_size: 128
    intermediate_size: 256
    num_hidden_layers: 1
    num_attention_heads: 4
    num_key_value_heads: 2
    vocab_size: 256
    max_position_embeddings: 512
    hidden_act: silu
    rms_norm_eps: 1e-06
    tie_word_embeddings: false
    torch_dtype: float16
tensors:
    embed_tokens.weight F16 [256, 128]
    fc.bias F16 [128]
    fc.weight F16 [128, 256]
    layers.0.mlp.down_proj.weight F16 [128, 256]
    layers.0.mlp.gate_proj.weight F16 [256, 128]
    layers.0.mlp.up_proj.weight F16 [256, 128]
    layers.0.post_attention_layernorm.weight F16 [128]
    layers.0.self_attn.k_proj.weight F16 [64, 128]
    layers.0.self_attn.o_proj.weight F16 [128, 128]
    layers.0.self_attn.q_proj.weight F16 [128, 128]
    layers.0.self_attn.v_proj.weight F16 [64, 128]
What such checkpoints are like: speculators plugins page eagle
"""
    )


def test_the_document_holds_everything(tmp_path: Path) -> None:
    native = json.loads(run(DATA / "eagle3", "--json").output)
    assert native["schema"] == "speculators.inspection/1"
    assert native["tensors"]["t2d"] == {"dtype": "BOOL", "shape": [256], "bytes": 256}
    assert native["evidence"][1]["recognises"] is True
    assert len(native["evidence"][0]["unmatched"]) == 13
    made = json.loads(run(converted("eagle3", tmp_path / "out"), "--json").output)
    assert made["format"]["readers"] == ["eagle3 (speculators-eagle3 1.0.0)"]
    assert made["kind"] == "converted"


def test_all_that_speaks_against_an_algorithm_is_shown_on_request() -> None:
    short, full = run(DATA / "eagle3").output, run(DATA / "eagle3", "--verbose").output

    assert "    not in its table: and 10 more; --verbose shows them\n" in short
    assert "    not in its table: t2d BOOL [256]\n" in full
    assert "--verbose shows them" not in full
