"""The worst that a file can hold is refused by the command line within seconds, in bounded memory, with one line."""

from __future__ import annotations

import io
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from checkpoints import DATA, VERIFIER

from speculators.json_files import LARGEST, LARGEST_TEXT
from speculators.pickles import LARGEST_PICKLE

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells peak memory")

SECONDS = 20.0
"""None takes more than seven on two slow cores."""

MORE, WITHOUT_TORCH = 300e6, 300e6
"""Bytes of memory that a refusal may take more than an ordinary one, and in all where torch is not imported."""

PROGRAM = """
import atexit, re, sys
from speculators.cli import cli

def tell():
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

atexit.register(tell)
cli(sys.argv[1:])
"""

EMPTY = b"\x80\x02}."
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + EMPTY
ENTRY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def repeated(start: bytes, each: bytes, end: bytes, most: int = LARGEST) -> bytes:
    """Fill a file with one thing again and again."""
    return start + each * ((most - len(start) - len(end)) // len(each)) + end


def counted(start: bytes, each: bytes, end: bytes, count: int) -> bytes:
    """Fill a file with things of different names."""
    return start + b",".join(each % number for number in range(count)) + end


JSON: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: b"[" * LARGEST,
    "lists nested a little less": lambda: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "empty objects": lambda: repeated(b'{"a":[', b"{},", b"{}]}"),
    "as many objects as may be": lambda: b'{"a":[' + b'{"a":1},' * 249_000 + b"{}]}",
    "numbers": lambda: repeated(b'{"a":[', b"1,", b"1]}"),
    "as many keys as may be": lambda: counted(b"{", b'"\\u00e9%x":1', b"}", 499_000),
    "one key again and again": lambda: b"{" + b'"a":1,' * 499_000 + b'"a":2}',
    "as many tensors as may be": lambda: counted(b"{", b'"%d":' + ENTRY, b"}", 83_000),
    "one text": lambda: repeated(b'{"a":"', b"x", b'"}'),
    "one text of wide characters": lambda: repeated(b'{"a":"', "😀".encode(), b'"}', LARGEST_TEXT),
    "one text with a wide character": lambda: repeated(b'{"a":"\\ud83d\\ude00', b"x", b'"}', LARGEST_TEXT),
    "one text with half a character": lambda: repeated(b'{"a":"\\ud800', "😀".encode(), b'"}', LARGEST_TEXT),
    "more than one text may have": lambda: repeated(b'{"a":"\\ud83d\\ude00', b"x", b'"}'),
    "one key": lambda: repeated(b'{"', b"x", b'":1}'),
    "one number": lambda: repeated(b'{"a":', b"1", b"}"),
    "spaces": lambda: b" " * LARGEST,
    "as many shards as may be": lambda: (
        b'{"weight_map":{' + b",".join(b'"%x":"%x.bin"' % (number, number) for number in range(499_000)) + b"}}"
    ),
}
"""What is written as header, index and config."""


def archive(pickled: bytes, **entries: bytes) -> bytes:
    """Return an archive like torch's."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if entries else zipfile.ZIP_STORED) as packed:
        for name, data in ({"version": b"3", "data.pkl": pickled} | entries).items():
            packed.writestr(f"m/{name.replace('_', '/')}", data)
    return file.getvalue()


def directory(count: int, twice: bool = False) -> bytes:
    """Return an archive of many empty entries; the last two of one name, if that is asked for."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("m/data.pkl", EMPTY)
        for number in range(count):
            packed.writestr(f"m/data/{number:06}", b"")
    data = file.getvalue()
    return data.replace(b"%06d" % (count - 1), b"%06d" % (count - 2)) if twice else data


