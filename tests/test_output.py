"""Writing: files that others read, published whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file

from speculators import CheckpointError, OptionError, OutputError, output
from speculators.output import (
    Payload,
    check_replaceable,
    check_target,
    parse_size,
    staged,
    work_folder,
    write_safetensors,
    writing,
)
from speculators.weights import Extent, TensorInfo

CONFIG = '{"speculators_model_type": "eagle3"}'
MIXED = (
    ("flags", "BOOL", (3,), b"\1\0\1"),
    ("wide", "I64", (1,), b"\7\0\0\0\0\0\0\0"),
    ("half", "BF16", (1,), b"\x80\x3f"),
    ("b", "F32", (2,), b"\0\0\x80\x3f\0\0\0\x40"),
    ("a", "F32", (), b"\0\0\x80\x3f"),
    ("none", "F32", (0, 4), b""),
)


class Interrupted(BaseException):
    """What a signal raises."""


@pytest.fixture
def umask() -> Iterator[None]:
    """Write with the permissions that most users have."""
    previous = os.umask(0o022)
    yield
    os.umask(previous)


def payload(name: str, dtype: str, shape: tuple[int, ...], *chunks: bytes) -> Payload:
    """Describe a tensor to write."""
    return Payload(name, TensorInfo(dtype, shape), chunks)


def names(folder: Path) -> list[str]:
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())


def in_file(path: Path, start: int, size: int) -> Extent:
    """Point to a stretch of a file."""
    return Extent(path, path.open("rb"), start, size)


def read_shards(folder: Path) -> dict[str, list[str]]:
    """Read the names in each shard, and compare them with the index."""
    shards = {path.name: sorted(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, held in shards.items() for name in held}
    return shards


def existing(folder: Path, **files: str) -> Path:
    """Make a folder of text files; an underscore in a keyword is a dot in the name."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


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

    assert names(tmp_path) == ["model.safetensors"]


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


def test_a_filesystem_that_cannot_sync_folders_gets_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    refused = []

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)

    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]
    assert len(refused) == 3  # that of the files, the one in which the output appears, and the one that it leaves


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with (
        Path("/proc/self/mem").open("rb") as memory,  # whose first bytes are never mapped
        pytest.raises(CheckpointError, match="in cannot be read: Input/output error"),
    ):
        extent = Extent(tmp_path / "in", memory, 0, 10)
        write_safetensors(tmp_path, [Payload("a", TensorInfo("U8", (10,)), [extent])])


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_target_meanwhile_is_kept(overwrite: bool, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="out"), staged(tmp_path / "out", overwrite) as folder:
        (folder / "config.json").write_text(CONFIG)
        existing(tmp_path / "out", chapter_tex="years of work")

    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["\U0001f600" * 60, "x" * 255], ids=["of 60 emoji", "of 255 letters"])
def test_a_name_as_long_as_the_disk_allows_is_accepted(name: str, tmp_path: Path) -> None:
    with staged(tmp_path / name) as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == [name]


def test_the_working_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(OutputError, match=r"the output \. is the working folder, which cannot be replaced"):
        check_target(Path(), [])


@pytest.mark.parametrize("chunks", [(b"\1",), (b"\1\2", b"\3")], ids=["too few", "too many"])
def test_bytes_that_do_not_fill_their_tensor_are_a_bug(chunks: tuple[bytes, ...], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        write_safetensors(tmp_path, [payload("a", "U8", (2,), *chunks)])


def test_bytes_that_spill_into_the_next_tensor_are_a_bug(tmp_path: Path) -> None:
    tensors = [payload("a", "U8", (2,), b"\1"), payload("b", "U8", (2,), b"\2\3\4")]

    with pytest.raises(RuntimeError, match="expected"):
        write_safetensors(tmp_path, tensors)


def test_a_staged_folder_is_published_when_its_block_ends(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        assert not (tmp_path / "out").exists()

    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == CONFIG


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "b" / "out") as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path / "a" / "b") == ["out"]


