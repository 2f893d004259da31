"""Pickled PyTorch files: exact bytes, read from where they lie, and nothing in them executed."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import VERIFIER

from speculators import CheckpointError
from speculators.pickles import PickleFile, digest
from speculators.weights import Extent, TensorInfo, pieces, read


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        """Ask the unpickler to create the folder."""
        return Path.mkdir, (self.folder,)


def content(file: PickleFile, name: str) -> bytes:
    """Read a whole tensor."""
    return bytes(read(file.stretch(name, 0, file.tensors[name].nbytes)))


def storage_key(path: Path) -> bytes:
    """Return the name that a legacy pickle of one tensor gives its storage."""
    return re.findall(rb"[0-9]{8,}", path.read_bytes())[-1]


def test_a_pickled_tensor_larger_than_a_chunk_arrives_exactly_in_pieces(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((4 << 20) + 4)
    torch.save({"a": torch.frombuffer(bytearray(data), dtype=torch.float32)}, tmp_path / "x.bin")

    found = list(pieces(PickleFile(tmp_path / "x.bin").stretch("a", 0, len(data))))

    assert [len(piece) for piece in found] == [4194304, 4]
    assert b"".join(found) == data


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:.*before 1.6")
def test_a_pickle_that_would_execute_code_is_refused_and_does_not_execute_it(legacy: bool, tmp_path: Path) -> None:
    evil = {"a": torch.ones(2), "b": Evil(tmp_path / "executed")}
    torch.save(evil, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)

    with pytest.raises(CheckpointError, match=r"x\.bin is refused.*Nothing in it was executed"):
        PickleFile(tmp_path / "x.bin")

    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        pytest.param({"state_dict": {"a": torch.ones(2)}}, "holds a dict of 'state_dict': dict", id="nested"),
        pytest.param({"a": torch.ones(2), "epoch": 3}, "'epoch': int", id="a number beside tensors"),
        pytest.param([torch.ones(2)], "holds a list", id="list"),
        pytest.param(torch.ones(2), "holds a Tensor", id="one tensor"),
    ],
)
def test_a_pickle_of_something_else_than_tensors_by_name_is_refused(
    saved: object, message: str, tmp_path: Path
) -> None:
    torch.save(saved, tmp_path / "x.bin")

    with pytest.raises(CheckpointError, match=rf"x\.bin {message}|x\.bin holds .*{message}") as caught:
        PickleFile(tmp_path / "x.bin")

    assert "Save the module's state_dict() by itself." in str(caught.value)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.ones(2).to_sparse(), id="sparse"),
        pytest.param(torch.ones(2, dtype=torch.complex64), id="complex"),
        pytest.param(torch.ones(2, device="meta"), id="without data"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": tensor}, tmp_path / "x.bin")

    with pytest.raises(CheckpointError, match=r"x\.bin stores tensor 'a' in a way that is not supported"):
        PickleFile(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", id="pointer of git-lfs"),
        pytest.param(b"<!DOCTYPE html>", id="web page"),
        pytest.param(b"PK\3\4", id="start of an archive"),
        pytest.param(b"\x80\2.", id="pickle of nothing"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*before 1.6")
def test_a_file_that_is_no_pytorch_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(data)

    with pytest.raises(CheckpointError, match=r"x\.bin"):
        PickleFile(tmp_path / "x.bin")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:.*before 1.6")
def test_a_truncated_pickle_is_refused_wherever_it_ends(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()

    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"x\.bin"):
            PickleFile(path)


@pytest.mark.filterwarnings("ignore:.*before 1.6")
def test_a_legacy_pickle_whose_storages_are_lost_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    before, key, after = path.read_bytes().rpartition(storage_key(path))
    path.write_bytes(before + b"0" * len(key) + after)

    with pytest.raises(CheckpointError, match=r"x\.bin"):
        PickleFile(path)


def test_strided_and_shared_tensors_are_read_exactly(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.int32).view(3, 4)
    saved = {"whole": base, "transposed": base.T, "row": base[1], "column": base[:, 2], "once more": base}
    saved["expanded"] = torch.tensor([7], dtype=torch.int32).expand(3)
    torch.save(saved, tmp_path / "x.bin")

    file = PickleFile(tmp_path / "x.bin")

    found = {name: np.frombuffer(content(file, name), "<i4").tolist() for name in file.tensors}
    assert found == {
        "whole": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        "transposed": [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
        "row": [4, 5, 6, 7],
        "column": [2, 6, 10],
        "once more": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        "expanded": [7, 7, 7],
    }
    assert file.tensors["transposed"] == TensorInfo("I32", (4, 3))


@pytest.mark.parametrize(
    ("tensor", "info", "data"),
    [
        (torch.tensor([1.0, -2.0], dtype=torch.bfloat16), TensorInfo("BF16", (2,)), b"\x80\x3f\x00\xc0"),
        (torch.tensor([1.0, -2.0], dtype=torch.float16), TensorInfo("F16", (2,)), b"\x00\x3c\x00\xc0"),
        (torch.tensor([True, False]), TensorInfo("BOOL", (2,)), b"\1\0"),
        (torch.tensor(258), TensorInfo("I64", ()), b"\2\1\0\0\0\0\0\0"),
        (torch.empty(0, 4), TensorInfo("F32", (0, 4)), b""),
        (torch.tensor([1.0]).to(torch.float8_e4m3fn), TensorInfo("F8_E4M3", (1,)), b"\x38"),
        (torch.nn.Parameter(torch.ones(1)), TensorInfo("F32", (1,)), b"\x00\x00\x80\x3f"),
    ],
    ids=["bfloat16", "float16", "bool", "scalar", "empty", "float8", "parameter"],
)
def test_every_kind_of_pickled_tensor_is_read_exactly(
    tensor: torch.Tensor, info: TensorInfo, data: bytes, tmp_path: Path
) -> None:
    torch.save({"a": tensor}, tmp_path / "x.bin")

    file = PickleFile(tmp_path / "x.bin")

    assert file.tensors == {"a": info}
    assert content(file, "a") == data


def test_a_pickle_in_the_format_of_before_1_6_is_read_with_a_warning(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1, 2])}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)

    with pytest.warns(UserWarning, match=r"x\.bin is in PyTorch's format of before 1\.6"):
        file = PickleFile(tmp_path / "x.bin")

    assert content(file, "a") == b"\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0"


def lies(file: PickleFile, name: str) -> bool:
    """Tell whether a tensor's bytes are where the file is said to hold them."""
    found = file.stretch(name, 0, file.tensors[name].nbytes)
    assert isinstance(found, Extent), name
    return found.path.read_bytes()[found.start : found.start + found.size] == bytes(read(found))


