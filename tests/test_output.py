"""Placing: an output appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from speculators import OutputError, output
from speculators.output import check_replaceable, check_target, staged, work_folder, writing
from speculators.writer import write_safetensors

CONFIG = '{"speculators_model_type": "eagle3"}'


class Interrupted(BaseException):
    """What a signal raises."""


@pytest.fixture
def umask() -> Iterator[None]:
    """Write with the permissions that most users have."""
    previous = os.umask(0o022)
    yield
    os.umask(previous)


def names(folder: Path) -> list[str]:
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())


def existing(folder: Path, **files: str) -> Path:
    """Make a folder of text files; an underscore in a keyword is a dot in the name."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_a_filesystem_that_cannot_sync_folders_gets_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    refused = []

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)

    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]
    assert len(refused) == 3  # that of the files, the one in which the output appears, and the one that it leaves


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_target_meanwhile_is_kept(overwrite: bool, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="out"), staged(tmp_path / "out", overwrite) as folder:
        (folder / "config.json").write_text(CONFIG)
        existing(tmp_path / "out", chapter_tex="years of work")

    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["\U0001f600" * 60, "x" * 255], ids=["of 60 emoji", "of 255 letters"])
def test_a_name_as_long_as_the_disk_allows_is_accepted(name: str, tmp_path: Path) -> None:
    with staged(tmp_path / name) as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == [name]


def test_the_working_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(OutputError, match=r"the output \. is the working folder, which cannot be replaced"):
        check_target(Path(), [])


def test_a_staged_folder_is_published_when_its_block_ends(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        assert not (tmp_path / "out").exists()

    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == CONFIG


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "b" / "out") as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path / "a" / "b") == ["out"]


