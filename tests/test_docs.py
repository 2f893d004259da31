"""What README and docs say is what is done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

from speculators import Checkpoint, Facts, Registry, match
from speculators.plan import plan
from speculators.sources.locations import HubLocation, LocalLocation, UrlLocation, parse
from speculators.weights import TensorInfo

ROOT = Path(__file__).parents[1]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    setup, tests, *_ = blocks(ROOT / "README.md", "console")
    script = (ROOT / ".ci" / "run").read_text()

    assert setup in script
    assert tests in script


def test_the_python_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")

    exec(blocks(ROOT / "README.md", "python")[0], {})

    assert capsys.readouterr().out == "layers.0.hidden_norm.weight\nvllm serve converted --skip-tokenizer-init\n"


def test_the_examples_of_the_page_on_plugins_run(tmp_path: Path) -> None:
    table, operation = blocks(ROOT / "docs" / "plugins.md", "python")
    found: dict[str, Any] = {}
    exec(table, found)
    exec(operation, found)

    fused = {"layers.0.self_attn.qkv_proj.weight": (8, 4), "layers.0.mlp.gate_proj.weight": (6, 4)}
    fused |= {"layers.0.mlp.up_proj.weight": (6, 4)}
    tensors = {name: TensorInfo("F32", shape) for name, shape in fused.items()}
    facts = Facts({"L": 1, "H": 4, "I": 6, "heads": 2, "head_dim": 2, "kv_heads": 1})
    planned = plan(found["table"], tensors, match(found["table"], tensors), facts, {})
    assert planned.findings == ()
    assert [(made.target.split(".")[-2], made.shape) for made in planned.derivations] == [
        ("q_proj", (4, 4)),
        ("k_proj", (2, 4)),
        ("v_proj", (2, 4)),
        ("gate_up_proj", (12, 4)),
    ]

    source = Checkpoint(write_checkpoint(tmp_path / "in", {}, {"t2d": torch.tensor([False, True, True, False, True])}))
    dtype, chunks = found["offsets"](source, ("t2d",), (3,))
    assert (dtype, np.frombuffer(b"".join(chunks), "<i8").tolist()) == ("I64", [1, 1, 2])


@pytest.mark.parametrize("name", ["eagle", "eagle3"])
def test_the_page_of_a_plugin_lists_exactly_its_options(name: str) -> None:
    page = (ROOT / "plugins" / f"speculators-{name}" / "README.md").read_text()

    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(Registry().get(name).spec.options.model_fields)


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("plugins/*/README.md")]
    assert len(pages) >= 9
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_every_form_of_a_source_on_its_page_has_a_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads" / "best").mkdir(parents=True)
    (tmp_path / "heads" / "best" / "step-2.safetensors").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_ENDPOINT")
    table = (ROOT / "docs" / "sources.md").read_text().partition("\n\n```")[0]
    rows = [(row.split("|")[1], row.split("|")[2]) for row in table.splitlines() if row.startswith("| `")]
    kinds = {
        LocalLocation: "local|weight file",
        HubLocation: "repository|same|page|branch",
        UrlLocation: "server|driver|weight f|same",
    }

    for forms, meaning in rows:
        for form in re.findall(r"`([^`]+)`", forms):
            assert re.search(kinds[type(parse(form.replace("…", "x")))], meaning), form
    assert len(rows) == 12


def test_the_core_names_no_algorithm() -> None:
    names = re.compile("|".join([*Registry().names, "medusa", "dflash"]))
    for module in (ROOT / "speculators").rglob("*.py"):
        code = re.sub(r'""".*?"""|#.*', "", module.read_text(), flags=re.DOTALL)
        assert not names.search(code), module.name
