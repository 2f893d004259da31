"""Real vLLM 0.32 serves what is converted, and accepts what the original code's drafts were accepted.

vLLM runs in an environment of its own, which ``.ci/serve`` makes (see tests/compat); its interpreter is
named by ``VLLM_PYTHON``. Everything is computed in float32 on the CPU, so counts are compared for equality.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, Copy, read_tensors
from golden import PROMPTS, acceptance, counts, measured
from safetensors.torch import load_file, save_file
from snippets import elsewhere

from speculators import convert_model

SCRIPT = engines.COMPAT / "serve_with_vllm.py"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Served:
    """What one run of vLLM drafted, how much of it was accepted at each position, and what came out."""

    drafts: int
    accepted: list[int]
    tokens: list[list[int]]

    @property
    def counts(self) -> tuple[int, list[int]]:
        return self.drafts, self.accepted


def vllm(*arguments: object) -> subprocess.CompletedProcess[str]:
    return engines.run("VLLM_PYTHON", *arguments)


def write_prompts(folder: Path, prompts: int = 2) -> Path:
    """Write the first so many prompts for the script to read."""
    (folder / "prompts.json").write_text(json.dumps(PROMPTS[:prompts]))
    return folder / "prompts.json"


def serve(model: Path, folder: Path, speculative: Mapping[str, Any] | None = None, prompts: int = 64) -> Served:
    """Let vLLM continue the first so many prompts."""
    result = vllm(SCRIPT, model, write_prompts(folder, prompts), *([json.dumps(speculative)] if speculative else []))
    assert result.returncode == 0, result.stdout + result.stderr
    return Served(**json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The verifier's own greedy output."""
    return serve(VERIFIER, tmp_path_factory.mktemp("alone")).tokens


@pytest.mark.parametrize("name", TRAINED)
def test_a_converted_head_is_served_as_the_model(name: str, tmp_path: Path, alone: list[list[int]]) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out")

    served = serve(tmp_path / "out", tmp_path)

    assert served.tokens == alone
    assert served.counts == counts(acceptance(name)["reference_64"]) == measured(tmp_path / "out")


@pytest.mark.parametrize("name", TRAINED)
def test_a_converted_head_is_served_beside_a_verifier(name: str, tmp_path: Path, alone: list[list[int]]) -> None:
    config = tmp_path / "out" / "config.json"
    convert_model(DATA / name, verifier=VERIFIER, output_path=config.parent)
    method = json.loads(config.read_text())["speculators_model_type"]
    config.write_text(config.read_text().replace(json.dumps(str(VERIFIER)), '"somewhere/else"'))

    served = serve(VERIFIER, tmp_path, {"model": str(config.parent), "method": method, "num_speculative_tokens": 3})

    assert served.tokens == alone
    assert served.counts == counts(acceptance(name)["reference_64"])


@pytest.mark.parametrize(
    ("name", "stripped"),
    [
        ("eagle1-fc-bias", ["fusion_fc.bias"]),
        ("hass-layernorms", ["hidden_layernorm.weight"]),
        ("hass-layernorms", ["embedding_layernorm.weight", "pre_lm_head_layernorm.weight"]),
        ("hass-fc-bias", ["transformer.mlp.up_proj.weight", "transformer.self_attn.k_proj.weight"]),
    ],
)
def test_an_output_that_lost_a_tensor_is_refused(name: str, stripped: list[str], tmp_path: Path) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out")
    strip(tmp_path / "out", stripped)

    result = vllm(SCRIPT, tmp_path / "out", write_prompts(tmp_path))

    assert result.returncode != 0
    complaint = f"this speculator of type 'eagle' lacks {', '.join(stripped)}: its drafts"
    assert complaint in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "changes", "complaints"),
    [
        ("eagle1-fc-bias", {"fusion_bias": False}, ["holds fusion_fc.bias, which its config does not tell of"]),
        (
            "hass-layernorms",
            {"layernorms": False},
            ["holds hidden_layernorm.weight, which its config does not tell of"],
        ),
        (
            "eagle1-no-bias",
            {
                "transformer_layer_config": {
                    "intermediate_size": 128,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                }
            },
            [
                "holds transformer.mlp.down_proj.weight [128, 256], its config says [128, 128]",
                "holds transformer.self_attn.k_proj.weight [64, 128], its config says [32, 128]",
            ],
        ),
        (
            "eagle1-no-bias",
            {"transformer_layer_config": {"vocab_size": 100, "hidden_size": 64}},
            ["hidden size of the verifier is 128, expected 64", "vocabulary of the verifier is 256, expected 100"],
        ),
    ],
)
def test_an_output_whose_config_tells_something_else_is_refused(
    name: str, changes: dict[str, Any], complaints: list[str], tmp_path: Path
) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out")
    amend(tmp_path / "out", changes)

    result = vllm(SCRIPT, tmp_path / "out", write_prompts(tmp_path))

    assert result.returncode != 0
    for complaint in complaints:
        assert complaint in result.stdout + result.stderr