def test_a_relative_path_is_published_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with staged(Path("out")) as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, Interrupted, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_passes_through(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        raise error

    assert names(tmp_path) == []


def test_an_exception_removes_the_parents_that_were_made_but_no_others(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    with pytest.raises(ValueError, match="failed"), staged(tmp_path / "mine" / "a" / "b" / "out"):
        raise ValueError("failed")

    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == []


def test_an_exception_keeps_what_others_put_into_a_parent_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="failed"), staged(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "notes.txt").write_text("mine")
        raise ValueError("failed")

    assert names(tmp_path / "a") == ["notes.txt"]


def test_an_exception_keeps_the_previous_content(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)

    with pytest.raises(ValueError, match="failed"), staged(out, overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
        raise ValueError("failed")

    assert names(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == CONFIG


def test_the_previous_content_is_replaced_whole(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG, model_safetensors="old")

    with staged(out, overwrite=True) as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json"]
    assert (out / "config.json").read_text() == CONFIG


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize(
    ("mask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)]
)
@pytest.mark.usefixtures("umask")
def test_an_output_has_the_permissions_that_the_umask_leaves(
    mask: int, folder_mode: int, file_mode: int, tmp_path: Path
) -> None:
    os.umask(mask)

    with staged(tmp_path / "out") as folder:
        write_safetensors(folder, [])

    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == file_mode
    assert os.umask(mask) == mask


def test_an_error_of_the_disk_is_worded_and_leaves_nothing(tmp_path: Path) -> None:
    refused = pytest.raises(OutputError, match="out: No space left on device; nothing was kept")
    with refused, staged(tmp_path / "out"), writing(tmp_path / "out"):
        raise OSError(28, "No space left on device")

    assert names(tmp_path) == []


def test_a_file_in_place_of_a_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "file" / "out"):
        pass

    assert names(tmp_path) == ["file"]


def test_a_name_that_the_disk_refuses_leaves_no_parents(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "a" / ("x" * 300)):
        pass

    assert names(tmp_path) == []


def test_a_file_at_the_target_is_kept_when_publishing_fails(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "out"):
        pass

    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_free_target_is_accepted(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "source").mkdir()

    check_target(tmp_path / "empty", [tmp_path / "source"])
    check_target(tmp_path / "new", [tmp_path / "source"])

    assert names(tmp_path) == ["empty", "source"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_refused(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with pytest.raises(OutputError, match="out exists and is no folder"):
        check_target(tmp_path / "out", [])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to nothing"])
def test_a_symbolic_link_in_the_way_is_refused(there: bool, overwrite: bool, tmp_path: Path) -> None:
    if there:
        existing(tmp_path / "elsewhere", config_json=CONFIG)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OutputError, match="out exists and is no folder"):
        check_target(tmp_path / "out", [])


def test_a_folder_that_is_not_empty_is_refused_without_overwrite(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)

    with pytest.raises(OutputError, match=r"out exists and is not empty.*pass --overwrite"):
        staged(out).__enter__()

    assert names(tmp_path) == ["out"]


def test_a_converted_model_may_be_overwritten(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG, model_safetensors="")

    check_replaceable(out, overwrite=True)

    assert names(out) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(None, id="no config"),
        pytest.param("{}", id="config of something else"),
        pytest.param("{", id="config that is no JSON"),
        pytest.param("3", id="config that is a number"),
        pytest.param("[" * 99999, id="config that is deeply nested"),
        pytest.param('["speculators_model_type"]', id="config that is a list"),
        pytest.param('"speculators_model_type"', id="config that is a text"),
    ],
)
def test_a_folder_of_something_else_is_not_overwritten(config: str | None, tmp_path: Path) -> None:
    out = existing(tmp_path / "out", model_safetensors="years of work", **({"config_json": config} if config else {}))

    with pytest.raises(OutputError, match="out holds something other than a converted model and is not overwritten"):
        check_replaceable(out, overwrite=True)

    assert (out / "model.safetensors").read_text() == "years of work"


def test_a_file_beside_a_converted_model_is_not_overwritten(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG, chapter_tex="years of work")

    with pytest.raises(OutputError, match=r"out has chapter\.tex beside a converted model and is not overwritten"):
        check_replaceable(out, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "source", ["out", "out/source", "out/deep/source", "out/source/model.safetensors", "out/../out/source"]
)
def test_a_target_that_is_or_holds_a_source_is_refused(source: str, overwrite: bool, tmp_path: Path) -> None:
    existing(tmp_path / "out", config_json=CONFIG)

    with pytest.raises(OutputError, match=r"out would replace its own source .*choose another --output-path"):
        check_target(tmp_path / "out", [tmp_path / "elsewhere", tmp_path / source])


def test_a_source_is_recognised_behind_a_symbolic_link(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)
    (tmp_path / "head").symlink_to(out)

    with pytest.raises(OutputError, match="would replace its own source"):
        check_target(out, [tmp_path / "head"])


@pytest.mark.parametrize("target", ["head/converted", "head/deep/converted", "link/converted", "head/../head/out"])
def test_a_target_in_a_source_is_refused(target: str, tmp_path: Path) -> None:
    existing(tmp_path / "head", config_json="{}")
    (tmp_path / "link").symlink_to(tmp_path / "head")

    with pytest.raises(OutputError, match=r"would lie in its own source .*head; choose another --output-path"):
        check_target(tmp_path / target, [tmp_path / "elsewhere", tmp_path / "head"])

    assert names(tmp_path / "head") == ["config.json"]


def test_a_source_whose_files_are_links_into_the_target_is_refused(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG, model_safetensors="years of work")
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "model.safetensors").symlink_to(out / "model.safetensors")

    with pytest.raises(OutputError, match=r"out would replace its own source .*head/model\.safetensors"):
        check_target(out, [tmp_path / "head"])


def test_a_target_may_lie_beside_a_weight_file(tmp_path: Path) -> None:
    existing(tmp_path / "head", config_json="{}", model_safetensors="")

    check_target(tmp_path / "head" / "converted", [tmp_path / "head" / "model.safetensors"])

    assert names(tmp_path / "head") == ["config.json", "model.safetensors"]


def test_a_second_run_to_one_path_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        with pytest.raises(OutputError, match=r"another conversion is writing to .*out; wait for it"):
            staged(tmp_path / "out").__enter__()
        with staged(tmp_path / "other") as other:
            (other / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["other", "out"]
    assert names(tmp_path / "out") == ["config.json"]


@pytest.fixture
def died(tmp_path: Path) -> Path:
    """What a run leaves that dies while it writes ``out``."""
    work = work_folder(tmp_path / "out")
    (work / "new").mkdir(parents=True)
    (work / "new" / "model.safetensors").write_text("half of it")
    (work / "lock").touch()
    return work


@pytest.mark.parametrize("target", ["out", "other"])
def test_what_a_dead_run_left_is_removed_by_the_next_one(target: str, died: Path, tmp_path: Path) -> None:
    with staged(tmp_path / target) as folder:
        assert names(folder) == []
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == [target]
    assert names(tmp_path / target) == ["config.json"]


def test_what_a_living_run_writes_beside_is_not_removed(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        with staged(tmp_path / "other"):
            pass
        assert names(folder) == ["config.json"]

    assert names(tmp_path) == ["other", "out"]


def test_a_previous_output_that_a_dead_run_had_moved_away_is_put_back(died: Path, tmp_path: Path) -> None:
    existing(died / "old", config_json=CONFIG)

    with staged(tmp_path / "other"):
        pass
    assert names(died) == ["lock", "new", "old"]
    with pytest.raises(OutputError, match=r"out exists and is not empty.*pass --overwrite"):
        staged(tmp_path / "out").__enter__()

    assert names(tmp_path) == ["other", "out"]
    assert (tmp_path / "out" / "config.json").read_text() == CONFIG


def test_a_hidden_folder_that_somebody_else_made_is_left_alone(tmp_path: Path) -> None:
    existing(tmp_path / ".mine.speculators", notes_txt="years of work")
    existing(tmp_path / ".yours.speculators", lock="", notes_txt="years of work")

    with staged(tmp_path / "out"):
        pass

    assert names(tmp_path) == [".mine.speculators", ".yours.speculators", "out"]
    assert (tmp_path / ".yours.speculators" / "notes.txt").read_text() == "years of work"


def test_a_link_in_place_of_the_hidden_folder_is_refused(tmp_path: Path) -> None:
    existing(tmp_path / "elsewhere", new="years of work")
    work_folder(tmp_path / "out").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OutputError, match=r"\.out\.speculators is a link, where a conversion writes"):
        staged(tmp_path / "out").__enter__()

    assert names(tmp_path / "elsewhere") == ["new"]


def test_what_takes_the_place_of_a_previous_output_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)
    real = output._exchange
    swapped = []

    def exchange(one: Path, other: Path) -> bool:
        if not swapped:
            out.rename(tmp_path / "moved")
            existing(out, chapter_tex="years of work")
        swapped.append(one)
        return real(one, other)

    monkeypatch.setattr(output, "_exchange", exchange)

    with pytest.raises(OutputError, match=r"out has chapter\.tex beside"), staged(out, overwrite=True) as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["moved", "out"]
    assert (out / "chapter.tex").read_text() == "years of work"


def test_a_name_that_begins_like_the_source_is_another(tmp_path: Path) -> None:
    check_target(tmp_path / "head", [tmp_path / "head-2"])

    assert names(tmp_path) == []
