"""Writing: all of it or nothing, and nothing that stood there is lost."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from speculators import OutputError
from speculators.output import Payload, check_target, staged, write_safetensors
from speculators.weights import TensorInfo


def payloads() -> list[Payload]:
    return [
        Payload("mask", TensorInfo("BOOL", (3,)), lambda: [b"\x01\x00\x01"]),
        Payload("a", TensorInfo("F16", (2,)), lambda: [b"\x00\x3c", b"\x00\x40"]),
        Payload("map", TensorInfo("I64", (1,)), lambda: [(7).to_bytes(8, "little")]),
    ]


def converted(path: Path) -> Path:
    """Make something that looks like an earlier output."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"speculators_model_type": "eagle3"}))
    (path / "model.safetensors").write_bytes(b"old")
    return path


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", payloads())

    tensors = load_file(tmp_path / "m.safetensors")
    assert {name: value.tolist() for name, value in tensors.items()} == {
        "mask": [True, False, True],
        "a": [1.0, 2.0],
        "map": [7],
    }
    with safe_open(tmp_path / "m.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_order_of_tensors_does_not_matter_and_each_is_aligned(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", payloads())
    write_safetensors(tmp_path / "n.safetensors", payloads()[::-1])

    content = (tmp_path / "m.safetensors").read_bytes()
    assert content == (tmp_path / "n.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, size in (("map", 8), ("a", 2), ("mask", 1)):
        assert (8 + length + header[name]["data_offsets"][0]) % size == 0


def test_a_finished_block_publishes_its_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "b") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "a" / "b").exists()

    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["config.json"]
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o777 & ~_umask()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), staged(tmp_path / "a" / "b") as folder:
        (folder / "config.json").write_text("{}")
        raise error

    assert not any(tmp_path.iterdir())


def test_an_interrupted_block_keeps_what_was_there(tmp_path: Path) -> None:
    path = converted(tmp_path / "out")

    with pytest.raises(RuntimeError), staged(path, overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError

    assert (path / "model.safetensors").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists and is not empty"), staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")

    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_replaced_output_leaves_no_trace(tmp_path: Path) -> None:
    path = converted(tmp_path / "out")

    with staged(path, overwrite=True) as folder:
        (folder / "config.json").write_text("new")

    assert [entry.name for entry in path.iterdir()] == ["config.json"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    check_target(tmp_path / "out", [], overwrite=False)
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")

    assert (tmp_path / "out" / "config.json").exists()


def test_a_file_of_the_users_beside_a_converted_model_is_not_lost(tmp_path: Path) -> None:
    path = converted(tmp_path / "out")
    (path / "NOTES.md").write_text("mine")

    with pytest.raises(OutputError, match=r"has NOTES\.md beside a converted model"):
        check_target(path, [], overwrite=True)


def test_targets_that_are_no_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    for name in ("file", "link"):
        with pytest.raises(OutputError, match="is no folder"):
            check_target(tmp_path / name, [], overwrite=True)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_an_impossible_path_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match=r"no path that this system knows|cannot write"):
        check_target(Path(name), [], overwrite=False)


def test_a_name_that_is_too_long_leaves_no_parents_behind(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "a" / ("x" * 300)):
        pass

    assert not any(tmp_path.iterdir())


def test_a_target_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "file" / "out"):
        pass