def test_a_head_with_another_method_is_refused(tmp_path: Path) -> None:
    convert_model(DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=tmp_path / "out")
    speculative = {"model": str(tmp_path / "out"), "method": "eagle3", "num_speculative_tokens": 3}

    result = vllm(SCRIPT, VERIFIER, write_prompts(tmp_path), json.dumps(speculative))

    assert result.returncode != 0
    assert "method is 'eagle3', expected 'eagle'" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "flag", "tensors", "mistake"),
    [
        ("eagle1-fc-bias", "fusion_bias", ["fusion_fc.bias"], "fc_bias_dropped"),
        ("hass-fc-bias", "fusion_bias", ["fusion_fc.bias"], "fc_bias_dropped"),
        (
            "hass-layernorms",
            "layernorms",
            ["embedding_layernorm.weight", "hidden_layernorm.weight", "pre_lm_head_layernorm.weight"],
            "all_three_layernorms_ignored",
        ),
    ],
)
def test_a_head_without_what_it_was_trained_with_is_accepted_as_little_as_the_original_was(
    name: str, flag: str, tensors: list[str], mistake: str, tmp_path: Path
) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out")
    strip(tmp_path / "out", tensors)
    amend(tmp_path / "out", {flag: False})
    wrong = acceptance(name)["wrong"][mistake]

    assert serve(tmp_path / "out", tmp_path, prompts=wrong["prompts"]).counts == counts(wrong)


def strip(folder: Path, names: list[str]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in names:
        del tensors[name]
    save_file(tensors, file, {"format": "pt"})


def amend(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of an output's config, and keys of the blocks in it."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def noise(*shape: int, seed: int = 0, scale: float = 0.3) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own_biases(source: str) -> dict[str, torch.Tensor]:
    return {f"{source}.self_attn.{name}_proj.bias": noise(size) for name, size in (("q", 128), ("k", 64), ("v", 64))}


def embeddings(width: int) -> torch.Tensor:
    return load_file(VERIFIER / "model.safetensors")["model.embed_tokens.weight"][:, :width] + noise(
        256, width, scale=0.1
    )


# Trained head, what is changed about it, and under "convert" how it is converted.
VARIANTS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "eagle: biases on q, k and v, embeddings of its own, YaRN": lambda: (
        "hass-layernorms",
        {
            "tensors": {**own_biases("layers.0"), "embed_tokens.weight": embeddings(128)},
            "config": {"rope_scaling": YARN, "rope_theta": 50000.0},
        },
    ),
    "eagle: biases everywhere, other heads than the verifier's, in shards and another dtype": lambda: (
        "eagle1-fc-bias",
        {
            "tensors": {
                "layers.0.self_attn.q_proj.weight": noise(3 * 64, 128, scale=0.1),
                "layers.0.self_attn.k_proj.weight": noise(64, 128, scale=0.1),
                "layers.0.self_attn.v_proj.weight": noise(64, 128, scale=0.1),
                "layers.0.self_attn.o_proj.weight": noise(128, 3 * 64, scale=0.05),
                "layers.0.self_attn.q_proj.bias": noise(3 * 64),
                "layers.0.self_attn.k_proj.bias": noise(64),
                "layers.0.self_attn.v_proj.bias": noise(64),
                "layers.0.self_attn.o_proj.bias": noise(128),
                "layers.0.mlp.gate_proj.bias": noise(256),
                "layers.0.mlp.up_proj.bias": noise(256),
                "layers.0.mlp.down_proj.bias": noise(128),
            },
            "config": {
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "head_dim": 64,
                "partial_rotary_factor": 0.5,
            },
            "convert": {"max_shard_size": "200KB", "dtype": "float32"},
        },
    ),
    "eagle3: flags, and other states of the verifier": lambda: (
        "eagle3",
        {"config": {"norm_before_residual": True, "norm_output": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 6]}},
    ),
    "eagle3: a norm before fc, biases, YaRN": lambda: (
        "eagle3",
        {
            "tensors": {**own_biases("midlayer"), "input_norm.weight": 1 + noise(384)},
            "config": {"rope_scaling": YARN, "rope_theta": 50000.0},
        },
    ),
    "eagle3: a norm for each of five states": lambda: (
        "eagle3",
        {
            "tensors": {
                "fc.weight": torch.cat(
                    (read_tensors(DATA / "eagle3")["fc.weight"], noise(128, 256, scale=0.02).half()), 1
                ),
                **{f"fc_norm.{number}.weight": 2 + noise(128, seed=number) for number in range(5)},
            },
            "config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5, 6, 7]},
        },
    ),
    "eagle3: the whole vocabulary": lambda: (
        "eagle3",
        {
            "tensors": {"lm_head.weight": whole_head(), "d2t": None, "t2d": None},
            "config": {"draft_vocab_size": 256, "norm_output": True},
        },
    ),
    "eagle3: the whole vocabulary, the verifier's head, embeddings of its own": lambda: (
        "eagle3",
        {
            "tensors": {**dict.fromkeys(("lm_head.weight", "d2t", "t2d")), "embed_tokens.weight": embeddings(128)},
            "config": {"draft_vocab_size": 256},
        },
    ),
    "eagle3: narrower than the verifier": lambda: (
        "eagle3",
        {"tensors": narrow(), "config": {"hidden_size": 64}},
    ),
}


