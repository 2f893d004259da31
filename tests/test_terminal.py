"""What is seen: real commands on terminals of two widths and in pipes, their variables, and what shells complete.

``SPECULATORS_SNAPSHOTS=write`` writes `snapshots` anew; look at what has changed before you commit it.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import click
import pyte
import pytest
from click.testing import CliRunner
from snippets import ROOT
from warm import Warm

from speculators.cli import cli

SNAPSHOTS = Path(__file__).parent / "snapshots"
WRITE = os.environ.pop("SPECULATORS_SNAPSHOTS", "") == "write"

HEAD = ("tests/data/eagle3", "--verifier", "tests/data/verifier")
SESSION: Mapping[str, tuple[str, ...]] = {
    "convert": ("convert", *HEAD),
    "inspect": ("inspect", "tests/data/eagle3"),
    "dry-run": ("convert", *HEAD, "--output-path", "planned", "--dry-run"),
    "validate": ("validate", "converted"),
    "list": ("convert", "--list-algorithms"),
}
"""Name of a snapshot → the command, in the order in which somebody would type them."""

ROWS = 400
"""Lines of the terminals, so that nothing leaves them."""

COLOURS = {*range(30, 39), *range(40, 49), *range(90, 98), *range(100, 108)}
"""Parameters of the escape sequence that sets how characters look which set a colour."""

GREEN = 32

HIDDEN = "\x1b[?25l"
"""Hides the cursor, while bars move."""

Finished = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def path() -> Iterator[str]:
    """Where the command is found."""
    warm = Warm()
    yield os.pathsep.join([str(warm.folder), os.environ["PATH"]])
    warm.close()


@pytest.fixture
def here(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which the bundled checkpoints have the names that pages give them, on a usual terminal."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def piped(*arguments: str, program: tuple[str, ...] = ("speculators",), **variables: str) -> Finished:
    """Run a command whose output goes into pipes."""
    return subprocess.run(
        [*program, *arguments],
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        check=False,
    )


def on_terminal(
    *arguments: str,
    columns: int = 80,
    program: tuple[str, ...] = ("speculators",),
    stdout: IO[str] | None = None,
    **variables: str,
) -> str:
    """Run a command on a terminal, and return all that it sent there; ``stdout`` takes its results away."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    running = subprocess.Popen(
        [*program, *arguments],
        env=os.environ | variables,
        stdin=terminal,
        stdout=stdout or terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    sent = b""
    try:
        while part := os.read(master, 1 << 16):
            sent += part
    except OSError:  # nobody holds the terminal any more
        pass
    os.close(master)
    assert running.wait() == 0, sent.decode()
    return sent.decode()


def seen(sent: str, columns: int) -> str:
    """Return what a terminal shows in the end."""
    screen = pyte.Screen(columns, ROWS)
    pyte.Stream(screen).feed(sent)
    return "\n".join(line.rstrip() for line in screen.display).rstrip("\n") + "\n"


def compare(name: str, text: str) -> None:
    """Hold a text to its snapshot, or write that."""
    __tracebackhide__ = True
    snapshot = SNAPSHOTS / f"{name}.txt"
    if WRITE:
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(text)
    assert text.splitlines() == snapshot.read_text().splitlines(), f"{snapshot} differs"


def colours(sent: str) -> set[int]:
    """Return the colours that were set."""
    found = re.findall(r"\x1b\[([\d;]*)m", sent)
    return {int(number) for each in found for number in each.split(";") if number} & COLOURS


@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_shows_tables_that_fit(columns: int, here: Path) -> None:
    for name, arguments in SESSION.items():
        sent = on_terminal(*arguments, columns=columns)

        compare(f"{name}-{columns}", seen(sent, columns))
        assert all(len(line) <= columns for line in re.sub(r"\x1b\[[\d;?]*\w", "", sent).splitlines())


def test_a_pipe_takes_plain_lines(here: Path) -> None:
    for name, arguments in SESSION.items():
        ran = piped(*arguments, FORCE_COLOR="1", COLUMNS="40")

        assert (ran.returncode, ran.stderr) == (0, "")
        compare(f"{name}-pipe", ran.stdout)


def test_a_terminal_has_what_it_can_show_and_what_was_asked_for(here: Path) -> None:
    assert piped("convert", *HEAD, "--no-validate").returncode == 0
    command = ("validate", "converted", "--level", "structure")

    usual, quiet = on_terminal(*command), on_terminal(*command, "--quiet")
    assert HIDDEN in usual
    assert HIDDEN not in quiet
    assert colours(usual) == colours(quiet) == {GREEN}
    assert not colours(on_terminal(*command, NO_COLOR="1"))
    dumb = on_terminal(*command, TERM="dumb")
    assert "\x1b" not in dumb
    assert "structure   passed" in dumb


BUSY = """\
from speculators.cli.screen import tell
from speculators.progress import on_terminal
with on_terminal() as progress:
    progress("writing", 10, 20)
    tell("Warning: it is late")
    progress("validating", 0, 0)
"""


