"""The four packages are built, installed into fresh environments, extended by a stranger's, uninstalled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import VERIFIER, write_checkpoint

ROOT = Path(__file__).parents[2]
PROJECTS = {"speculators": ROOT} | {folder.name: folder for folder in sorted((ROOT / "plugins").iterdir())}

pytestmark = pytest.mark.slow


def run(*command: str | Path, code: int = 0) -> str:
    """Run a command outside the checkout and return what it printed."""
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Build sdist and wheel of each package; the wheel from the sdist, as ``build`` does."""
    built: dict[str, dict[str, Path]] = {}
    for name, folder in PROJECTS.items():
        target = tmp_path_factory.mktemp(name)
        run(sys.executable, "-m", "build", "--outdir", target, folder)
        built[name] = {"wheel": next(target.glob("*.whl")), "sdist": next(target.glob("*.tar.gz"))}
    return built


@pytest.fixture
def environment(tmp_path: Path, packages: dict[str, dict[str, Path]]) -> Path:
    """A fresh environment that holds the core, with torch, and no plugin."""
    folder = tmp_path / "venv"
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "-q", "-c", ROOT / "constraints.txt", packages["speculators"]["wheel"])
    return folder / "bin"


def names(environment: Path) -> list[str]:
    listing = json.loads(run(environment / "speculators", "convert", "--list-algorithms", "--json"))
    assert listing["broken"] == []
    return [algorithm["name"] for algorithm in listing["algorithms"]]


def test_a_stranger_adds_an_algorithm_and_ours_come_and_go(
    environment: Path, packages: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    pip = environment / "pip"

    listing = run(environment / "speculators", "convert", "--list-algorithms")
    assert listing == (
        "No algorithm is installed; to have one or all of them: "
        "pip install speculators-eagle speculators-eagle3 speculators-hass\n"
    )

    toy = shutil.copytree(ROOT / "tests" / "toy", tmp_path / "toy")
    run(pip, "install", "-q", toy)
    assert names(environment) == ["toy"]
    source = write_checkpoint(tmp_path / "source", {}, {"toy.weight": torch.randn(128, 256)})
    printed = run(
        environment / "speculators", "convert", source, "--verifier", VERIFIER, "--output-path", tmp_path / "out",
        "--algorithm-kwargs", '{"squash": true}',
    )  # fmt: skip
    assert f"Converted {source} with toy (speculators-toy 0.3.0)" in printed
    assert "parity     passed  hidden states and logits are exactly what the source computes" in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["squash"] is True

    run(pip, "install", "-q", packages["speculators-eagle"]["wheel"], packages["speculators-hass"]["sdist"])
    run(pip, "install", "-q", packages["speculators-eagle3"]["sdist"])
    assert names(environment) == ["eagle", "eagle3", "hass", "toy"]

    run(pip, "uninstall", "-q", "-y", "speculators-eagle3", "speculators-toy")
    assert names(environment) == ["eagle", "hass"]
    run(environment / "speculators", "convert", source, "--verifier", VERIFIER, "--algorithm", "toy", code=3)


def test_a_plugin_is_not_satisfied_by_the_unrelated_library_of_the_same_name(
    packages: dict[str, dict[str, Path]],
) -> None:
    for name, built in packages.items():
        if name != "speculators":
            with zipfile.ZipFile(built["wheel"]) as wheel:
                metadata = next(member for member in wheel.namelist() if member.endswith("METADATA"))
                assert "Requires-Dist: speculators>=1.0\n" in wheel.read(metadata).decode()