def whole_head() -> torch.Tensor:
    """The trained head for 64 tokens, with zeros for all others of the vocabulary."""
    trained = read_tensors(DATA / "eagle3")
    head = torch.zeros(256, 128, dtype=torch.float16)
    head[torch.arange(64) + trained["d2t"]] = trained["lm_head.weight"]
    return head


def narrow() -> dict[str, torch.Tensor]:
    """The trained draft in half its verifier's width: what its head reads, and most of the embeddings."""
    trained = {name: tensor.float() for name, tensor in read_tensors(DATA / "eagle3").items()}
    embedding = load_file(VERIFIER / "model.safetensors")["model.embed_tokens.weight"]
    read = torch.linalg.svd(trained["lm_head.weight"] * trained["norm.weight"]).Vh[:64]
    seen = torch.linalg.svd(embedding).Vh[:64]
    layer = {name.removeprefix("midlayer."): tensor for name, tensor in trained.items()}
    joined = torch.block_diag(
        (layer["input_layernorm.weight"][:, None] * seen.T), (layer["hidden_norm.weight"][:, None] * read.T)
    )
    after = layer["post_attention_layernorm.weight"][:, None] * read.T
    return {
        **{f"midlayer.self_attn.{each}_proj.weight": layer[f"self_attn.{each}_proj.weight"] @ joined for each in "qkv"},
        **{f"midlayer.mlp.{each}_proj.weight": layer[f"mlp.{each}_proj.weight"] @ after for each in ("gate", "up")},
        **{f"midlayer.{each}.weight": read @ layer[f"{each}.weight"] for each in ("self_attn.o_proj", "mlp.down_proj")},
        **{
            f"midlayer.{each}.weight": torch.ones(64)
            for each in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
        "fc.weight": read @ trained["fc.weight"],
        "norm.weight": torch.ones(64),
        "lm_head.weight": (trained["lm_head.weight"] * trained["norm.weight"]) @ read.T,
        "embed_tokens.weight": embedding @ seen.T,
    }


@pytest.mark.parametrize("variant_name", VARIANTS)
def test_what_a_head_can_have_reaches_vllm(variant_name: str, variant: Copy, tmp_path: Path) -> None:
    """Made from trained heads, so that something is accepted, and judged by our own forward."""
    name, changes = VARIANTS[variant_name]()
    options = changes.pop("convert", {})
    convert_model(variant(name, **changes), verifier=VERIFIER, output_path=tmp_path / "out", **options)

    served = serve(tmp_path / "out", tmp_path)

    assert served.counts == measured(tmp_path / "out")
    assert sum(served.accepted) > 10
    assert served.counts != counts(acceptance(name)["reference_64"])


def test_a_verifier_that_has_no_lm_head_in_vllm_lends_its_embeddings(variant: Copy, tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
    )
    CohereForCausalLM(config).save_pretrained(tmp_path / "tied")
    source = variant("eagle1-no-bias", tensors={"embed_tokens.weight": None})
    convert_model(source, verifier=tmp_path / "tied", output_path=tmp_path / "out")

    served = serve(tmp_path / "out", tmp_path)

    assert served.counts == measured(tmp_path / "out")
    assert sum(served.accepted) > 10


def test_a_self_contained_head_keeps_the_embeddings_that_it_was_trained_with(tmp_path: Path) -> None:
    convert_model(DATA / "eagle1-fc-bias", verifier=VERIFIER, output_path=tmp_path / "out", self_contained=True)

    result = vllm(SCRIPT, tmp_path / "out", write_prompts(tmp_path))

    assert result.returncode == 0, result.stderr
    assert "distinct embed_tokens" in result.stdout + result.stderr


def teach(code: str) -> list[str]:
    """Run code where vLLM is installed, after imports; return the lines that it printed."""
    prelude = """
import logging
logging.basicConfig(level=logging.INFO)
import vllm.model_executor.models.llama_eagle as llama_eagle
from vllm import ModelRegistry
from vllm.transformers_utils.configs.speculators import algos
from speculators_eagle.vllm import ARCHITECTURE, describe, register
known = algos.SUPPORTED_SPECULATORS_TYPES
"""
    result = vllm("-c", prelude + code)
    assert result.returncode == 0, result.stdout + result.stderr
    return (result.stdout + result.stderr).splitlines()


def test_the_plugin_can_be_loaded_again() -> None:
    lines = teach("register(); register(); print(known['eagle'] is describe, ARCHITECTURE in ModelRegistry.models)")

    assert "True True" in lines


def test_the_plugin_leaves_the_type_to_a_vllm_that_knows_it() -> None:
    lines = teach(
        "known['eagle'] = len; register(); print(known['eagle'] is len, ARCHITECTURE in ModelRegistry.models)"
    )

    assert "True False" in lines
    assert any("knows speculators of type 'eagle' by itself" in line for line in lines)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("del algos.register_speculator", "cannot import name 'register_speculator'"),
        ("algos.SUPPORTED_SPECULATORS_TYPES = ['eagle3']", "has no attribute 'get'"),
        (
            "import vllm; vllm.__version__ = '0.28.1'",
            "cannot teach vLLM 0.28.1 to serve speculators of type 'eagle': it is",
        ),
    ],
)
def test_a_vllm_that_cannot_be_taught_still_starts_and_says_why(damage: str, why: str) -> None:
    lines = teach(f"{damage}; register(); print(ARCHITECTURE in ModelRegistry.models)")

    assert "False" in lines
    assert any("cannot teach vLLM" in line and why in line for line in lines)


