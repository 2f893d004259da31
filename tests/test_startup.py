"""Commands start without what they do not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import DATA, VERIFIER, Copy

import speculators
from speculators import convert_model

HEAVY = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")
NETWORK = {"huggingface_hub.hf_api", "httpx", "httpx2", "requests"}
"""What huggingface_hub imports to reach the Hub; the metadata of model cards needs none of it."""


def modules_after(code: str) -> set[str]:
    """Run ``code`` in a fresh interpreter and return the names of the modules it imported."""
    program = f"import sys\n{code}\nprint('\\n' + ' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["convert", "--help"], ["convert", "--list-algorithms"], ["plugins"]]
)
def test_help_and_listing_import_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(f"from speculators.cli import cli\ncli({arguments!r}, standalone_mode=False)")

    assert "speculators.cli" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    ("layout", "more", "unneeded"),
    [
        ("safetensors", [], {"torch", "transformers", "safetensors", "rich", *NETWORK}),
        ("safetensors", ["--dtype", "bfloat16"], {"torch", "transformers", "safetensors", "rich", *NETWORK}),
        ("safetensors", ["--max-shard-size", "1MB"], {"torch", "transformers", "safetensors", "rich", *NETWORK}),
        ("bin", [], {"transformers", "safetensors", "rich", *NETWORK}),
    ],
)
def test_converting_imports_what_it_needs(
    layout: str, more: list[str], unneeded: set[str], variant: Copy, tmp_path: Path
) -> None:
    source = variant("eagle3", layout=layout)
    arguments = ["convert", str(source), "--verifier", str(VERIFIER), "--output-path", str(tmp_path / "out")]

    loaded = modules_after(
        f"from speculators.cli import cli\ncli({[*arguments, '--no-validate', *more]!r}, standalone_mode=False)"
    )

    assert (tmp_path / "out").exists()
    assert not loaded & unneeded


def test_checking_the_structure_imports_no_torch(tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", validate=False)
    arguments = ["validate", str(tmp_path / "out"), "--level", "structure"]

    loaded = modules_after(f"from speculators.cli import cli\ncli({arguments!r}, standalone_mode=False)")

    assert "speculators.validation" in loaded
    assert not loaded & {"torch", "transformers"}


def test_importing_the_package_imports_none_of_its_dependencies() -> None:
    loaded = modules_after("import speculators")

    assert not loaded & {*HEAVY, "pydantic", "click", "pluggy"}


def test_every_public_name_can_be_imported() -> None:
    for name in speculators.__all__:
        assert getattr(speculators, name) is not None
    assert sorted(speculators.__all__) == speculators.__all__
