"""The model card: what the Hub reads of it, what people read, and whose it is."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, TRAINED, VERIFIER, Copy, contents
from click.testing import CliRunner
from huggingface_hub import ModelCard
from loopback import Server
from markdown_it import MarkdownIt

from speculators import Checkpoint, OutputError, Registry, Verifier, convert_model, validate_model
from speculators.acceptance import Acceptance
from speculators.card import model_card, source_license
from speculators.cli import cli
from speculators.convert import Conversion, prepare
from speculators.sources import LocalFolder, parse
from speculators.validation import Check, Report

HOSTILE = (
    "a|b` <script>alert(1)</script> [x](javascript:1) **bold** $$x$$ \\| &amp; __it__",
    "</details>\n\n# Title\n",
    "``` \x1b[31m",
    "---",
)


def conversion(name: str = "eagle3", **more: Any) -> Conversion:
    """Decide everything about the conversion of a bundled head."""
    source, verifier = Checkpoint(DATA / name), Verifier(VERIFIER)
    return prepare(
        source, verifier, algorithm="auto", dtype=None, registry=Registry(), algorithm_kwargs=more, self_contained=False
    )


class Page(HTMLParser):
    """What a browser makes of a card: its tags, and the text of each cell, item and block of code."""

    def __init__(self, card: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self._texts: list[str] = []
        body = card.partition("\n---\n")[2]
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("td", "li", "pre", "p", "summary", "h1", "h2"):
            self._texts.append("")

    def handle_data(self, data: str) -> None:
        if self._texts:
            self._texts[-1] += data

    @property
    def texts(self) -> list[str]:
        return [text.strip() for text in self._texts]


@pytest.mark.parametrize("name", TRAINED)
def test_every_output_has_a_card_that_the_hub_understands(name: str, tmp_path: Path) -> None:
    result = convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", validate=False)

    card = ModelCard.load(tmp_path / "out" / "README.md")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tags = {"speculators", "speculative-decoding", config["speculators_model_type"], result.algorithm, "vllm"}
    assert {"library_name": "speculators", "pipeline_tag": "text-generation"}.items() <= card.data.to_dict().items()
    assert set(card.data.tags) == tags
    assert card.data.base_model is None
    assert card.data.license is None
    shown = Page(card.content).texts
    for names in (result.renamed, result.reworked, result.dropped, result.completed):
        assert set(names) <= set(shown)
    assert result.package in " ".join(shown)
    for path in (tmp_path, DATA, Path.cwd()):
        assert str(path) not in card.content


def test_the_same_input_gives_the_same_card(tmp_path: Path) -> None:
    for place in ("a", "b"):
        convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / place, validate_level="structure")

    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_card_says_what_was_checked_and_what_is_accepted() -> None:
    checks = (Check("structure", True, "15 tensors"), Check("forward", True, "finite"))
    measured = Acceptance(2, 40, (30, 20, 10), 4, (20, 20))

    texts = Page(model_card(conversion(), report=Report(checks, measured))).texts

    assert texts[texts.index("forward") :][:3] == ["forward", "passed", "finite"]
    first = texts.index("0.750") - 1
    assert texts[first : first + 6] == ["1", "0.750", "2", "0.500", "3", "0.250"]
    assert "It was not validated when it was converted." in Page(model_card(conversion())).texts


def test_a_card_says_how_the_output_is_served() -> None:
    texts = Page(model_card(conversion("eagle1-fc-bias"), repository="org/head")).texts

    (served,) = (text for text in texts if "vllm serve" in text)
    assert served.splitlines()[0] == "pip install speculators-eagle"
    assert served.splitlines()[1].startswith("vllm serve VERIFIER --speculative-config '{")
    assert '"model": "org/head"' in served


@pytest.mark.parametrize("text", HOSTILE)
def test_what_strangers_wrote_is_shown_and_nothing_else(text: str) -> None:
    before = conversion()
    plain = Page(model_card(replace(before, dropped={"x": "y"}, notes=("n",))))

    page = Page(model_card(replace(before, dropped={text: text}, notes=(text,))))

    seen = text.replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert page.tags - {"code"} == plain.tags - {"code"}
    assert len(page.texts) == len(plain.texts)
    assert page.texts.count(seen) == 2
    assert f"left out: {seen}" in page.texts


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ("license: apache-2.0\ntags: [a]", {"license": "apache-2.0"}),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        (
            "license: other\nlicense_name: theirs\nlicense_link: https://example.org/license#text",
            {"license": "other", "license_name": "theirs", "license_link": "https://example.org/license#text"},
        ),
        ("license: other\nlicense_link: LICENSE", {"license": "other"}),  # which is not in the output
        ("license: other\nlicense_link: https://user:secret@host/x?signature=1", {"license": "other"}),
        ("license_name: theirs", {}),
        ("license: {a: 1}", {}),
        ('license: "a\\nb"', {}),
        ("license: mit\n: [", {}),
        ("license: mit\nx: " + "[" * 2000, {}),
        ("license: 2024-99-99", {}),
        ("license: mit\nx: " + "y" * 70_000, {}),
    ],
)
def test_the_license_is_that_of_the_source_or_none(metadata: str, found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# A head\n\nlicense: gpl-3.0\n")

    place = parse(tmp_path)
    assert source_license(LocalFolder(place)) == found  # type: ignore[arg-type]


def test_a_card_without_metadata_names_no_license(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3")
    (source / "README.md").write_text("# A head\n\nlicense: mit\n")

    convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", validate=False)

    assert ModelCard.load(tmp_path / "out" / "README.md").data.license is None


def test_repositories_are_named_linked_and_served_and_the_command_makes_the_same_again(
    server: Server, variant: Copy, tmp_path: Path
) -> None:
    source = variant("eagle3")
    (source / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE.md\n---\n")
    commits = {name: server.add(name, folder) for name, folder in (("org/head", source), ("org/base", VERIFIER))}
    more = {"validate": False, "norm_before_residual": False, "dtype": "bfloat16", "max_shard_size": "100KB"}

    convert_model("org/head", verifier="org/base", output_path=tmp_path / "out", **more)  # type: ignore[arg-type]

    card = ModelCard.load(tmp_path / "out" / "README.md")
    link = f"{server.url}/org/head/blob/{commits['org/head']}/LICENSE.md"
    assert (card.data.base_model, card.data.license, card.data.license_link) == ("org/base", "other", link)
    assert f"[`org/head@{commits['org/head']}`]({server.url}/org/head)" in card.content
    assert "vllm serve MODEL\n" in card.content
    command = re.findall("^speculators (convert .*)$", card.content, re.MULTILINE)
    assert len(command) == 1
    again = CliRunner().invoke(
        cli, [*shlex.split(command[0]), "--no-validate", "--output-path", str(tmp_path / "again")]
    )
    assert again.exit_code == 0, again.output
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_card_that_cannot_be_read_is_told_and_nothing_is_guessed(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3")
    (tmp_path / "elsewhere.md").write_text("---\nlicense: mit\n---\n")
    (source / "README.md").symlink_to(tmp_path / "elsewhere.md")

    result = convert_model(source, verifier=VERIFIER, output_path=tmp_path / "out", validate=False)

    assert "outside its folder" in result.notes[-1]
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license is None


@pytest.mark.parametrize("change", [lambda text: f"{text}More.\n", lambda text: text.replace("eagle3", "my head", 1)])
def test_a_card_that_somebody_changed_is_not_replaced(change: Any, tmp_path: Path) -> None:
    def again() -> None:
        convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path, validate=False, overwrite=True)

    again()
    again()  # what nobody changed is replaced
    card = tmp_path / "README.md"
    card.write_text(change(card.read_text()))
    before = contents(tmp_path)

    with pytest.raises(OutputError, match=r"has README\.md beside a converted model and is not overwritten"):
        again()

    assert contents(tmp_path) == before


def test_a_changed_card_and_what_the_hub_adds_are_valid(tmp_path: Path) -> None:
    convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", validate=False)
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    (tmp_path / "out" / ".gitattributes").write_text("*.safetensors filter=lfs\n")

    report = validate_model(tmp_path / "out", verifier=VERIFIER, level="structure")

    assert [(check.name, check.passed) for check in report.checks] == [("files", True), ("structure", True)]