def number(value: int) -> bytes:
    """Pickle a number."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(elements: int, stored: int, stride: bytes, view: bytes = b"") -> bytes:
    """Pickle a tensor of any size over any storage, of which older files say what it is a view of."""
    return (
        b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + number(stored)
        + view
        + b"tQK\x00("
        + number(elements)
        + b"t("
        + stride
        + b"t\x89ccollections\nOrderedDict\n)RtRu."
    )


PICKLES: dict[str, Callable[[], bytes]] = {
    "zeros, compressed": lambda: archive(EMPTY, data_0=bytes(1 << 28)),
    "a pickle of zeros, compressed": lambda: archive(bytes(1 << 28), data_0=b""),
    "many entries": lambda: directory(300_000),
    "as many entries as may be": lambda: directory(60_000),
    "many entries, the last twice": lambda: directory(60_000, twice=True),
    "empty dicts": lambda: archive(repeated(b"\x80\x02", b"}", b".", LARGEST_PICKLE)),
    "as many empty dicts as may be": lambda: archive(repeated(b"\x80\x02", b"}", b".", 999_000)),
    "empty ordered dicts": lambda: archive(
        repeated(b"\x80\x02ccollections\nOrderedDict\nq\x00", b"h\x00)R", b".", LARGEST_PICKLE)
    ),
    "places of a memo": lambda: archive(
        b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", place * 2000) for place in range(830_000)) + b"."
    ),
    "texts": lambda: archive(repeated(b"\x80\x02](", b"X\x00\x00\x00\x00", b"e.", LARGEST_PICKLE)),
    "nested tuples": lambda: archive(repeated(b"\x80\x02)", b"\x85", b".", LARGEST_PICKLE)),
    "a large bytearray": lambda: archive(b"\x80\x02cbuiltins\nbytearray\n" + number(10**10) + b"\x85R."),
    "a bytearray that is not there": lambda: archive(b"\x80\x05\x96" + struct.pack("<Q", 10**10) + b"."),
    "a tensor of 1e12": lambda: archive(tensor(10**12, 10**12, b"K\x01")),
    "a tensor that repeats one number": lambda: archive(tensor(10**12, 0, b"K\x00")),
    "before 1.6, no end of a line": lambda: LEGACY + b"c" + bytes(40 << 20),
    "before 1.6, empty dicts": lambda: LEGACY + repeated(b"\x80\x02", b"}", b".", LARGEST_PICKLE),
    "before 1.6, a tensor of 1e12": lambda: (
        LEGACY + tensor(10**12, 10**12, b"K\x01", b"N") + b"\x80\x02]X\x01\x00\x00\x000a."
    ),
}

NAMES = {"header": "model.safetensors", "index": "model.safetensors.index.json", "config": "config.json"}

CASES = {
    **{f"{kind}: {name}": (NAMES[kind], make) for name, make in JSON.items() for kind in NAMES},
    **{f"pickle: {name}": ("pytorch_model.bin", make) for name, make in PICKLES.items()},
}

SPARSE = {
    "header, 1 GB": ("model.safetensors", struct.pack("<Q", 10**9), 1 << 30),
    "header, 10 GB": ("model.safetensors", struct.pack("<Q", 10**10), 1 << 30),
    "index, 10 GB": ("model.safetensors.index.json", b"", 10 << 30),
    "config, 10 GB": ("config.json", b"", 10 << 30),
    "pickle, 1 GB": ("pytorch_model.bin", LEGACY + b"X\xff\xff\xff\x7f", 1 << 30),
    "archive, 1 GB": ("pytorch_model.bin", b"PK\x03\x04", 1 << 30),
}
"""Files that say that they are long, and take no room: name, beginning, size."""


def refused(folder: Path) -> float:
    """Convert a folder on the command line, which must refuse it with one line, and return its peak memory."""
    arguments = ["convert", str(folder), "--verifier", str(VERIFIER), "--output-path", f"{folder}-out"]
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - start < SECONDS
    errors = [line for line in run.stderr.splitlines() if not line.startswith("Warning: ")]
    assert run.returncode == 3
    assert len(errors) == 1, run.stderr
    assert re.match("Error: .{20}", errors[0])
    assert len(errors[0]) < 5000
    assert not Path(f"{folder}-out").exists()
    return int(run.stdout) * 1024


@cache
def ordinary(name: str) -> float:
    """Return the peak memory of an ordinary refusal of a file that is empty."""
    with tempfile.TemporaryDirectory() as place:
        return refused(written(Path(place), name, b""))


def written(folder: Path, name: str, data: bytes) -> Path:
    """Write one file of a checkpoint that lacks the others."""
    if name != "config.json":
        shutil.copy(DATA / "eagle1-no-bias" / "config.json", folder)
    header = struct.pack("<Q", len(data)) if name == "model.safetensors" and data else b""
    (folder / name).write_bytes(header + data)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_worst_content_is_refused_in_bounded_time_and_memory(case: str, tmp_path: Path) -> None:
    name, make = CASES[case]

    peak = refused(written(tmp_path, name, make()))

    assert peak - ordinary(name) < MORE
    assert name in ("model.safetensors", "pytorch_model.bin") or peak < WITHOUT_TORCH


@pytest.mark.parametrize("case", SPARSE)
def test_a_file_that_says_that_it_is_long_is_refused_unread(case: str, tmp_path: Path) -> None:
    name, start, size = SPARSE[case]
    written(tmp_path, name, b"")
    with (tmp_path / name).open("wb") as file:
        file.write(start)
        file.truncate(size)

    assert refused(tmp_path) - ordinary(name) < MORE
