"""Every snippet of the pages runs as a reader runs it: here, or in the test that `snippets.ELSEWHERE` names."""

from __future__ import annotations

import ast
import json
import os
import re
import ssl
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
import snippets
import trustme
import yaml
from loopback import Proxy, Server
from snippets import ELSEWHERE, ROOT, SHELL, WHOLE, Block, Shell, blocks, commands, compare, named, pages
from warm import Warm

from speculators.cli import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PARSED: dict[str, Any] = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
LANGUAGES = (*SHELL, *PARSED, "python", "output", "text", "")

TYPED = re.compile(r"(\$|>>>) |(?:[A-Z_]+=\S+ )*(speculators|vllm|curl|pip3?|python3?|pytest|hf|git|\.ci/\w+)( |$)")
"""What somebody types, as against what a program prints."""


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What whoever follows the pages has set: the real command, a Hub and other servers on loopback, a token."""
    served, authority, bundle = Server(), trustme.CA(), tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*{site.partition("/")[0] for site in snippets.SITES}).configure_cert(context)
    proxy = Proxy(served, context)
    set_here = {
        "HF_ENDPOINT": served.url,
        "HTTPS_PROXY": proxy.url,
        "NO_PROXY": "127.0.0.1",
        "SSL_CERT_FILE": str(bundle),
        "HOME": str(tmp_path_factory.mktemp("home")),
        **snippets.VARIABLES,
    }
    served.tokens[snippets.VARIABLES["TOKEN"]] = set()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in set_here.items():
            patch.setenv(name, value)
        warm = Warm()
        patch.setenv("PATH", os.pathsep.join([str(warm.folder), str(Path(sys.executable).parent), os.environ["PATH"]]))
        for name, make in snippets.HUB.items():
            repository, _, revision = name.partition("@")
            folder = tmp_path_factory.mktemp("repository") / "files"
            make(folder)
            served.add(repository, folder, revision or "main")
        for site, make in snippets.SITES.items():
            folder = tmp_path_factory.mktemp("site") / "files"
            make(folder)
            served.folders[site.partition("/")[2]] = folder
        yield dict(os.environ)
    warm.close()
    proxy.close()
    served.close()


def is_signature(block: Block) -> bool:
    """Tell whether a block is how something is called, which `docs/generate.py` writes below its heading."""
    return block.page == "docs/plugins/reference.md" and block.titled


@pytest.mark.parametrize("page", [page for page in pages() if WHOLE not in ELSEWHERE.get(page, {}) and blocks(page)])
def test_the_snippets_of_a_page_run(
    page: str, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, in a folder that begins with what they name."""
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, make in (snippets.STANDS_FOR | snippets.MORE.get(page, {})).items():
        make(folder / name)
    rows = ELSEWHERE.get(page, {})
    shell = Shell(folder, tmp_path / "state", variables)
    names = {"__name__": "snippet", "__file__": str(folder / "snippet.py")}
    printed: str | None = None

    for block in blocks(page):
        if block.language in SHELL:
            printed = shell.run(block, leave=rows)
            if all(named(each.text, rows) is not None for each in commands(block)):
                printed = None
        elif block.language == "python" and not is_signature(block):
            printed = run_python(block, names) if named(block.text, rows) is None else None
        elif block.language == "output" and printed is not None:
            compare(block, printed)


def run_python(block: Block, names: dict[str, Any]) -> str:
    """Run a block in the namespace of its page and return what it printed."""
    printed = StringIO()
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
    try:
        with redirect_stdout(printed):
            exec(code, names)
    except Exception as error:
        lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == block.page]
        place, said = f"{block.page}:{(lines or [block.line])[-1]}", f"{type(error).__name__}: {error}"
        raise AssertionError(f"{place}: {said}\n{block.text}\n{printed.getvalue()}") from error
    return printed.getvalue()


@pytest.mark.parametrize("page", pages())
def test_blocks_say_what_they_are(page: str) -> None:
    for block in blocks(page):
        if block.language.startswith("{"):  # written by the generator of the site
            continue
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is none of {LANGUAGES}"
        if block.language in PARSED:
            try:
                PARSED[block.language](block.text)
            except (ValueError, yaml.YAMLError) as error:
                raise AssertionError(f"{block}: no {block.language}: {error}") from error
        for number, line in enumerate(block.text.splitlines(), block.line):
            if block.language in SHELL:
                assert not re.match(r"\$ |> ", line), f"{page}:{number}: a prompt: {line}"
            elif not block.language:
                assert not TYPED.match(line), f"{page}:{number}: a command in a block that shows output: {line}"
        if not block.language and (found := parsed(block.text)):
            statements = [each for each in found.body if not isinstance(each, ast.Expr | ast.AnnAssign)]
            assert not statements, f"{block}: Python in a block that shows output"
        if block.language == "text":
            check_synopsis(block)
        elif is_signature(block):
            parse_signature(block)


