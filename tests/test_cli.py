"""The command line: what is typed, what is printed, and the exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, VERIFIER, Copy, read_tensors
from click.testing import CliRunner, Result

from speculators.cli import cli


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def convert(tmp_path: Path, *more: str, source: Path = DATA / "eagle3") -> Result:
    return run("convert", source, "--verifier", VERIFIER, "--output-path", tmp_path / "out", *more)


def test_convert_prints_what_it_did(tmp_path: Path) -> None:
    result = convert(tmp_path, "--algorithm", "eagle")
    assert result.exit_code == 3

    result = convert(tmp_path, "--algorithm", "eagle", source=DATA / "eagle1-no-bias")

    assert result.exit_code == 0
    assert (
        result.output
        == f"""\
Converted {DATA / "eagle1-no-bias"} with eagle (speculators-eagle 1.0.0)
renamed:
    fc.weight -> fusion_fc.weight
    layers.0.mlp.down_proj.weight -> transformer.mlp.down_proj.weight
    layers.0.mlp.gate_proj.weight -> transformer.mlp.gate_proj.weight
    layers.0.mlp.up_proj.weight -> transformer.mlp.up_proj.weight
    layers.0.post_attention_layernorm.weight -> transformer.post_attention_layernorm.weight
    layers.0.self_attn.k_proj.weight -> transformer.self_attn.k_proj.weight
    layers.0.self_attn.o_proj.weight -> transformer.self_attn.o_proj.weight
    layers.0.self_attn.q_proj.weight -> transformer.self_attn.q_proj.weight
    layers.0.self_attn.v_proj.weight -> transformer.self_attn.v_proj.weight
left out:
    embed_tokens.weight: equal to the verifier's embed_tokens
completed:
    embed_tokens.weight: the verifier's embed_tokens is used
    lm_head.weight: the verifier's lm_head is used
note: config.json names no rope_theta: 10000, the default of the training code, is written
structure  passed  9 tensors with the names, shapes and dtypes that config.json requires
forward    passed  hidden states [1, 16, 128] and logits [1, 16, 256] finite and repeatable in bfloat16 on cpu
parity     passed  hidden states and logits are exactly what the source computes
Everything that was checked is right
Wrote {tmp_path / "out"}

