"""What is said about serving: the exact line, for every place that a verifier can lie in."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, VERIFIER, write_checkpoint
from click.testing import CliRunner
from installing import TOY, Install
from loopback import Server

from speculators import convert_model
from speculators.cli import cli
from speculators.serving import Instructions


def instructions(source: str, verifier: object, folder: Path, name: str = "out") -> Instructions:
    found = convert_model(DATA / source, verifier=str(verifier), output_path=folder / name, validate=False).serving
    assert found is not None
    return found


def test_a_verifier_here_is_found_through_the_config(speaking: Path, tmp_path: Path) -> None:
    assert instructions("eagle3", speaking, tmp_path) == Instructions(f"vllm serve {tmp_path / 'out'}")


@pytest.mark.parametrize("source", ["eagle1-no-bias", "hass-layernorms"])
def test_types_that_vllm_must_be_taught_name_what_teaches_it(source: str, speaking: Path, tmp_path: Path) -> None:
    assert instructions(source, speaking, tmp_path).packages == ("speculators-eagle",)


@pytest.mark.parametrize("name", ["my head", "it's", '"$HOME"', "a;b", "ümlaut"])
def test_an_odd_path_is_quoted(name: str, speaking: Path, tmp_path: Path) -> None:
    command = instructions("eagle3", speaking, tmp_path, name).command

    assert shlex.split(command) == ["vllm", "serve", str(tmp_path / name)]


def test_a_path_that_looks_like_an_option_is_none(
    speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    serving = convert_model(DATA / "eagle3", verifier=speaking, output_path="-head", validate=False).serving

    assert serving == Instructions("vllm serve ./-head")


def test_without_a_tokenizer_vllm_is_told_so(tmp_path: Path) -> None:
    assert instructions("eagle3", VERIFIER, tmp_path) == Instructions(
        f"vllm serve {tmp_path / 'out'} --skip-tokenizer-init",
        note=f'{VERIFIER} has no tokenizer: send lists of token ids, with "return_token_ids": true',
    )


def test_a_revision_of_the_verifier_reaches_vllm(
    server: Server, speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.add("org/base", speaking)
    commit = server.repos["org/base"].refs["main"]

    pinned = instructions("eagle3", f"org/base@{commit}", tmp_path, "pinned")
    assert pinned.command == f"vllm serve {tmp_path / 'pinned'} --revision {commit}"


@pytest.mark.parametrize("place", ["a folder of a repository", "an address", "a config without weights"])
def test_a_verifier_that_vllm_cannot_load_is_left_for_the_user_to_name(
    place: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(VERIFIER, tmp_path / "repository" / "inner")
    (tmp_path / "bare").mkdir()
    shutil.copy(VERIFIER / "config.json", tmp_path / "bare")
    server.add("org/base", tmp_path / "repository")
    server.folders["files"] = tmp_path / "repository"
    verifiers = {
        "a folder of a repository": "org/base:inner",
        "an address": f"{server.url}/files/inner",
        "a config without weights": str(tmp_path / "bare"),
    }

    if place == "an address":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the server is no Hub then

    found = instructions("eagle1-no-bias", verifiers[place], tmp_path)

    program, serve, verifier, option, settings = shlex.split(found.command)
    assert (program, serve, verifier, option) == ("vllm", "serve", "VERIFIER", "--speculative-config")
    assert json.loads(settings) == {"method": "eagle", "model": str(tmp_path / "out"), "num_speculative_tokens": 3}
    reason = "there are no weights" if place == "a config without weights" else "vLLM loads nothing from there"
    assert found.note == f"VERIFIER stands for a folder or a Hugging Face ID of {verifiers[place]}; {reason}"


def test_the_number_of_draft_tokens_is_the_configs(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(VERIFIER / "config.json", tmp_path / "bare")

    result = convert_model(
        DATA / "eagle3", verifier=tmp_path / "bare", output_path=tmp_path / "out", speculative_tokens=5, validate=False
    )

    assert result.serving is not None
    assert '"num_speculative_tokens": 5' in result.serving.command


def test_the_command_prints_them_as_json(speaking: Path, tmp_path: Path) -> None:
    arguments = [
        "convert",
        DATA / "eagle1-no-bias",
        "--verifier",
        speaking,
        "--output-path",
        tmp_path / "out",
        "--json",
    ]

    printed = json.loads(CliRunner().invoke(cli, [str(each) for each in arguments]).stdout)

    assert printed["serving"] == {
        "command": f"vllm serve {tmp_path / 'out'}",
        "packages": ["speculators-eagle"],
        "note": "",
    }


def test_nothing_is_said_of_types_that_vllm_does_not_serve(install: Install, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {}, {"toy.weight": torch.randn(128, 256)})

    result = convert_model(
        source, verifier=VERIFIER, output_path=tmp_path / "out", registry=install("toy", TOY), validate=False
    )

    assert result.serving is None


def test_a_plugin_says_how_its_type_is_served(install: Install, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {}, {"toy.weight": torch.randn(128, 256)})
    (tmp_path / "bare").mkdir()
    shutil.copy(VERIFIER / "config.json", tmp_path / "bare")
    said = 'Vllm("eagle3", packages=("toy-for-vllm",), settings={"parallel_drafting": True})'
    toy = TOY.replace('    name = "toy"\n', f'    name = "toy"\n    vllm = speculators.{said}\n')

    serving = convert_model(
        source, verifier=tmp_path / "bare", output_path=tmp_path / "out", registry=install("toy", toy), validate=False
    ).serving

    assert serving is not None
    assert serving.packages == ("toy-for-vllm",)
    assert json.loads(shlex.split(serving.command)[-1]) == {
        "model": str(tmp_path / "out"),
        "method": "eagle3",
        "num_speculative_tokens": 3,
        "parallel_drafting": True,
    }


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("'eagle3'", "Toy.vllm is 'eagle3', expected a Vllm or None"),
        ("speculators.Vllm('eagle3', packages='toy')", "Input should be a valid tuple"),
        ("speculators.Vllm('eagle3', settings={'rates': {1}})", "input was not a valid JSON value"),
        ("speculators.Vllm({'method': 'eagle3'})", "Input should be a valid string"),
    ],
)
def test_a_plugin_that_says_it_otherwise_is_broken(said: str, why: str, install: Install) -> None:
    registry = install("toy", TOY.replace('    name = "toy"\n', f'    name = "toy"\n    vllm = {said}\n'))

    (broken,) = registry.broken
    assert why in str(broken)


def test_a_verifier_by_its_cached_config_is_not_said_to_lack_a_tokenizer(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.add("org/base", VERIFIER)

    assert instructions("eagle3", "org/base", tmp_path) == Instructions(f"vllm serve {tmp_path / 'out'}")
