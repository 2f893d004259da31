"""The files of an output: what others read, byte for byte."""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file

from speculators import CheckpointError, OptionError
from speculators.weights import Extent, TensorInfo
from speculators.writer import Payload, parse_size, write_safetensors

MIXED = (
    ("flags", "BOOL", (3,), b"\1\0\1"),
    ("wide", "I64", (1,), b"\7\0\0\0\0\0\0\0"),
    ("half", "BF16", (1,), b"\x80\x3f"),
    ("b", "F32", (2,), b"\0\0\x80\x3f\0\0\0\x40"),
    ("a", "F32", (), b"\0\0\x80\x3f"),
    ("none", "F32", (0, 4), b""),
)


def payload(name: str, dtype: str, shape: tuple[int, ...], *chunks: bytes) -> Payload:
    """Describe a tensor to write."""
    return Payload(name, TensorInfo(dtype, shape), chunks)


def in_file(path: Path, start: int, size: int) -> Extent:
    """Point to a stretch of a file."""
    return Extent(path, path.open("rb"), start, size)


def read_shards(folder: Path) -> dict[str, list[str]]:
    """Read the names in each shard, and compare them with the index."""
    shards = {path.name: sorted(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, held in shards.items() for name in held}
    return shards


def test_a_written_file_is_read_back_by_the_safetensors_library(tmp_path: Path) -> None:
    write_safetensors(tmp_path, [payload(*entry) for entry in MIXED])

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "model.safetensors")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in found.items()} == {
        "flags": (torch.bool, [True, False, True]),
        "wide": (torch.int64, [7]),
        "half": (torch.bfloat16, [1.0]),
        "b": (torch.float32, [1.0, 2.0]),
        "a": (torch.float32, 1.0),
        "none": (torch.float32, []),
    }
    assert found["none"].shape == (0, 4)


def test_a_file_without_tensors_is_readable_too(tmp_path: Path) -> None:
    write_safetensors(tmp_path, [])

    assert load_file(tmp_path / "model.safetensors") == {}


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    for folder, entries in (("one", MIXED), ("other", MIXED[::-1])):
        (tmp_path / folder).mkdir()
        write_safetensors(tmp_path / folder, [payload(*entry) for entry in entries])

    one, other = (tmp_path / folder / "model.safetensors" for folder in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("length", range(1, 9))
def test_every_tensor_is_aligned_to_its_dtype(length: int, tmp_path: Path) -> None:
    sizes = {"I64": 8, "F32": 4, "BF16": 2, "BOOL": 1}
    entries = [payload(dtype.lower() * length, dtype, (3,), bytes(3 * size)) for dtype, size in sizes.items()]

    write_safetensors(tmp_path, entries[::-1])

    data = (tmp_path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    assert {
        entry["dtype"]: (8 + size + entry["data_offsets"][0]) % sizes[entry["dtype"]]
        for name, entry in header.items()
        if name != "__metadata__"
    } == {"I64": 0, "F32": 0, "BF16": 0, "BOOL": 0}


def test_the_layout_of_a_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path, [payload("bb", "U8", (2,), b"\3", b"\4"), payload("a", "U8", (1,), b"\2")])

    assert (tmp_path / "model.safetensors").read_bytes() == (
        b"\x90\0\0\0\0\0\0\0"
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"bb":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}'
        b"       "
        b"\2\3\4"
    )


SIZES = {"a": 4, "b": 2, "c": 9, "d": 1, "e": 3}
BYTES = [payload(name, "U8", (size,), name.encode() * size) for name, size in SIZES.items()]


@pytest.mark.parametrize(
    ("limit", "shards"),
    [
        pytest.param(6, [["c"], ["a", "b"], ["d", "e"]], id="a tensor larger than a shard has one of its own"),
        pytest.param(9, [["a", "b"], ["c"], ["d", "e"]], id="none is divided"),
        pytest.param(18, [["a", "b", "c", "d"], ["e"]], id="one byte too many"),
        pytest.param(1, [["a"], ["b"], ["c"], ["e"], ["d"]], id="one each"),
    ],
)
def test_shards_hold_tensors_in_order_up_to_a_size(limit: int, shards: list[list[str]], tmp_path: Path) -> None:
    write_safetensors(tmp_path, BYTES, max_shard_size=limit)

    count = len(shards)
    assert read_shards(tmp_path) == {
        f"model-{number:05}-of-{count:05}.safetensors": names for number, names in enumerate(shards, 1)
    }
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 19}


@pytest.mark.parametrize("limit", [None, 19, 10**12])
def test_what_fits_into_one_file_is_one_file(limit: int | None, tmp_path: Path) -> None:
    write_safetensors(tmp_path, BYTES, max_shard_size=limit)

    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_are_those_of_the_hub_library(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(size, dtype=torch.uint8) for name, size in SIZES.items()}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=6)

    write_safetensors(tmp_path, BYTES, max_shard_size=6)

    assert read_shards(tmp_path) == {name: sorted(held) for name, held in theirs.filename_to_tensors.items()}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7", 7),
        (7, 7),
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1.5gb", 15 * 10**8),
        ("2TB", 2 * 10**12),
        ("0.001TB", 10**9),
        ("8B", 8),
    ],
)
def test_sizes_are_written_as_for_the_hub(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "-5GB", "5 apples", "1e9", "5GiB", "0.1B", "٥GB", "5\u212aB", "9" * 5000, -1, 0]
)
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(OptionError, match="is no size of a shard; write it as '5GB' or '500MB'"):
        parse_size(text)


