"""What the page on reliability says of bad input is what happens; `reliability` says how it comes about."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, VERIFIER, contents
from click.testing import CliRunner, Result
from reliability import FAULTS, INPUTS, Input, Payload, Workplace

from speculators import Verifier, convert_model, prompts
from speculators.cli import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A place with an earlier output, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    found = Workplace(tmp_path)
    found.fill()
    convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path="out", validate=False)
    return found


def everything(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.what)
def test_bad_input_is_one_error_and_changes_nothing(case: Input, place: Workplace) -> None:
    more = case.bring(place)
    before = everything(place.folder)

    result = CliRunner().invoke(
        cli, ["convert", "head", "--verifier", "base", "--output-path", "out", "--overwrite", *more]
    )

    assert result.exit_code == case.code, result.output
    assert case.message in result.output
    assert "Traceback" not in result.output
    assert [line for line in result.output.splitlines() if line.startswith(("Error: ", "Usage: "))][1:] == []
    assert everything(place.folder) == before
    assert not (place.folder / "executed").exists()


def test_the_same_head_is_converted_when_nothing_is_wrong(place: Workplace) -> None:
    result = CliRunner().invoke(cli, ["convert", "head", "--verifier", "base", "--output-path", "out", "--overwrite"])

    assert result.exit_code == 0, result.output
    assert sorted(contents(place.folder / "out")) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "native_config.json",
        "provenance.json",
    ]


def table(page: str, name: str) -> list[list[str]]:
    """Return the cells of the table behind a mark."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", page, re.DOTALL)
    assert found is not None
    return [line.strip("| ").split(" | ") for line in found[1].splitlines()[2:]]


def test_the_page_on_reliability_lists_what_is_tested() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()

    assert table(page, "inputs") == [[case.what, f"`{case.message}`", str(case.code)] for case in INPUTS]
    assert table(page, "faults") == [[fault.what, fault.sees, fault.code or " ", fault.disk] for fault in FAULTS]


def test_what_it_says_of_faults_is_proved_by_a_test_that_there_is() -> None:
    suite = (ROOT / "tests" / "slow" / "test_faults.py").read_text()

    assert [fault.what for fault in FAULTS if f"def {fault.test}(" not in suite] == []


EVIL = """
from pathlib import Path
Path("executed").mkdir()
"""


def test_code_that_a_verifier_names_is_not_run(place: Workplace) -> None:
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    place.config("base", model_type="evil", auto_map=classes)
    place.text("base/evil.py", EVIL)
    before = everything(place.folder)

    result = CliRunner().invoke(
        cli,
        [
            "convert",
            "head",
            "--verifier",
            "base",
            "--output-path",
            "out",
            "--overwrite",
            "--validate-level",
            "acceptance",
        ],
    )

    assert result.exit_code == 3, result.output
    assert "transformers cannot load the verifier base" in result.output
    assert everything(place.folder) == before
    assert not (place.folder / "executed").exists()


def accept(verifier: str) -> Result:
    """Convert with the level that runs the verifier."""
    return CliRunner().invoke(
        cli, ["convert", "head", "--verifier", verifier, "--output-path", "new", "--validate-level", "acceptance"]
    )


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": {"": "flash_attention_2"}},
        {"_attn_implementation_internal": "flash_attention_3", "_attn_implementation_autoset": True},
        {"experts_implementation": "deepgemm"},
        {"transformers_weights": "../elsewhere.safetensors"},
        {"layers": [[{"attn_implementation": "somebody/kernel"}]]},
        {"attribute_map": {"other": "_attn_implementation"}, "other": "somebody/kernel"},
    ],
    ids=str,
)
def test_code_and_weights_that_a_verifier_would_fetch_are_not_used(config: dict[str, Any], place: Workplace) -> None:
    place.config("base", **config)

    assert accept("base").exit_code == 0