def check_synopsis(block: Block) -> None:
    """Hold a synopsis to the options that there are."""
    known: set[str] = set()
    for line in block.text.splitlines():
        words = line.split()
        if words[0] == "speculators":
            command: click.Command = cli
            for word in words[1:]:
                if not isinstance(command, click.Group) or word not in command.commands:
                    break
                command = command.commands[word]
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert known, f"{block}: text begins with a command whose options it lists; for what is printed, leave it out"
        unknown = set(re.findall(r"(?<!\S)\[?(--[\w-]+)", line)) - known
        assert not unknown, f"{block}: {', '.join(sorted(unknown))} in {line!r}"


def parse_signature(block: Block) -> None:
    """Refuse a signature that is no Python."""
    text = block.text.rstrip()
    assert any(map(parsed, (text, f"{text}: ...", f"def {text}: ..."))), f"{block}: no signature:\n{text}"


def parsed(text: str) -> ast.Module | None:
    """Read text as Python, if it is."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def rows() -> list[tuple[str, str, str]]:
    return [(page, start, runner) for page, found in ELSEWHERE.items() for start, runner in found.items()]


@pytest.mark.parametrize(("page", "start", "runner"), rows())
def test_what_runs_elsewhere_is_on_its_page_and_run_there(page: str, start: str, runner: str) -> None:
    assert page in pages(), f"there is no page {page}"
    found = [text for block in blocks(page) for text in snippets.texts(block) if start and text.startswith(start)]
    assert len(found) == (start != WHOLE), f"{page} has {len(found)} snippets that begin with {start!r}, expected one"

    file, _, name = runner.partition("::")
    code = (ROOT / file).read_text()
    if not name:
        assert found[0] in code or found[0] == file, f"{file} does not run {found[0]}"
        return
    functions = {each.name: each for each in ast.parse(code).body if isinstance(each, ast.FunctionDef)}
    assert name in functions, f"{file} has no test {name}"
    calls = [each for each in ast.walk(functions[name]) if isinstance(each, ast.Call) and each.args]
    called = {(ast.unparse(each.func), each.args[0].value) for each in calls if isinstance(each.args[0], ast.Constant)}
    expected = ("elsewhere", name) if start != WHOLE else ("follow", page)
    assert expected in called, f"{runner} has no {expected[0]}({expected[1]!r}), which takes what it runs from {page}"


def test_pages_of_every_kind_are_read() -> None:
    kinds = {"README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/sources.md", "docs/plugins/table.md"}
    kinds |= {f"plugins/speculators-{name}/README.md" for name in ("eagle", "eagle3", "hass")}

    assert {*kinds, "examples/speculators-medusa/README.md"} <= {*pages()}


def a_block(text: str, language: str = "console", line: int = 10) -> Block:
    return Block("docs/page.md", line, language, "", text, titled=False)


def test_a_block_is_divided_into_commands() -> None:
    lines = ["a --x 'one", "two'", "", "b \\", "  --y", "# why", "cat >f <<'END'", "it's", "END", "c # don't"]

    found = [(each.line, each.text) for each in commands(a_block("\n".join(lines)))]

    assert found == [
        (1, "a --x 'one\ntwo'"),
        (4, "b \\\n  --y"),
        (6, "# why"),
        (7, "cat >f <<'END'\nit's\nEND"),
        (10, "c # don't"),
    ]


def test_a_command_that_fails_is_named_with_its_line_and_what_it_printed(tmp_path: Path) -> None:
    shell = Shell(tmp_path, tmp_path / "state", os.environ)

    with pytest.raises(AssertionError, match=r"docs/page.md:12: ended with exit code 3:(.|\n)*no such head"):
        shell.run(a_block("true\n\n(echo no such head; exit 3)\ntrue\n"))
    with pytest.raises(AssertionError, match=r"ended with exit code 1"):
        shell.run(a_block("false | true\n"))


def test_a_block_begins_where_the_last_one_ended_and_leaves_out_what_runs_elsewhere(tmp_path: Path) -> None:
    shell = Shell(tmp_path, tmp_path / "state", os.environ)

    shell.run(a_block("mkdir 'a b'\ncd 'a b'\nexport NAME='two words'\n"))
    printed = shell.run(a_block('serve x \\\n  --y\necho "$NAME in $(basename "$PWD")"\n'), leave=["serve"])

    assert printed == "two words in a b\n"
    assert shell.place == tmp_path / "a b"


def test_output_that_was_not_printed_is_named(tmp_path: Path) -> None:
    compare(a_block("took … seconds\n", "output"), "it took 3 seconds\n")

    with pytest.raises(AssertionError, match=r"docs/page.md:11: 'wrong' is not in what was printed:\nright"):
        compare(a_block("right\nwrong\n", "output"), "right\n")


def test_a_python_block_that_fails_is_named_with_what_it_printed() -> None:
    with pytest.raises(AssertionError, match=r"docs/page.md:11: ValueError: no(.|\n)*said"):
        run_python(a_block("print('said')\nraise ValueError('no')\n", "python"), {})


@pytest.mark.parametrize(
    ("synopsis", "found"),
    [
        ("speculators convert MODEL [--verifyer X]", "--verifyer"),
        ("speculators plugins check NAME --dtype X", "--dtype"),
        ("Converted it", "text begins with a command"),
    ],
)
def test_a_synopsis_with_an_option_that_there_is_not_is_found(synopsis: str, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check_synopsis(a_block(synopsis, "text"))
