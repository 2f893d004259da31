"""What an output says about where it came from, and how that shows a change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, TRAINED, VERIFIER, Copy, contents
from click.testing import CliRunner

from speculators import Keep, Registry, Rename, Table, convert_model, validate_model
from speculators.cli import cli


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return found


def digest(path: Path) -> dict[str, Any]:
    """Return what a record says of a file."""
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy-bin", "sharded-safetensors", "sharded-bin"])
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore:.*before 1.6")
def test_every_file_that_was_read_and_written_is_named_with_its_digest(
    name: str, layout: str, variant: Copy, tmp_path: Path
) -> None:
    source = variant(name, layout=layout)

    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", validate=False, max_shard_size="100KB")

    found = record(tmp_path / "out")
    assert found["source"] == {"folder": "source", "files": {path.name: digest(path) for path in source.iterdir()}}
    written = {
        path.name: digest(path)
        for path in (tmp_path / "out").iterdir()
        if path.name not in ("provenance.json", "README.md")
    }
    assert found["output"] == written
    assert len(written) > 4
    assert found["verifier"]["files"]["config.json"] == digest(VERIFIER / "config.json")


def test_of_the_verifiers_weights_those_that_were_opened_are_named_with_their_size(tmp_path: Path) -> None:
    for name in ("eagle1-fc-bias", "eagle3"):
        convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / name, validate=False)

    size = (VERIFIER / "model.safetensors").stat().st_size
    assert record(tmp_path / "eagle1-fc-bias")["verifier"]["files"]["model.safetensors"] == {"size": size}
    assert "model.safetensors" not in record(tmp_path / "eagle3")["verifier"]["files"]


def test_what_converted_it_is_named_with_its_options(tmp_path: Path) -> None:
    algorithm = Registry().get("eagle3")

    convert_model(
        DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", dtype="float32", norm_before_residual=False
    )

    found = record(tmp_path / "out")["converter"]
    assert found == {
        "speculators": "1.0.0",
        "package": "speculators-eagle3",
        "package_version": algorithm.version,
        "algorithm": "eagle3",
        "options": {**dict.fromkeys(algorithm.spec.options.model_fields), **found["options"]},
        "dtype": "float32",
        "max_shard_size": None,
        "self_contained": False,
        "table_sha256": algorithm.spec.table.sha256,
        "validated": "forward",
    }
    assert (found["options"]["norm_before_residual"], found["options"]["speculative_tokens"]) == (False, None)


def test_the_digest_of_a_table_is_that_of_its_rows_in_any_order() -> None:
    one, other = Keep("a.weight", "H"), Rename("b.weight", "c.weight", "H, H")

    assert Table((one, other)).sha256 == Table((other, one)).sha256
    assert Table((one, other)).sha256 != Table((one, Rename("b.weight", "c.weight", "H"))).sha256
    assert Table((one, other)).sha256 != Table((one, other), prefixes=("model.",)).sha256


def test_the_same_input_gives_the_same_bytes_wherever_and_whenever(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3")
    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "one")
    moved = source.rename(tmp_path / "elsewhere")
    (tmp_path / "deep").mkdir()

    convert_model(moved.rename(tmp_path / "deep" / "source"), verifier=VERIFIER, output_path=tmp_path / "deep" / "two")

    assert contents(tmp_path / "one") == contents(tmp_path / "deep" / "two")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "change", "finding"),
    [
        pytest.param("model.safetensors", flip, "the content of model.safetensors is not what was written", id="bit"),
        pytest.param("config.json", append, "config.json has {now} bytes, {then} were written", id="byte"),
        pytest.param(
            "model-00001-of-00002.safetensors",
            Path.touch,
            "model-00001-of-00002.safetensors was added",
            id="a file more",
        ),
        pytest.param(
            "provenance.json",
            lambda path: path.write_text('{"output": {"../../etc/passwd": {"size": 1, "sha256": ""}}}'),
            "has no sizes and checksums under 'output'",
            id="a name that leads elsewhere",
        ),
        pytest.param(
            "provenance.json",
            lambda path: path.write_text('{"output": {"config.json": 3}}'),
            "has no sizes and checksums under 'output'",
            id="something else",
        ),
        pytest.param("provenance.json", flip, "provenance.json is no JSON object", id="no JSON"),
    ],
)
def test_validating_names_what_was_changed(
    file: str, change: Callable[[Path], object], finding: str, tmp_path: Path
) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", validate=False)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    change(tmp_path / "out" / file)

    result = CliRunner().invoke(cli, ["validate", str(tmp_path / "out")])

    assert result.exit_code == 4
    assert result.output.startswith("files      FAILED  ")
    now = (tmp_path / "out" / file).stat().st_size
    assert finding.replace("{then}", str(sizes.get(file))).replace("{now}", str(now)) in result.output


def test_a_file_that_is_lost_is_named(tmp_path: Path) -> None:
    convert_model(
        DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", validate=False, max_shard_size="100KB"
    )
    (tmp_path / "out" / "model-00002-of-00006.safetensors").unlink()

    report = validate_model(tmp_path / "out", level="structure")

    assert not report.passed
    assert "model-00002-of-00006.safetensors is missing" in report.checks[0].detail
