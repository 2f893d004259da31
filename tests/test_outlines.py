"""Checkpoints that lie elsewhere and are only looked at: little is fetched, and all is refused that is refused here."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from checkpoints import DATA, Tensors, write_checkpoint
from loopback import Fault, Server

from speculators import CheckpointError
from speculators.checkpoint import Checkpoint
from speculators.errors import UnavailableError
from speculators.sources import Access, remote
from speculators.weights import read

# Where a test looks at warnings, it would see those about files that are closed when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

LITTLE = 200_000
"""Bytes that tell the tensors of a checkpoint in one file, and the most that its config and listing take."""

WIDTH = 1024

Place = Callable[[Path], str]
"""Puts a folder somewhere else, and returns its address."""


@pytest.fixture
def elsewhere(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """A Hub and a web server whose faults are soon over, and a place of its own for temporary files."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return server


@pytest.fixture
def web(elsewhere: Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A web server, which is not the Hub."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    def put(folder: Path) -> str:
        elsewhere.folders["files"] = folder.parent
        return f"{elsewhere.url}/files/{folder.name}"

    return put


@pytest.fixture
def hub(elsewhere: Server) -> Place:
    """A Hub."""

    def put(folder: Path) -> str:
        elsewhere.add("org/head", folder)
        return "hf://org/head"

    return put


@pytest.fixture
def driver(elsewhere: Server) -> Iterator[Place]:
    """A driver of fsspec."""
    memory = fsspec.filesystem("memory")

    def put(folder: Path) -> str:
        memory.put(f"{folder}/", "/outlines/head/", recursive=True)
        return "memory://outlines/head"

    yield put
    memory.rm("/outlines", recursive=True)


@pytest.fixture(params=["web", "hub"])
def place(request: pytest.FixtureRequest) -> Place:
    """A place whose bytes are counted."""
    put: Place = request.getfixturevalue(request.param)
    return put


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Open a checkpoint of any format in parts, with a cache of its own."""

    def run(location: str, **more: Any) -> Checkpoint:
        return Checkpoint.at(location, Access(cache_dir=tmp_path / "cache", **more), partly=True)

    return run


Look = Callable[..., Checkpoint]


def head() -> Tensors:
    """Return tensors of every kind that heads have, 8 MB of them."""
    make = torch.Generator().manual_seed(0)
    square = torch.randn(WIDTH, WIDTH, generator=make)
    return {
        "fc.weight": torch.randn(WIDTH, 2 * WIDTH, generator=make).to(torch.bfloat16),
        "lm_head.weight": square,
        "norm.weight": torch.ones(WIDTH, dtype=torch.float16),
        "d2t": torch.arange(500),
        "t2d": torch.arange(WIDTH) % 2 == 0,
        "scale": torch.tensor(3.0),
        "nothing": torch.empty(0, 4),
        "turned": square.T,
        "row": square[7],
    }


def saved(folder: Path, tensors: Tensors | None = None, layout: str = "bin", name: str = "pytorch_model.bin") -> Path:
    """Write a checkpoint, its weights under a name of its own."""
    write_checkpoint(folder, {"model_type": "llama"}, head() if tensors is None else tensors, layout)
    if not layout.startswith("sharded"):
        (folder / "pytorch_model.bin").rename(folder / name)
    return folder


def served(server: Server) -> int:
    """Return how many bytes of bodies were sent; the last are counted when they have arrived already."""
    before, total = -1, server.total()
    while before != total:
        time.sleep(0.03)
        before, total = total, server.total()
    return total


def content(checkpoint: Checkpoint, name: str) -> bytes:
    """Read a whole tensor."""
    return bytes(read(checkpoint.stretch(name)))


def require_same(found: Checkpoint, local: Checkpoint) -> None:
    """Require that two checkpoints hold the same tensors, byte for byte."""
    assert found.tensors == local.tensors
    for name in local.tensors:
        assert content(found, name) == content(local, name), name


@pytest.mark.parametrize("file", ["pytorch_model.bin", "head.pt", "head.pth"])
def test_of_a_pickle_that_is_looked_at_little_is_fetched(
    file: str, hub: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head", name=file)

    found = look(hub(folder)).tensors

    assert found == Checkpoint(folder).tensors
    assert (folder / file).stat().st_size > 8e6
    assert served(elsewhere) < LITTLE
    assert not list((tmp_path / "tmp").iterdir())


def test_it_does_not_matter_where_it_lies(place: Place, look: Look, elsewhere: Server, tmp_path: Path) -> None:
    folder = saved(tmp_path / "head")

    found = look(place(folder))

    assert found.tensors == Checkpoint(folder).tensors
    assert served(elsewhere) < LITTLE
    require_same(found, Checkpoint(folder))


def test_a_driver_of_fsspec_is_asked_for_parts_too(driver: Place, look: Look, tmp_path: Path) -> None:
    folder = saved(tmp_path / "head")

    found = look(driver(folder))

    assert found.tensors == Checkpoint(folder).tensors
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < LITTLE
    require_same(found, Checkpoint(folder))


@pytest.mark.parametrize("name", ["fc.weight", "norm.weight", "d2t", "turned", "row", "nothing"])
def test_of_a_tensor_that_is_read_no_more_than_it_is_fetched(
    name: str, place: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head")
    found = look(place(folder))
    size, before = found.info(name).nbytes, served(elsewhere)

    assert content(found, name) == content(Checkpoint(folder), name)

    assert served(elsewhere) - before < size + 100


def test_of_rows_that_are_read_no_more_than_they_is_fetched(
    place: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head")
    found = look(place(folder))
    before = served(elsewhere) if found.tensors else 0

    assert bytes(found.rows("fc.weight", 500, 503)) == bytes(Checkpoint(folder).rows("fc.weight", 500, 503))

    assert served(elsewhere) - before < 3 * 4 * WIDTH + 100


@pytest.mark.parametrize("layout", ["sharded-bin", "sharded-safetensors"])
def test_of_each_shard_little_is_fetched(
    layout: str, place: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    tensors = {name: tensor.clone().contiguous() for name, tensor in head().items()}
    folder = saved(tmp_path / "head", tensors, layout)

    found = look(place(folder))

    assert found.tensors == Checkpoint(folder).tensors
    assert served(elsewhere) < 3 * LITTLE
    require_same(found, Checkpoint(folder))


def test_of_many_tensors_each_is_found_in_its_place(
    place: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    """Their directory and their pickle are longer than what is fetched at first."""
    folder = saved(tmp_path / "head", {f"layers.{each:04}.weight": torch.full((999,), each) for each in range(1500)})

    found = look(place(folder))

    assert found.tensors == Checkpoint(folder).tensors
    assert served(elsewhere) < 800_000
    for each in (0, 1, 700, 1499):
        assert found.array(f"layers.{each:04}.weight").tolist() == [each] * 999


def test_what_was_looked_at_can_be_looked_at_offline(
    place: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    location = place(saved(tmp_path / "head"))
    online = look(location)
    expected, targets = online.tensors, content(online, "d2t")
    elsewhere.requests.clear()

    found = look(location, offline=True)

    assert (found.tensors, content(found, "d2t")) == (expected, targets)
    with pytest.raises(UnavailableError, match=r"bytes \d+ to \d+ are not in the cache, and offline nothing can be"):
        content(found, "fc.weight")
    assert not elsewhere.requests


def test_what_lies_here_whole_is_not_fetched_in_parts(
    place: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head")
    location = place(folder)
    Checkpoint.at(location, Access(cache_dir=tmp_path / "cache")).fetch()
    before = served(elsewhere)

    require_same(look(location), Checkpoint(folder))

    assert served(elsewhere) - before < 2000


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        """Ask the unpickler to create the folder."""
        return Path.mkdir, (self.folder,)


def repacked(path: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> None:
    """Pack a file anew, with other content in some entries; a keyword ``data_0`` stands for ``data/0``."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(entries)).partition("/")[0]
    entries |= {f"{folder}/{name.replace('_', '/')}": data for name, data in changed.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def with_evil(path: Path) -> None:
    torch.save({**head(), "evil": Evil(path.parent / "executed")}, path)


def with_evil_in_another_case(path: Path) -> None:
    torch.save({"evil": Evil(path.parent / "executed")}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    torch.save(head(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/DATA.pkl", pickled)


def with_two_directories(path: Path) -> None:
    torch.save(head(), path)
    with path.open("ab") as file:
        file.write(path.read_bytes()[-200_000:])


def with_something_behind(path: Path) -> None:
    torch.save(head(), path)
    with path.open("ab") as file:
        file.write(b"more")


def with_zeros(path: Path) -> None:
    torch.save(head(), path)
    repacked(path, zipfile.ZIP_DEFLATED, data_0=bytes(1 << 28))


def with_an_entry_twice(path: Path) -> None:
    torch.save(head(), path)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[-1], b"")


def with_a_short_tensor(path: Path) -> None:
    torch.save(head(), path)
    repacked(path, data_1=bytes(80))


def with_a_long_pickle(path: Path) -> None:
    torch.save(head(), path)
    repacked(path, **{"data.pkl": bytes(5 << 20)})


def with_nested_weights(path: Path) -> None:
    torch.save({"state_dict": head()}, path)


def cut(path: Path) -> None:
    torch.save(head(), path)
    path.write_bytes(path.read_bytes()[:-300_000])


def with_a_changed_pickle(path: Path) -> None:
    torch.save(head(), path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"norm.weight", b"form.weight", 1))


def with_overlapping_entries(path: Path) -> None:
    torch.save(head(), path)
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(next(n for n in archive.namelist() if n.endswith(f"data/{d}"))) for d in "01")
    data = path.read_bytes()
    record = data.rindex(second.filename.encode()) - 4  # in the directory
    path.write_bytes(data[:record] + (first.header_offset + 100).to_bytes(4, "little") + data[record + 4 :])


HOSTILE = [
    with_evil,
    with_evil_in_another_case,
    with_two_directories,
    with_something_behind,
    with_zeros,
    with_an_entry_twice,
    with_a_short_tensor,
    with_a_long_pickle,
    with_nested_weights,
    with_a_changed_pickle,
    with_overlapping_entries,
    cut,
]


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_what_is_refused_here_is_refused_elsewhere_in_the_same_words(
    make: Callable[[Path], None], web: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head")
    make(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as here:
        _ = Checkpoint(folder).tensors
    location = web(folder)

    with pytest.raises(CheckpointError) as there:
        _ = look(location).tensors

    assert str(there.value) == str(here.value).replace(str(folder), location)
    assert served(elsewhere) < LITTLE
    assert not (folder / "executed").exists()
    assert not list((tmp_path / "tmp").iterdir())


def test_a_file_that_says_that_it_is_long_is_refused_unread(
    web: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head", {})
    with (folder / "pytorch_model.bin").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(1 << 34)

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or no PyTorch file"):
        _ = look(web(folder)).tensors

    assert served(elsewhere) < LITTLE


def test_a_tensor_that_is_not_where_the_directory_says_is_refused(web: Place, look: Look, tmp_path: Path) -> None:
    folder = saved(tmp_path / "head")
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(next(name for name in archive.namelist() if name.endswith("data/1")))
    with path.open("r+b") as file:
        file.seek(entry.header_offset)
        file.write(b"PK\x01\x02")
    found = look(web(folder))

    assert found.tensors == Checkpoint(folder).tensors
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged: '.*/data/1' is not where its directory"):
        content(found, "lm_head.weight")


@pytest.mark.filterwarnings("ignore:.*is downloaded although less is needed", "ignore:.*read into memory whole")
@pytest.mark.parametrize("size", [10, 100_000])
def test_whatever_is_damaged_a_checkpoint_error_says_so(size: int, web: Place, tmp_path: Path) -> None:
    """What can be read in spite of it is what is read here."""
    folder = saved(tmp_path / "head", {"a": torch.arange(size), "b": torch.ones(2, 2)})
    path, location = folder / "pytorch_model.bin", web(folder)
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    around = [*range(4000), *range(len(sound) - 4000, len(sound))]
    refused = 0
    for number in range(100):
        damaged = bytearray(sound)
        for at in generator.choice(around, size=generator.integers(1, 4)):
            damaged[at % len(sound)] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            found = Checkpoint.at(location, Access(cache_dir=tmp_path / f"cache{number}"), partly=True)
            read_all = {name: content(found, name) for name in found.tensors}
        except CheckpointError:
            refused += 1
            continue
        here = Checkpoint(folder)
        assert read_all == {name: content(here, name) for name in here.tensors}

    assert refused > 20  # the rest of the bytes are padding, which nobody reads


def reversed_bytes(path: Path) -> None:
    torch.save({"a": torch.arange(50_000)}, path)
    repacked(path, byteorder=b"big", data_0=np.arange(50_000, dtype=">i8").tobytes())


def compressed(path: Path) -> None:
    torch.save({"a": torch.randn(100_000)}, path)
    repacked(path, zipfile.ZIP_DEFLATED)


def legacy(path: Path) -> None:
    torch.save(head(), path, _use_new_zipfile_serialization=False)


@pytest.mark.filterwarnings("ignore:.*read into memory whole")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (legacy, r"is in PyTorch's format of before 1\.6, or no PyTorch file"),
        (compressed, "is compressed"),
        (reversed_bytes, "stores numbers with their bytes in reverse"),
    ],
)
def test_a_format_that_has_no_parts_is_fetched_whole_and_that_is_said(
    make: Callable[[Path], None], reason: str, place: Place, look: Look, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head")
    make(folder / "pytorch_model.bin")

    with pytest.warns(UserWarning, match=rf"pytorch_model\.bin {reason}; all of \d+ MB is downloaded although less is"):
        require_same(look(location := place(folder)), Checkpoint(folder))

    require_same(look(location, offline=True), Checkpoint(folder))


def test_a_server_without_ranges_is_read_whole_and_that_is_said(
    place: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head")
    elsewhere.ranges = False

    with pytest.warns(UserWarning, match=r"model\.bin is on a server that sends whole files only; all of 8 MB is down"):
        require_same(look(place(folder)), Checkpoint(folder))


@pytest.mark.parametrize("skip", [1, 2, 3], ids=["at the beginning", "in the outline", "at a tensor"])
def test_a_server_that_stops_sending_parts_is_read_whole(
    skip: int, web: Place, look: Look, elsewhere: Server, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head")
    whole = (folder / "pytorch_model.bin").read_bytes()
    elsewhere.faults.append(
        Fault("pytorch_model.bin$", body=whole, headers={"Content-Range": None}, skip=skip, as_status=200)
    )

    with pytest.warns(UserWarning, match="sends whole files only; all of 8 MB is downloaded although less is needed"):
        require_same(look(web(folder)), Checkpoint(folder))


def test_a_file_that_changes_while_it_is_looked_at_is_not_mixed(web: Place, look: Look, tmp_path: Path) -> None:
    folder = saved(tmp_path / "head")
    found = look(web(folder))
    assert found.tensors
    shutil.rmtree(folder)
    saved(folder, {name: tensor.clone() + 1 for name, tensor in head().items() if name != "t2d"})

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin was changed on the server while it was read"):
        content(found, "fc.weight")


def test_a_system_that_does_not_tell_what_is_mapped_looks_at_little_and_reads_the_whole(
    web: Place, look: Look, elsewhere: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators.pickles.MAPPINGS", tmp_path / "maps")
    folder = saved(tmp_path / "head")
    found = look(web(folder))

    assert found.tensors == Checkpoint(folder).tensors
    assert content(found, "nothing") == b""
    assert served(elsewhere) < LITTLE
    with pytest.warns(UserWarning, match="does not show from outside where it holds a tensor; all of 8 MB is download"):
        require_same(found, Checkpoint(folder))


def test_a_tensor_whose_signs_are_turned_when_it_is_read_is_read_exactly(
    web: Place, look: Look, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head", {"a": torch._neg_view(torch.arange(50_000))})

    with pytest.warns(UserWarning, match="all of 0 MB is downloaded"):
        require_same(look(web(folder)), Checkpoint(folder))


def test_no_room_for_temporary_files_is_said(
    web: Place, look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "head")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))

    with pytest.raises(UnavailableError, match=r"no temporary file can be written to \S+nowhere .*TMPDIR"):
        _ = look(web(folder)).tensors


def test_no_message_names_a_temporary_file(web: Place, look: Look, tmp_path: Path) -> None:
    folder = saved(tmp_path / "head", {"a": torch.ones(2).to_sparse()})

    with pytest.raises(CheckpointError) as caught:
        _ = look(location := web(folder)).tensors

    assert re.match(rf"{location}/pytorch_model\.bin stores tensor 'a' in a way", str(caught.value))
    assert "speculators-" not in str(caught.value)


def test_a_trained_head_is_looked_at(place: Place, look: Look) -> None:
    found = look(place(DATA / "eagle3"))

    require_same(found, Checkpoint(DATA / "eagle3"))
    assert found.config == json.loads((DATA / "eagle3" / "config.json").read_text())