def test_a_vllm_without_a_part_of_the_model_says_which() -> None:
    lines = teach("""
del llama_eagle.LlamaDecoderLayer
try:
    import speculators_eagle.vllm.model
except ImportError as error:
    print(error)
""")

    assert any("cannot teach vLLM" in line and "'LlamaDecoderLayer'" in line for line in lines)


@contextmanager
def server(command: str, folder: Path) -> Iterator[str]:
    """Run a command in a folder, on a free port of loopback; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *arguments = shlex.split(command)
    vllm_command = engines.interpreter("VLLM_PYTHON").with_name(program)
    log = folder / "server.log"
    with log.open("w") as output:
        running = subprocess.Popen(
            [vllm_command, *arguments, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=engines.environment(VLLM_CPU_KVCACHE_SPACE="1"),
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 400
            while True:
                assert running.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                with suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                    break
                time.sleep(0.5)
            yield address
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(running.pid, number)
                    running.wait(60)


def ask(address: str, request: Mapping[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{address}/v1/completions", json.dumps(request).encode(), headers)
    with urllib.request.urlopen(asked) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def counter(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics") as response:
        found = re.search(rf"^vllm:spec_decode_{name}_total\{{.*\}} (.*)$", response.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_the_openai_server_answers_a_completion(
    speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = convert_model(DATA / "hass-layernorms", verifier=speaking, output_path="converted")
    assert result.serving is not None
    pages = elsewhere("test_the_openai_server_answers_a_completion")
    asking = re.sub(r"^vllm serve converted\n", "", pages["docs/serving.md"])
    assert {result.serving.command, f"{result.serving.command}\n{asking}"} == {*pages.values()}

    with server(result.serving.command, tmp_path) as address:
        answer = ask(address, {"prompt": "def __init__(self, ", "max_tokens": 40, "temperature": 0, "ignore_eos": True})
        length = 1 + counter(address, "num_accepted_tokens") / counter(address, "num_drafts")
        (tmp_path / ".curlrc").write_text(f"connect-to = localhost:8000:{address.removeprefix('http://')}\n")
        asked = subprocess.run(
            ["bash", "-c", asking], env={**os.environ, "CURL_HOME": str(tmp_path)}, capture_output=True, check=True
        )

    assert answer["choices"][0]["text"].startswith("self.")
    assert answer["usage"]["completion_tokens"] == 40
    assert length > 2.5
    assert json.loads(asked.stdout)["usage"]["completion_tokens"] == 64


def test_the_first_steps_are_served_as_their_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(DATA.parent)
    convert_model("tests/data/eagle3", verifier="tests/data/verifier", output_path="converted")
    (page,) = elsewhere("test_the_first_steps_are_served_as_their_page_says").values()
    serving, asking = page.split("\n", 1)

    with server(serving, tmp_path) as address:
        (tmp_path / ".curlrc").write_text(f"connect-to = localhost:8000:{address.removeprefix('http://')}\n")
        asked = subprocess.run(
            ["bash", "-c", asking], env={**os.environ, "CURL_HOME": str(tmp_path)}, capture_output=True, check=True
        )

    assert len(json.loads(asked.stdout)["choices"][0]["token_ids"]) == 32


def test_a_verifier_is_served_with_a_draft_beside_it(speaking: Path, tmp_path: Path) -> None:
    (command,) = elsewhere("test_a_verifier_is_served_with_a_draft_beside_it").values()
    convert_model(DATA / "eagle1-no-bias", verifier=speaking, output_path=tmp_path / "converted")
    (tmp_path / "VERIFIER").symlink_to(speaking)

    with server(f"{command} --enforce-eager", tmp_path) as address:
        answer = ask(address, {"prompt": "def __init__(self, ", "max_tokens": 40, "temperature": 0, "ignore_eos": True})
        length = 1 + counter(address, "num_accepted_tokens") / counter(address, "num_drafts")

    assert answer["choices"][0]["text"].startswith("self.")
    assert length > 2.5


def test_the_python_of_the_page_counts_drafts(speaking: Path, tmp_path: Path) -> None:
    (code,) = elsewhere("test_the_python_of_the_page_counts_drafts").values()
    convert_model(DATA / "eagle1-no-bias", verifier=speaking, output_path=tmp_path / "converted")
    counting = """