def test_a_message_makes_room_above_bars_which_are_gone_in_the_end(here: Path) -> None:
    sent = on_terminal("-c", BUSY, program=(sys.executable,))

    assert "writing" in sent
    assert seen(sent, 80) == "Warning: it is late\n"


NARROW = """\
from speculators.progress import on_terminal
with on_terminal() as progress:
    progress("downloading model-00001-of-00030.safetensors of a repository with a long name", 10**9, 2 * 10**9)
"""


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_of_a_long_step_the_name_is_cut_and_the_figures_are_not(columns: int, here: Path) -> None:
    sent = on_terminal("-c", NARROW, program=(sys.executable,), columns=columns)

    lines = [line for line in re.sub(r"\x1b\[[\d;?]*\w", "", sent).splitlines() if "downloading" in line]
    assert lines
    assert all(len(line) <= columns and "…" in line and "/2.0 GB" in line for line in lines)


def test_results_in_a_pipe_are_plain_whatever_messages_are_shown_on(here: Path) -> None:
    assert piped("convert", *HEAD, "--no-validate").returncode == 0
    command = ("validate", "converted", "--level", "structure")

    with Path("result").open("w") as result:
        on_terminal(*command, stdout=result)

    assert Path("result").read_text() == piped(*command).stdout
    assert "\x1b" not in Path("result").read_text()


def test_what_an_encoding_lacks_is_escaped(here: Path) -> None:
    Path("頭").symlink_to(ROOT / "tests/data/eagle3")
    cold = (sys.executable, "-m", "speculators")  # the encoding is chosen when Python starts

    shown = piped("inspect", "頭", program=cold, PYTHONIOENCODING="latin-1")
    refused = piped("inspect", "naïf", program=cold, PYTHONIOENCODING="ascii")
    sent = on_terminal("inspect", "頭", program=cold, PYTHONIOENCODING="ascii")

    assert (shown.returncode, shown.stdout.splitlines()[0]) == (0, r"\u982d")
    assert refused.returncode == 3
    assert "naïf" in refused.stderr or r"na\xeff" in refused.stderr  # Click takes ASCII for UTF-8 that nobody has set
    assert "Traceback" not in refused.stderr
    assert sent.isascii()
    assert r"\u982d" in sent


def test_each_step_is_said_on_standard_error_where_it_is_asked_for(here: Path) -> None:
    quiet = piped("convert", *HEAD, "--no-validate", "--output-path", "same", "--quiet")
    verbose = piped("convert", *HEAD, "--no-validate", "--output-path", "same", "--overwrite", "--verbose")
    both = piped("convert", *HEAD, "--quiet", "--verbose")

    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert verbose.stdout == quiet.stdout
    assert re.search(r"^(\w.*) \.\.\.\n(?:.*\n)*?\1: .*\d\.\d s$", verbose.stderr, re.MULTILINE)
    assert both.returncode == 2
    assert "--quiet and --verbose contradict each other" in both.stderr
    assert not Path("converted").exists()


def test_where_an_error_comes_from_is_said_where_it_is_asked_for(here: Path) -> None:
    usual, verbose = piped("inspect", "./nowhere"), piped("inspect", "./nowhere", "--verbose")

    assert "Traceback" not in usual.stderr
    assert verbose.stderr.startswith("Traceback (most recent call last):\n")
    assert verbose.stderr.endswith(usual.stderr)
    assert (verbose.returncode, verbose.stdout) == (usual.returncode, usual.stdout) == (3, "")


def test_a_typed_option_beats_a_variable_and_that_a_default(here: Path) -> None:
    command = ("convert", *HEAD, "--no-validate")
    variable = {"SPECULATORS_CONVERT_OUTPUT_PATH": "set", "SPECULATORS_JSON": "1"}

    assert json.loads(piped(*command, **variable).stdout)["output_path"] == "set"
    assert json.loads(piped(*command, "--output-path", "typed", **variable).stdout)["output_path"] == "typed"
    assert "algorithm" in json.loads(piped("inspect", "set", SPECULATORS_JSON="true").stdout)
    validated = piped(*command[:-1], "--output-path", "unchecked", SPECULATORS_CONVERT_VALIDATE="0")
    assert "not validated" in validated.stdout
    typed = piped("inspect", "set", "--quiet", SPECULATORS_VERBOSE="1")  # which would contradict each other
    assert (typed.returncode, typed.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variable", "value", "option"),
    [
        pytest.param("SPECULATORS_CONVERT_ALGORITHM_KWARGS", "[", "--algorithm-kwargs", id="what Click reads"),
        pytest.param("SPECULATORS_CONVERT_VALIDATE_LEVEL", "utmost", "--validate-level", id="what the library reads"),
    ],
)
def test_a_bad_value_is_traced_to_its_variable(variable: str, value: str, option: str, here: Path) -> None:
    ran = piped("convert", *HEAD, **{variable: value})

    assert ran.returncode == 2
    assert f"{option} is taken from {variable}" in ran.stderr
    assert not Path("converted").exists()


