"""Compare ways to bring the tensors of one safetensors file into another, down to the disk.

    python benchmarks/copying.py FILE [--rounds 9]

What `speculators.writer` does was chosen by this. Each way runs in a process of its own; all write what
FILE holds, in the same order, into a file beside it, and sync it. The seconds include the start of a
process, which the first row shows. The last way is the safetensors library's ``serialize_file``, given
pointers into a memory map of FILE.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from measuring import Measured, measure

STEP, BUFFER = 64 << 20, 8 << 20


def in_kernel(source: int, target: int, size: int) -> None:
    """Let the kernel copy (copy_file_range), and sync at the end."""
    position = 0
    while position < size:
        position += os.copy_file_range(source, target, min(STEP, size - position), offset_src=position)
    os.fsync(target)


def in_kernel_synced_beside(source: int, target: int, size: int) -> None:
    """Let the kernel copy, and a thread sync again and again meanwhile."""
    position = 0
    syncing: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as beside:
        while position < size:
            position += os.copy_file_range(source, target, min(STEP, size - position), offset_src=position)
            if syncing is None or syncing.done():
                syncing = beside.submit(os.fsync, target)
    os.fsync(target)


def sendfile(source: int, target: int, size: int) -> None:
    """Let the kernel copy (sendfile), and sync at the end."""
    position = 0
    while position < size:
        position += os.sendfile(target, source, position, min(STEP, size - position))
    os.fsync(target)


def read_and_write(source: int, target: int, size: int) -> None:
    """Read into a buffer, write it, and sync at the end."""
    position = 0
    while position < size:
        position += os.write(target, os.pread(source, min(BUFFER, size - position), position))
    os.fsync(target)


def from_memory_map(source: int, target: int, size: int) -> None:
    """Write from a memory map of the source, and sync at the end."""
    with mmap.mmap(source, 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
        position = 0
        while position < size:
            position += os.write(target, view[position : position + STEP])
    os.fsync(target)


def safetensors(source: Path, target: Path) -> None:
    """Serialize from pointers into a memory map of the source, and sync at the end."""
    import ctypes

    from safetensors import TensorSpec, serialize_file

    with source.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + 8 + length
    specs = {
        name: TensorSpec(
            dtype=NAMES[entry["dtype"]],
            shape=entry["shape"],
            data_ptr=start + entry["data_offsets"][0],
            data_len=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
    serialize_file(specs, target, {"format": "pt"})
    with target.open("rb") as file:
        os.fsync(file.fileno())


NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "I64": "int64", "BOOL": "bool"}

SAFETENSORS = "safetensors, from pointers into a memory map"


def nothing(source: int, target: int, size: int) -> None:
    """Copy nothing, to see what starting costs."""


WAYS: dict[str, Callable[[int, int, int], None]] = {
    "nothing": nothing,
    "copy_file_range": in_kernel,
    "copy_file_range, synced beside": in_kernel_synced_beside,
    "sendfile": sendfile,
    "read and write": read_and_write,
    "write from a memory map": from_memory_map,
}


def table(source: Path, rounds: int) -> str:
    """Measure every way, and return the table."""
    target = source.with_suffix(".copy")
    script = [sys.executable, __file__, str(source), "--way"]
    measured = {
        "cp and fsync": Measured(["sh", "-c", f"cp '{source}' '{target}' && sync '{target}'"], target),
        **{way: Measured([*script, way], target) for way in (*WAYS, SAFETENSORS)},
    }
    measure(rounds, measured.values())
    start, base = measured["nothing"].median, measured["cp and fsync"].median
    lines = ["| way | seconds | from, to | over cp, less the start | peak MB |", "|---|---|---|---|---|"]
    for way, each in measured.items():
        taken = each.median - (0 if way == "cp and fsync" else start)
        lines.append(f"| {way} | {each.median:.2f} | {each.spread} | {taken / base:.2f} | {each.peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every way and print Markdown, or go one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source = arguments.file.resolve()
    if arguments.way is None:
        print(table(source, arguments.rounds))
    elif arguments.way == SAFETENSORS:
        safetensors(source, source.with_suffix(".copy"))
    else:
        with source.open("rb") as reading, source.with_suffix(".copy").open("wb") as writing:
            WAYS[arguments.way](reading.fileno(), writing.fileno(), source.stat().st_size)


if __name__ == "__main__":
    main()
