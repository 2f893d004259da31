"""New plugins, their examples, and the verdict on installed ones, as the command line gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from checkpoints import contents
from click.testing import CliRunner, Result
from installing import TOY, Announce

from speculators import Checkpoint, OptionError, PluginError, Registry, scaffold
from speculators.cli import cli
from speculators.conformance import Bench, judge

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


@pytest.mark.parametrize(
    ("name", "package", "module", "cls"),
    [
        ("none", "speculators-none", "speculators_none", "NoneConfig"),
        ("example", "speculators-example", "speculators_example", "ExampleConfig"),
        ("p-eagle2", "speculators-p-eagle2", "speculators_p_eagle2", "PEagle2Config"),
        ("mlp_heads", "speculators-mlp-heads", "speculators_mlp_heads", "MlpHeadsConfig"),
    ],
)
def test_a_new_plugin_keeps_every_promise(
    name: str, package: str, module: str, cls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    folder = scaffold.write(name)

    assert folder == Path(package)
    monkeypatch.syspath_prepend(str(tmp_path / folder))
    registry = Registry(EntryPoints([EntryPoint(name, module, "speculators")]))
    assert registry.get(name).spec.config.__name__ == cls
    needing_metadata = {"light", "reproducible"}  # which start processes that see installed packages alone
    findings = judge(Bench(name, tmp_path, registry=registry))
    assert [each for each in findings if not each.passed and each.check not in needing_metadata] == []


@pytest.mark.parametrize("name", ["medusa", "table", "p-eagle2", "a" * scaffold.LONGEST_NAME])
def test_a_new_plugin_is_formatted_and_free_of_lint(name: str, tmp_path: Path) -> None:
    folder = scaffold.write(name, tmp_path / "new")

    for tool in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        ran = subprocess.run([sys.executable, "-m", *tool], cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout
    assert "$" not in "".join(
        path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.name and "cache" not in str(path)
    )


@pytest.mark.parametrize("name", ["", "Medusa", "3d", "a b", "a--b", "-a", "auto", "a" * 31, "a.b", "../a", "é"])
def test_a_name_that_no_package_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"is no (name for an )?algorithm"):
        scaffold.write(name, tmp_path / "new")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "owner"), [("eagle3", "speculators-eagle3 1.0.0"), ("eagle1", "eagle, speculators-eagle 1.0.0")]
)
def test_the_name_or_alias_of_an_installed_algorithm_is_refused(name: str, owner: str, tmp_path: Path) -> None:
    result = run("plugins", "new", name, "--output-path", tmp_path / "new")

    assert (result.exit_code, result.output) == (
        2,
        f"Error: an algorithm {name!r} is installed already ({owner}); choose another name\n",
    )


def test_a_name_that_gives_a_class_the_name_of_one_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'speculator' would have a class SpeculatorConfig, which"):
        scaffold.write("speculator", tmp_path / "new")


@pytest.mark.parametrize("command", [["new", "medusa"], ["example", "eagle3"]])
def test_what_stands_there_is_not_written_over(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    result = run("plugins", *command, "--output-path", tmp_path)

    assert (result.exit_code, result.output) == (
        5,
        f"Error: {tmp_path} exists and is not empty; choose another --output-path\n",
    )
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("name", ["eagle", "eagle3", "hass"])
def test_the_example_of_a_plugin_is_converted_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    written = run("plugins", "example", name)

    assert written.exit_code == 0
    command = written.output.splitlines()[-1].split()
    converted = run(*command[1:])
    assert converted.exit_code == 0, converted.output
    assert Registry().recognise(Checkpoint(tmp_path / "example" / "draft")).spec.name == name


def test_examples_are_always_the_same(tmp_path: Path) -> None:
    for place in ("one", "other"):
        assert run("plugins", "example", "eagle3", "--output-path", tmp_path / place).exit_code == 0

    for part in ("draft", "verifier"):
        assert contents(tmp_path / "one" / part) == contents(tmp_path / "other" / part)


def test_a_plugin_without_an_example_is_said_to_have_none(beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("toy", TOY.replace("def example(", "def _example("))

    result = run("plugins", "example", "toy", "--output-path", tmp_path / "example")
    checked = run("plugins", "check", "toy")

    assert result.exit_code == PluginError.exit_code
    assert "the plugin of 'toy' brings no example" in result.output
    assert list((tmp_path).glob("example*")) == []
    assert checked.exit_code == 0
    assert "it brings no example, so nothing was converted" in checked.output


def test_the_verdict_on_an_installed_plugin() -> None:
    text, facts = run("plugins", "check", "eagle1"), run("plugin", "check", "eagle", "--json")

    assert text.exit_code == facts.exit_code == 0
    assert text.output.startswith("eagle, from speculators-eagle 1.0.0\n    found ")
    assert text.output.endswith(" checks passed\n")
    verdict = json.loads(facts.output)
    assert (verdict["plugin"]["name"], verdict["passed"]) == ("eagle", True)
    assert verdict["checks"][0] == {"check": "found", "passed": True, "detail": ""}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(TOY.replace("H, 2*H", "2*H, H"), "size mismatch for linear.weight", id="wrong"),
        pytest.param("import a_package_that_is_not_there", "ModuleNotFoundError", id="broken"),
    ],
)
def test_a_plugin_that_does_not_keep_a_promise_fails(source: str, message: str, beside_ours: Announce) -> None:
    beside_ours("toy", source)

    result = run("plugins", "check", "toy")

    assert result.exit_code == 4
    assert "FAILED" in result.output
    assert message in result.output
    assert result.output.splitlines()[-1].endswith("checks failed")


def test_a_plugin_that_is_not_there_cannot_be_checked() -> None:
    result = run("plugins", "check", "medusa")

    assert (result.exit_code, result.output) == (
        3,
        "Error: no algorithm 'medusa' is installed; installed: eagle, eagle3, hass\n",
    )


def test_options_before_a_command_are_not_lost() -> None:
    assert run("plugins", "--json", "check", "eagle").exit_code == 2


def test_the_page_of_a_plugin_is_printed() -> None:
    result = run("plugins", "page", "eagle3")

    assert result.exit_code == 0
    assert (ROOT / "docs" / "algorithms" / "eagle3.md").read_text().endswith(f"\n{result.output}")
