"""The injector of faults: undisturbed runs are like any other, and faults strike where and how they are told."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from checkpoints import DATA, VERIFIER
from injection import Fault, Injector, Outcome
from loopback import wait_for

CONVERT = ("convert", DATA / "eagle3", "--verifier", VERIFIER, "--output-path", "out")
QUICK = (*CONVERT, "--no-validate")


def runs(process: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(injector: Injector, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return injector.run(QUICK, root=tmp_path_factory.mktemp("undisturbed"))


def test_an_undisturbed_run_is_like_any_other(injector: Injector, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "traced").mkdir()
    command = [sys.executable, "-m", "speculators", *map(str, CONVERT)]

    plain = subprocess.run(command, cwd=tmp_path / "plain", capture_output=True, text=True, check=True)
    traced = injector.run(CONVERT, root=tmp_path / "traced")

    assert (traced.status, traced.stdout, traced.stderr) == (0, plain.stdout, plain.stderr)
    assert contents(tmp_path / "traced") == contents(tmp_path / "plain")
    assert len(contents(tmp_path / "traced")) == 5
    assert traced.struck == []


def test_the_changing_calls_are_told_in_order(undisturbed: Outcome) -> None:
    calls = undisturbed.calls
    assert undisturbed.status == 0
    assert {"mkdir", "openat", "write", "copy_file_range", "fsync"} <= {call.split()[0] for call in calls}
    assert all(not path.startswith("/") for call in calls for path in call.split()[1::2])
    published = undisturbed.numbers(" -> out")[-1]
    assert calls[published - 1].startswith("rename")
    assert max(undisturbed.numbers("copy_file_range ")) < published


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_killed_run_does_nothing_more(injector: Injector, undisturbed: Outcome, tmp_path: Path, share: float) -> None:
    number = 1 + int(share * len(undisturbed.calls))

    outcome = injector.run(QUICK, root=tmp_path, fault=Fault(number, "SIGKILL"))

    assert outcome.status == -9
    assert len(outcome.calls) == number
    assert outcome.struck == outcome.calls[-1:]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "status", "made"),
    [("SIGKILL", -9, False), ("SIGTERM", -15, True), ("SIGHUP", -1, True), ("SIGINT", -2, True), ("EROFS", 1, False)],
)
def test_only_a_call_that_fails_or_is_killed_is_not_carried_out(
    injector: Injector, tmp_path: Path, name: str, status: int, made: bool
) -> None:
    outcome = injector.run(code="import os; os.mkdir('made'); os.rmdir('made')", root=tmp_path, fault=Fault(1, name))

    assert outcome.status == status
    assert outcome.struck == outcome.calls == ["mkdir made"]
    assert (tmp_path / "made").exists() == made


def test_a_conversion_is_interrupted(injector: Injector, tmp_path: Path) -> None:
    assert injector.run(QUICK, root=tmp_path, fault=Fault(1, "SIGINT", of="write")).status == 130


@pytest.mark.parametrize(("name", "text"), [("ENOSPC", "No space left"), ("EIO", "Input/output error")])
def test_a_call_fails(injector: Injector, tmp_path: Path, name: str, text: str) -> None:
    outcome = injector.run(QUICK, root=tmp_path, fault=Fault(1, name, of="write"))

    assert outcome.status == 5
    assert text in outcome.stderr
    assert len(outcome.struck) == 1
    assert outcome.struck[0].startswith("write ")


def test_once_is_not_for_good(injector: Injector, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "lasting").mkdir()

    once = injector.run(QUICK, root=tmp_path / "once", fault=Fault(1, "ENOSPC", of="copy_file_range"))
    lasting = injector.run(QUICK, root=tmp_path / "lasting", fault=Fault(1, "ENOSPC", "copy_file_range", lasting=True))

    assert once.status == 0  # it is written in another way
    assert lasting.status == 5
    later = lasting.calls[lasting.calls.index(lasting.struck[0]) + 1 :]
    assert any(call.startswith("write ") for call in later)


def test_faults_come_together(injector: Injector, tmp_path: Path) -> None:
    faults = [Fault(1, "EIO", of="write"), Fault(1, "SIGKILL", of="remove")]

    outcome = injector.run(QUICK, root=tmp_path, fault=faults)

    assert outcome.status == -9
    assert [call.split()[0] for call in outcome.struck] == ["write", "unlinkat"]


def test_a_filesystem_lacks_calls(injector: Injector, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    code = """\
import ctypes, errno, fcntl, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for folder in sys.argv[1:]:
    for name in "ab":
        open(f"{folder}/{name}", "w").write(name)
    done = libc.renameat2(-100, f"{folder}/a".encode(), -100, f"{folder}/b".encode(), 2) == 0
    print(open(f"{folder}/a").read(), done or errno.errorcode[ctypes.get_errno()])
    try:
        fcntl.flock(open(f"{folder}/a"), fcntl.LOCK_EX)
        print("locked")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    run = partial(injector.run, [".", tmp_path], code=code, root=tmp_path / "root")

    as_ever = run()
    lacking = run(failing={"renameat2": "EINVAL", "flock": "ENOSYS"})

    assert as_ever.stdout.split() == ["b", "True", "locked"] * 2
    assert lacking.stdout.split() == ["a", "EINVAL", "ENOSYS", "b", "True", "locked"]
    assert lacking.calls[-2:] == ["renameat2 a -> b", "flock a"]


