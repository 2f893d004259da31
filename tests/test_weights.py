"""Weight files and checkpoint folders: exact bytes from sound ones, one clear refusal from all others."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import save_file

from speculators import CheckpointError
from speculators.checkpoint import Checkpoint
from speculators.weights import SafetensorsFile, TensorInfo, WeightFile, pieces, read

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    """Write a safetensors file with any header and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def content(file: WeightFile | Checkpoint, name: str) -> bytes:
    """Read a whole tensor."""
    return bytes(read(file.stretch(name, 0, file.tensors[name].nbytes)))


def raw(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor in row-major order."""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def test_a_safetensors_file_says_what_it_holds(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}, tmp_path / "x.safetensors")

    assert SafetensorsFile(tmp_path / "x.safetensors").tensors == {
        "a": TensorInfo("F32", (2, 3)),
        "b": TensorInfo("BF16", ()),
    }


@pytest.mark.parametrize(
    ("info", "nbytes", "text"),
    [
        (TensorInfo("F32", (2, 3)), 24, "F32 [2, 3]"),
        (TensorInfo("BF16", ()), 2, "BF16 []"),
        (TensorInfo("I64", (0, 4)), 0, "I64 [0, 4]"),
        (TensorInfo("BOOL", (5,)), 5, "BOOL [5]"),
    ],
)
def test_a_tensor_has_a_size_and_a_text(info: TensorInfo, nbytes: int, text: str) -> None:
    assert (info.nbytes, str(info)) == (nbytes, text)


def test_bytes_are_read_from_the_place_of_their_tensor(tmp_path: Path) -> None:
    header = {
        "second": {"dtype": "U8", "shape": [3], "data_offsets": [2, 5]},
        "first": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "empty": {"dtype": "F32", "shape": [0], "data_offsets": [2, 2]},
        "__metadata__": {"format": "pt"},
    }

    file = SafetensorsFile(safetensors(tmp_path / "x.safetensors", header, b"\1\2\3\4\5"))

    assert {name: content(file, name) for name in file.tensors} == {
        "second": b"\3\4\5",
        "first": b"\1\2",
        "empty": b"",
    }
    assert bytes(file.stretch("second", 1, 2).read()) == b"\4"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "0 bytes long", id="empty"),
        pytest.param(b"\1\0\0", "3 bytes long", id="shorter than its length field"),
        pytest.param(struct.pack("<Q", 100) + b"{}", "promise a header of 100 bytes", id="truncated header"),
        pytest.param(b"\xff" * 16, "promise a header of 18446744073709551615 bytes", id="absurd header length"),
        pytest.param(struct.pack("<Q", 3) + b"{a}", "unreadable safetensors header", id="bad JSON"),
        pytest.param(struct.pack("<Q", 2) + b"\xff\xfe", "safetensors header", id="no UTF-8"),
        pytest.param(struct.pack("<Q", 9999) + b"[" * 9999, "unreadable safetensors header", id="deeply nested JSON"),
        pytest.param(struct.pack("<Q", 2) + b"[]", "it is a list, expected an object", id="a list"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "promise a header", id="pointer of git-lfs"),
    ],
)
def test_a_file_without_a_header_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)

    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{message}"):
        SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"dtype": "F4"}, "stores tensor 'a' as 'F4', a dtype that is not supported", id="unknown dtype"),
        pytest.param({"dtype": None}, "stores tensor 'a' as None", id="no dtype"),
        pytest.param({"dtype": ["F32"]}, "tensor 'a'", id="a list as dtype"),
        pytest.param({"shape": [3]}, r"tensor 'a' is F32 \[3\] but spans bytes 0 to 8", id="wrong size for the shape"),
        pytest.param({"shape": [-2]}, r"tensor 'a' is F32 \[-2\]", id="negative dimension"),
        pytest.param({"shape": [-1, -2]}, r"tensor 'a' is F32 \[-1, -2\]", id="negative dimensions of right product"),
        pytest.param({"shape": [2.0]}, r"tensor 'a' is F32 \[2.0\]", id="fractional dimension"),
        pytest.param({"shape": [True, 2]}, r"tensor 'a' is F32 \[True, 2\]", id="dimension that is no number"),
        pytest.param({"shape": 2}, "malformed header entry for tensor 'a'", id="shape that is no list"),
        pytest.param({"shape": "2"}, "tensor 'a'", id="shape that is a text"),
        pytest.param({"data_offsets": [0]}, "malformed header entry for tensor 'a'", id="one offset"),
        pytest.param({"data_offsets": [-8, 0]}, "tensor 'a'", id="negative offset"),
        pytest.param({"data_offsets": [8, 0]}, "tensor 'a'", id="offsets in reverse"),
        pytest.param({"data_offsets": ["0", "8"]}, "tensor 'a'", id="offsets that are texts"),
        pytest.param({"data_offsets": [1, 9]}, "starts at byte 1 of the data, expected 0", id="hole at the start"),
        pytest.param({"shape": [1], "data_offsets": [0, 4]}, "holds 8 bytes of data, its header names 4", id="rest"),
        pytest.param({"shape": [3], "data_offsets": [0, 12]}, "holds 8 bytes of data, its header names 12", id="cut"),
    ],
)
def test_a_damaged_entry_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "x.safetensors", {"a": ENTRY | change}, bytes(8))

    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{message}"):
        SafetensorsFile(path)


@pytest.mark.parametrize("entry", [None, 1, "F32", [], {}])
def test_an_entry_of_another_kind_is_refused(entry: object, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "x.safetensors", {"a": entry})

    with pytest.raises(CheckpointError, match=r"x\.safetensors has a malformed header entry for tensor 'a'"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        pytest.param(4, "tensor 'b' starts at byte 4 of the data, expected 8", id="overlap"),
        pytest.param(0, "tensor 'b' starts at byte 0 of the data, expected 8", id="same place"),
        pytest.param(12, "tensor 'b' starts at byte 12 of the data, expected 8", id="hole"),
    ],
)
def test_tensors_that_do_not_lie_one_after_the_other_are_refused(start: int, message: str, tmp_path: Path) -> None:
    other = ENTRY | {"data_offsets": [start, start + 8]}
    path = safetensors(tmp_path / "x.safetensors", {"a": ENTRY, "b": other}, bytes(start + 8))

    with pytest.raises(CheckpointError, match=rf"x\.safetensors is damaged: {message}"):
        SafetensorsFile(path)


@pytest.mark.parametrize("missing", [1, 4, 8])
def test_a_truncated_file_is_refused(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes()[:-missing])

    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged or incomplete.*Download or copy it again"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1 << 20)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-4])

    with pytest.raises(CheckpointError, match=r"x\.safetensors ended while it was read; was it changed meanwhile\?"):
        content(file, "a")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read: No such file or directory"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_tensor_larger_than_a_chunk_arrives_exactly_in_pieces(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((4 << 20) + 3)
    header = {
        "a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
        "b": {"dtype": "U8", "shape": [(4 << 20) + 3], "data_offsets": [5, (4 << 20) + 8]},
    }
    file = SafetensorsFile(safetensors(tmp_path / "x.safetensors", header, b"12345" + data))

    found = list(pieces(file.stretch("b", 0, len(data))))

    assert [len(piece) for piece in found] == [4194304, 3]
    assert b"".join(found) == data


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded-safetensors", "sharded-bin"])
def test_a_checkpoint_gives_the_same_tensors_in_every_layout(layout: str, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5]).bfloat16(), "c": torch.tensor(7)}
    source = Checkpoint(write_checkpoint(tmp_path / "in", {"hidden_size": 3}, tensors, layout))

    assert source.config == {"hidden_size": 3}
    assert source.tensors == {
        "a": TensorInfo("F32", (2, 3)),
        "b": TensorInfo("BF16", (1,)),
        "c": TensorInfo("I64", ()),
    }
    assert {name: content(source, name) for name in source.tensors} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }
    assert np.frombuffer(source.rows("a", 1, 2), "<f4").tolist() == [3.0, 4.0, 5.0]
    assert source.array("a").tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert source.array("b").tolist() == [1.5]
    assert torch.equal(source.tensor("a"), tensors["a"])
    assert torch.equal(source.tensor("a", (1, 2)), tensors["a"][1:])
    assert torch.equal(source.tensor("b"), tensors["b"])
    assert torch.equal(source.tensor("c"), tensors["c"])


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_an_empty_tensor_is_a_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = Checkpoint(write_checkpoint(tmp_path / "in", {}, {"a": torch.empty(shape)}))

    assert source.tensor("a").shape == shape
    assert source.array("a").shape == shape


def test_safetensors_are_preferred_over_a_pickle(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", {}, {"safe": torch.ones(1)})
    (folder / "pytorch_model.bin").write_bytes(b"never opened")

    assert list(Checkpoint(folder).tensors) == ["safe"]


def test_the_conventional_name_is_preferred_over_others(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", {}, {"a": torch.ones(1)})
    save_file({"b": torch.ones(1)}, folder / "consolidated.safetensors")

    assert list(Checkpoint(folder).tensors) == ["a"]


def test_one_weight_file_may_have_any_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", {}, {"a": torch.ones(1)})
    (folder / "model.safetensors").rename(folder / "head.safetensors")

    assert list(Checkpoint(folder).tensors) == ["a"]


def test_one_of_several_weight_files_can_be_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", {"hidden_size": 3}, {"a": torch.ones(1)})
    save_file({"b": torch.ones(1)}, folder / "step-2.safetensors")

    source = Checkpoint(folder / "step-2.safetensors")

    assert list(source.tensors) == ["b"]
    assert source.config == {"hidden_size": 3}


def test_several_weight_files_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", {}, {"a": torch.ones(1)})
    (folder / "model.safetensors").rename(folder / "step-1.safetensors")
    save_file({"b": torch.ones(1)}, folder / "step-2.safetensors")

    with pytest.raises(CheckpointError, match=r"in holds alternative .*\(step-1\.safetensors, step-2\.safetensors\)"):
        _ = Checkpoint(folder).tensors


@pytest.mark.parametrize("beside", ["README.md", "adapter_model.safetensors"])
def test_a_folder_without_weights_is_refused_with_what_lies_there(beside: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / beside).write_bytes(b"")
    source = Checkpoint(tmp_path)

    assert not source.has_weights
    with pytest.raises(CheckpointError, match="holds no weights") as caught:
        _ = source.tensors

    assert "config.json" in str(caught.value)
    assert beside in str(caught.value)


def test_a_folder_with_weights_has_them(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", {}, {"a": torch.ones(1)}, "sharded-safetensors")

    assert Checkpoint(folder).has_weights
    assert Checkpoint(folder / "model-00001-of-00003.safetensors").has_weights


def test_a_folder_without_a_config_is_refused_with_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"no config\.json \(found: model\.safetensors, notes\.txt\)"):
        Checkpoint(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json \(found: nothing\)"):
        Checkpoint(tmp_path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="head does not exist"):
        Checkpoint(tmp_path / "head")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(b"", "no JSON object", id="empty"),
        pytest.param(b"{", "no JSON object", id="incomplete"),
        pytest.param(b"\xff\xff", "no JSON object", id="no text"),
        pytest.param(b"[" * 99999, "no JSON object", id="deeply nested"),
        pytest.param(b"[]", "it is a list, expected an object", id="a list"),
    ],
)
def test_an_unreadable_config_is_refused(config: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config)

    with pytest.raises(CheckpointError, match=rf"config\.json .*{message}"):
        Checkpoint(tmp_path)


def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "head.gguf").write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"head\.gguf is no weight file.*\.safetensors, \.bin, \.pt, \.pth"):
        _ = Checkpoint(tmp_path / "head.gguf").tensors


def indexed(folder: Path, weight_map: object, **shards: list[str]) -> Checkpoint:
    """Open a checkpoint with an index and shards that hold tensors of the given names."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for stem, names in shards.items():
        save_file({name: torch.ones(1) for name in names}, folder / f"{stem}.safetensors")
    return Checkpoint(folder)


def test_an_index_finds_the_tensors_of_its_shards(tmp_path: Path) -> None:
    source = indexed(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=["a"], y=["b"], unlisted=["c"])

    assert list(source.tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        pytest.param({"a": "z.safetensors"}, r"names the shard 'z\.safetensors', which is missing", id="missing shard"),
        pytest.param({"a": "../x.safetensors"}, r"names the shard '\.\./x\.safetensors'; shards must lie", id="above"),
        pytest.param({"a": "/x.safetensors"}, r"names the shard '/x\.safetensors'; shards must lie", id="absolute"),
        pytest.param({"a": "sub/x.safetensors"}, r"names the shard 'sub/x\.safetensors'", id="in a subfolder"),
        pytest.param({"a": ".."}, r"names the shard '\.\.'", id="the parent folder"),
        pytest.param({"a": "."}, r"names the shard '\.'", id="the folder itself"),
        pytest.param({"a": ""}, "names the shard ''", id="no name"),
        pytest.param({"a": "readme.md"}, r"names the shard 'readme\.md', which is no weight file", id="no weights"),
        pytest.param({"a": "x" * 300}, "names the shard 'x", id="name too long"),
        pytest.param({"a": 1}, "has no weight_map", id="a number as shard"),
        pytest.param(["x.safetensors"], "has no weight_map", id="a list as map"),
        pytest.param(None, "has no weight_map", id="no map"),
        pytest.param({}, "has no weight_map", id="an empty map"),
        pytest.param({"a": "x.safetensors"}, r"x\.safetensors disagree about tensor 'b'", id="tensor not in index"),
        pytest.param(
            {"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"},
            r"x\.safetensors disagree about tensor 'c'",
            id="tensor not in shard",
        ),
        pytest.param(
            {"a": "x.safetensors", "b": "y.safetensors"},
            r"x\.safetensors disagree about tensor 'b'",
            id="tensor stored twice",
        ),
    ],
)
def test_a_faulty_index_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    source = indexed(tmp_path / "in", weight_map, x=["a", "b"], y=["b"])
    (tmp_path / "in" / "readme.md").write_text("words")

    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json.* {message}"):
        _ = source.tensors
