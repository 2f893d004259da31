"""``--json``: every document is described, key by key, on the page about them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, VERIFIER
from click.testing import CliRunner

from speculators import convert_model
from speculators.cli import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "json.md").read_text()

DOCUMENTS = {
    "algorithms/1": "convert --list-algorithms",
    "conversion/1": f"convert {DATA / 'eagle3'} --verifier {VERIFIER} --output-path new --no-validate",
    "plan/1": f"convert {DATA / 'eagle3'} --verifier {VERIFIER} --output-path new --dry-run",
    "batch/1": "convert --from-file jobs.json --executor threads --no-validate",
    "validation/1": "validate out --level structure",
    "inspection/1": f"inspect {DATA / 'eagle3'}",
    "difference/1": f"diff {DATA / 'eagle3'} out",
    "export/1": "export out --output-path native",
    "plugins/1": "plugins",
    "plugin-check/1": "plugins check eagle",
}


def described(document: str) -> set[str]:
    """Return the keys that the page has for a document, in dotted paths."""
    section = PAGE.split(f"\n## speculators.{document}\n")[1].split("\n## ")[0]
    keys: set[str] = set()
    for cell in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        stem = names[0].rpartition(".")[0]
        keys |= {name if "." in name or not stem else f"{stem}.{name}" for name in names}
    return keys


def found(value: Any, paths: set[str]) -> set[str]:
    """Return the keys of a document that stand as high as the described ones, in dotted paths."""
    keys = set()
    for key, inner in value.items():
        deeper = [path for path in paths if path.startswith((f"{key}.", f"{key}[]."))]
        stem = deeper[0][: -len(deeper[0].removeprefix(key).lstrip("[]."))] if deeper else ""
        one = inner[0] if isinstance(inner, list) and inner else inner
        keys |= {f"{stem}{name}" for name in one} if deeper and isinstance(one, dict) else {key}
    return keys


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: beside a conversion, and a file of jobs."""
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", validate=False)
    job = {"model": str(DATA / "eagle3"), "verifier": str(VERIFIER), "output_path": "again"}
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": [job]}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_has_the_keys_that_are_described(document: str, folder: Path) -> None:
    result = CliRunner().invoke(cli, [*DOCUMENTS[document].split(), "--json"])

    said = json.loads(result.stdout)
    assert said.pop("schema") == f"speculators.{document}"
    assert found(said, described(document)) == described(document)


def test_every_document_of_the_command_line_is_described() -> None:
    code = "".join(path.read_text() for path in (ROOT / "speculators" / "cli").glob("*.py"))

    shown = set(re.findall(r'\.show\(\s*"([^"]+)"', code))

    assert shown == DOCUMENTS.keys() == set(re.findall(r"^## speculators\.(\S+)$", PAGE, re.MULTILINE))
    assert re.findall(r"^\| `speculators\.(\S+)` \|", PAGE, re.MULTILINE) == list(DOCUMENTS)