def test_variables_that_are_no_options_keep_their_meaning(here: Path) -> None:
    ran = piped("convert", "--list-algorithms", "--json", SPECULATORS_PLUGINS="eagle3", SPECULATORS_VERSION="1.0")

    assert [each["name"] for each in json.loads(ran.stdout)["algorithms"]] == ["eagle3"]


def test_a_token_in_a_variable_is_said_and_written_nowhere(here: Path) -> None:
    secret = "hf_s3cret0fMine"
    variable = {"SPECULATORS_TOKEN": secret}

    done = piped("convert", *HEAD, "--no-validate", "--verbose", **variable)
    refused = piped("convert", "org/head", "--verifier", "org/base", "--offline", "--verbose", **variable)

    assert done.returncode == 0
    assert refused.returncode != 0
    said = [done.stdout, done.stderr, refused.stdout, refused.stderr]
    written = [file.read_bytes().decode("latin-1") for file in Path("converted").iterdir()]
    assert written
    assert not [each for each in [*said, *written] if secret in each]


BASH = """\
source speculators.bash
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_speculators_completion speculators
printf '%s\\n' "${COMPREPLY[@]}"
"""

COMMANDS = {"convert", "validate", "inspect", "diff", "export", "plugins", "completion"}
ALGORITHMS = ["auto", "eagle", "eagle3", "hass"]


def test_bash_completes_what_can_be_typed(here: Path) -> None:
    Path("speculators.bash").write_text(piped("completion", "bash").stdout)

    def completed(*words: str) -> list[str]:
        ran = piped("-euc", BASH, "bash", "speculators", *words, program=("bash", "--norc", "--noprofile"))
        assert (ran.returncode, ran.stderr) == (0, "")
        return ran.stdout.split()

    assert set(completed("")) == COMMANDS
    assert completed("convert", "--algorithm", "") == ALGORITHMS
    assert completed("convert", "--algorithm", "eagle") == ["eagle", "eagle3"]
    assert completed("validate", "converted", "--lev") == ["--level"]
    assert completed("validate", "--level", "ac") == ["acceptance"]


@pytest.mark.parametrize("command", ["convert", "inspect", "validate", "diff", "export"])
def test_a_shell_is_asked_for_paths_where_a_checkpoint_is_meant(command: str) -> None:
    ran = CliRunner().invoke(cli, [], prog_name="speculators", env=asked_by("bash", "speculators", command, "conv"))

    assert ran.output == "file,conv\n"


def asked_by(shell: str, *words: str) -> dict[str, str]:
    """Return the variables with which a shell asks for what the last of some words may become."""
    number = words[-1] if shell == "fish" else str(len(words) - 1)
    said = " ".join(words[:-1] if shell == "fish" else words)
    return {"_SPECULATORS_COMPLETE": f"{shell}_complete", "COMP_WORDS": said, "COMP_CWORD": number}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_the_same(shell: str, here: Path) -> None:
    def completed(*words: str) -> str:
        return piped(**asked_by(shell, "speculators", *words)).stdout

    script = piped("completion", shell).stdout
    assert f"_SPECULATORS_COMPLETE={shell}_complete" in script
    assert shell != "zsh" or "== (loadautofunc|shfunc) ]]" in script  # so that it answers more than once
    assert set(re.findall(r"\w+", completed(""))) > COMMANDS
    assert re.findall(r"\b(?!plain\b|_\b)[a-z]\w*", completed("convert", "--algorithm", "")) == ALGORITHMS


def test_completing_imports_neither_plugins_nor_what_is_heavy(here: Path) -> None:
    program = (
        "import sys\nfrom speculators.cli import cli\ntry: cli(prog_name='speculators')\nfinally: print(*sys.modules)"
    )

    ran = piped(
        program=(sys.executable, "-c", program), **asked_by("bash", "speculators", "convert", "--algorithm", "eagle3")
    )

    completed, modules = ran.stdout.splitlines()
    loaded = set(modules.split())
    assert completed == "plain,eagle3"
    assert "speculators.registry" in loaded
    assert not {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "rich"} & loaded
    assert not [each for each in loaded if each.startswith("speculators_")]


def every_command(command: click.Command, *names: str) -> Iterator[tuple[str, ...]]:
    yield names
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        if not inner.hidden:
            yield from every_command(inner, *names, name)


@pytest.mark.parametrize("names", [*every_command(cli)], ids=" ".join)
def test_help_has_examples_and_fits(names: tuple[str, ...]) -> None:
    said = CliRunner().invoke(cli, [*names, "--help"], prog_name="speculators", terminal_width=80).output

    assert f"Examples:\n    speculators {' '.join(names)}".rstrip() in said
    assert max(map(len, said.splitlines())) <= 80
    assert "..." not in said.partition("\nCommands:\n")[2]


BLANK = """\
from speculators.cli.screen import Screen, Table
rows = [("draft token 1", " " * 30, "0.000")]
Screen().show("validation/1", {}, [Table("accepted by position", ("", "", ""), rows)])
"""


def test_a_table_whose_widest_cells_are_blank_is_shown(here: Path) -> None:
    sent = on_terminal("-c", BLANK, program=(sys.executable,))

    assert "draft token 1" in seen(sent, 80)
