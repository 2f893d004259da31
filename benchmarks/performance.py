"""Measure conversions against ``cp`` and print the table of docs/performance.md.

    python benchmarks/performance.py [--folder DIR] [--rounds 5] [--existing PYTHON] [--growth]

Every round runs all commands once, one after another, so that a slow minute of the machine falls on all of
them; reported are medians. ``--existing`` names a Python that has speculators 0.9.0, to measure it beside.
Needs about 30 GB in DIR with ``--growth``, 12 GB without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
SPECULATORS = [sys.executable, "-m", "speculators"]
SIZES = {"0.25 GB": 700_000_000, "1 GB": 1_000_000_000, "4 GB": 4_000_000_000}
SHARDS = (1, 8, 64)


@dataclass
class Measured:
    """Wall times in seconds and the highest peak of memory in MB."""

    command: list[str]
    output: Path | None = None
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0

    def run(self) -> None:
        """Run the command once, with a fresh output."""
        if self.output is not None:
            shutil.rmtree(self.output, ignore_errors=True)
        started = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - started)
        if status:
            raise SystemExit(
                f"{' '.join(self.command)} failed: {process.stderr.read().decode() if process.stderr else ''}"
            )
        self.peak = max(self.peak, usage.ru_maxrss / 1000)

    @property
    def median(self) -> float:
        """Median wall time."""
        return statistics.median(self.seconds)


def make(folder: Path, *options: str) -> Path:
    """Make a head unless it is there."""
    if not folder.exists():
        subprocess.run([sys.executable, str(HERE / "heads.py"), str(folder), *options], check=True)
    return folder


def weight_bytes(folder: Path) -> int:
    """Add up the weight files of a head."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


def copied(head: Path, output: Path) -> Measured:
    """Copy the weights of a head and sync them."""
    files = " ".join(str(file) for file in head.iterdir() if file.suffix in (".safetensors", ".bin"))
    return Measured(["sh", "-c", f"mkdir {output} && cp {files} {output} && sync {output}/*"], output)


def converted(head: Path, output: Path, *options: str) -> Measured:
    """Convert a head."""
    arguments = ["convert", str(head), "--algorithm", "eagle3", "--verifier", str(head / "verifier")]
    return Measured([*SPECULATORS, *arguments, "--output-path", str(output), *options], output)


def existing(python: str, head: Path, output: Path) -> Measured:
    """Convert a head with the library that was there before."""
    program = (
        "from speculators.convert.eagle.eagle3_converter import Eagle3Converter as C;"
        f"C().convert({str(head)!r}, {str(output)!r}, {str(head / 'verifier')!r}, validate=False)"
    )
    return Measured([python, "-c", program], output)


def measure(rounds: int, measured: dict[str, Measured]) -> None:
    """Run everything ``rounds`` times, after one round that warms caches and is not counted."""
    for number in range(rounds + 1):
        for each in measured.values():
            each.run()
            if number == 0:
                each.seconds, each.peak = [], 0.0
    for each in measured.values():
        if each.output is not None:
            shutil.rmtree(each.output, ignore_errors=True)


def main() -> None:
    """Measure, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "speculators-performance")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--existing", help="Python that has speculators 0.9.0")
    parser.add_argument("--growth", action="store_true", help="also measure other sizes and numbers of shards")
    arguments = parser.parse_args()
    folder, rounds = arguments.folder, arguments.rounds
    out = folder / "out"

    head, pickled = make(folder / "head"), make(folder / "head-bin", "--bin")
    structure = folder / "structure"
    if not structure.exists():
        subprocess.run(converted(head, structure, "--no-validate").command, check=True, stdout=subprocess.DEVNULL)
    measured = {
        "`python -c pass`": Measured([sys.executable, "-c", "pass"]),
        "`import torch`": Measured([sys.executable, "-c", "import torch"]),
        "`speculators --help`": Measured([*SPECULATORS, "--help"]),
        "`speculators convert --list-algorithms`": Measured([*SPECULATORS, "convert", "--list-algorithms"]),
        "`validate --level structure`": Measured(
            [*SPECULATORS, "validate", str(structure), "--level", "structure", "--verifier", str(head / "verifier")]
        ),
        "cp and fsync, safetensors": copied(head, out / "cp"),
        "convert, safetensors, `--no-validate`": converted(head, out / "safe", "--no-validate"),
        "cp and fsync, bin": copied(pickled, out / "cp-bin"),
        "convert, bin, `--no-validate`": converted(pickled, out / "bin", "--no-validate"),
        "convert, safetensors, default validation": converted(head, out / "checked"),
    }
    if arguments.existing:
        measured["speculators 0.9.0, safetensors"] = existing(arguments.existing, head, out / "existing")
    out.mkdir(exist_ok=True)
    measure(rounds, measured)

    print(f"{weight_bytes(head) / 1e9:.2f} GB, {rounds} rounds, medians\n")
    print("| what | seconds | over cp | peak MB |\n|---|---|---|---|")
    for name, each in measured.items():
        base = measured["cp and fsync, bin" if "bin" in name else "cp and fsync, safetensors"].median
        print(f"| {name} | {each.median:.2f} | {each.median / base:.2f} | {each.peak:.0f} |")
    if not arguments.growth:
        return

    print("\n| head | GB | cp and fsync | convert | GB/s | peak MB |\n|---|---|---|---|---|---|")
    heads = {name: make(folder / f"size-{size}", "--size", str(size)) for name, size in SIZES.items()}
    for shards in SHARDS:
        path = folder / f"shards-{shards}"
        heads[f"{shards} shards"] = make(path, "--size", "2000000000", "--layers", "8", "--shards", str(shards))
    for name, path in heads.items():
        pair = {"cp": copied(path, out / "cp"), "convert": converted(path, out / "own", "--no-validate")}
        measure(rounds, pair)
        size, taken = weight_bytes(path) / 1e9, pair["convert"]
        print(
            f"| {name} | {size:.2f} | {pair['cp'].median:.2f} | {taken.median:.2f} "
            f"| {size / taken.median:.2f} | {taken.peak:.0f} |"
        )


if __name__ == "__main__":
    main()