def rezip(
    path: Path, order: Callable[[list[str]], list[str]] = list, compression: int = zipfile.ZIP_STORED
) -> zipfile.ZipFile:
    """Pack a file anew as other tools would: in another order, compressed, without torch's alignment."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in order(list(content)):
            archive.writestr(name, content[name])
    return archive


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_tensors_of_one_size_are_found_each_in_its_place(count: int, tmp_path: Path) -> None:
    saved = {str(number): torch.full((100,), number) for number in range(count)}
    torch.save(saved, tmp_path / "x.bin")

    file = PickleFile(tmp_path / "x.bin")

    assert {name: np.frombuffer(content(file, name), "<i8").tolist() for name in file.tensors} == {
        str(number): [number] * 100 for number in range(count)
    }
    assert all(lies(file, name) for name in file.tensors)


def test_views_are_copied_from_within_their_storage(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.int32).view(3, 4)
    torch.save({"rows": base[1:], "turned": base.T, "negative": torch._neg_view(base)}, tmp_path / "x.bin")

    file = PickleFile(tmp_path / "x.bin")

    assert lies(file, "rows")
    assert np.frombuffer(content(file, "rows"), "<i4").tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert not isinstance(file.stretch("turned", 0, 48), Extent)
    assert not isinstance(file.stretch("negative", 0, 48), Extent)
    assert np.frombuffer(content(file, "negative"), "<i4").tolist() == [-number for number in range(12)]


def test_a_file_that_was_packed_anew_in_another_order_is_read_exactly(tmp_path: Path) -> None:
    saved = {str(number): torch.full((100,), number) for number in range(4)}
    torch.save(saved, tmp_path / "x.bin")
    rezip(tmp_path / "x.bin", order=lambda names: names[::-1])

    file = PickleFile(tmp_path / "x.bin")

    assert {name: np.frombuffer(content(file, name), "<i8").tolist() for name in file.tensors} == {
        str(number): [number] * 100 for number in range(4)
    }
    digest(tmp_path / "x.bin", Event())


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_a_compressed_file_is_read_with_a_warning(size: int, tmp_path: Path) -> None:
    torch.save({"a": torch.arange(size)}, tmp_path / "x.bin")
    rezip(tmp_path / "x.bin", compression=zipfile.ZIP_DEFLATED)

    with pytest.warns(UserWarning, match=r"x\.bin is compressed and is read into memory whole"):
        file = PickleFile(tmp_path / "x.bin")

    assert np.array_equal(np.frombuffer(content(file, "a"), "<i8"), np.arange(size))


def change_entries(path: Path, **changed: bytes) -> None:
    """Pack a file anew with other content in some entries; a keyword ``data_0`` stands for ``data/0``."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries |= {f"{path.stem}/{name.replace('_', '/')}": data for name, data in changed.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_numbers_whose_bytes_are_reversed_are_put_in_order(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1, 2])}, tmp_path / "x.bin")
    change_entries(tmp_path / "x.bin", byteorder=b"big", data_0=b"\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\2")

    file = PickleFile(tmp_path / "x.bin")

    assert content(file, "a") == b"\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0"


