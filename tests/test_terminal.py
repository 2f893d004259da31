"""What is seen: sessions in a real terminal at two widths, what a pipe gets, and the manners of all commands.

``SPECULATORS_SNAPSHOTS=write pytest tests/test_terminal.py`` writes the snapshots anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pyte
import pytest
from checkpoints import DATA, VERIFIER

from speculators import convert_model

SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMAND = (sys.executable, "-m", "speculators")
GREEN = re.compile(rb"\x1b\[[\d;]*32m")
LONGEST = 400
"""Lines of the terminal in which sessions are looked at."""

SESSIONS = {
    "inspect": "inspect tests/data/eagle1-no-bias",
    "dry-run": "convert tests/data/eagle1-no-bias --verifier tests/data/verifier --dry-run --no-validate",
    "convert": "convert tests/data/eagle1-no-bias --verifier tests/data/verifier",
    "validate": "validate converted --level structure",
    "list": "convert --list-algorithms",
}


def environment(**variables: str) -> dict[str, str]:
    """Return the variables of a user who has set none of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPECULATORS_", "COLUMNS"))}
    return {**kept, "TERM": "xterm-256color", "LANG": "C.UTF-8"} | variables


def on_terminal(command: str, folder: Path, columns: int = 80, **variables: str) -> tuple[str, bytes]:
    """Run a command in a terminal; return the text on the screen at the end, and all that was sent to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LONGEST, columns, 0, 0))
    arguments = [*COMMAND, *command.split()]
    with subprocess.Popen(
        arguments, cwd=folder, env=environment(**variables), stdin=theirs, stdout=theirs, stderr=theirs
    ) as running:
        os.close(theirs)
        sent = b""
        with suppress(OSError):  # how the end of a terminal reads
            while data := os.read(ours, 1 << 16):
                sent += data
    os.close(ours)
    assert running.returncode == 0, sent.decode()
    screen = pyte.Screen(columns, LONGEST)
    pyte.ByteStream(screen).feed(sent)
    return "\n".join(line.rstrip() for line in screen.display).rstrip() + "\n", sent


def in_pipe(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment(**variables), capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader of the pages works: beside ``tests``."""
    (tmp_path / "tests").symlink_to(DATA.parent)
    return tmp_path


def compare(name: str, text: str) -> None:
    """Compare a session with its snapshot, or write it where that was asked for."""
    file = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("SPECULATORS_SNAPSHOTS") == "write":
        SNAPSHOTS.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("columns", [80, 140])
def test_sessions_look_right_in_a_terminal(columns: int, folder: Path) -> None:
    for name, command in SESSIONS.items():
        text, sent = on_terminal(command, folder, columns)

        compare(f"{name}-{columns}", text)
        assert re.search(rb"\x1b\[[\d;]*m", sent), "no colours"


def test_a_pipe_gets_lines_that_depend_on_nothing_else(folder: Path) -> None:
    for name, command in SESSIONS.items():
        result = in_pipe(*command.split(), folder=folder, FORCE_COLOR="", COLUMNS="40")

        assert (result.returncode, result.stderr) == (0, "")
        compare(f"{name}-pipe", result.stdout)
        assert "\x1b" not in result.stdout


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_refused(variables: dict[str, str], folder: Path) -> None:
    convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=folder / "converted", validate=False)

    _, coloured = on_terminal(SESSIONS["validate"], folder)
    _, plain = on_terminal(SESSIONS["validate"], folder, **variables)

    assert GREEN.search(coloured)
    assert not GREEN.search(plain)


def test_steps_are_told_where_they_were_asked_for(folder: Path) -> None:
    arguments = SESSIONS["convert"].split()

    told = in_pipe(*arguments, "--no-validate", "--verbose", folder=folder)
    failed = in_pipe(*arguments, "--verbose", folder=folder)
    both = in_pipe(*arguments, "--verbose", "--quiet", folder=folder)

    assert told.returncode == 0
    assert re.search(r"^writing \.\.\.\nwriting: .* in \d+\.\d s$", told.stderr, re.MULTILINE)
    assert "writing" not in told.stdout
    assert failed.returncode == 5
    assert "Traceback (most recent call last)" in failed.stderr
    assert "Error: converted exists and is not empty" in failed.stderr
    assert both.returncode == 2
    assert "--quiet and --verbose contradict each other" in both.stderr


