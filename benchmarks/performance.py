"""Measure conversions against ``cp`` and hold them to the bars of docs/performance.md.

    python benchmarks/performance.py [--folder DIR] [--rounds 5] [--existing PYTHON] [--write]

Prints Markdown; ``--write`` puts it into docs/performance.md and draws the plot beside it, for which
matplotlib is needed (``pip install -r benchmarks/requirements.txt``). ``--existing`` names a Python that
has speculators 0.9.0, to measure it beside. The heads are made once and kept in DIR, which takes about
25 GB; a run takes about 15 minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import copying
from measuring import Measured, measure

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PLOT = PAGE.with_suffix(".svg")
SPECULATORS = str(Path(sys.executable).with_name("speculators"))

WEIGHTS = (".safetensors", ".bin")
VERIFIER = "verifier"

WITHOUT_EMBEDDINGS = 850_000_000
"""Bytes of the real head without its token embeddings."""

LARGE = 4 * 1_900_000_000

SIZES = (250_000_000, 1_000_000_000, 4_000_000_000)
SHARDS = (1, 8, 64)
GROWING = ("--hidden", "2048", "--layers", "8")
"""Shapes of the heads of other sizes: enough tensors for 64 shards, and little besides what grows."""


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
    if not kept.exists():
        subprocess.run(conversion(SPECULATORS, head, kept, "--no-validate", "--quiet"), check=True, capture_output=True)
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

    start, torch = rows["`python -c pass`"].median, rows["`import torch`"].median
    cp, cp_large, cp_bin = (
        rows[name].median
        for name in ("cp and fsync, safetensors", "cp and fsync, four times larger", "cp and fsync, bin")
    )
    validated = WITHOUT_EMBEDDINGS / 1e6 + 900
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
        f"medians of {rounds} runs, {described_machine()}:",
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
    """How long one head of another size took to copy and to convert."""

    name: str
    size: float
    shards: int
    copied: Measured
    converted: Measured


def growth(folder: Path, rounds: int) -> list[Growth]:
    """Measure other sizes and numbers of shards."""
    out, found = folder / "out", []
    for size, shards in [*((size, 1) for size in SIZES), *((SIZES[1], shards) for shards in SHARDS[1:])]:
        options = ("--size", str(size), "--shards", str(shards), *GROWING)
        head = make(folder / f"grown-{size // 1_000_000}-{shards}", *options)
        name = f"{size / 1e9:g} GB in {shards} file{'s' * (shards > 1)}"
        pair = copied(head, out), converted(head, out, "--no-validate")
        found.append(Growth(name, weight_bytes(head) / 1e9, shards, *pair))
    measure(rounds, [each for head in found for each in (head.copied, head.converted)])
    return found


def growth_table(found: list[Growth], start: float) -> str:
    """Return the table of other sizes."""
    lines = [
        "| head | cp and fsync, s | convert, s | the same less its start, s per GB | peak MB |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        taken = each.converted.median
        lines.append(
            f"| {each.name} | {each.copied.median:.2f} | {taken:.2f} | {(taken - start) / each.size:.2f} "
            f"| {each.converted.peak:.0f} |"
        )
    return "\n".join(lines)


def draw(found: list[Growth]) -> None:
    """Plot time and memory over size, with the sharded heads of one size beside."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "speculators"
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    whole = [each for each in found if each.shards == 1]
    sharded = [each for each in found if each.shards > 1]
    for label, color, seconds in (
        ("convert", "tab:blue", lambda each: each.converted.median),
        ("cp and fsync", "tab:gray", lambda each: each.copied.median),
    ):
        time.plot([each.size for each in whole], [seconds(each) for each in whole], "o-", color=color, label=label)
        time.plot([each.size for each in sharded], [seconds(each) for each in sharded], "x", color=color)
    memory.plot(
        [each.size for each in whole], [each.converted.peak for each in whole], "o-", label="one file", color="tab:blue"
    )
    memory.plot(
        [each.size for each in sharded],
        [each.converted.peak for each in sharded],
        "x",
        label=" and ".join(str(each.shards) for each in sharded) + " files",
        color="tab:blue",
    )
    time.set(xlabel="GB", ylabel="seconds", xlim=0, ylim=0, title="Time")
    memory.set(xlabel="GB", ylabel="peak of resident memory, MB", xlim=0, ylim=(0, 150), title="Memory")
    time.legend()
    memory.legend()
    figure.savefig(PLOT, metadata={"Date": None})


def described_machine() -> str:
    """Say on what this runs."""
    names = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}), {memory:.0f} GiB of memory, "
        f"{platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}"
    )


def main() -> None:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "speculators-performance")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--existing", help="Python that has speculators 0.9.0")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md, with a plot")
    arguments = parser.parse_args()

    table = main_table(arguments.folder, arguments.rounds, arguments.existing)
    start = Measured([SPECULATORS, "convert", "--list-algorithms"])
    grown = growth(arguments.folder, arguments.rounds)
    measure(arguments.rounds, [start])
    ways = copying.table(arguments.folder / "head" / "model.safetensors", arguments.rounds)
    tables = {"bars": table, "growth": growth_table(grown, start.median), "copying": ways}
    for text in tables.values():
        print(text, end="\n\n")
    if arguments.write:
        page = PAGE.read_text()
        for name, text in tables.items():
            marked = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
            page = marked.sub(lambda found, text=text: f"{found[1]}{text}{found[2]}", page)
        PAGE.write_text(page)
        draw(grown)


if __name__ == "__main__":
    main()