Serve it where vLLM is installed:
    pip install speculators-eagle
    vllm serve {tmp_path / "out"} --skip-tokenizer-init
{VERIFIER} has no tokenizer: send lists of token ids, with "return_token_ids": true
"""
    )


def test_convert_prints_its_result_as_json(tmp_path: Path) -> None:
    result = convert(tmp_path, "--json")

    facts = json.loads(result.output)
    assert facts["algorithm"] == "eagle3"
    assert facts["renamed"]["midlayer.mlp.up_proj.weight"] == "layers.0.mlp.up_proj.weight"
    assert [check["name"] for check in facts["validation"]["checks"]] == ["structure", "forward", "parity"]
    assert facts["validation"]["passed"] is True


def test_options_of_the_algorithm_arrive(tmp_path: Path) -> None:
    result = convert(tmp_path, "--algorithm-kwargs", '{"norm_before_residual": true}')

    assert result.exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["norm_before_residual"] is True


@pytest.mark.parametrize("flag", ["--validate", "-validate"])
def test_validation_can_be_asked_for_in_both_spellings(flag: str, tmp_path: Path) -> None:
    assert "\nforward    passed  hidden states" in convert(tmp_path, flag).output


def test_a_level_of_validation_can_be_asked_for(tmp_path: Path) -> None:
    assert "forward  " not in convert(tmp_path, "--validate-level", "structure").output
    assert convert(tmp_path, "--validate-level", "all", "--overwrite").exit_code == 2


@pytest.mark.parametrize("flag", ["--no-validate", "-no-validate"])
def test_validation_can_be_switched_off_and_the_output_says_so(flag: str, tmp_path: Path) -> None:
    assert "not validated" in convert(tmp_path, flag).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["convert"], "MODEL is missing", id="no model"),
        pytest.param(["convert", "x"], "--verifier is missing", id="no verifier"),
        pytest.param(["convert", "x", "--verifier", "y", "--algorithm-kwargs", "{"], "is no JSON", id="no JSON"),
        pytest.param(["convert", "x", "--verifier", "y", "--algorithm-kwargs", "[1]"], "no JSON object", id="a list"),
        pytest.param(
            ["convert", "x", "--verifier", "y", "--algorithm-kwargs", '{"overwrite": true}'],
            "which no algorithm may take",
            id="an argument of the command",
        ),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        pytest.param(["--algorithm", "eagle4"], 3, "no algorithm 'eagle4' is installed", id="algorithm"),
        pytest.param(["--validate-device", "cuba"], 2, "the device 'cuba' cannot be used", id="device"),
        pytest.param(["--dtype", "float17"], 2, "'float17' is none of", id="dtype"),
        pytest.param(["--algorithm-kwargs", '{"typo": 1}'], 2, "eagle3 has no option 'typo'", id="option"),
        pytest.param(
            ["--algorithm-kwargs", '{"fc_norm": "x"}'], 2, "fc_norm: Input should be a valid boolean", id="type"
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(more: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = convert(tmp_path, *more)

    assert result.exit_code == code
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_missing_source_and_one_without_config_say_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")

    assert "does not exist" in convert(tmp_path, source=tmp_path / "nowhere").output
    assert "it has no config.json (found: notes.txt)" in convert(tmp_path, source=tmp_path / "empty").output


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    assert convert(tmp_path).exit_code == 0

    assert convert(tmp_path).exit_code == 5
    assert convert(tmp_path, "--overwrite").exit_code == 0


def test_control_characters_in_names_are_escaped(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", tensors={"evil\x1b[2Jname": torch.ones(1)})

    result = convert(tmp_path, source=source)

    assert "\x1b" not in result.output
    assert r"evil\x1b[2Jname" in result.output


def on_a_terminal(*arguments: str | Path) -> tuple[str, str]:
    """Run the command with a terminal as standard error; return what it prints there and on standard output."""
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "speculators", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True, env=TERMINAL) as process:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # how the end of a terminal reads
            while data := os.read(screen, 4096):
                shown += data
        output = process.stdout.read() if process.stdout else ""
    os.close(screen)
    assert process.returncode == 0, shown
    return shown.decode(), output


TERMINAL = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}


def test_a_terminal_shows_progress(tmp_path: Path) -> None:
    arguments = ("convert", DATA / "eagle1-fc-bias", "--verifier", VERIFIER, "--output-path", tmp_path / "out")

    shown, output = on_a_terminal(*arguments)

    assert "comparing embed_tokens" in shown
    assert re.search(r"writing .*\d+\.\d/\d+\.\d kB", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown))
    assert "validating" in shown
    assert f"\nWrote {tmp_path / 'out'}\n" in output
    assert "writing" not in output


def test_quiet_shows_no_progress(tmp_path: Path) -> None:
    arguments = ("convert", DATA / "eagle1-fc-bias", "--verifier", VERIFIER, "--output-path", tmp_path / "out")

    shown, output = on_a_terminal(*arguments, "--quiet")

    assert shown == ""
    assert f"\nWrote {tmp_path / 'out'}\n" in output


def test_a_pipe_shows_no_progress(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "speculators", "convert", str(DATA / "eagle3"), "--verifier", str(VERIFIER)]

    result = subprocess.run([*command, "--output-path", str(tmp_path / "out")], capture_output=True, check=True)

    assert result.stderr == b""


def test_a_process_without_standard_error_converts(tmp_path: Path) -> None:
    command = f"{sys.executable} -m speculators convert {DATA / 'eagle3'} --verifier {VERIFIER}"
    command += f" --output-path {tmp_path / 'out'} 2>&-"

    result = subprocess.run(command, shell=True, capture_output=True, check=True)

    assert f"\nWrote {tmp_path / 'out'}\n".encode() in result.stdout


def test_a_warning_is_one_line(variant: Copy, tmp_path: Path) -> None:
    source = variant("eagle3", layout="legacy-bin")
    command = [sys.executable, "-m", "speculators", "convert", str(source), "--verifier", str(VERIFIER)]

    result = subprocess.run([*command, "--output-path", str(tmp_path / "out")], capture_output=True, check=True)

    path = source / "pytorch_model.bin"
    message = f"Warning: {path} is in PyTorch's format of before 1.6 and is read into memory whole\n"
    assert result.stderr.decode() == message


def test_shards_can_be_asked_for(tmp_path: Path) -> None:
    result = convert(tmp_path, "--max-shard-size", "100KB")

    assert result.exit_code == 0, result.output
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert run("validate", tmp_path / "out", "--source", DATA / "eagle3").exit_code == 0
    sharded = read_tensors(tmp_path / "out")
    assert convert(tmp_path, "--overwrite").exit_code == 0
    whole = read_tensors(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "native_config.json",
        "provenance.json",
    ]
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_an_impossible_shard_size_is_wrong_usage(tmp_path: Path) -> None:
    result = convert(tmp_path, "--max-shard-size", "many")

    assert result.exit_code == 2
    assert "'many' is no size of a shard; write it as '5GB' or '500MB'" in result.output
    assert not (tmp_path / "out").exists()


def test_list_algorithms_shows_what_each_plugin_brings() -> None:
    result = run("convert", "--list-algorithms")

    assert result.exit_code == 0
    assert "eagle (also eagle1, eagle2): EAGLE v1 and v2 draft heads (SafeAILab/EAGLE)" in result.output
    assert "    from speculators-eagle3 1.0.0" in result.output
    assert "    norm_before_residual  boolean  default null  Whether" in result.output
    assert "    speculative_tokens  integer from 1 to 1000  default null  Draft" in result.output


def test_list_algorithms_as_json() -> None:
    listing = json.loads(run("convert", "--list-algorithms", "--json").output)

    assert [algorithm["name"] for algorithm in listing["algorithms"]] == ["eagle", "eagle3", "hass"]
    eagle3 = listing["algorithms"][1]
    assert eagle3["reference"] == "https://arxiv.org/abs/2503.01840"
    assert eagle3["package"] == "speculators-eagle3"
    ids = next(option for option in eagle3["options"] if option["name"] == "eagle_aux_hidden_state_layer_ids")
    assert (ids["type"], ids["default"]) == ("list of integer", None)
    assert listing["broken"] == []


@pytest.mark.parametrize("command", [["-m", "speculators"], ["-c", "from speculators.cli import cli; cli()"]])
def test_version(command: list[str]) -> None:
    result = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, check=True)

    assert result.stdout == "speculators, version 1.0.0\n"


def test_a_reader_that_has_gone_is_no_bug(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ["convert", DATA / "eagle3", "--verifier", VERIFIER, "--output-path", tmp_path / "out", "--no-validate"]

    done = subprocess.run(
        [sys.executable, "-m", "speculators", *arguments], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)

    assert (done.returncode, done.stderr) == (141, b"")
    assert (tmp_path / "out" / "provenance.json").exists()


@pytest.mark.parametrize("path", ["/", "/proc"])
def test_where_a_disk_is_mounted_no_output_is_put(path: str) -> None:
    result = run("convert", DATA / "eagle3", "--verifier", VERIFIER, "--output-path", path, "--overwrite")

    assert result.exit_code == 5
    assert "which cannot be replaced" in result.output or "would replace its own source" in result.output


def test_dots_at_the_end_mean_the_folder_that_they_lead_to(tmp_path: Path) -> None:
    result = run(
        "convert",
        DATA / "eagle3",
        "--verifier",
        VERIFIER,
        "--output-path",
        tmp_path / "a" / "b" / "..",
        "--no-validate",
    )

    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "native_config.json",
        "provenance.json",
    ]
