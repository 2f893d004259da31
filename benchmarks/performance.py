"""Measure conversions against ``cp`` and hold them to the bars of docs/performance.md.

    python benchmarks/performance.py [--folder DIR] [--rounds 5] [--existing PYTHON] [--write]

Prints Markdown; ``--write`` puts it into docs/performance.md and draws the plot beside it, for which
matplotlib is needed (``pip install -r benchmarks/requirements.txt``). ``--existing`` names a Python that
has speculators 0.9.0, to measure it beside. The heads are made once and kept in DIR, which takes about
25 GB; a run takes about 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import copying
from measuring import Measured, measure

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PLOT = PAGE.with_suffix(".svg")
SPECULATORS = str(Path(sys.executable).with_name("speculators"))

WEIGHTS = (".safetensors", ".bin")
VERIFIER = "verifier"

TINY = HERE.parent / "tests" / "data" / "eagle1-no-bias"
"""A head of some hundred kB, whose conversion takes as long as it takes to start."""

LARGE = 4 * 1_900_000_000

SIZES = (250_000_000, 1_000_000_000, 4_000_000_000)
SHARDS = (1, 8, 64)
GROWING = ("--hidden", "1024", "--layers", "8")
"""Shapes of the heads of other sizes: enough tensors for 64 shards, and little besides what grows."""

MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Bar:
    """What must be true of a measured command.

    Attributes:
        text: How the bars are called.
        seconds: The longest time.
        peak: The highest peak of memory in MB.
    """

    text: str
    seconds: float = float("inf")
    peak: float = float("inf")

    def verdict(self, measured: Measured) -> str:
        """Say whether the bar is met."""
        return "yes" if measured.median <= self.seconds and measured.peak <= self.peak else "**no**"


def make(folder: Path, *options: str) -> Path:
    """Make a head unless it is there."""
    if not folder.exists():
        subprocess.run([sys.executable, str(HERE / "heads.py"), str(folder), *options], check=True)
    return folder


def weight_bytes(folder: Path) -> int:
    """Add up the weight files of a head."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)


