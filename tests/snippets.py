"""What the pages show: each fenced block, what it stands for, and which test runs what cannot be run at once.

To add a page, write it. What its snippets name is in `STANDS_FOR`, `MORE` or `HUB`; a command that needs more than this
suite has is a row of `ELSEWHERE`, and the test that it names takes the command from there (`elsewhere`).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoints import DATA, VERIFIER

ROOT = Path(__file__).parents[1]

SERVED = "tests/slow/test_serving.py::"
PACKAGED = "tests/slow/test_packages.py::"
SHELL = ("console", "bash", "sh")
"""Languages of blocks that hold commands."""

WHOLE = ""
"""The row of a page that one test follows from its first block to the last."""

ELSEWHERE: dict[str, dict[str, str]] = {
    "README.md": {
        "python3 -m venv .venv": ".ci/run",
        ".venv/bin/pip install": ".ci/run",
        "vllm serve converted": f"{SERVED}test_the_openai_server_answers_a_completion",
    },
    "CONTRIBUTING.md": {".ci/run": ".ci/run"},
    "docs/batch.md": {
        "speculators convert --from-file docs/batch.yaml --exec": "tests/test_batch.py::test_a_dask_cluster_does_jobs"
    },
    "docs/getting-started.md": {
        "python3 -m venv .venv": ".ci/run",
        ".venv/bin/pip install": ".ci/run",
        "vllm serve converted": f"{SERVED}test_the_first_steps_are_served_as_their_page_says",
        "curl": f"{SERVED}test_the_first_steps_are_served_as_their_page_says",
    },
    "docs/serving.md": {
        "vllm serve converted": f"{SERVED}test_the_openai_server_answers_a_completion",
        "vllm serve VERIFIER": f"{SERVED}test_a_verifier_is_served_with_a_draft_beside_it",
        "curl": f"{SERVED}test_the_openai_server_answers_a_completion",
        "from vllm import LLM": f"{SERVED}test_the_python_of_the_page_counts_drafts",
    },
    "docs/sources.md": {
        "speculators convert s3://": f"{PACKAGED}test_a_head_is_read_from_a_bucket",
    },
    "docs/validation.md": {
        "speculators validate converted --diagnose": "tests/test_validation.py::test_the_command_reports_a_diagnosis"
    },
    "docs/plugins/conformance.md": {
        "import torch": "tests/test_conformance.py::test_the_script_of_the_page_writes_what_the_original_code_computes"
    },
    "docs/plugins/publishing.md": {WHOLE: f"{PACKAGED}test_an_author_checks_and_releases_a_plugin"},
    "docs/plugins/tutorial.md": {WHOLE: f"{PACKAGED}test_the_tutorial_leads_to_the_example_and_back"},
    "plugins/speculators-eagle/README.md": {
        "pip install speculators-eagle": f"{PACKAGED}test_a_plugin_is_installed_as_its_page_says",
        "pip install vllm": f"{SERVED}test_what_teaches_vllm_is_installed_beside_it",
        "vllm serve converted": f"{SERVED}test_the_openai_server_answers_a_completion",
    },
    "plugins/speculators-eagle3/README.md": {
        "pip install speculators-eagle3": f"{PACKAGED}test_a_plugin_is_installed_as_its_page_says"
    },
    "plugins/speculators-hass/README.md": {
        "pip install speculators-hass": f"{PACKAGED}test_a_plugin_is_installed_as_its_page_says"
    },
    "examples/speculators-medusa/README.md": {
        WHOLE: f"{PACKAGED}test_the_example_passes_its_tests_where_it_is_installed"
    },
}
"""Page → the beginning of a command, or of a block in another language → the test or script that runs it."""


Make = Callable[[Path], None]


def link(target: Path) -> Make:
    """Let a name stand for a folder of this repository."""
    return lambda place: place.symlink_to(target)


def copy(source: Path) -> Make:
    """Let a name stand for a copy of a checkpoint."""
    return lambda place: void(shutil.copytree(source, place, ignore=shutil.ignore_patterns("golden")))


def convert(name: str, verifier: str | Path = VERIFIER) -> Make:
    """Let a name stand for the conversion of a bundled checkpoint."""

    def make(place: Path) -> None:
        from speculators import convert_model

        convert_model(DATA / name, verifier=verifier, output_path=place, validate=False)

    return make


def write(text: str) -> Make:
    """Let a name stand for a file."""
    return lambda place: void(place.write_text(text))


def within(inner: str, make: Make) -> Make:
    """Let a name stand for a folder that has something deeper in it."""

    def nested(place: Path) -> None:
        (place / inner).parent.mkdir(parents=True)
        make(place / inner)

    return nested


def void(_: object) -> None:
    """Return nothing."""


STANDS_FOR: dict[str, Make] = {
    "MODEL": copy(DATA / "eagle3"),
    "VERIFIER": copy(VERIFIER),
    "prompts.json": write(json.dumps([list(b"def __init__(self, "), list(b"import os\n")])),
    "tests": link(ROOT / "tests"),
    "docs": link(ROOT / "docs"),
    "examples": link(ROOT / "examples"),
}
"""What lies in the folder in which a page is followed."""

MORE: dict[str, dict[str, Make]] = {
    "docs/serving.md": {"converted": convert("eagle1-no-bias")},
    "docs/sources.md": {"Llama-3.1-8B-Instruct": copy(VERIFIER)},
    "docs/validation.md": {"converted": convert("eagle3")},
    "plugins/speculators-eagle/README.md": {"MODEL": copy(DATA / "eagle1-fc-bias")},
    "plugins/speculators-hass/README.md": {"MODEL": copy(DATA / "hass-layernorms")},
}
"""Page → what lies there besides, or in its place."""

HUB: dict[str, Make] = {
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": copy(DATA / "eagle3"),
    "meta-llama/Llama-3.1-8B-Instruct": copy(VERIFIER),
    "org/base@refs/pr/3": copy(VERIFIER),
    "org/heads@v1.0": within("llama/best", copy(DATA / "eagle1-no-bias")),
    "org/converted": convert("eagle3", "meta-llama/Llama-3.1-8B-Instruct"),
}
"""Repositories of the Hub, with the revision where it is not the main branch; what is made of another comes later."""

SITES: dict[str, Make] = {
    "files.example.com/heads": within("best", copy(DATA / "eagle1-no-bias")),
}
"""Host and first folder of what other servers have."""

VARIABLES = {"TOKEN": "hf_s3cret"}
"""Variables that snippets take from whoever follows them."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The page, from the root of the repository.
        line: The number of its first line.
        language: The first word of its fence, empty where there is none.
        info: What stands behind that.
        text: Its lines, without the indentation of its fence.
        titled: Whether it stands directly below a heading.
    """

    page: str
    line: int
    language: str
    info: str
    text: str
    titled: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a block, with the lines that continue it; ``line`` is the number of its first in the block."""

    line: int
    text: str


