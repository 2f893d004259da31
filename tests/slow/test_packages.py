"""The four packages are built, installed into fresh environments, extended by a stranger's, uninstalled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, VERIFIER, write_checkpoint
from loopback import Server
from snippets import SHELL, Shell, blocks, compare, elsewhere

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


def follow(page: str, folder: Path, environment: Path, **more: str) -> None:
    """Do what a page says: run its commands, write the pieces of its files, compare its outputs."""
    shell = Shell(folder, folder.parent / "state", variables(environment, SPECULATORS=str(ROOT), **more))
    printed = ""
    begun: set[Path] = set()
    for block in blocks(page):
        if block.language in SHELL:
            printed = shell.run(block)
        elif block.language == "output":
            compare(block, printed)
        elif block.language == "python":
            target = shell.place / block.info
            target.write_text((target.read_text() if target in begun else "") + block.text)
            begun.add(target)


def variables(environment: Path, **more: str) -> dict[str, str]:
    """Return the variables of somebody who has activated an environment."""
    path = f"{environment}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **more}


def found_at(packages: dict[str, dict[str, Path]]) -> str:
    """Return where pip finds what was built, as if it were published."""
    return " ".join(str(built["wheel"].parent) for built in packages.values())


def test_a_plugin_is_installed_as_its_page_says(
    environment: Path, packages: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    published = variables(environment, PIP_FIND_LINKS=found_at(packages), PIP_NO_INDEX="1")
    for page, command in elsewhere("test_a_plugin_is_installed_as_its_page_says").items():
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=published, check=True)

        assert page.split("/")[1].removeprefix("speculators-") in names(environment)


def test_an_author_checks_and_releases_a_plugin(
    environment: Path, packages: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """With a wheel of the core as its release, and what it requires from the environment, as torch is large."""
    subprocess.run([environment / "speculators", "plugins", "new", "toy"], cwd=tmp_path, check=True)
    (site,) = environment.parent.glob("lib/python*/site-packages")
    required = tmp_path / "required"
    required.mkdir()
    for each in site.iterdir():
        if not each.name.startswith(("speculators", "__editable__", "_")):
            (required / each.name).symlink_to(each)

    follow(
        "docs/plugins/publishing.md",
        tmp_path / "speculators-toy",
        environment,
        PIP_FIND_LINKS=found_at(packages),
        PYTHONPATH=str(required),
    )

    (fresh,) = (tmp_path / "speculators-toy" / "fresh").glob("lib/python*/site-packages")
    assert {"speculators", "speculators_toy"} <= {path.name for path in fresh.iterdir()}


def test_a_head_is_read_from_a_bucket(
    environment: Path, packages: dict[str, dict[str, Path]], server: Server, tmp_path: Path
) -> None:
    (command,) = elsewhere("test_a_head_is_read_from_a_bucket").values()
    run(environment / "pip", "install", "-q", packages["speculators-eagle3"]["wheel"])
    run(environment / "pip", "install", "-q", "--target", tmp_path / "driver", "s3fs")
    shutil.copytree(DATA / "eagle3", tmp_path / "bucket" / "heads" / "best")
    server.folders["bucket"] = tmp_path / "bucket"
    server.add("meta-llama/Llama-3.1-8B-Instruct", VERIFIER)
    server.tokens["hf_s3cret"] = set()
    bucket = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "s3cret"}

    subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=variables(environment, PYTHONPATH=str(tmp_path / "driver"), TOKEN="hf_s3cret", **bucket),
        check=True,
    )

    assert (tmp_path / "from-bucket" / "model.safetensors").is_file()
    assert server.asked("/bucket/heads/best/pytorch_model.bin")


def test_the_tutorial_leads_to_the_example_and_back(environment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tutorial"
    folder.mkdir()

    follow("docs/plugins/tutorial.md", folder, environment)

    example = ROOT / "examples" / "speculators-medusa"
    modules = [f"speculators_medusa/{name}.py" for name in ("__init__", "draft", "original")]
    for file in ("pyproject.toml", *modules, "tests/test_medusa.py"):
        assert (folder / "speculators-medusa" / file).read_text() == (example / file).read_text(), file
    assert names(environment) == []


def test_the_example_passes_its_tests_where_it_is_installed(environment: Path, tmp_path: Path) -> None:
    example = ROOT / "examples" / "speculators-medusa"
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("examples", "tests"):
        (folder / name).symlink_to(ROOT / name)

    follow("examples/speculators-medusa/README.md", folder, environment, PIP_CONSTRAINT=str(ROOT / "constraints.txt"))

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