def test_a_relative_path_is_published_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with staged(Path("out")) as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, Interrupted, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_passes_through(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        raise error

    assert names(tmp_path) == []


def test_an_exception_removes_the_parents_that_were_made_but_no_others(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    with pytest.raises(ValueError, match="failed"), staged(tmp_path / "mine" / "a" / "b" / "out"):
        raise ValueError("failed")

    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == []


def test_an_exception_keeps_what_others_put_into_a_parent_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="failed"), staged(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "notes.txt").write_text("mine")
        raise ValueError("failed")

    assert names(tmp_path / "a") == ["notes.txt"]


def test_an_exception_keeps_the_previous_content(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)

    with pytest.raises(ValueError, match="failed"), staged(out, overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
        raise ValueError("failed")

    assert names(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == CONFIG


def test_the_previous_content_is_replaced_whole(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG, model_safetensors="old")

    with staged(out, overwrite=True) as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json"]
    assert (out / "config.json").read_text() == CONFIG


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize(
    ("mask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)]
)
@pytest.mark.usefixtures("umask")
def test_an_output_has_the_permissions_that_the_umask_leaves(
    mask: int, folder_mode: int, file_mode: int, tmp_path: Path
) -> None:
    os.umask(mask)

    with staged(tmp_path / "out") as folder:
        write_safetensors(folder, [])

    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == file_mode
    assert os.umask(mask) == mask


def test_an_error_of_the_disk_is_worded_and_leaves_nothing(tmp_path: Path) -> None:
    refused = pytest.raises(OutputError, match="out: No space left on device; nothing was kept")
    with refused, staged(tmp_path / "out"), writing(tmp_path / "out"):
        raise OSError(28, "No space left on device")

    assert names(tmp_path) == []


def test_a_file_in_place_of_a_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "file" / "out"):
        pass

    assert names(tmp_path) == ["file"]


def test_a_name_that_the_disk_refuses_leaves_no_parents(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "a" / ("x" * 300)):
        pass

    assert names(tmp_path) == []


def test_a_file_at_the_target_is_kept_when_publishing_fails(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "out"):
        pass

    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_free_target_is_accepted(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "source").mkdir()

    check_target(tmp_path / "empty", [tmp_path / "source"])
    check_target(tmp_path / "new", [tmp_path / "source"])

    assert names(tmp_path) == ["empty", "source"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_refused(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with pytest.raises(OutputError, match="out exists and is no folder"):
        check_target(tmp_path / "out", [])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to nothing"])
def test_a_symbolic_link_in_the_way_is_refused(there: bool, overwrite: bool, tmp_path: Path) -> None:
    if there:
        existing(tmp_path / "elsewhere", config_json=CONFIG)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OutputError, match="out exists and is no folder"):
        check_target(tmp_path / "out", [])


def test_a_folder_that_is_not_empty_is_refused_without_overwrite(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)

    with pytest.raises(OutputError, match=r"out exists and is not empty.*pass --overwrite"):
        staged(out).__enter__()

    assert names(tmp_path) == ["out"]


def test_a_converted_model_may_be_overwritten(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG, model_safetensors="")

    check_replaceable(out, overwrite=True)

    assert names(out) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(None, id="no config"),
        pytest.param("{}", id="config of something else"),
        pytest.param("{", id="config that is no JSON"),
        pytest.param("3", id="config that is a number"),
        pytest.param("[" * 99999, id="config that is deeply nested"),
        pytest.param('["speculators_model_type"]', id="config that is a list"),
        pytest.param('"speculators_model_type"', id="config that is a text"),
    ],
)
def test_a_folder_of_something_else_is_not_overwritten(config: str | None, tmp_path: Path) -> None:
    out = existing(tmp_path / "out", model_safetensors="years of work", **({"config_json": config} if config else {}))

    with pytest.raises(OutputError, match="out holds something other than a converted model and is not overwritten"):
        check_replaceable(out, overwrite=True)

    assert (out / "model.safetensors").read_text() == "years of work"


def test_a_folder_with_the_name_of_a_file_of_a_model_is_not_overwritten(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)
    existing(out / "model.safetensors", chapter_tex="years of work")

    with pytest.raises(OutputError, match=r"out has model\.safetensors beside a converted model"):
        check_replaceable(out, overwrite=True)


def test_a_file_beside_a_converted_model_is_not_overwritten(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG, chapter_tex="years of work")

    with pytest.raises(OutputError, match=r"out has chapter\.tex beside a converted model and is not overwritten"):
        check_replaceable(out, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "source", ["out", "out/source", "out/deep/source", "out/source/model.safetensors", "out/../out/source"]
)
def test_a_target_that_is_or_holds_a_source_is_refused(source: str, overwrite: bool, tmp_path: Path) -> None:
    existing(tmp_path / "out", config_json=CONFIG)

    with pytest.raises(OutputError, match=r"out would replace its own source .*choose another --output-path"):
        check_target(tmp_path / "out", [tmp_path / "elsewhere", tmp_path / source])


def test_a_source_is_recognised_behind_a_symbolic_link(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)
    (tmp_path / "head").symlink_to(out)

    with pytest.raises(OutputError, match="would replace its own source"):
        check_target(out, [tmp_path / "head"])


@pytest.mark.parametrize("target", ["head/converted", "head/deep/converted", "link/converted", "head/../head/out"])
def test_a_target_in_a_source_is_refused(target: str, tmp_path: Path) -> None:
    existing(tmp_path / "head", config_json="{}")
    (tmp_path / "link").symlink_to(tmp_path / "head")

    with pytest.raises(OutputError, match=r"would lie in its own source .*head; choose another --output-path"):
        check_target(tmp_path / target, [tmp_path / "elsewhere", tmp_path / "head"])

    assert names(tmp_path / "head") == ["config.json"]


def test_a_source_whose_files_are_links_into_the_target_is_refused(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG, model_safetensors="years of work")
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "model.safetensors").symlink_to(out / "model.safetensors")

    with pytest.raises(OutputError, match=r"out would replace its own source .*head/model\.safetensors"):
        check_target(out, [tmp_path / "head"])


def test_a_target_may_lie_beside_a_weight_file(tmp_path: Path) -> None:
    existing(tmp_path / "head", config_json="{}", model_safetensors="")

    check_target(tmp_path / "head" / "converted", [tmp_path / "head" / "model.safetensors"])

    assert names(tmp_path / "head") == ["config.json", "model.safetensors"]


def test_a_second_run_to_one_path_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        with pytest.raises(OutputError, match=r"another conversion is writing to .*out; wait for it"):
            staged(tmp_path / "out").__enter__()
        with staged(tmp_path / "other") as other:
            (other / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["other", "out"]
    assert names(tmp_path / "out") == ["config.json"]


@pytest.fixture
def died(tmp_path: Path) -> Path:
    """What a run leaves that dies while it writes ``out``."""
    work = work_folder(tmp_path / "out")
    (work / "new").mkdir(parents=True)
    (work / "new" / "model.safetensors").write_text("half of it")
    (work / "lock").touch()
    return work


@pytest.mark.parametrize("target", ["out", "other"])
def test_what_a_dead_run_left_is_removed_by_the_next_one(target: str, died: Path, tmp_path: Path) -> None:
    with staged(tmp_path / target) as folder:
        assert names(folder) == []
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == [target]
    assert names(tmp_path / target) == ["config.json"]


def test_what_a_living_run_writes_beside_is_not_removed(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        with staged(tmp_path / "other"):
            pass
        assert names(folder) == ["config.json"]

    assert names(tmp_path) == ["other", "out"]


def test_a_previous_output_that_a_dead_run_had_moved_away_is_put_back(died: Path, tmp_path: Path) -> None:
    existing(died / "old", config_json=CONFIG)

    with staged(tmp_path / "other"):
        pass
    assert names(died) == ["lock", "new", "old"]
    with pytest.raises(OutputError, match=r"out exists and is not empty.*pass --overwrite"):
        staged(tmp_path / "out").__enter__()

    assert names(tmp_path) == ["other", "out"]
    assert (tmp_path / "out" / "config.json").read_text() == CONFIG


def test_a_hidden_folder_that_somebody_else_made_is_left_alone(tmp_path: Path) -> None:
    existing(tmp_path / ".mine.speculators", notes_txt="years of work")
    existing(tmp_path / ".yours.speculators", lock="", notes_txt="years of work")

    with staged(tmp_path / "out"):
        pass

    assert names(tmp_path) == [".mine.speculators", ".yours.speculators", "out"]
    assert (tmp_path / ".yours.speculators" / "notes.txt").read_text() == "years of work"


@pytest.mark.parametrize("linked", [True, False], ids=["a link", "a file"])
def test_what_is_no_folder_in_place_of_the_hidden_one_is_refused(linked: bool, tmp_path: Path) -> None:
    existing(tmp_path / "elsewhere", new="years of work")
    if linked:
        work_folder(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    else:
        work_folder(tmp_path / "out").write_text("years of work")

    with pytest.raises(OutputError, match=r"\.out\.speculators is no folder, and a conversion writes there"):
        staged(tmp_path / "out").__enter__()

    assert names(tmp_path) == [".out.speculators", "elsewhere"]
    assert names(tmp_path / "elsewhere") == ["new"]


def test_an_empty_hidden_folder_of_a_dead_run_is_removed(tmp_path: Path) -> None:
    work_folder(tmp_path / "other").mkdir()

    with staged(tmp_path / "out"):
        pass

    assert names(tmp_path) == ["out"]


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the system's locks answer with an error."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(code: int) -> None:
        def answer(descriptor: int, operation: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", answer)

    return refuse


SOFTLY_LOCKED = """
import os, sys
from filelock import SoftFileLock

lock = SoftFileLock(sys.argv[1])
lock.acquire()
sys.stdout.write("locked")
sys.stdout.flush()
sys.stdin.read(1)
os._exit(1)
"""


@pytest.fixture
def soft_lock(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run, of which only the lock is there, to ``out`` on a system that has no locks; it ends with the test."""
    work = work_folder(tmp_path / "out")
    (work / "new").mkdir(parents=True)
    command = [sys.executable, "-c", SOFTLY_LOCKED, str(work / "soft-lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(6) == b"locked"
        yield process
        process.kill()


@pytest.mark.parametrize("code", [0, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], ids=["locks", *"abc"])
def test_a_run_without_the_system_s_locks_is_left_alone_while_it_lives(
    code: int, soft_lock: subprocess.Popen[bytes], without_locks: Callable[[int], None], tmp_path: Path
) -> None:
    if code:
        without_locks(code)

    with pytest.raises(OutputError, match=r"another conversion is writing to .*out; wait for it"):
        staged(tmp_path / "out").__enter__()
    assert {"new", "soft-lock"} <= {*names(work_folder(tmp_path / "out"))}
    soft_lock.kill()
    soft_lock.wait()
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["out"]


def test_what_a_dead_run_without_the_system_s_locks_left_is_removed_by_a_run_to_another_path(
    soft_lock: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    with staged(tmp_path / "other"):
        pass
    there = names(work_folder(tmp_path / "out"))
    soft_lock.kill()
    soft_lock.wait()
    with staged(tmp_path / "another"):
        pass

    assert {"new", "soft-lock"} <= {*there}
    assert names(tmp_path) == ["another", "other"]


def test_a_run_with_the_system_s_locks_is_left_alone_by_one_that_finds_none(
    without_locks: Callable[[int], None], tmp_path: Path
) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text(CONFIG)
        without_locks(errno.EOPNOTSUPP)
        with pytest.raises(
            OutputError, match=r"another conversion is writing to .*\(if there is none, remove .*/locked"
        ):
            staged(tmp_path / "out").__enter__()

    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]


def test_locks_that_fail_are_an_error(without_locks: Callable[[int], None], tmp_path: Path) -> None:
    without_locks(errno.EIO)

    with pytest.raises(OutputError, match=r"cannot write .*out: Input/output error; nothing was kept"):
        staged(tmp_path / "out").__enter__()


@pytest.mark.parametrize("empty", [True, False], ids=["an empty one", "an output"])
@pytest.mark.parametrize("mode", [0o700, 0o775], ids=oct)
def test_an_output_has_the_permissions_of_what_was_there_and_so_it_has_while_it_grows(
    mode: int, empty: bool, tmp_path: Path
) -> None:
    out = existing(tmp_path / "out", **({} if empty else {"config_json": CONFIG}))
    out.chmod(mode)

    with staged(out, overwrite=True) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == mode
        (folder / "config.json").write_text(CONFIG)

    assert stat.S_IMODE(out.stat().st_mode) == mode


REPLACING = """
import sys
from pathlib import Path
from speculators import OutputError
from speculators.output import staged

try:
    with staged(Path(sys.argv[1]), overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
except OutputError as error:
    print(error)
"""


def without_privileges() -> None:
    """Have root held to the permissions of files like everybody else, from the next program on."""
    if os.geteuid() == 0:
        for override in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, dropped by PR_CAPBSET_DROP of prctl(2)
            ctypes.CDLL(None).prctl(24, override, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a root without privileges, or none")
def test_a_previous_output_that_may_not_be_moved_is_kept_and_may_be_replaced_later(tmp_path: Path) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)

    def replace() -> str:
        return subprocess.run(
            [sys.executable, "-c", REPLACING, str(out)],
            preexec_fn=without_privileges,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    out.chmod(0o555)
    refused = replace()
    if not refused and os.geteuid() == 0:
        pytest.skip("this root cannot give up its privileges")
    there = names(tmp_path)
    out.chmod(0o755)
    replaced = replace()

    assert refused == f"cannot write {out}: Permission denied; nothing was kept\n"
    assert there == ["out"]
    assert replaced == ""
    assert (out / "config.json").read_text() == "{}"


def test_what_was_replaced_by_mistake_and_cannot_be_put_back_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)
    real = output._exchange

    def exchange(one: Path, other: Path) -> bool:
        if (one / "chapter.tex").exists():
            return False  # which was to put it back
        (other / "chapter.tex").write_text("years of work")
        return real(one, other)

    monkeypatch.setattr(output, "_exchange", exchange)

    for number in range(2):
        with (
            pytest.warns(UserWarning, match=rf"what was replaced is kept in .*kept-{number}; move it back"),
            pytest.raises(OutputError, match=r"out has chapter\.tex beside"),
            staged(out, overwrite=True) as folder,
        ):
            (folder / "config.json").write_text(CONFIG)

        assert (work_folder(out) / f"kept-{number}" / "chapter.tex").read_text() == "years of work"
    assert names(work_folder(out)) == ["kept-0", "kept-1", "lock"]


def test_what_takes_the_place_of_a_previous_output_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = existing(tmp_path / "out", config_json=CONFIG)
    real = output._exchange
    swapped = []

    def exchange(one: Path, other: Path) -> bool:
        if not swapped:
            out.rename(tmp_path / "moved")
            existing(out, chapter_tex="years of work")
        swapped.append(one)
        return real(one, other)

    monkeypatch.setattr(output, "_exchange", exchange)

    with pytest.raises(OutputError, match=r"out has chapter\.tex beside"), staged(out, overwrite=True) as folder:
        (folder / "config.json").write_text(CONFIG)

    assert names(tmp_path) == ["moved", "out"]
    assert (out / "chapter.tex").read_text() == "years of work"


def test_a_name_that_begins_like_the_source_is_another(tmp_path: Path) -> None:
    check_target(tmp_path / "head", [tmp_path / "head-2"])

    assert names(tmp_path) == []
