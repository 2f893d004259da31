"""What README and docs say is what is done."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from installing import TOY, Install
from snippets import blocks

import speculators
from speculators import Checkpoint, ConverterSpec, Facts, Registry, convert_model, examples, hookspecs, match, pages
from speculators.plan import plan
from speculators.sources.locations import HubLocation, LocalLocation, UrlLocation, parse
from speculators.weights import TensorInfo

ROOT = Path(__file__).parents[1]


def test_the_examples_of_the_page_on_tables_do_what_it_says(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for block in blocks("docs/plugins/table.md", "python"):
        exec(block.text, found)

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


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What writes pages from code."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("generate")


def test_generated_pages_are_up_to_date(generate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_pages_that_are_not_up_to_date_are_named_and_written_anew(
    generate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for package in (ROOT / "plugins").iterdir():
        (tmp_path / "plugins" / package.name).mkdir(parents=True)
        for file in ("README.md", "pyproject.toml"):
            shutil.copy(package / file, tmp_path / "plugins" / package.name)
    algorithms, reference = tmp_path / "docs" / "algorithms", tmp_path / "docs" / "plugins" / "reference.md"
    (algorithms / "eagle.md").write_text((algorithms / "eagle.md").read_text().replace("fusion_fc", "fusion"))
    (algorithms / "hass.md").unlink()
    (algorithms / "gone.md").write_text("# gone\n")
    reference.write_text(reference.read_text().replace("context: Context", "context"))
    readme = tmp_path / "plugins" / "speculators-eagle3" / "README.md"
    readme.write_text(readme.read_text().replace("| `norm_output` |", "| `norm` |"))

    assert generate.main(["--check", "--root", str(tmp_path)]) == 1
    named = [line.partition(" is not ")[0] for line in capsys.readouterr().err.splitlines()]
    assert named == [
        "docs/algorithms/eagle.md",
        "docs/algorithms/gone.md",
        "docs/algorithms/hass.md",
        "docs/plugins/reference.md",
        "plugins/speculators-eagle3/README.md",
    ]

    assert generate.main(["--root", str(tmp_path)]) == 0
    assert generate.main(["--check", "--root", str(tmp_path)]) == 0
    assert not (algorithms / "gone.md").exists()


def section(page: str, heading: str) -> str:
    """What stands below a heading of any level, up to the next one."""
    found = re.search(rf"^#+ `{re.escape(heading)}`$\n(.*?)(?=^#+ |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {heading!r}"
    return found.group(1)


def described(page: str, heading: str) -> str:
    """The signature in a section, without the whitespace in which signatures of many lines differ."""
    found = re.search(r"```python\n(.*?)\n```", section(page, heading), re.DOTALL)
    assert found, f"no signature below {heading!r}"
    return re.sub(r"\s+", "", found.group(1)).replace(",)", ")")


def test_the_reference_has_every_public_name_and_every_member_with_its_signature() -> None:
    page = (ROOT / "docs" / "plugins" / "reference.md").read_text()
    modules = {"decoder": "speculators.decoder"}
    for name in speculators.__all__:
        assert section(page, modules.get(name, name)).strip(), name
    assert described(page, "register_converter") == "defregister_converter()->type[ConverterSpec]"
    assert inspect.signature(hookspecs.register_converter).return_annotation == "type[ConverterSpec]"

    members = {name for name in vars(ConverterSpec) if not name.startswith("_")} | set(ConverterSpec.__annotations__)
    for name in members:
        below = section(page, f"ConverterSpec.{name}")
        required = name in ConverterSpec.__abstractmethods__ or not hasattr(ConverterSpec, name)
        assert ("Required." in below) == required, name
        if name in ConverterSpec.__annotations__:
            expected = f"{name}: {ConverterSpec.__annotations__[name]}"
            if not required:
                value = getattr(ConverterSpec, name)
                shown = value.__name__ if inspect.isclass(value) else repr(value).replace("'", '"')
                assert re.search(rf"Default: \[?`{re.escape(shown)}`", below), name
        else:
            read = inspect.signature(getattr(ConverterSpec, name))
            given = [
                each.name + (f": {each.annotation}" if each.name != "self" else "") for each in read.parameters.values()
            ]
            expected = f"def {name}({', '.join(given)}) -> {read.return_annotation}"
            assert inspect.getdoc(getattr(ConverterSpec, name)), name
        assert described(page, f"ConverterSpec.{name}") == re.sub(r"\s+", "", expected)
    assert len(members) >= 28


def test_links_within_the_reference_lead_to_headings() -> None:
    for page in (ROOT / "docs" / "plugins").glob("*.md"):
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
            other = page.parent / target if target else page
            headings = [
                re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-")
                for line in re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            ]
            numbered = [name + (f"-{n}" if (n := headings[:i].count(name)) else "") for i, name in enumerate(headings)]
            assert anchor in numbered, f"{page.name} -> {target}#{anchor}"


def test_the_whole_plugin_of_the_reference_converts_its_example(tmp_path: Path, install: Install) -> None:
    plugin = blocks("docs/plugins/reference.md", "python")[0].text
    registry = install("toy", plugin, version="0.1.0")
    draft, verifier, _ = examples.write_example(registry.get("toy").spec, tmp_path)

    result = convert_model(draft, verifier=verifier, output_path=tmp_path / "out", registry=registry, scale=0.5)

    assert result.renamed == {"fc.bias": "linear.bias", "fc.weight": "linear.weight"}
    assert result.validation is not None
    assert [check.name for check in result.validation.checks] == ["structure", "forward", "parity"]
    assert result.validation.passed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scale"] == 0.5


def test_the_page_of_a_plugin_says_what_becomes_of_each_tensor() -> None:
    page = pages.page(Registry().get("eagle3"))

    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| `")}
    assert rows["`fc.weight`"] == "| `fc.weight` | same | `[H, naux·TH]` | |"
    assert rows["`d2t`"] == (
        "| `d2t` | same | `[DV]` | part `draft_vocabulary`; `I64` or `I32`; where it is missing and `t2d` is there: "
        "made from t2d; left out where the draft vocabulary is the verifier's, so the map is the identity |"
    )
    assert rows[r"`(midlayer\|layers.0).hidden_norm.weight`"].split(" | ")[1] == "`layers.0.hidden_norm.weight`"
    assert rows["`naux`"] == "| `naux` | how many of its states `fc` joins |"
    assert rows["`kv_heads`"] == "| `kv_heads` | key and value heads |"
    assert "written even where it equals the verifier's `lm_head`" in rows["`lm_head.weight`"]
    assert "left out where it equals the verifier's `embed_tokens`" in rows["`embed_tokens.weight`"]
    assert rows["`**rotary_emb.inv_freq`"].split(" | ")[1:] == [
        "dropped",
        "a buffer that every engine recomputes from the config |",
    ]
    assert rows["`norm_output`"].split(" | ")[1:3] == ["boolean", "`null`"]
    assert "- The maps `d2t` (offsets) and `t2d` (a mask) must agree" in page
    assert "vLLM serves the output type `eagle3` with the method `eagle3`." in page


STRANGER = (
    TOY
    + '''
from typing import Literal

from speculators import Keep, Merge, Refuse, Shared, Split, Vllm


class ManyOptions(Options):
    given: bool = Field(description="Must be | given.")
    sizes: list[int] = Field(default_factory=list, description="Sizes.")
    kind: Literal["a", "b"] | None = Field(default="a", description="Kind.")
    ratio: float = Field(default=1.0, gt=0, le=2, description="Ratio.")


class Many(Toy):
    options = ManyOptions
    vllm = Vllm("draft_model", packages=("toy-vllm",), settings={"parallel_drafting": True})
    table = Table(
        (
            Keep("up.{0:N}.weight", "H, 2*H", part="deep"),
            Keep("down.{0:N}.weight", "H, 2*H"),
            Split("both.{0:N}.weight", ("up.{0:N}.weight", "down.{0:N}.weight")),
            Keep("whole", "2*I, H"),
            Merge("half", "whole", 0, "I, H"),
            Merge("rest", "whole", 1, "I, H"),
            Shared("lm_head.weight", "lm_head.weight", "V, H", verifier="lm_head", own=False),
            Refuse("**.(a|b)", "cannot be"),
        )
    )

    def dims(self, config):
        """Sizes.

        N: layers
        """


@hookimpl
def register_converter():
    return Many
'''
)


def test_a_strangers_plugin_has_a_page(install: Install) -> None:
    page = pages.page(install("toy", STRANGER).get("toy"))

    for line in (
        "# toy",
        "- Also called: `plaything`",
        "| `up.{0:N}.weight` | same | `[H, 2·H]` | part `deep` |",
        "| `both.{0:N}.weight` | `up.{0:N}.weight`<br>`down.{0:N}.weight` | | holds them one after another |",
        "| `half` | `whole` | `[I, H]` | piece 0 of it |",
        r"| `**.(a\|b)` | refused | cannot be |",
        "| `N` | layers |",
        "Sizes that the plugin works out: `H`, `I`, `V`.",
        r"| `given` | boolean | required | Must be \| given. |",
        "| `sizes` | list of integer | `[]` | Sizes. |",
        '| `kind` | "a" or "b" | `"a"` | Kind. |',
        "| `ratio` | number above 0 to 2 | `1.0` | Ratio. |",
    ):
        assert line in page.splitlines(), line
    assert "equals the verifier's `lm_head`, refused where it does not; the verifier's where it is missing |" in page
    assert '`--speculative-config` needs `{"parallel_drafting": true}` beside the method.' in page
    assert "It is taught how by `pip install toy-vllm`" in page


HEADINGS = frozenset(
    re.findall(r"^#+ `([\w.]+)", (ROOT / "docs" / "plugins" / "reference.md").read_text(), re.MULTILINE)
)
MODULES = ("decoder", "modeling", "testing")


def foreign(tree: ast.AST) -> Iterator[str]:
    """Name what a plugin's code takes from `speculators` that the reference does not list."""
    listed = {f"speculators.{name.removeprefix('speculators.')}" for name in HEADINGS} | {"speculators"}
    for node in ast.walk(tree):
        taken = []
        if isinstance(node, ast.Import):
            taken = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            taken = [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            within = node.value.id
            taken = [f"speculators.{within}.{node.attr}" if within in MODULES else f"{within}.{node.attr}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            taken = [node.value.partition(":")[0]] if re.fullmatch(r"speculators\.[\w.:]+", node.value) else []
            taken += [node.value.replace(":", ".")] if taken and ":" in node.value else []
        yield from (name for name in taken if name.split(".")[0] == "speculators" and name not in listed)


def test_plugins_import_nothing_but_the_interface() -> None:
    files = [*ROOT.glob("plugins/*/speculators_*/**/*.py"), *ROOT.glob("examples/*/speculators_*/**/*.py")]
    assert len(files) >= 12

    taken = {str(file.relative_to(ROOT)): sorted(foreign(ast.parse(file.read_text()))) for file in files}

    assert {file: names for file, names in taken.items() if names} == {}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from speculators.config import DecoderLayerConfig", ["speculators.config.DecoderLayerConfig"]),
        ("from speculators.decoder import _NativeConfig", ["speculators.decoder._NativeConfig"]),
        ("from speculators import decoder\ndecoder._Sizes", ["speculators.decoder._Sizes"]),
        ("import importlib\nimportlib.import_module('speculators.guard')", ["speculators.guard"]),
        ("from speculators import Table, plan", ["speculators.plan"]),
        ("import speculators.guard", ["speculators.guard"]),
        ("import speculators\nspeculators.spec.INTERFACE", ["speculators.spec"]),
        ("from speculators import decoder\nfrom speculators.modeling import Rotary\nimport speculators_eagle", []),
    ],
)
def test_an_import_from_the_core_itself_is_found(code: str, found: list[str]) -> None:
    assert list(foreign(ast.parse(code))) == found


def code_lines(source: str) -> int:
    """Count lines that are neither blank, nor a comment, nor a docstring's."""
    said: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            said |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    lines = enumerate(map(str.strip, source.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in said for number, line in lines)


def test_a_plugin_of_about_150_lines_covers_a_real_algorithm() -> None:
    files = [*(ROOT / "examples" / "speculators-medusa" / "speculators_medusa").glob("*.py")]

    assert len(files) == 3
    assert 100 < sum(code_lines(file.read_text()) for file in files) <= 155


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("plugins/*/README.md")]
    pages += ROOT.glob("examples/*/README.md")
    assert len(pages) >= 20
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
