"""The four packages are built, installed into fresh environments, extended by a stranger's, uninstalled."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, packages: dict[str, dict[str, Path]]) -> Path:
    """A fresh environment that holds the core, with torch, and pytest."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", folder)
    run(
        folder / "bin" / "pip",
        "install",
        "-q",
        "-c",
        ROOT / "constraints.txt",
        packages["speculators"]["wheel"],
        "pytest",
    )
    return folder / "bin"


@pytest.fixture
def environment(made: Path) -> Iterator[Path]:
    """An environment without any plugin."""
    yield made
    plugins = [each["package"] for each in json.loads(run(made / "speculators", "plugins", "--json"))["plugins"]]
    if plugins:
        run(made / "pip", "uninstall", "-q", "-y", *plugins)


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


FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def follow(page: Path, folder: Path, environment: Path) -> None:
    """Do what a page says: run its commands, write the pieces of its files, compare its outputs."""
    place, printed = folder, ""
    begun: set[Path] = set()
    left = folder / "left"
    variables = os.environ | {
        "PATH": f"{environment}{os.pathsep}{os.environ['PATH']}",
        "SPECULATORS": str(ROOT),
        "LEFT": str(left),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    variables.pop("PYTHONPATH", None)
    for language, file, block in FENCE.findall(page.read_text()):
        if language == "python":
            target = place / file
            target.write_text((target.read_text() if target in begun else "") + block)
            begun.add(target)
        elif language == "output":
            missing = [line for line in block.splitlines() if line not in printed]
            assert not missing, f"{missing} not in\n{printed}"
        else:
            assert language == "console"
            ran = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", f'{block}\npwd >"$LEFT"'],
                cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
            assert ran.returncode == 0, f"{block}\n{ran.stdout}"
            printed, place = ran.stdout, Path(left.read_text().strip())


def test_the_tutorial_leads_to_the_example_and_back(environment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tutorial"
    folder.mkdir()

    follow(ROOT / "docs" / "plugins" / "tutorial.md", folder, environment)

    example = ROOT / "examples" / "speculators-medusa"
    modules = [f"speculators_medusa/{name}.py" for name in ("__init__", "draft", "original")]
    for file in ("pyproject.toml", *modules, "tests/test_medusa.py"):
        assert (folder / "speculators-medusa" / file).read_text() == (example / file).read_text(), file
    assert names(environment) == []


def test_the_example_passes_its_tests_where_it_is_installed(environment: Path, tmp_path: Path) -> None:
    example = ROOT / "examples" / "speculators-medusa"
    run(environment / "pip", "install", "-q", "-c", ROOT / "constraints.txt", example)

    run(
        environment / "python",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        example / "pyproject.toml",
        "--confcutdir",
        example,
        example,
    )