def test_a_stretch_of_another_file_is_copied(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"before" + bytes(range(200)) + b"after")
    heard: list[int] = []

    extents = [
        in_file(tmp_path / "in", 6, 100),
        b"",
        in_file(tmp_path / "in", 106, 0),
        in_file(tmp_path / "in", 106, 100),
    ]
    write_safetensors(tmp_path, [Payload("a", TensorInfo("U8", (200,)), extents)], report=heard.append)

    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == list(range(200))
    assert sum(heard) == 200


REFUSALS = {
    "other filesystem": OSError(errno.EXDEV, "Invalid cross-device link"),
    "old kernel": OSError(errno.ENOSYS, "Function not implemented"),
    "no such operation here": OSError(errno.EOPNOTSUPP, "Operation not supported"),
    "forbidden": PermissionError(errno.EPERM, "Operation not permitted"),
    "says it is done": 0,
    "has no such call": None,
}


@pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS)
def test_where_the_kernel_cannot_copy_the_file_is_the_same(
    answer: OSError | int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_bytes(bytes(range(256)) * (10 << 12))  # more than is read at a time
    for folder in ("fast", "plain"):
        (tmp_path / folder).mkdir()
    size = (tmp_path / "in").stat().st_size - 3
    asked = []

    def refuse(*arguments: Any, **more: Any) -> int:
        asked.append(arguments)
        if isinstance(answer, OSError):
            raise answer
        return 0

    def write(folder: str) -> bytes:
        tensor = Payload("a", TensorInfo("U8", (size,)), [in_file(tmp_path / "in", 3, size)])
        write_safetensors(tmp_path / folder, [tensor])
        return (tmp_path / folder / "model.safetensors").read_bytes()

    fast = write("fast")
    if answer is None:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    plain = write("plain")

    assert plain == fast
    assert fast.endswith((tmp_path / "in").read_bytes()[3:])
    assert bool(asked) == (answer is not None)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second filesystem")
def test_a_source_on_another_filesystem_is_copied(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as other:
        other.write(bytes(range(256)) * 1000)
        other.flush()
        extent = in_file(Path(other.name), 1, 255_999)
        write_safetensors(tmp_path, [Payload("a", TensorInfo("U8", (255_999,)), [extent])])

        assert (tmp_path / "model.safetensors").read_bytes().endswith(Path(other.name).read_bytes()[1:])


def test_a_source_that_shrinks_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(1000))
    extent = in_file(tmp_path / "in", 0, 1000)
    (tmp_path / "in").write_bytes(bytes(999))

    with pytest.raises(CheckpointError, match="in ended while it was read; was it changed meanwhile"):
        write_safetensors(tmp_path, [Payload("a", TensorInfo("U8", (1000,)), [extent])])


def test_a_source_that_is_replaced_while_it_is_copied_is_the_one_that_was_opened(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"old")
    extent = in_file(tmp_path / "in", 0, 3)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(tmp_path / "in")

    write_safetensors(tmp_path, [Payload("a", TensorInfo("U8", (3,)), [extent])])

    assert (tmp_path / "model.safetensors").read_bytes().endswith(b"old")


@pytest.mark.parametrize("chunks", [(b"1", b"2", b"3"), (b"123",)], ids=["early", "by the last sync"])
def test_an_error_that_the_disk_reports_late_is_an_error(
    chunks: tuple[bytes, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([OSError(errno.EIO, "Input/output error")])

    def sync(descriptor: int) -> None:
        for error in answers:
            raise error  # an error of the disk is told once

    monkeypatch.setattr(os, "fsync", sync)

    with pytest.raises(OSError, match="Input/output error"):
        write_safetensors(tmp_path, [payload("a", "U8", (3,), *chunks)])


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with Path("/proc/self/mem").open("rb") as memory:  # whose first bytes are never mapped
        tensor = Payload("a", TensorInfo("U8", (10,)), [Extent(tmp_path / "in", memory, 0, 10)])
        with pytest.raises(CheckpointError, match="in cannot be read: Input/output error"):
            write_safetensors(tmp_path, [tensor])


@pytest.mark.parametrize("chunks", [(b"\1",), (b"\1\2", b"\3")], ids=["too few", "too many"])
def test_bytes_that_do_not_fill_their_tensor_are_a_bug(chunks: tuple[bytes, ...], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        write_safetensors(tmp_path, [payload("a", "U8", (2,), *chunks)])


def test_bytes_that_spill_into_the_next_tensor_are_a_bug(tmp_path: Path) -> None:
    tensors = [payload("a", "U8", (2,), b"\1"), payload("b", "U8", (2,), b"\2\3\4")]

    with pytest.raises(RuntimeError, match="expected"):
        write_safetensors(tmp_path, tensors)