def test_a_paused_run_waits_while_another_runs(injector: Injector, tmp_path: Path) -> None:
    with injector.start(QUICK, root=tmp_path, fault=Fault(1, "pause", of="rename")) as running:
        assert running.paused().endswith(" -> out")
        assert not (tmp_path / "out").exists()
        assert injector.run([*QUICK[:-2], "other", "--no-validate"], root=tmp_path).status == 0
        running.resume()
        assert running.wait().status == 0

    inside = contents(tmp_path / "out")
    assert len(inside) == 5
    assert contents(tmp_path / "other") == inside


def test_a_pause_ends_with_a_fault(injector: Injector, tmp_path: Path) -> None:
    with injector.start(QUICK, root=tmp_path, fault=Fault(3, "pause")) as running:
        call = running.paused()
        running.resume("SIGKILL")
        outcome = running.wait()

    assert outcome.status == -9
    assert outcome.struck == [call] == outcome.calls[2:]


def test_a_pause_stops_every_thread(injector: Injector, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    ticks = tmp_path / "ticks"
    code = """\
import os, pathlib, threading, time
def tick():
    with open("../ticks", "wb", buffering=0) as file:
        while not os.path.exists("made"):
            file.write(b".")
thread = threading.Thread(target=tick)
thread.start()
while not os.path.exists("../ticks") or os.path.getsize("../ticks") < 100:
    time.sleep(0.001)
os.mkdir("made")
thread.join()
"""
    with injector.start(code=code, root=tmp_path / "root", fault=Fault(1, "pause")) as running:
        assert running.paused() == "mkdir made"
        size = ticks.stat().st_size
        time.sleep(0.05)
        assert ticks.stat().st_size == size
        running.resume()
        assert running.wait().status == 0


def test_paths_are_found_however_they_are_named(injector: Injector, tmp_path: Path) -> None:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("root")
    code = """\
import os
os.chdir("inner")
os.mkdir("../a")
folder = os.open("..", os.O_RDONLY)
os.mkdir("b", dir_fd=folder)
os.rename("../../link/a", "c", dst_dir_fd=folder)
os.symlink("/elsewhere", "../d")
file = os.open("../../moved", os.O_RDWR | os.O_CREAT)
os.rename("../../moved", "e")
os.ftruncate(file, 5)
os.close(os.open("e", os.O_RDONLY))
os.write(os.open("../../outside", os.O_WRONLY | os.O_CREAT), b"1")
"""
    outcome = injector.run(code=code, root=tmp_path / "root")

    assert outcome.stderr == ""
    assert outcome.calls == [
        "mkdir a",
        "mkdirat b",
        "renameat a -> c" if "renameat a -> c" in outcome.calls else "renameat2 a -> c",
        "symlink d",
        f"rename {tmp_path.resolve() / 'moved'} -> inner/e",
        "ftruncate inner/e",
    ]


@pytest.mark.parametrize(
    ("code", "status", "printed"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('so')", 1, "so\n"),
        ("raise ValueError('so')", 1, "ValueError: so\n"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt\n"),
        ("import atexit, sys; atexit.register(print, 'so', file=sys.stderr)", 0, "so\n"),
        ("import os; os.abort()", -6, ""),
    ],
)
def test_a_run_ends_as_an_interpreter_does(
    injector: Injector, tmp_path: Path, code: str, status: int, printed: str
) -> None:
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    outcome = injector.run(code=code, root=tmp_path)

    assert outcome.status == plain.returncode == status
    assert outcome.stderr.endswith(printed)
    assert plain.stderr.endswith(printed)


def test_a_run_that_hangs_is_killed_with_what_it_started(injector: Injector, tmp_path: Path) -> None:
    code = """\
import os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "60"])
pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid}")
time.sleep(60)
"""
    with pytest.raises(TimeoutError, match="write pids"):
        injector.run(code=code, root=tmp_path, timeout=0.5)

    wait_for(lambda: not any(runs(int(each)) for each in (tmp_path / "pids").read_text().split()))


def test_a_run_that_nobody_waits_for_is_killed(injector: Injector, tmp_path: Path) -> None:
    code = "import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); os.mkdir('made')"

    with injector.start(code=code, root=tmp_path, fault=Fault(1, "pause", of="mkdir")) as running:
        running.paused()
        assert runs(int((tmp_path / "pid").read_text()))

    wait_for(lambda: not runs(int((tmp_path / "pid").read_text())))


def test_what_cannot_be_started_is_told(injector: Injector, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No such file or directory"):
        injector.run(QUICK, root=tmp_path, cwd=tmp_path / "missing")