@pytest.mark.parametrize("told", [True, False], ids=["mappings told", "not told"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((80, 1600), id="too few bytes"),
        pytest.param((808, 1600), id="too many bytes"),
        pytest.param((1600, 800), id="the size of the other"),
    ],
)
def test_a_tensor_that_the_file_holds_in_another_size_is_refused(
    sizes: tuple[int, int], told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not told:
        monkeypatch.setattr("speculators.pickles.MAPPINGS", tmp_path / "maps")
    torch.save({"a": torch.arange(100), "b": torch.arange(200), "c": torch.arange(300)}, tmp_path / "x.bin")
    change_entries(tmp_path / "x.bin", data_0=bytes(sizes[0]), data_1=bytes(sizes[1]))

    with pytest.raises(CheckpointError, match=r"x\.bin is damaged: it does not hold as many bytes of each tensor"):
        PickleFile(tmp_path / "x.bin")


@pytest.mark.parametrize("told", [True, False], ids=["mappings told", "not told"])
def test_another_entry_of_the_right_size_does_not_make_up_for_one_that_is_cut(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not told:
        monkeypatch.setattr("speculators.pickles.MAPPINGS", tmp_path / "maps")
    torch.save({"a": torch.arange(8)}, tmp_path / "x.bin")
    change_entries(tmp_path / "x.bin", data_0=bytes(32), zzz=bytes(64), data_zzz=bytes(64))

    with pytest.raises(CheckpointError, match=r"x\.bin is damaged: it does not hold as many bytes of each tensor"):
        PickleFile(tmp_path / "x.bin")


def test_bytes_behind_the_last_element_are_nobodys(tmp_path: Path) -> None:
    buffer = torch.arange(9, dtype=torch.uint8)
    torch.save({"a": buffer[:-1].view(torch.int32)}, tmp_path / "x.bin")

    file = PickleFile(tmp_path / "x.bin")

    assert content(file, "a") == bytes(range(8))


def directories(one: bytes, other: bytes) -> bytes:
    """Join two archives of the same names into one, whose end record points to the first directory but follows both."""
    parts = []
    for data in (one, other):
        end = data.rindex(b"PK\5\6")
        size, start = struct.unpack("<II", data[end + 12 : end + 20])
        parts.append((data[:start], bytearray(data[start : start + size])))
    (first, directory), (second, hidden) = parts
    place = 0
    while place < len(hidden):
        name, extra, comment = struct.unpack("<HHH", hidden[place + 28 : place + 34])
        (offset,) = struct.unpack("<I", hidden[place + 42 : place + 46])
        # Python takes all offsets to be wrong by as much as the directory is.
        hidden[place + 42 : place + 46] = struct.pack("<I", offset + len(first) - len(directory))
        place += 46 + name + extra + comment
    entries = struct.unpack("<H", one[one.rindex(b"PK\5\6") + 10 :][:2])[0]
    size = len(directory)
    record = struct.pack("<HHHHIIH", 0, 0, entries, entries, size, len(first) + len(second), 0)
    return first + second + bytes(directory) + bytes(hidden) + b"PK\5\6" + record


def packed(tensors: dict[str, torch.Tensor], path: Path) -> bytes:
    """Return an archive as zip tools write it."""
    torch.save(tensors, path)
    file = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(file, "w") as anew:
        for entry in archive.infolist():
            anew.writestr(zipfile.ZipInfo(entry.filename), archive.read(entry))
    return file.getvalue()


def test_an_archive_in_which_torch_would_see_something_else_is_refused(tmp_path: Path) -> None:
    seen, screened = (packed({name: torch.ones(2)}, tmp_path / "x.bin") for name in ("a", "b"))
    (tmp_path / "x.bin").write_bytes(directories(seen, screened))

    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        assert b"b" in archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    assert list(torch.load(tmp_path / "x.bin", weights_only=True)) == ["a"]
    with pytest.raises(CheckpointError, match=r"its directory starts at byte \d+, its end record says \d+"):
        PickleFile(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        pytest.param(lambda data: data + b"more", "something follows its end record", id="bytes at the end"),
        pytest.param(
            lambda data: data[:-34] + struct.pack("<Q", 0) + data[-26:],
            "its end records do not follow each other",
            id="another record of a large archive",
        ),
    ],
)
def test_an_archive_that_ends_in_another_way_is_refused(
    wrong: Callable[[bytes], bytes], found: str, tmp_path: Path
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(wrong((tmp_path / "x.bin").read_bytes()))

    with pytest.raises(CheckpointError, match=rf"x\.bin is damaged or no PyTorch file: {found}"):
        PickleFile(tmp_path / "x.bin")


LIMITED = """
import resource, sys
from pathlib import Path
import numpy, torch
from speculators.cli import cli

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (80 << 20),) * 2)
cli(sys.argv[1:])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux alone holds a process to its addresses")
def test_a_lack_of_memory_is_not_taken_for_damage_or_a_plugin_s_fault(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(100 << 20, dtype=torch.uint8)}, tmp_path / "head" / "pytorch_model.bin")
    command = ["convert", str(tmp_path / "head"), "--verifier", str(VERIFIER), "--output-path", str(tmp_path / "out")]

    found = subprocess.run([sys.executable, "-c", LIMITED, *command], check=False, capture_output=True, text=True)

    assert found.returncode == 5, found.stderr
    assert "out of memory" in found.stderr


def test_a_comparison_that_nobody_waits_for_ends_early(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(8)}, tmp_path / "x.bin")
    change_entries(tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(data.replace(torch.arange(8).numpy().tobytes(), bytes(64)))
    stopped = Event()

    with pytest.raises(CheckpointError, match=r"Bad CRC-32 for file 'x/data/0'"):
        digest(tmp_path / "x.bin", stopped)
    stopped.set()
    digest(tmp_path / "x.bin", stopped)


@pytest.mark.filterwarnings("ignore:.*(before 1.6|compressed)")
def test_whatever_is_damaged_a_checkpoint_error_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(3), "b": torch.ones(2, 2)}, path)
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(sound)
        for place in generator.integers(len(sound), size=generator.integers(1, 4)):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            file = PickleFile(path)
            for name in file.tensors:
                content(file, name)
            digest(path, Event())
        except CheckpointError:
            refused += 1

    assert refused > 200  # the rest of the bytes are padding, which nobody reads


@pytest.mark.parametrize("key", [0, ("a", "b"), None], ids=str)
def test_tensors_under_something_else_than_names_are_refused(key: object, tmp_path: Path) -> None:
    torch.save({key: torch.ones(2), "0": torch.zeros(2)}, tmp_path / "x.bin")

    with pytest.raises(CheckpointError, match=r"x\.bin holds a dict of .*, expected a flat dict of names and tensors"):
        PickleFile(tmp_path / "x.bin")


ONE = torch.arange(6.0).view(3, 2)


@pytest.mark.parametrize("file", ["mapped", "not told", "legacy"])
@pytest.mark.parametrize(
    ("view", "expected"),
    [
        pytest.param(ONE[:1, 1], [1.0], id="one element of a column"),
        pytest.param(ONE[1:2, :1], [2.0], id="one element of a matrix"),
        pytest.param(ONE[:0, 1], [], id="no element of a column"),
        pytest.param(ONE[1, 1], [3.0], id="a number"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*before 1.6")
def test_a_view_of_one_element_or_none_is_read_exactly(
    view: torch.Tensor, expected: list[float], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file == "not told":
        monkeypatch.setattr("speculators.pickles.MAPPINGS", tmp_path / "maps")
    torch.save({"a": view}, tmp_path / "x.bin", _use_new_zipfile_serialization=file != "legacy")

    assert np.frombuffer(content(PickleFile(tmp_path / "x.bin"), "a"), "<f4").tolist() == expected


LISTINGS = {
    "none": None,
    "empty": "",
    "of something else": "7f00-7f01 r--p 0 fe:00 1",
    "short lines": "7f00-7f01 r--p",
    "no numbers": "7f00-7f01 r--p 0 fe:00 inode",
}


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS)
def test_a_system_that_does_not_tell_what_is_mapped_reads_the_same(
    listing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listing is not None:
        (tmp_path / "maps").write_text(listing)
    monkeypatch.setattr("speculators.pickles.MAPPINGS", tmp_path / "maps")
    torch.save({"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])}, tmp_path / "x.bin")

    file = PickleFile(tmp_path / "x.bin")

    assert not isinstance(file.stretch("a", 0, 16), Extent)
    assert content(file, "a") == b"\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0"
    assert bytes(read(file.stretch("b", 8, 16))) == b"\4\0\0\0\0\0\0\0"