llm.generate(["def __init__(self, "])
counts = {each.name: each.value for each in llm.get_metrics() if hasattr(each, "value")}
open("counts.json", "w").write(json.dumps(counts))
"""
    script = f"import json\n\nif __name__ == '__main__':\n{textwrap.indent(code + counting, '    ')}"
    (tmp_path / "script.py").write_text(script)

    result = subprocess.run(
        [engines.interpreter("VLLM_PYTHON"), "script.py"],
        cwd=tmp_path,
        env=engines.environment(VLLM_CPU_KVCACHE_SPACE="1"),
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["vllm:spec_decode_num_draft_tokens"] == 3 * found["vllm:spec_decode_num_drafts"] > 0


def test_what_teaches_vllm_is_installed_beside_it(tmp_path: Path) -> None:
    """Nothing is fetched: .ci/serve has installed both, the plugin from this checkout."""
    (command,) = elsewhere("test_what_teaches_vllm_is_installed_beside_it").values()
    path = f"{engines.interpreter('VLLM_PYTHON').parent}{os.pathsep}{os.environ['PATH']}"

    result = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    assert "Requirement already satisfied: speculators-eagle" in result.stdout


def test_the_server_needs_no_tokenizer(tmp_path: Path) -> None:
    result = convert_model(DATA / "eagle1-fc-bias", verifier=VERIFIER, output_path=tmp_path / "out")
    assert result.serving is not None

    with server(f"{result.serving.command} --enforce-eager --dtype float32", tmp_path) as address:
        prompt = list(b"def __init__(self, ")
        answer = ask(address, {"prompt": prompt, "max_tokens": 40, "temperature": 0, "return_token_ids": True})

    assert bytes(answer["choices"][0]["token_ids"]).startswith(b"self.")


def test_the_number_of_draft_tokens_can_be_set_beside_an_output(tmp_path: Path) -> None:
    for tokens in (3, 5):
        convert_model(
            DATA / "eagle1-no-bias", verifier=VERIFIER, output_path=tmp_path / str(tokens), speculative_tokens=tokens
        )

    served = serve(tmp_path / "3", tmp_path, {"num_speculative_tokens": 5})

    assert len(served.accepted) == 5
    assert served.counts == measured(tmp_path / "5")
