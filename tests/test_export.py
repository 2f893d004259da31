"""The way back: an export is the checkpoint that was converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, Copy, contents, read_tensors, unrecorded, write_checkpoint
from click.testing import CliRunner, Result
from loopback import Server
from safetensors import safe_open

from speculators import CheckpointError, OptionError, OutputError, convert_model, export_model
from speculators.cli import cli


def converted(source: Path, tmp_path: Path, **more: object) -> Path:
    arguments = {"verifier": VERIFIER, "output_path": tmp_path / "converted", "validate": False} | more
    return convert_model(source, **arguments).output_path  # type: ignore[arg-type]


def require_equal(folder: Path, source: Path) -> None:
    """Compare config and tensors bit for bit, as torch and safetensors read them."""
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    found, expected = read_tensors(folder), read_tensors(source)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor), name


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("self_contained", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_an_export_is_the_checkpoint_bit_for_bit(name: str, self_contained: bool, tmp_path: Path) -> None:
    output = converted(DATA / name, tmp_path, self_contained=self_contained)

    result = export_model(output, output_path=tmp_path / "exported")

    require_equal(tmp_path / "exported", DATA / name)
    weights = {path.name for path in (DATA / name).iterdir() if path.is_file()}
    assert {path.name for path in (tmp_path / "exported").iterdir()} == weights == {"config.json", result.weights}
    assert (result.recorded, result.missing, result.rounded) == (True, {}, {})
    assert {**result.written, **result.restored}.keys() == read_tensors(DATA / name).keys()


@pytest.mark.filterwarnings("ignore:.*is read into memory whole")
@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("sharded-safetensors", "model.safetensors"),
        ("sharded-bin", "pytorch_model.bin"),
        ("legacy-bin", "pytorch_model.bin"),
    ],
)
def test_shards_become_one_file_of_their_kind(layout: str, weights: str, variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", layout=layout)

    result = export_model(converted(source, tmp_path), output_path=tmp_path / "exported")

    assert result.weights == weights
    require_equal(tmp_path / "exported", source)


def test_names_come_back_with_prefixes_and_in_their_own_spelling(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", rename=lambda name: f"module.{name.replace('midlayer.', 'layers.0.')}")

    export_model(converted(source, tmp_path), output_path=tmp_path / "exported")

    require_equal(tmp_path / "exported", source)


@pytest.mark.parametrize(("stored", "asked"), [(torch.bfloat16, "float32"), (torch.float16, "float32")])
def test_a_wider_dtype_is_taken_back_exactly(stored: torch.dtype, asked: str, variant: Copy, tmp_path: Path) -> None:
    floats = {name: t.to(stored) for name, t in read_tensors(DATA / "eagle3").items() if t.is_floating_point()}
    source = variant("eagle3", tensors=floats)

    result = export_model(converted(source, tmp_path, dtype=asked), output_path=tmp_path / "exported")

    assert result.rounded == {}
    require_equal(tmp_path / "exported", source)


def test_what_was_rounded_is_named(tmp_path: Path) -> None:
    output = converted(DATA / "eagle3", tmp_path, dtype="bfloat16")

    result = export_model(output, output_path=tmp_path / "exported")

    found = read_tensors(tmp_path / "exported")
    floating = {name for name, tensor in read_tensors(DATA / "eagle3").items() if tensor.is_floating_point()}
    assert result.rounded == dict.fromkeys(floating, "F16")
    assert {found[name].dtype for name in floating} == {torch.bfloat16}


def test_what_nobody_needs_and_what_was_replaced_is_named(variant: Copy, tmp_path: Path) -> None:
    own = {"embed_tokens.weight": torch.ones(256, 128), "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    source = variant("eagle3", tensors=own)

    result = export_model(
        converted(source, tmp_path, use_verifier_embed_tokens=True), output_path=tmp_path / "exported"
    )

    assert result.missing == {
        "embed_tokens.weight": "the verifier's embed_tokens was asked for",
        "midlayer.self_attn.rotary_emb.inv_freq": "a buffer that every engine recomputes from the config",
    }
    assert read_tensors(tmp_path / "exported").keys() == read_tensors(source).keys() - result.missing.keys()
    assert result.notes == (
        'it was converted with {"use_verifier_embed_tokens": true}; '
        "engines that read the native layout must be told likewise",
    )


@pytest.mark.parametrize("name", TRAINED)
def test_an_output_of_another_writer_becomes_one_that_converts_to_the_same(name: str, tmp_path: Path) -> None:
    output = converted(DATA / name, tmp_path, norm_before_residual=True) if name == "eagle3" else None
    output = output or converted(DATA / name, tmp_path)
    before = contents(output)

    result = export_model(unrecorded(output), output_path=tmp_path / "exported")

    assert not result.recorded
    assert read_tensors(tmp_path / "exported").keys() == read_tensors(DATA / name).keys()
    again = convert_model(
        tmp_path / "exported", verifier=VERIFIER, output_path=tmp_path / "again", validate=False
    ).output_path
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == before[file]


def test_restoring_needs_the_verifier_of_the_conversion(tmp_path: Path) -> None:
    output = converted(DATA / "eagle1-no-bias", tmp_path)
    other = read_tensors(VERIFIER)
    other["model.embed_tokens.weight"][3, 5] += 1
    config = json.loads((VERIFIER / "config.json").read_text())
    write_checkpoint(tmp_path / "other", config, other)
    write_checkpoint(tmp_path / "bare", config, {"model.norm.weight": torch.ones(128)})

    with pytest.raises(CheckpointError, match="is not the one that was left out; pass the verifier of the conversion"):
        export_model(output, verifier=tmp_path / "other", output_path=tmp_path / "exported")
    with pytest.raises(CheckpointError, match=r"which .* does not hold; pass --verifier"):
        export_model(output, verifier=tmp_path / "bare", output_path=tmp_path / "exported")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight was left to the verifier's embed_tokens"):
        export_model(output, verifier=tmp_path / "nowhere", output_path=tmp_path / "exported")

    assert not [path for path in tmp_path.iterdir() if "exported" in path.name]


def test_a_damaged_output_is_not_exported(tmp_path: Path) -> None:
    output = converted(DATA / "eagle3", tmp_path)
    with (output / "model.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"\xff")

    with pytest.raises(CheckpointError, match=r"is not as it was written: the content of model\.safetensors"):
        export_model(output, output_path=tmp_path / "exported")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pieces": [{"target": "nowhere", "start": 0}]}, "holds no nowhere, of which fc.weight was made"),
        ({"pieces": [{"target": "norm.weight", "start": 0}]}, "bytes too few for fc.weight"),
        ({"pieces": [{"target": "fc.weight", "start": -1}]}, "which cannot be"),
        ({"dtype": "X9"}, "which cannot be"),
        ({"pieces": 7}, "under tensors.fc.weight.pieces"),
        ({"pieces": [], "role": "nose"}, "which cannot be"),
        ({"dtype": "I64"}, r"holds fc\.weight as F16, which was I64 in the source"),
    ],
)
def test_a_record_that_cannot_be_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    output = converted(DATA / "eagle3", tmp_path)
    record = json.loads((output / "provenance.json").read_text())
    record["tensors"]["fc.weight"] |= change
    (output / "provenance.json").write_text(json.dumps(record))

    with pytest.raises(CheckpointError, match=message):
        export_model(output, output_path=tmp_path / "exported")

    assert not (tmp_path / "exported").exists()


def test_a_record_does_not_choose_where_files_are_written(tmp_path: Path) -> None:
    output = converted(DATA / "eagle3", tmp_path)
    record = json.loads((output / "provenance.json").read_text())
    for number, files in enumerate(({"../../elsewhere.bin": {}}, {"/tmp/elsewhere.bin": {}}, [1], "x.bin")):
        record["source"]["files"] = files
        (output / "provenance.json").write_text(json.dumps(record))

        export_model(output, output_path=tmp_path / f"exported-{number}")

        assert sorted(contents(tmp_path / f"exported-{number}")) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.rglob("elsewhere*"))


def test_another_kind_of_weight_file_can_be_asked_for(tmp_path: Path) -> None:
    output = converted(DATA / "hass-layernorms", tmp_path)

    assert export_model(output, output_path=tmp_path / "bin", weights="bin").weights == "pytorch_model.bin"
    sharded = export_model(output, output_path=tmp_path / "shards", max_shard_size="200KB")

    assert sharded.weights == "model.safetensors.index.json"

    for folder in ("bin", "shards"):
        require_equal(tmp_path / folder, DATA / "hass-layernorms")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    with pytest.raises(OptionError, match="pass --weights safetensors for shards"):
        export_model(output, output_path=tmp_path / "no", weights="bin", max_shard_size="1MB")
    with pytest.raises(OptionError, match="'onnx' is none of native"):
        export_model(output, output_path=tmp_path / "no", to="onnx")


def test_nothing_is_replaced(tmp_path: Path) -> None:
    output = converted(DATA / "eagle3", tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match="exists and is not empty"):
        export_model(output, output_path=tmp_path / "there")
    with pytest.raises(OutputError, match="would lie in its own source"):
        export_model(output, output_path=output / "native")
    with pytest.raises(CheckpointError, match="is not in the speculators format"):
        export_model(DATA / "eagle3", output_path=tmp_path / "exported")


def test_outputs_and_verifiers_of_the_hub(server: Server, tmp_path: Path) -> None:
    server.add("org/base", VERIFIER)
    server.add("org/speculator", converted(DATA / "eagle1-fc-bias", tmp_path, verifier="org/base"))

    export_model("org/speculator", output_path=tmp_path / "exported")

    require_equal(tmp_path / "exported", DATA / "eagle1-fc-bias")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_says_what_became_of_each_tensor(tmp_path: Path) -> None:
    output = converted(DATA / "eagle1-no-bias", tmp_path)

    result = run("export", output, "--output-path", tmp_path / "exported")
    facts = json.loads(run("export", output, "--output-path", tmp_path / "again", "--json").output)

    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == f"Exported {output} to the native layout of eagle"
    assert "    fusion_fc.weight -> fc.weight" in lines
    assert lines[-3:] == [
        "restored:",
        "    embed_tokens.weight: the verifier's embed_tokens",
        f"Wrote {tmp_path / 'exported'} with config.json and model.safetensors",
    ]
    assert facts["schema"] == "speculators.export/1"
    assert facts["restored"] == {"embed_tokens.weight": "the verifier's embed_tokens"}
    with safe_open(tmp_path / "exported" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_single_shard_becomes_a_whole_file(variant: Copy, tmp_path: Path) -> None:
    source = variant("hass-layernorms")
    shard = "model-00001-of-00001.safetensors"
    (source / "model.safetensors").rename(source / shard)
    names = dict.fromkeys(read_tensors(source), shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    result = export_model(converted(source, tmp_path), output_path=tmp_path / "exported")

    assert result.weights == "model.safetensors"
    require_equal(tmp_path / "exported", source)


def test_an_export_stays_out_of_the_verifier(tmp_path: Path) -> None:
    shutil.copytree(VERIFIER, tmp_path / "verifier")
    output = converted(DATA / "eagle3", tmp_path)

    with pytest.raises(OutputError, match="would lie in its own source"):
        export_model(output, verifier=tmp_path / "verifier", output_path=tmp_path / "verifier" / "inside")