def pages() -> list[str]:
    """Return every page whose snippets are run."""
    folders = ("docs/**/*.md", "plugins/*/README.md", "examples/*/README.md")
    return sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in ("README.md", "CONTRIBUTING.md", "SECURITY.md", *folders)
        for path in ROOT.glob(pattern)
    )


FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page, of some languages or of all."""
    return [each for each in read_blocks(page) if not languages or each.language in languages]


def read_blocks(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines = iter(enumerate((ROOT / page).read_text().splitlines(), 1))
    last = ""
    for number, line in lines:
        if fence := FENCE.match(line):
            indent, mark, said = fence.groups()
            language, _, info = said.strip().partition(" ")
            content = []
            for _, inner in lines:
                if inner.strip() == mark:
                    break
                content.append(inner.removeprefix(indent))
            else:
                raise AssertionError(f"{page}:{number}: a block that does not end")
            text = "".join(f"{each}\n" for each in content)
            yield Block(page, number + 1, language, info.strip(), text, last.startswith("#"))
        last = line if line.strip() else last


HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")


def commands(block: Block) -> list[Command]:
    """Divide a block of the shell into commands: lines, with those that continue them."""
    found: list[Command] = []
    begun, until = "", None
    for number, line in enumerate(block.text.splitlines(), 1):
        if not begun:
            found.append(Command(number, ""))
        begun += line + "\n"
        if until is not None:
            finished = line.strip() == until
        else:
            heredoc = HEREDOC.search(line)
            until = heredoc.group(2) if heredoc else None
            finished = not heredoc and not line.endswith("\\") and closed(begun)
        if finished:
            found[-1] = Command(found[-1].line, begun.rstrip("\n"))
            begun, until = "", None
    assert not begun, f"{block}: a command that does not end:\n{begun}"
    return [each for each in found if each.text.strip()]


def closed(text: str) -> bool:
    """Tell whether all quotes are closed."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def named(text: str, rows: Iterable[str]) -> str | None:
    """Return the row that a command or block belongs to."""
    return next((row for row in rows if text.startswith(row)), None)


