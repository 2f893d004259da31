"""Whatever ends or disturbs a conversion, the output path holds all that it held, or all that it should hold.

Real runs of the command line are killed, interrupted, or refused by the filesystem, at each call that changes
something on the disk. ``--kill-points all`` takes all trained heads and more ways to write them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import DATA, VERIFIER, contents, read_tensors
from injection import Fault, Injector, Outcome
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

FEW = ("eagle1-fc-bias", "hass-layernorms", "eagle3")
ALL = (*FEW, "eagle1-no-bias", "hass-fc-bias")

LEAST_POINTS = 29
"""Of each case; seven make more than two hundred."""

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")

NO_EXCHANGE = {"renameat2": "EINVAL"}
"""What a filesystem answers on which two folders cannot take each other's place."""


@dataclass(frozen=True)
class Case:
    """One head, how it is converted, and what stood at the output path."""

    head: str
    options: tuple[str, ...]
    overwrite: bool
    failing: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        ways = (*self.options, "over another" if self.overwrite else "new", *(f"no {name}" for name, _ in self.failing))
        return f"{self.head} {' '.join(ways)}"


def cases(every: bool, heads: tuple[str, ...]) -> list[Case]:
    """List what is tried: heads over nothing and over another output, or all heads in every way."""
    ways: tuple[tuple[str, ...], ...] = ((),)
    if every:
        ways = ((), ("--max-shard-size", "100KB"), ("--no-validate",), ("--dtype", "float16"), ("--self-contained",))
    replacing = ((False, ()), (True, ()), (True, tuple(NO_EXCHANGE.items())))
    heads = ALL if every else heads
    return [
        Case(head, way, overwrite, failing)
        for head in heads
        for way in ways
        for overwrite, failing in replacing
        if every or not failing or head == heads[-1]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test its cases: three heads where runs are killed, one where they end by themselves."""
    every = metafunc.config.getoption("--kill-points") == "all"
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(every, FEW if "killed" in metafunc.function.__name__ else FEW[-1:]), ids=str)
    if "signal" in metafunc.fixturenames:
        metafunc.parametrize("signal", SIGNALS if every else list(SIGNALS)[:2])
    if {"error", "place"} <= set(metafunc.fixturenames):
        metafunc.parametrize("error", ERRORS if every else ERRORS[:2])


class Place:
    """A folder with a head, its verifier, and perhaps an earlier output at the output path."""

    def __init__(self, folder: Path, case: Case, injector: Injector) -> None:
        self.folder, self.case, self.injector = folder, case, injector
        shutil.copytree(DATA / case.head, folder / "head", ignore=shutil.ignore_patterns("golden"))
        shutil.copytree(VERIFIER, folder / "base", ignore=shutil.ignore_patterns("golden"))
        self.sources = {name: contents(folder / name) for name in ("head", "base")}
        whole = self.run()
        assert whole.status == 0, whole.stderr
        self.new = contents(folder / "out")
        shutil.rmtree(folder / "out")
        self.old: dict[str, bytes] = {}
        if case.overwrite:
            shutil.copytree(DATA / "eagle1-no-bias", folder / "other", ignore=shutil.ignore_patterns("golden"))
            made = self.run("other", "before", "--max-shard-size", "200KB")
            assert made.status == 0, made.stderr
            shutil.rmtree(folder / "other")
            self.old = contents(folder / "before")

    def run(self, head: str = "head", out: str = "out", *more: str, **faults: object) -> Outcome:
        """Convert."""
        options = more or (*self.case.options, *(("--overwrite",) if self.case.overwrite else ()))
        args = ["convert", head, "--verifier", "base", "--output-path", out, *options]
        failing = dict(self.case.failing)
        return self.injector.run(args, root=self.folder, failing=failing, **faults)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Have the output path hold what stood there before, and nothing else beside it."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        if self.old:
            shutil.copytree(self.folder / "before", self.folder / "out")

    @property
    def out(self) -> dict[str, bytes]:
        """What the output path holds; nothing where there is none."""
        return contents(self.folder / "out") if (self.folder / "out").exists() else {}

    @property
    def beside(self) -> set[str]:
        """What else lies there than what belongs there."""
        return {path.name for path in self.folder.iterdir()} - {"head", "base", "out", "before"}

    @property
    def left(self) -> set[str]:
        """What the hidden folder of a run holds that has ended; nothing where there is none."""
        hidden = self.folder / ".out.speculators"
        return {path.name for path in hidden.iterdir()} if hidden.exists() else set()

    def require_sound(self, point: str, *, gap: bool = False) -> None:
        """Prove that the output path holds one thing whole, and that the sources are as they were.

        Args:
            point: What was done.
            gap: Whether there may be a moment in which a previous output is not at the path.
        """
        assert self.out in (self.old, self.new) or (gap and not self.out), f"{point}: {sorted(self.out)}"
        assert {name: contents(self.folder / name) for name in self.sources} == self.sources, point

    def require_recovered(self, point: str) -> None:
        """Prove that the next run ends as if nothing had happened before it, and tidies up."""
        if not self.old and self.out:
            assert self.run().status == 5, point  # it was complete, and is not replaced unasked
        else:
            after = self.run()
            assert after.status == 0, f"{point}: {after.stderr}"
        assert self.out == self.new, point
        assert self.beside == set(), point


@pytest.fixture
def place(case: Case, injector: Injector, tmp_path: Path) -> Place:
    """A place for one case."""
    return Place(tmp_path, case, injector)


def each_point(place: Place, action: str) -> Iterator[tuple[str, Outcome]]:
    """Disturb a run at its first changing call, another at its second, and so on until one is undisturbed."""
    for number in range(1, 200):
        place.reset()
        outcome = place.run(fault=Fault(number, action))
        if not outcome.struck:
            return
        yield f"{action} at call {number}, {outcome.struck[0]}", outcome
    raise AssertionError("a conversion takes fewer calls than that")


def test_a_run_that_is_killed_anywhere_leaves_the_old_or_the_new_output_or_none(place: Place) -> None:
    count = 0
    for point, outcome in each_point(place, "SIGKILL"):
        count += 1
        assert outcome.status == -9, point
        place.require_sound(point, gap=bool(place.case.failing))
        assert place.beside <= {".out.speculators"}, point
        place.require_recovered(point)
    assert count >= LEAST_POINTS


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def test_a_run_that_is_asked_to_end_tidies_up(signal: str, place: Place) -> None:
    for point, outcome in each_point(place, signal):
        assert outcome.status in (0, SIGNALS[signal]), f"{point}: {outcome.stderr}"
        assert "Traceback" not in outcome.stderr, point
        place.require_sound(point)
        assert outcome.status != 0 or place.out == place.new, point
        assert place.left <= {"lock"}, point


def test_a_call_that_the_filesystem_refuses_is_one_line_and_changes_nothing(error: str, place: Place) -> None:
    for point, outcome in each_point(place, error):
        assert outcome.status in (0, 5), f"{point}: {outcome.stderr}"
        assert "Traceback" not in outcome.stderr, point
        place.require_sound(point)
        if outcome.status == 0:
            assert place.out == place.new, point
        else:
            assert place.out == place.old, point
            assert outcome.stderr.count("\n") == 1, f"{point}: {outcome.stderr}"
        assert place.beside <= {".out.speculators"}, point


def test_a_disk_that_takes_nothing_more_is_one_line_and_changes_nothing(error: str, place: Place) -> None:
    for number in range(1, 200):
        place.reset()
        outcome = place.run(fault=Fault(number, error, of="write", lasting=True))
        if not outcome.struck:
            break
        assert outcome.status == 5, f"{outcome.struck}: {outcome.stderr}"
        assert outcome.stderr.startswith("Error: cannot write out: ")
        assert place.out == place.old
        assert place.beside == set()
    assert number > 3


def test_what_is_on_the_disk_before_what_relies_on_it(place: Place) -> None:
    place.reset()
    calls = place.run().calls

    def last(*starts: str) -> int:
        return max(number for number, call in enumerate(calls) if call.startswith(starts))

    synced = [last(f"fsync .out.speculators/new/{name}") for name in place.new]
    moved = max(number for number, call in enumerate(calls) if call.startswith("rename") and call.endswith("-> out"))
    if place.case.failing:
        aside = calls.index("rename out -> .out.speculators/old")
        assert aside < calls.index("fsync .out.speculators", aside) < calls.index("fsync .", aside) < moved
    assert max(synced) < last("fsync .out.speculators/new") < moved
    assert moved < calls.index("fsync .", moved) < last("unlink", "rmdir")
    removed = [number for number, call in enumerate(calls) if call.startswith("unlink") and "/lock" not in call]
    assert all(number > calls.index("fsync .", moved) for number in removed)


def test_a_previous_output_that_cannot_be_put_back_is_kept_and_found_again(injector: Injector, tmp_path: Path) -> None:
    place = Place(tmp_path, Case("eagle3", (), overwrite=True, failing=tuple(NO_EXCHANGE.items())), injector)
    place.reset()

    outcome = place.run(fault=Fault(3, "EIO", of="rename", lasting=True))

    assert outcome.status == 5
    assert "Warning: the previous output is in .out.speculators/old; the next conversion to out" in outcome.stderr
    assert contents(tmp_path / ".out.speculators" / "old") == place.old
    assert place.run("head", "out", "--no-validate").status == 5  # it is put back, and not replaced unasked
    assert (place.out, place.beside) == (place.old, set())


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_where_nothing_can_be_locked_a_conversion_takes_place(error: str, injector: Injector, tmp_path: Path) -> None:
    place = Place(tmp_path, ONE, injector)

    for _ in range(2):
        place.reset()
        outcome = place.injector.run(
            ["convert", "head", "--verifier", "base", "--output-path", "out"], root=tmp_path, failing={"flock": error}
        )
        assert outcome.status == 0, outcome.stderr
        assert (place.out, place.beside) == (place.new, set())


ONE = Case("eagle3", (), overwrite=False)


def test_two_runs_to_one_path_do_not_mix(injector: Injector, tmp_path: Path) -> None:
    place = Place(tmp_path, ONE, injector)
    args = ["convert", "head", "--verifier", "base", "--output-path", "out"]
    points = len(place.run().calls)

    for number in range(3, points - 3, 4):
        place.reset()
        with injector.start(args, root=tmp_path, fault=Fault(number, "pause")) as first:
            point = first.paused()
            second = place.run()
            first.resume()
            outcome = first.wait()
        refused, other = (outcome, second) if second.status == 0 else (second, outcome)
        assert (refused.status, other.status, refused.stderr.count("\n")) == (5, 0, 1), point
        assert "another conversion is writing to out" in refused.stderr or "not empty" in refused.stderr, point
        assert place.out == place.new, point
        assert place.beside == set(), point


READ = ("config.json", "model.safetensors")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_another(path: Path) -> None:
    path.with_name("fresh").write_bytes(path.read_bytes())
    path.with_name("fresh").replace(path)


@pytest.mark.parametrize("change", [append, flip, replace_by_another, Path.unlink])
@pytest.mark.parametrize("file", [*(f"head/{name}" for name in READ), *(f"base/{name}" for name in READ)])
def test_a_source_that_changes_while_it_is_read_is_refused(
    change: Callable[[Path], object], file: str, injector: Injector, tmp_path: Path
) -> None:
    place = Place(tmp_path, Case("eagle1-fc-bias", (), overwrite=False), injector)
    save_file(read_tensors(tmp_path / "head"), tmp_path / "head" / "model.safetensors")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    args = ["convert", "head", "--verifier", "base", "--output-path", "out"]

    with injector.start(args, root=tmp_path, fault=Fault(2, "pause", of="write")) as running:
        running.paused()
        time.sleep(0.02)  # the clock of a filesystem ticks slowly
        change(tmp_path / file)
        running.resume()
        outcome = running.wait()

    assert (outcome.status, outcome.stderr.count("\n")) == (3, 1), outcome.stderr
    assert place.out == {}
    assert place.beside == set()


MOUNTED = """
mount -t tmpfs -o {options} tmpfs disk && {prepare} && mount -o remount,{options},{mode} disk || exit 99
{python} -m speculators convert {head} --verifier {verifier} --output-path disk/out {more}
echo $? $(ls -A disk)
"""


@pytest.mark.parametrize(
    ("options", "prepare", "mode", "message"),
    [
        pytest.param("size=300k", "true", "rw", "cannot write disk/out: No space left on device", id="full"),
        pytest.param("size=300k,nr_inodes=4", "true", "rw", "cannot write disk/out: No space left", id="no inodes"),
        pytest.param("size=4m", "true", "ro", "cannot write disk/out: Read-only file system", id="read-only"),
    ],
)
def test_a_disk_that_is_full_or_read_only_is_one_line(
    options: str, prepare: str, mode: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    script = MOUNTED.format(
        options=options,
        prepare=prepare,
        mode=mode,
        python=sys.executable,
        head=DATA / "eagle3",
        verifier=VERIFIER,
        more="",
    )

    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout == "5\n", done.stderr  # and nothing lies on the disk
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        pytest.param("-f 200", "cannot write out: File too large", id="size of a file"),
        pytest.param("-v 400000", "out of memory", id="memory"),
    ],
)
def test_a_limit_that_the_system_sets_is_one_line(limit: str, message: str, tmp_path: Path) -> None:
    command = f'ulimit {limit} && exec "$@"'
    args = [sys.executable, "-m", "speculators", "convert", str(DATA / "eagle3"), "--verifier", str(VERIFIER)]

    done = subprocess.run(
        ["bash", "-c", command, "bash", *args, "--output-path", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
