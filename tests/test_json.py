"""What programs read: every document that ``--json`` prints is what ``docs/json.md`` says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, TRAINED, VERIFIER, Copy
from click.testing import CliRunner

import speculators.cli
from speculators.cli import cli

PAGE = Path(__file__).parent.parent / "docs" / "json.md"
SHOWN = re.compile(r'show\(\s*"([a-z-]+/\d+)"')
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \|[^|]*\|$", re.MULTILINE)
LIKE = "like "

Tables = dict[str, dict[str, str]]

NUMBERS = (int, float)
SIMPLE: Mapping[str, Callable[[Any], bool]] = {
    "any": lambda value: True,
    "null": lambda value: value is None,
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, NUMBERS) and not isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "map": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
}


def documented() -> Tables:
    sections = re.split(r"^## (\S+/\d+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        name: {key: re.sub(r"`|\[(.*?/\d+)\]\(.*?\)", r"\1", kind) for key, kind in ROW.findall(body)}
        for name, body in zip(sections[::2], sections[1::2], strict=True)
    }


def printed() -> set[str]:
    folder = Path(speculators.cli.__file__).parent
    return {name for file in folder.glob("*.py") for name in SHOWN.findall(file.read_text(encoding="utf-8"))}


def fits(value: Any, kind: str) -> bool:
    """Tell whether a value is of a type in the words of the page, as ``map to lists of strings``."""
    outer, _, inner = re.sub(r"^(list|map)s? (of|to) ", r"\1 of ", kind).partition(" of ")
    if not inner:
        return SIMPLE[kind.removesuffix("s")](value)
    members = value.values() if isinstance(value, dict) else value
    return SIMPLE[outer](value) and all(fits(each, inner) for each in members)


class Reader:
    """Compares documents with the tables and remembers what it met."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.met: set[tuple[str, str]] = set()

    def unmet(self) -> set[tuple[str, str]]:
        return {(name, key) for name, rows in self.tables.items() for key in rows} - self.met

    def members(self, name: str, prefix: str, found: Mapping[str, Any], but: str = "") -> Iterator[str]:
        rows = {key.removeprefix(prefix) for key in self.tables[name] if key.startswith(prefix)}
        expected = {key for key in rows if not re.search(r"[.\[]", key)} - {but}
        for key in sorted(found.keys() ^ expected):
            yield f"{name}: {prefix}{key} is {'not documented' if key in found else 'not there'}"
        for key in sorted(found.keys() & expected):
            yield from self.value(name, prefix + key, found[key])

    def value(self, name: str, key: str, found: Any) -> Iterator[str]:
        self.met.add((name, key))
        kinds = re.split(r", or |, | or ", self.tables[name][key])
        like = next((kind.removeprefix(LIKE) for kind in kinds if kind.startswith(LIKE)), None)
        if like is not None and isinstance(found, dict):
            inside = like in self.tables
            yield from self.members(like if inside else name, "" if inside else f"{like}.", found, but="schema")
        elif not any(fits(found, kind) for kind in kinds if not kind.startswith(LIKE)):
            yield f"{name}: {key} is {found!r}, not {self.tables[name][key]}"
        elif "map" in kinds:
            for each in found.values():
                yield from self.members(name, f"{key}.*.", each)
        elif "list" in kinds:
            for each in found:
                yield from self.members(name, f"{key}[].", each)
        elif "object" in kinds and found is not None:
            yield from self.members(name, f"{key}.", found)


def run(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install a plugin whose module is not there."""
    folder = tmp_path / "site" / "lost_heads-2.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lost-heads\nVersion: 2.0\n")
    (folder / "entry_points.txt").write_text("[speculators]\nlost = lost_heads\n")
    monkeypatch.syspath_prepend(folder.parent)
    return "lost"


def outputs(tmp_path: Path, broken: str) -> Iterator[dict[str, Any]]:
    verifier = ("--verifier", VERIFIER)
    yield run("convert", "--list-algorithms")
    yield run("plugins")
    yield run("plugins", "check", broken, code=4)
    for name in TRAINED:
        out = tmp_path / name
        yield run("convert", DATA / name, *verifier, "--output-path", out, "--dry-run")
        yield run("convert", DATA / name, *verifier, "--output-path", out, "--no-validate")
        yield run("inspect", DATA / name)
        yield run("inspect", out)
        yield run("diff", DATA / name, out, *verifier)
        yield run("export", out, *verifier, "--output-path", tmp_path / f"{name}-native")
    yield run("diff", DATA / "eagle1-fc-bias", DATA / "hass-fc-bias", code=4)
    yield run("diff", tmp_path / "eagle1-fc-bias", tmp_path / "eagle1-no-bias", code=4)
    yield run("inspect", VERIFIER)
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[[1, 40, 65, 66, 32]]")
    yield run("validate", tmp_path / "eagle3", "--prompts", prompts, "--diagnose")
    jobs = [{"model": str(DATA / name), "output_path": str(tmp_path / f"{name}-job")} for name in ("eagle3", "none")]
    file = tmp_path / "jobs.yaml"
    file.write_text(json.dumps({"defaults": {"verifier": str(VERIFIER), "validate": False}, "jobs": jobs}))
    yield run("convert", "--from-file", file, "--executor", "threads", "--jobs", "1", code=3)


def test_the_page_describes_every_document_and_no_other() -> None:
    assert documented().keys() == printed()


def test_documents_are_what_the_page_says(tmp_path: Path, broken: str) -> None:
    reader = Reader(documented())
    complaints, names = [], set()
    for found in outputs(tmp_path, broken):
        name = found["schema"].removeprefix("speculators.")
        names.add(name)
        complaints += reader.members(name, "", found)
    assert complaints == []
    assert names == printed()
    assert reader.unmet() == set()


def test_errors_leave_standard_output_empty(tmp_path: Path) -> None:
    for command in (("inspect", "none"), ("diff", "none", "nothing"), ("convert", DATA / "eagle3")):
        result = CliRunner().invoke(cli, [*map(str, command), "--json", "--offline"])
        assert result.exit_code in {2, 3, 5}
        assert result.stdout == ""
        assert "Error" in result.stderr


def test_numbers_that_json_does_not_have_are_strings(variant: Copy) -> None:
    source = variant("eagle3")
    config = (source / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN')
    (source / "config.json").write_text(config)

    result = CliRunner().invoke(cli, ["inspect", str(source), "--json"])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    settings = json.loads(result.stdout, parse_constant=refuse)["settings"]
    assert {"key": "rms_norm_eps", "values": ["nan"]} in settings