def test_what_lies_beside_a_verifier_and_is_none_of_it_is_left_alone(place: Workplace) -> None:
    (place.folder / "base" / "notes.json").mkdir()
    (place.folder / "base" / "other.model").symlink_to("nowhere")
    (place.folder / "LICENSE.txt").write_text("years of work")
    (place.folder / "base" / "LICENSE.txt").symlink_to(place.folder / "LICENSE.txt")

    assert accept("base").exit_code == 0


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "own"]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["vocab_file", "vocab", "tokenizer_file", "init_inputs", "merges_file"])
def test_a_tokenizer_reads_nothing_elsewhere(file: str, key: str, place: Workplace) -> None:
    secret = place.folder / "secret.txt"
    secret.write_text("\n".join([*VOCABULARY, "secret"]))
    place.text("base/vocab.txt", "\n".join(VOCABULARY))
    (place.folder / "base" / "tokenizer.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        named = {key: [str(secret)] if key == "init_inputs" else str(secret)} if name == file else {}
        place.text(f"base/{name}", json.dumps({"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]"} | named))

    tokenizer = prompts._tokenizer(Verifier(place.folder / "base"))

    assert sorted(tokenizer.get_vocab()) == sorted(VOCABULARY)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "name", ["AutoModelForCausalLM", "AutoTokenizer", "OneFormerImageProcessor", ["LlamaTokenizer"]]
)
def test_a_tokenizer_is_of_no_other_class(name: object, file: str, place: Workplace) -> None:
    (place.folder / "base" / "tokenizer_config.json").unlink(missing_ok=True)
    place.text("base/tokenizer.json", "{}")
    content = json.loads(path.read_text()) if (path := place.folder / "base" / file).exists() else {}
    place.text(f"base/{file}", json.dumps(content | {"tokenizer_class": name}))

    with Verifier(place.folder / "base").checkpoint.gathered(weights=False) as given:
        assert "tokenizer_class" not in json.loads((given / file).read_text())
    with Verifier(place.folder / "base").checkpoint.gathered() as given:
        assert {path.name for path in given.iterdir()} <= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }


def test_a_tokenizer_s_settings_are_kept(place: Workplace) -> None:
    settings = {
        "tokenizer_class": "BertTokenizer",
        "chat_template": "{{ messages }}",
        "model_max_length": 77,
        "padding_side": "left",
        "do_lower_case": False,
    }
    place.text("base/vocab.txt", "\n".join([*VOCABULARY, "Own"]))
    (place.folder / "base" / "tokenizer.json").unlink(missing_ok=True)
    place.text("base/tokenizer_config.json", json.dumps(settings))
    place.text("base/special_tokens_map.json", '{"additional_special_tokens": ["own"]}')

    tokenizer = prompts._tokenizer(Verifier(place.folder / "base"))

    assert (tokenizer.model_max_length, tokenizer.padding_side) == (77, "left")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.tokenize("Own") == ["Own"]


def test_a_pickled_shard_of_a_verifier_is_screened_before_transformers_reads_it(place: Workplace) -> None:
    import torch
    from safetensors.torch import load_file

    base = place.folder / "base"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model-00001-of-00002.bin")
    torch.save({"extra": Payload()}, base / "pytorch_model-00002-of-00002.bin")
    weight_map = dict.fromkeys(tensors, "pytorch_model-00001-of-00002.bin")
    index = {"metadata": {}, "weight_map": weight_map | {"extra": "pytorch_model-00002-of-00002.bin"}}
    place.text("base/pytorch_model.bin.index.json", json.dumps(index))

    result = accept("base")

    assert result.exit_code == 3
    assert "pytorch_model-00002-of-00002.bin is refused, its pickle asks for posix.mkdir" in result.output
    assert not (place.folder / "executed").exists()


def test_no_room_for_temporary_files_is_said(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place.folder / "none"))

    result = accept("base")

    assert result.exit_code == 5
    assert "no temporary folder can be made: No such file or directory" in result.output


def test_a_tokenizer_that_brings_code_is_not_run(place: Workplace) -> None:
    place.text("base/evil.py", EVIL)
    place.text("base/tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')

    result = accept("base")

    assert result.exit_code == 3, result.output
    assert "transformers cannot load the tokenizer of base" in result.output
    assert not (place.folder / "executed").exists()


def test_no_environment_variable_lets_a_pickle_run_code(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("speculators.pickles._screen", lambda *file: None)  # so that torch is all that stands between
    place.pickled({"a": Payload()})

    result = CliRunner().invoke(cli, ["convert", "head", "--verifier", "base", "--output-path", "new"])

    assert result.exit_code == 3, result.output
    assert "is refused, its pickle asks for posix.mkdir" in result.output
    assert not (place.folder / "executed").exists()