def embedless_bytes(head: Path) -> int:
    """Add up what a head in one safetensors file holds besides its token embeddings."""
    with (head / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    first, last = header["embed_tokens.weight"]["data_offsets"]
    return weight_bytes(head) - 8 - length - (last - first)


def copied(head: Path, output: Path) -> Measured:
    """Copy the weights of a head and sync them."""
    files = " ".join(f"'{file}'" for file in sorted(head.iterdir()) if file.suffix in WEIGHTS)
    return Measured(["sh", "-c", f"mkdir '{output}' && cp {files} '{output}' && sync '{output}'/*"], output)


def conversion(program: str, head: Path, output: Path, *options: str) -> list[str]:
    """Return the command that converts a head."""
    arguments = ["--algorithm", "eagle3", "--verifier", str(head / VERIFIER), "--output-path", str(output)]
    return [program, "convert", str(head), *arguments, *options]


def converted(head: Path, output: Path, *options: str) -> Measured:
    """Convert a head."""
    return Measured(conversion(SPECULATORS, head, output, *options), output)


def existing(python: str, head: Path, output: Path) -> Measured:
    """Convert a head with speculators 0.9.0, whose own command always validates."""
    program = (
        "import sys; from speculators.convert import convert_model; "
        "convert_model(sys.argv[1], verifier=sys.argv[2], algorithm='eagle3', output_path=sys.argv[3])"
    )
    return Measured([python, "-c", program, str(head), str(head / VERIFIER), str(output)], output)


def main_table(folder: Path, rounds: int, python: str | None) -> str:
    """Measure the real head and what has a bar, and return the table."""
    head, pickled, out = make(folder / "head"), make(folder / "head-bin", "--bin"), folder / "out"
    large = make(folder / "head-large", "--size", str(LARGE))
    kept = folder / "converted"
    command = conversion(SPECULATORS, head, kept, "--no-validate", "--overwrite")
    subprocess.run(command, check=True, capture_output=True)
    check = [SPECULATORS, "validate", str(kept), "--level", "structure", "--verifier", str(head / VERIFIER)]
    rows = {
        "`python -c pass`": Measured([sys.executable, "-c", "pass"]),
        "`import torch`": Measured([sys.executable, "-c", "import torch"]),
        "`speculators --help`": Measured([SPECULATORS, "--help"]),
        "`speculators convert --list-algorithms`": Measured([SPECULATORS, "convert", "--list-algorithms"]),
        "`speculators validate --level structure`": Measured(check),
        "cp and fsync, safetensors": copied(head, out),
        "convert, safetensors, `--no-validate`": converted(head, out, "--no-validate"),
        "cp and fsync, four times larger": copied(large, out),
        "convert, four times larger, `--no-validate`": converted(large, out, "--no-validate"),
        "cp and fsync, bin": copied(pickled, out),
        "convert, bin, `--no-validate`": converted(pickled, out, "--no-validate"),
        "convert, safetensors, validated (`forward`)": converted(head, out),
    }
    if python:
        program = str(Path(python).with_name("speculators"))
        rows["speculators 0.9.0 `--help`"] = Measured([program, "--help"])
        rows["speculators 0.9.0, safetensors, not validated"] = existing(python, head, out)
    measure(rounds, rows.values())

    start = rows["`python -c pass`"].median
    torch = rows["`import torch`"].median - start
    cp, cp_large, cp_bin = (
        rows[name].median
        for name in ("cp and fsync, safetensors", "cp and fsync, four times larger", "cp and fsync, bin")
    )
    validated = embedless_bytes(head) / 1e6 + 900
    bars = {
        "`speculators --help`": Bar("0.25 s over `pass`", start + 0.25),
        "`speculators convert --list-algorithms`": Bar("0.4 s over `pass`", start + 0.4),
        "`speculators validate --level structure`": Bar("0.5 s over `pass`, 100 MB", start + 0.5, 100),
        "convert, safetensors, `--no-validate`": Bar("1.3 x cp + 0.5 s, 150 MB", 1.3 * cp + 0.5, 150),
        "convert, four times larger, `--no-validate`": Bar("1.3 x cp + 0.5 s, 150 MB", 1.3 * cp_large + 0.5, 150),
        "convert, bin, `--no-validate`": Bar("1.5 x cp + `import torch`, 700 MB", 1.5 * cp_bin + torch, 700),
        "convert, safetensors, validated (`forward`)": Bar(f"12 s, {validated:.0f} MB", 12, validated),
    }
    lines = [
        f"{weight_bytes(head) / 1e9:.2f} GB ({weight_bytes(large) / 1e9:.2f} GB the larger one), "
        f"medians of {rounds} runs, {described_machine(folder)}:",
        "",
        "| what | seconds | from, to | peak MB | bar | met |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in rows.items():
        bar = bars.get(name)
        held = f"{bar.text} | {bar.verdict(each)}" if bar else "|"
        lines.append(f"| {name} | {each.median:.2f} | {each.spread} | {each.peak:.0f} | {held} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Growth:
    """How long one head of another size took to copy and to convert.

    Attributes:
        name: How it is called.
        size: GB of its weight files.
        shards: Number of them.
        copied: Copying it.
        converted: Converting it into one file.
    """

    name: str
    size: float
    shards: int
    copied: Measured
    converted: Measured


def growth(folder: Path, rounds: int) -> tuple[float, list[Growth]]:
    """Measure other sizes and numbers of shards, and what a conversion takes before it copies anything."""
    out, found = folder / "out", []
    arguments = ["--verifier", str(TINY.with_name(VERIFIER)), "--no-validate", "--output-path", str(out)]
    start = Measured([SPECULATORS, "convert", str(TINY), *arguments], out)
    for size, shards in [*((size, 1) for size in SIZES), *((SIZES[1], shards) for shards in SHARDS[1:])]:
        options = ("--size", str(size), "--shards", str(shards), *GROWING)
        head = make(folder / f"grown-{size // 1_000_000}-{shards}", *options)
        name = f"{weight_bytes(head) / 1e9:.2f} GB in {shards} file{'s' * (shards > 1)}"
        pair = copied(head, out), converted(head, out, "--no-validate")
        found.append(Growth(name, weight_bytes(head) / 1e9, shards, *pair))
    sharded = converted(head, out, "--no-validate", "--max-shard-size", "16MB")
    found.append(Growth(f"{name}, into files of 16 MB", weight_bytes(head) / 1e9, shards, found[-1].copied, sharded))
    measure(rounds, [start, *(each for head in found for each in (head.copied, head.converted))])
    return start.median, found


def growth_table(start: float, found: list[Growth]) -> str:
    """Return the table of other sizes."""
    lines = [
        f"A head of {weight_bytes(TINY) / 1e6:.1f} MB takes {start:.2f} s, the start of every conversion.",
        "",
        "| head | cp and fsync, s | convert, s | less the start, s per GB | peak MB |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        taken = each.converted.median
        lines.append(
            f"| {each.name} | {each.copied.median:.2f} | {taken:.2f} | {(taken - start) / each.size:.2f} "
            f"| {each.converted.peak:.0f} |"
        )
    return "\n".join(lines)


def draw(start: float, found: list[Growth]) -> None:
    """Plot time and memory over size, and over the number of files."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "speculators"
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharey="row")
    sized = [each for each in found if each.shards == 1]
    sharded = [each for each in found[:-1] if round(each.size) == SIZES[1] // 10**9]
    for column, heads, unit in ((0, sized, "GB"), (1, sharded, f"files of {sharded[0].size:.2f} GB together")):
        x = [each.size if heads is sized else each.shards for each in heads]
        time, memory = axes[0][column], axes[1][column]
        time.plot(x, [each.converted.median for each in heads], "o-", label="convert")
        time.plot(x, [each.copied.median for each in heads], "o-", color="tab:gray", label="cp and fsync")
        memory.plot(x, [each.converted.peak for each in heads], "o-", label="convert")
        time.axhline(start, linestyle=":", color="tab:blue", label="start of a conversion")
        time.set(xlabel=unit, ylim=0)
        memory.set(xlabel=unit, ylim=(0, 150))
        if heads is sharded:
            time.set(xscale="log", xticks=x, xticklabels=x)
            memory.set(xscale="log", xticks=x, xticklabels=x)
            time.minorticks_off()
            memory.minorticks_off()
    axes[0][0].set(ylabel="seconds", xlim=0)
    axes[1][0].set(ylabel="peak of resident memory, MB", xlim=0)
    axes[0][0].legend()
    figure.savefig(PLOT, metadata={"Date": None})


def filesystem(folder: Path) -> str:
    """Name the kind of filesystem on which ``folder`` lies, where the system tells (Linux)."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown filesystem"
    points = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    holding = [(point, kind) for point, kind in points if folder.is_relative_to(point)]
    return max(holding, key=lambda found: len(found[0]))[1]


def described_machine(folder: Path) -> str:
    """Say on what this runs."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}), {memory:.0f} GiB of memory, "
        f"{filesystem(folder)}, {platform.system()} {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    )


def main() -> None:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "speculators-performance")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--existing", help="Python that has speculators 0.9.0")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md, with a plot")
    arguments = parser.parse_args()

    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if filesystem(folder) in MEMORY_FILESYSTEMS:
        raise SystemExit(f"{folder} lies in memory, where syncing costs nothing; choose another --folder")
    python = str(Path(arguments.existing).absolute()) if arguments.existing else None

    table = main_table(folder, arguments.rounds, python)
    grown = growth(folder, arguments.rounds)
    ways = copying.table(folder / "head" / "model.safetensors", arguments.rounds)
    tables = {"bars": table, "growth": growth_table(*grown), "copying": ways}
    for text in tables.values():
        print(text, end="\n\n")
    if arguments.write:
        page = PAGE.read_text()
        for name, text in tables.items():
            marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
            page, count = marked.subn(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
            if count != 1:
                raise SystemExit(f"{PAGE} has {count} places for the table {name!r}, expected one")
        PAGE.write_text(page)
        draw(*grown)


if __name__ == "__main__":
    main()