def texts(block: Block) -> list[str]:
    """Return what rows can name in a block: its commands, or all of it where it is Python."""
    if block.language in SHELL:
        return [each.text for each in commands(block)]
    return [block.text] if block.language == "python" else []


def elsewhere(test: str) -> dict[str, str]:
    """Return what a test has to run, and no other test does: page → the commands and blocks whose rows name it."""
    found: dict[str, str] = {}
    for page, rows in ELSEWHERE.items():
        mine = [row for row, runner in rows.items() if runner.rpartition("::")[2] == test]
        every = [text for block in blocks(page) for text in texts(block)]
        if taken := [text for text in every if named(text, mine) is not None]:
            found[page] = "\n".join(taken)
    assert found, f"no row of ELSEWHERE names {test}"
    return found


class Shell:
    """Bash, in which one block after another is run: each begins where the last one ended, with its variables.

    Attributes:
        place: The folder in which the last one ended.
    """

    def __init__(self, folder: Path, state: Path, variables: Mapping[str, str]) -> None:
        state.mkdir()
        self.place = self._folder = folder
        self._state, self._variables = state, variables

    def run(self, block: Block, leave: Iterable[str] = ()) -> str:
        """Run a block without the commands of some rows, and return what it printed, to both streams.

        Raises:
            AssertionError: One of its commands failed.
        """
        __tracebackhide__ = True
        lines = block.text.splitlines()
        for command in commands(block):
            if named(command.text, leave) is not None:
                for number in range(command.line, command.line + len(command.text.splitlines())):
                    lines[number - 1] = ""
        left, place, failed, script = (self._state / name for name in ("left", "place", "failed", "script"))
        script.write_text("\n".join(lines) + "\n")
        begin = f". {shlex.quote(str(left))}; " if left.exists() else ""
        begin += f"trap 'echo $LINENO >{shlex.quote(str(failed))}' ERR; . {shlex.quote(str(script))}; trap ERR"
        end = f'{{ export -p; printf "cd %q\\n" "$PWD"; }} >{shlex.quote(str(left))}; pwd >{shlex.quote(str(place))}'
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{begin}\n{end}"],
            cwd=self._folder, env=dict(self._variables), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            number = int(failed.read_text()) if failed.exists() else 1
            where = f"{block.page}:{block.line + number - 1}"
            raise AssertionError(f"{where}: ended with exit code {ran.returncode}:\n{block.text}\n{ran.stdout}")
        self.place = Path(place.read_text().removesuffix("\n"))
        return ran.stdout


def compare(block: Block, printed: str) -> None:
    """Hold the output that a page shows to what was printed; ``…`` stands for anything."""
    __tracebackhide__ = True
    for number, line in enumerate(block.text.splitlines(), block.line):
        pattern = ".*".join(re.escape(part) for part in line.split("…"))
        assert re.search(pattern, printed), f"{block.page}:{number}: {line!r} is not in what was printed:\n{printed}"