def test_a_poor_encoding_escapes_what_it_lacks(folder: Path) -> None:
    shutil.copytree(DATA / "eagle1-no-bias", folder / "深-head")

    result = in_pipe("inspect", "深-head", folder=folder, PYTHONIOENCODING="cp1252")

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("\\u6df1-head\n")


def test_a_variable_stands_between_the_default_and_what_is_typed(folder: Path) -> None:
    arguments = (*SESSIONS["convert"].split(), "--no-validate")

    named = in_pipe(*arguments, folder=folder, SPECULATORS_CONVERT_OUTPUT_PATH="named", SPECULATORS_JSON="1")
    typed = in_pipe(*arguments, "--output-path", "typed", folder=folder, SPECULATORS_CONVERT_OUTPUT_PATH="unused")

    assert json.loads(named.stdout)["output_path"] == "named"
    assert typed.returncode == 0
    assert sorted(path.name for path in folder.iterdir() if path.name != "tests") == ["named", "typed"]


def test_a_bad_value_names_its_variable_and_no_secret_is_shown(folder: Path) -> None:
    secret = {"SPECULATORS_TOKEN": "hf_s3cret"}

    bad = in_pipe("convert", "x", folder=folder, SPECULATORS_CONVERT_ALGORITHM_KWARGS="{", **secret)
    shown = in_pipe("convert", "--help", folder=folder, **secret)

    assert bad.returncode == 2
    assert "SPECULATORS_CONVERT_ALGORITHM_KWARGS" in bad.stderr
    assert not [said for said in (bad, shown) if "s3cret" in said.stdout + said.stderr]


def test_the_variable_of_plugins_is_no_option(folder: Path) -> None:
    result = in_pipe("plugins", folder=folder, SPECULATORS_PLUGINS="hass")

    assert "hass: ready" in result.stdout
    assert "eagle3: not loaded" in result.stdout


COMPLETE = """
PATH={bin}:$PATH
source ./script
COMP_WORDS=({words}) COMP_CWORD={number}
_speculators_completion speculators
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("speculators ex", ["export"]),
        ("speculators convert --algorithm ''", ["auto", "eagle", "eagle3", "hass"]),
        ("speculators convert --algorithm eagle", ["eagle", "eagle3"]),
        ("speculators validate --level ac", ["acceptance"]),
        ("speculators completion f", ["fish"]),
    ],
)
def test_bash_completes_commands_and_installed_algorithms(words: str, expected: list[str], folder: Path) -> None:
    (folder / "script").write_text(in_pipe("completion", "bash", folder=folder).stdout)
    bash = COMPLETE.format(bin=Path(sys.executable).parent, words=words, number=len(words.split()) - 1)

    done = subprocess.run(
        ["bash", "-c", bash], cwd=folder, env=environment(), capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == expected


@pytest.mark.parametrize(
    ("shell", "variables"),
    [
        ("zsh", {"COMP_WORDS": "speculators convert --algorithm ", "COMP_CWORD": "3"}),
        ("fish", {"COMP_WORDS": "speculators convert --algorithm ", "COMP_CWORD": ""}),
    ],
)
def test_other_shells_are_answered_too(shell: str, variables: dict[str, str], folder: Path) -> None:
    script = in_pipe("completion", shell, folder=folder).stdout
    program = Path(sys.executable).with_name("speculators")

    asked = subprocess.run(
        [program],
        env=environment(_SPECULATORS_COMPLETE=f"{shell}_complete", **variables),
        capture_output=True,
        text=True,
        check=True,
    )

    assert "speculators" in script
    assert re.findall(r"\b(auto|eagle3|hass)\b", asked.stdout) == ["auto", "eagle3", "hass"]


def test_completing_imports_nothing_heavy(folder: Path) -> None:
    code = """
import os, sys
os.environ |= {"_SPECULATORS_COMPLETE": "bash_complete"}
os.environ |= {"COMP_WORDS": "speculators convert --algorithm ", "COMP_CWORD": "3"}
from speculators.cli import cli
try:
    cli(prog_name="speculators")
except SystemExit:
    pass
print(sorted({"torch", "transformers", "numpy", "rich", "speculators_eagle3"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"
