"""The command that lists plugins, the variable that leaves some out, and packages whose metadata is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, VERIFIER
from click.testing import CliRunner
from installing import TOY, Announce, Install, announce

from speculators import AlgorithmError, PluginError, Registry
from speculators.cli import cli

OURS = ["eagle", "eagle3", "hass"]
IMPORTED = "raise AssertionError('imported')"


def listing(*more: str) -> str:
    result = CliRunner().invoke(cli, ["plugins", *more])
    assert result.exit_code == 0, result.output
    return result.output


def standings() -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads(listing("--json"))["plugins"]}


def test_every_plugin_is_listed_with_its_origin(beside_ours: Announce, site: Path) -> None:
    beside_ours("toy", TOY)
    beside_ours("bad", "import a_package_that_is_not_there")

    lines = listing().splitlines()

    start = lines.index("bad: broken, ModuleNotFoundError: No module named 'a_package_that_is_not_there'")
    assert lines[start + 1 : start + 3] == [
        f"    from speculators-bad 0.3.0 in {site}",
        "    entry point speculators_bad",
    ]
    assert "toy (also plaything): ready" in lines
    assert "eagle (also eagle1, eagle2): ready" in lines


def test_the_list_as_json(beside_ours: Announce, site: Path) -> None:
    beside_ours("toy", TOY)

    found = json.loads(listing("--json"))

    assert found["plugins"][-1] == {
        "name": "toy",
        "package": "speculators-toy",
        "version": "0.3.0",
        "entry_point": "speculators_toy",
        "folder": str(site),
        "state": "ready",
        "aliases": ["plaything"],
        "reason": "",
    }
    assert [each["name"] for each in found["plugins"]] == [*OURS, "toy"]
    assert (found["contested"], found["not_installed"], found["damaged"]) == ({}, [], [])


def test_both_packages_that_bring_one_name_are_listed(beside_ours: Announce) -> None:
    beside_ours("toy", TOY)
    beside_ours("toy", TOY, package="toys-r-us", version="2.0")

    lines = listing().splitlines()

    reason = "speculators-toy 0.3.0 and toys-r-us 2.0 both bring an algorithm of this name; uninstall one"
    assert lines.count(f"toy: broken, {reason}") == 2
    assert "eagle3: ready" in lines


def test_an_alias_of_two_plugins_is_told(beside_ours: Announce) -> None:
    beside_ours("toy", TOY)
    beside_ours("other", TOY.replace('name = "toy"', 'name = "other"'))

    message = "'plaything' is an alias of other (speculators-other 0.3.0) and toy (speculators-toy 0.3.0)"
    assert f"{message}; name one of them" in listing().splitlines()
    assert json.loads(listing("--json"))["contested"] == {"plaything": ["other", "toy"]}
    assert Registry().get("other").spec.name == "other"


@pytest.mark.parametrize(
    ("value", "loaded", "left_out"),
    [
        pytest.param("eagle3", ["eagle3"], ["bad", "eagle", "hass"], id="one"),
        pytest.param(" eagle ,, eagle3\t", ["eagle", "eagle3"], ["bad", "hass"], id="blanks and empty places"),
        pytest.param("", [], ["bad", *OURS], id="none"),
    ],
)
def test_the_variable_says_which_plugins_are_loaded(
    value: str, loaded: list[str], left_out: list[str], beside_ours: Announce, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_ours("bad", IMPORTED)
    monkeypatch.setenv("SPECULATORS_PLUGINS", value)

    registry = Registry()

    assert [algorithm.spec.name for algorithm in registry.algorithms] == registry.names == loaded
    assert registry.broken == []
    assert registry.left_out == left_out
    states = {name: (each["state"], each["reason"]) for name, each in standings().items()}
    assert states == dict.fromkeys(loaded, ("ready", "")) | dict.fromkeys(
        left_out, ("not loaded", "SPECULATORS_PLUGINS leaves it out")
    )
    assert "speculators_bad" not in sys.modules


def test_the_variable_counts_for_plugins_that_are_handed_in(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATORS_PLUGINS", "other")
    registry = install("toy", IMPORTED)

    with pytest.raises(
        AlgorithmError,
        match=r"'toy' \(speculators-toy 0\.3\.0\) is installed, but SPECULATORS_PLUGINS leaves it out; "
        "add it there, or unset SPECULATORS_PLUGINS",
    ):
        registry.get("toy")


def test_a_name_in_the_variable_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATORS_PLUGINS", "eagle3,eagel")

    told = "SPECULATORS_PLUGINS names 'eagel', which no installed plugin is called"
    assert told in listing().splitlines()
    assert json.loads(listing("--json"))["not_installed"] == ["eagel"]
    with pytest.raises(AlgorithmError) as error:
        Registry().get("medusa")
    expected = (
        f"no algorithm 'medusa' is installed; installed: eagle3; SPECULATORS_PLUGINS leaves out eagle, hass; {told}"
    )
    assert str(error.value) == expected


def test_without_any_plugin_both_lists_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATORS_PLUGINS", "")

    result = CliRunner().invoke(cli, ["convert", "--list-algorithms"])

    assert result.output == "SPECULATORS_PLUGINS leaves out eagle, eagle3, hass\n"
    facts = json.loads(CliRunner().invoke(cli, ["convert", "--list-algorithms", "--json"]).output)
    assert facts == {"schema": "speculators.algorithms/1", "algorithms": [], "broken": [], "install": []}


NAMELESS = "Metadata-Version: 2.1\n"
NO_METADATA = "its package has no METADATA that tells name and version; install it again"


@pytest.mark.parametrize(
    ("damage", "broken"),
    [
        pytest.param({"metadata": None}, {"toy": NO_METADATA}, id="no METADATA"),
        pytest.param({"metadata": NAMELESS}, {"toy": NO_METADATA}, id="METADATA without name and version"),
        pytest.param({"metadata": b"Name: \xff\xfe"}, {"toy": NO_METADATA}, id="METADATA that is no text"),
        pytest.param(
            {"entry_points": "[speculators]\ntoy\n"},
            {"toy": "entry_points.txt has the line 'toy', expected 'name = module'"},
            id="a line without a value",
        ),
        pytest.param(
            {"entry_points": "[speculators]\ntoy = not a module!!\n"},
            {"toy": "entry_points.txt has the line 'toy = not a module!!', expected 'name = module'"},
            id="a value that is no module",
        ),
        pytest.param(
            {"entry_points": "[speculators]\ntoy = speculators_toy\n\n# a remark\ngarbage\n"},
            {"garbage": "entry_points.txt has the line 'garbage', expected 'name = module'"},
            id="a wrong line beside a right one",
        ),
        pytest.param(
            {"entry_points": "[speculators]\ntoy = .relative\n"},
            {"toy": "entry_points.txt has the line 'toy = .relative', expected 'name = module'"},
            id="a relative module",
        ),
        pytest.param({"entry_points": "[console_scripts]\ngarbage\n"}, {}, id="a wrong line in another group"),
        pytest.param(
            {"entry_points": b"[console_scripts]\n\xff = x\n[speculators]\ntoy = speculators_toy\n"},
            {},
            id="bytes that are no text",
        ),
        pytest.param({"entry_points": "garbage\n[[[\n=\n"}, {}, id="no groups at all"),
    ],
)
def test_damaged_metadata_takes_nothing_else_down(
    damage: dict[str, str | bytes | None], broken: dict[str, str], beside_ours: Announce
) -> None:
    beside_ours("toy", TOY, **damage)

    found = standings()

    assert {name: each["reason"] for name, each in found.items() if each["state"] == "broken"} == broken
    assert {name for name, each in found.items() if each["state"] == "ready"} >= set(OURS)


def test_a_package_without_metadata_or_plugins_is_of_no_interest(site: Path) -> None:
    (site / "ruin-1.0.dist-info").mkdir()

    assert list(standings()) == OURS


def test_of_two_copies_of_a_package_the_one_that_is_imported_counts(
    beside_ours: Announce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = tmp_path / "later"
    later.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(later)])
    announce(later, "toy", IMPORTED, version="0.1.0")
    announce(later, "gone", IMPORTED)
    beside_ours("toy", TOY)
    beside_ours("gone", "", entry_points="[console_scripts]\n")

    assert [(each["name"], each["version"], each["state"]) for each in standings().values()][3:] == [
        ("toy", "0.3.0", "ready")
    ]


BROKEN = {
    "quitter": "raise SystemExit('bye')",
    "thrower": "raise BaseException('no')",
    "older": TOY.replace("interface = 1", "interface = 0").replace('name = "toy"', 'name = "older"'),
    "auto": TOY,
}


def run(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, which imports from ``site`` too."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "speculators", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_conversion_works_beside_broken_plugins(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for name, source in BROKEN.items():
        announce(site, name, source)
    announce(site, "ruin", "", metadata=None, entry_points="[speculators]\nruin = not a module!!\n")

    converted = run(site, "convert", DATA / "eagle3", "--verifier", VERIFIER, "--output-path", tmp_path / "out")

    assert (converted.returncode, converted.stderr) == (0, "")
    assert "parity     passed" in converted.stdout
    listed = json.loads(run(site, "plugins", "--json").stdout)["plugins"]
    assert {each["name"]: each["state"] for each in listed} == dict.fromkeys(OURS, "ready") | dict.fromkeys(
        (*BROKEN, "ruin"), "broken"
    )
    listing = run(site, "convert", "--list-algorithms").stdout
    assert "broken: quitter (speculators-quitter 0.3.0): SystemExit: bye" in listing


@pytest.mark.parametrize("entry_points", [b"[console_scripts]\ngarbage\n", b"[console_scripts]\n\xff = x\n"])
def test_a_package_that_keeps_pydantic_from_being_imported_is_named(entry_points: bytes, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    announce(site, "ruin", "", entry_points=entry_points)
    message = f"entry_points.txt of the package speculators-ruin 0.3.0 in {site} is damaged ("

    converted = run(site, "convert", DATA / "eagle3", "--verifier", VERIFIER, "--output-path", tmp_path / "out")
    listed = run(site, "plugins")

    assert converted.returncode == 3
    assert converted.stderr.startswith(f"Error: {message}")
    assert converted.stderr.endswith("install that package again or remove it\n")
    assert listed.returncode == 0
    assert listed.stdout.splitlines()[-1].startswith(message)


def test_a_plugin_in_a_broken_package_is_an_error_that_says_so(beside_ours: Announce) -> None:
    beside_ours("toy", TOY, metadata=None)

    with pytest.raises(PluginError, match=r"the plugin of algorithm toy \(\? \?\): its package has no METADATA"):
        Registry().get("toy")
