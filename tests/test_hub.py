"""Drafts and verifiers from the Hub, through huggingface_hub's own client and a server that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, VERIFIER, Copy, contents, read_tensors, weights, write_checkpoint
from click.testing import CliRunner
from huggingface_hub import hf_hub_download, scan_cache_dir
from loopback import SIGNATURE, Fault, Server, Start, wait_for

from speculators import CheckpointError, ConversionResult, SpeculatorsError, convert_model, validate_model
from speculators.cli import cli
from speculators.sources import remote, web

# Where a test looks at warnings, it would see those about files that are closed when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

HEAD, BASE = "org/eagle3-head", "org/base"
TOKEN = "hf_s3cret"

Convert = Callable[..., ConversionResult]


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """A Hub with a head and its verifier, whose faults are soon over; the working folder is empty."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    server.add(HEAD, DATA / "eagle3")
    server.add(BASE, VERIFIER)
    return server


@pytest.fixture
def convert(hub: Server, tmp_path: Path) -> Convert:
    """Convert the head of the Hub, without validation, into ``out``, with a cache of its own."""

    def run(model: str | Path = HEAD, verifier: str | Path = BASE, out: str = "out", **more: Any) -> ConversionResult:
        more = {"cache_dir": tmp_path / "cache", "validate": False, "overwrite": True} | more
        return convert_model(model, verifier=verifier, output_path=tmp_path / out, **more)

    return run


def provenance(folder: Path) -> dict[str, Any]:
    """Read where an output's source and verifier came from, without the files that were read."""
    found: dict[str, dict[str, Any]] = json.loads((folder / "provenance.json").read_text())
    return {
        role: {key: value for key, value in found[role].items() if key != "files"} for role in ("source", "verifier")
    }


def named_verifier(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["speculators_config"]["verifier"]["name_or_path"]


def test_a_head_of_the_hub_becomes_what_its_files_become(hub: Server, convert: Convert, tmp_path: Path) -> None:
    result = convert(validate=True)
    convert(DATA / "eagle3", VERIFIER, out="local")

    assert result.validation is not None
    assert [check.name for check in result.validation.checks] == ["structure", "forward", "parity"]
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert named_verifier(tmp_path / "out") == BASE
    assert provenance(tmp_path / "out") == {
        "source": {"repository": HEAD, "commit": hub.repos[HEAD].refs["main"]},
        "verifier": {"repository": BASE, "commit": hub.repos[BASE].refs["main"]},
    }


@pytest.mark.parametrize(
    "form", ["{name}", "{name}@main", "{name}@{commit}", "hf://{name}", "{url}/{name}", "{url}/{name}/tree/main"]
)
def test_every_form_of_one_commit_gives_the_same_bytes(
    form: str, hub: Server, convert: Convert, tmp_path: Path
) -> None:
    def place(name: str) -> str:
        return form.format(name=name, url=hub.url, commit=hub.repos[name].refs["main"])

    convert(out="plain")
    convert(place(HEAD), place(BASE))

    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_revision_is_what_it_was(hub: Server, convert: Convert, tmp_path: Path, variant: Copy) -> None:
    first = hub.repos[HEAD].refs["main"]
    convert(out="first")
    second = hub.add(HEAD, variant("eagle3", tensors={"norm.weight": torch.ones(128)}))

    convert(out="second")
    convert(f"{HEAD}@{first}", out="again")

    assert contents(tmp_path / "first") == contents(tmp_path / "again")
    assert weights(tmp_path / "second") != weights(tmp_path / "first")
    assert provenance(tmp_path / "second")["source"]["commit"] == second


def test_a_folder_and_a_file_of_a_repository_can_be_meant(
    hub: Server, convert: Convert, tmp_path: Path, variant: Copy
) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(DATA / "eagle3", repo / "heads" / "best")
    other = variant("eagle3", tensors={"norm.weight": torch.ones(128)})
    shutil.copy(other / "model.safetensors", repo / "heads" / "best" / "other.safetensors")
    commit = hub.add("org/many", repo)
    convert(out="plain")

    convert("org/many:heads/best")
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    assert provenance(tmp_path / "out")["source"] == {
        "repository": "org/many",
        "commit": commit,
        "path": "heads/best",
    }
    convert(f"{hub.url}/org/many/blob/main/heads/best/other.safetensors")
    assert provenance(tmp_path / "out")["source"]["file"] == "other.safetensors"
    assert weights(tmp_path / "out") != weights(tmp_path / "plain")
    with pytest.raises(
        CheckpointError, match=r"org/many has no folder or weight file 'heads/worst'; it has heads/best/c"
    ):
        convert("org/many:heads/worst")
    with pytest.raises(
        CheckpointError, match=r"org/many is no checkpoint: it has no config\.json \(found: heads/best/,"
    ):
        convert("org/many")


def test_of_a_draft_one_format_and_its_config_are_fetched(
    hub: Server, convert: Convert, tmp_path: Path, variant: Copy
) -> None:
    repo = variant("eagle3", layout="sharded-safetensors")
    shutil.copy(DATA / "eagle3" / "pytorch_model.bin", repo)
    (repo / "optimizer.pt").write_bytes(b"large")
    (repo / "README.md").write_text("words")
    hub.add("org/both", repo)

    convert("org/both")

    fetched = {request.path.rpartition("/")[2].partition("?")[0] for request in hub.asked("org/both/resolve")}
    assert fetched == {
        "README.md",  # which may name the license
        "config.json",
        "model.safetensors.index.json",
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    }


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A head, and a sharded verifier of 210 MB with embeddings of 105 MB."""
    width, vocabulary, drafted, inner, heads = 512, 102_400, 1000, 64, 8
    shape = {"hidden_size": width, "vocab_size": vocabulary, "num_attention_heads": heads, "num_key_value_heads": heads}
    more = {"num_hidden_layers": 8, "intermediate_size": inner, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    make = torch.Generator().manual_seed(0)

    def tensor(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, generator=make) * 0.02).to(torch.bfloat16)

    base = {
        "model.embed_tokens.weight": tensor(vocabulary, width),
        "lm_head.weight": tensor(vocabulary, width),
        "model.norm.weight": tensor(width),
    }
    targets = torch.arange(drafted) * 3
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    mask[targets] = True
    layer = {f"self_attn.{name}_proj.weight": tensor(width, 2 * width) for name in "qkv"}
    layer |= {"self_attn.o_proj.weight": tensor(width, width)}
    layer |= {f"mlp.{name}_proj.weight": tensor(inner, width) for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": tensor(width, inner)}
    layer |= {
        f"{name}.weight": tensor(width) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    }
    head = {f"midlayer.{name}": value for name, value in layer.items()} | {
        "fc.weight": tensor(width, 3 * width),
        "norm.weight": tensor(width),
        "lm_head.weight": tensor(drafted, width),
        "d2t": targets - torch.arange(drafted),
        "t2d": mask,
    }
    common = {**shape, **more, "torch_dtype": "bfloat16", "max_position_embeddings": 2048, "model_type": "llama"}
    folder = tmp_path_factory.mktemp("large")
    return (
        write_checkpoint(folder / "head", {**common, "draft_vocab_size": drafted, "num_hidden_layers": 1}, head),
        write_checkpoint(
            folder / "base", {**common, "architectures": ["LlamaForCausalLM"]}, base, "sharded-safetensors"
        ),
    )


EMBEDDING = 102_400 * 512 * 2
"""Bytes of the large verifier's embeddings."""


@pytest.mark.parametrize("self_contained", [False, True])
def test_of_a_verifier_only_what_is_used_is_fetched(
    self_contained: bool, large_pair: tuple[Path, Path], hub: Server, convert: Convert, tmp_path: Path
) -> None:
    head, base = large_pair
    hub.add("org/large-head", head)
    hub.add("org/large-base", base)
    draft = sum(path.stat().st_size for path in head.iterdir())
    completed = EMBEDDING if self_contained else 0
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) > 200e6

    convert("org/large-head", "org/large-base", validate=True, self_contained=self_contained)

    assert draft + completed < hub.total() < draft + completed + 1e6
    assert ("embed_tokens.weight" in read_tensors(tmp_path / "out")) == self_contained
    before = hub.total()
    convert("org/large-head", "org/large-base", validate=True, self_contained=self_contained)
    assert hub.total() - before < 10_000  # all but what tells the commits comes from the cache


def test_of_a_pickled_verifier_only_the_shard_with_the_tensor_is_fetched(
    hub: Server, convert: Convert, tmp_path: Path, variant: Copy
) -> None:
    hub.add("org/pickled", variant("verifier", layout="sharded-bin"))

    convert(DATA / "eagle1-no-bias", "org/pickled")

    index = json.loads((tmp_path / "source" / "pytorch_model.bin.index.json").read_text())
    shard = index["weight_map"]["model.embed_tokens.weight"]
    assert {request.path.rpartition("/")[2] for request in hub.asked("resolve") if ".bin" in request.path} == {
        "pytorch_model.bin.index.json",
        shard,
    }


def test_what_another_program_downloaded_is_used(hub: Server, convert: Convert, tmp_path: Path) -> None:
    for name, file in ((HEAD, "pytorch_model.bin"), (BASE, "model.safetensors")):
        for each in ("config.json", file):
            hf_hub_download(name, each, cache_dir=tmp_path / "cache", endpoint=hub.url)
    hub.requests.clear()

    convert(validate=True, self_contained=True)
    convert(validate=True, self_contained=True, offline=True, out="again")

    assert not hub.asked("resolve")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_what_another_program_downloaded_in_part_is_not_taken_for_all(
    hub: Server, convert: Convert, tmp_path: Path
) -> None:
    for each in (HEAD, BASE):
        hf_hub_download(each, "config.json", cache_dir=tmp_path / "cache", endpoint=hub.url)

    with pytest.raises(CheckpointError, match=r"model\.safetensors is not in the cache .*\(it has config\.json\)"):
        convert(offline=True)
    assert convert().algorithm == "eagle3"


def test_another_program_finds_what_was_downloaded(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert()
    file = hf_hub_download(HEAD, "pytorch_model.bin", cache_dir=tmp_path / "cache", local_files_only=True)

    assert Path(file).read_bytes() == (DATA / "eagle3" / "pytorch_model.bin").read_bytes()
    assert HEAD in {repo.repo_id for repo in scan_cache_dir(tmp_path / "cache").repos}


def test_a_cached_conversion_needs_no_hub(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert(validate=True, self_contained=True)
    hub.requests.clear()

    convert(validate=True, self_contained=True, out="again", offline=True)

    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert not hub.requests


def test_a_hub_that_is_away_is_said_and_the_cache_used(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert(validate=True, self_contained=True)
    hub.faults.append(Fault("", times=99, status=503, methods=("GET", "HEAD")))

    with pytest.warns(
        UserWarning, match=r"the Hub at http://\S+ cannot be reached \(status 503\).*; the cached commit"
    ):
        convert(validate=True, self_contained=True, out="again")

    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_offline_a_branch_is_what_it_was_when_it_was_last_seen(
    hub: Server, convert: Convert, tmp_path: Path, variant: Copy
) -> None:
    convert(out="first")
    second = hub.add(HEAD, variant("eagle3", tensors={"norm.weight": torch.ones(128)}), revision="next")
    convert(f"{HEAD}@{second}", out="second")
    hub.repos[HEAD].refs["main"] = second
    convert(out="online")

    convert(out="offline", offline=True)

    assert contents(tmp_path / "online") == contents(tmp_path / "second") != contents(tmp_path / "first")
    assert contents(tmp_path / "offline") == contents(tmp_path / "online")


def test_what_is_validated_is_the_commit_that_was_converted_with(
    hub: Server, convert: Convert, tmp_path: Path, variant: Copy
) -> None:
    first = hub.repos[BASE].refs["main"]
    hub.add(BASE, variant("verifier", config={"hidden_size": 64}))

    convert(verifier=f"{BASE}@{first}")

    assert named_verifier(tmp_path / "out") == BASE
    assert validate_model(tmp_path / "out", level="structure", cache_dir=tmp_path / "cache").passed
    (tmp_path / "out" / "provenance.json").unlink()
    assert not validate_model(tmp_path / "out", level="structure", cache_dir=tmp_path / "cache").passed


def test_a_verifier_is_named_by_its_folder(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert(verifier=f"{BASE}:model.safetensors")

    assert named_verifier(tmp_path / "out") == BASE


@pytest.mark.parametrize("token", ["hf_s3cret\n", " hf_s3cret ", "hf_s3cret\r\n"])
def test_blanks_around_a_token_are_nothing(token: str, hub: Server, convert: Convert) -> None:
    hub.add("org/private", DATA / "eagle3", private=True)
    hub.tokens[TOKEN] = {"org/private"}

    assert convert("org/private", token=token).algorithm == "eagle3"


@pytest.mark.parametrize("token", ["hf_s3 cret", "hf_s3crét", "hf_s3\ncret"])
def test_a_token_that_cannot_be_one_is_said(token: str, hub: Server, convert: Convert) -> None:
    with pytest.raises(CheckpointError, match="holds characters that no token has; copy it again") as caught:
        convert(token=token)

    assert "hf_s3" not in str(caught.value)


def test_a_hub_that_lists_and_names_what_leads_elsewhere_is_not_followed(
    hub: Server, convert: Convert, tmp_path: Path
) -> None:
    for body, message in (
        ({"sha": "../../x", "siblings": []}, "names no commit of org/eagle3-head; is it a Hub?"),
        ({"sha": str(tmp_path / "x"), "siblings": []}, "names no commit"),
        ({"siblings": []}, "names no commit"),
        ([], "does not answer like a Hub"),
        ("<html>", "does not answer like a Hub"),
        (
            {"sha": "a" * 40, "siblings": [{"rfilename": "../config.json"}, {"rfilename": "/etc/x.bin"}]},
            "no checkpoint",
        ),
    ):
        text = body if isinstance(body, str) else json.dumps({"id": HEAD, **body} if isinstance(body, dict) else body)
        hub.faults = [Fault("/api/models", body=text.encode())]

        with pytest.raises(CheckpointError, match=message):
            convert()
    hub.faults = [Fault("resolve", methods=("HEAD",), headers={"ETag": '"../../../x"'}, times=9)]
    with pytest.raises(CheckpointError, match=r"gives config\.json of org/eagle3-head the ETag .*, which is none"):
        convert()
    assert not list(tmp_path.glob("x*"))


def test_the_cache_can_be_read_by_others(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert(self_contained=True)

    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert len(kept) > 8
    assert {path.stat().st_mode & 0o777 for path in kept if ".locks" not in str(path)} == {0o644}


def test_a_mirror_may_name_a_plain_checksum(hub: Server, convert: Convert) -> None:
    digest = hashlib.sha1((DATA / "eagle3" / "config.json").read_bytes()).hexdigest()
    hub.faults = [Fault(f"{HEAD}/resolve", methods=("HEAD",), headers={"ETag": f'"{digest}"'}, times=2)]

    assert convert().algorithm == "eagle3"


def test_a_slow_look_does_not_hold_up_what_lies_here(
    hub: Server, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators.sources.hub.LOOK", 0.3)
    shutil.copytree(DATA / "eagle3", tmp_path / "org" / "here")
    hub.faults = [Fault("/api/models/org/here", stall=0)]
    start = time.monotonic()

    convert("org/here", VERIFIER)

    assert time.monotonic() - start < 5


def test_a_wrong_option_is_said_before_anything_is_fetched(hub: Server, convert: Convert) -> None:
    for wrong in ({"dtype": "int3"}, {"algorithm": "nothing"}, {"algorithm": "eagle3", "layernorms": True}):
        with pytest.raises(SpeculatorsError, match=r"int3|nothing|layernorms"):
            convert(**wrong)
    assert not hub.requests
    with pytest.raises(SpeculatorsError, match="the device 'nowhere' cannot be used"):
        convert(validate=True, validate_device="nowhere")
    assert not hub.asked("pytorch_model.bin")


def test_a_token_reaches_the_hub_and_nobody_else(hub: Server, convert: Convert, tmp_path: Path) -> None:
    hub.add("org/private", DATA / "eagle3", private=True)
    hub.tokens[TOKEN] = {"org/private"}

    convert("org/private", token=TOKEN)

    said = {
        (request.origin, request.authorization) for request in hub.requests if "agent-harnesses" not in request.path
    }
    assert said == {("hub", f"Bearer {TOKEN}"), ("storage", None)}
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in everything
    assert SIGNATURE.encode() not in everything


@pytest.mark.parametrize("how", ["variable", "login"])
def test_a_token_may_come_from_the_variable_or_a_login(
    how: str, hub: Server, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/private", DATA / "eagle3", private=True)
    hub.tokens[TOKEN] = {"org/private"}
    if how == "variable":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        from huggingface_hub import constants

        token = Path(constants.HF_TOKEN_PATH)
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(TOKEN)
    try:
        assert convert("org/private").algorithm == "eagle3"
    finally:
        if how == "login":
            token.unlink()


@pytest.mark.parametrize(
    ("model", "token", "message"),
    [
        ("org/nothing", None, r"has no repository org/nothing, or it is private.*without a token; there is no folder"),
        (
            "hf://org/nothing",
            None,
            r"has no repository org/nothing, .*without a token; check the name, or pass a token",
        ),
        ("org/private", None, r"has no repository org/private, or it is private and not to be seen without a token"),
        ("org/private", "hf_other", r"has no repository org/private, or it is private .* with this token"),
        ("org/private", "hf_wrong", r"does not accept the token \(status 401\); see http://\S+/org/private"),
        (
            "org/gated",
            None,
            r"org/gated is gated: ask for access at http://\S+/org/gated, then pass a token with --token",
        ),
        ("org/gated", "hf_other", r"org/gated is gated: ask for access at http://\S+/org/gated, then pass a token"),
        (f"{HEAD}@v7", None, r"org/eagle3-head has no revision 'v7'; it has main"),
        ("org/words", None, r"org/words is no checkpoint: it has no config\.json \(found: README\.md\)"),
        ("org/config-only", None, r"org/config-only holds no weights: expected .*, found README\.md, config\.json"),
        ("org/torn", None, r"names the shard 'model-00002-of-00002\.safetensors', which is missing"),
        ("org/two", None, r"org/two holds alternative weight files \(a\.safetensors, b\.safetensors\)"),
        ("org/pointer", None, r"git-lfs|no complete safetensors file"),
    ],
)
def test_what_stands_in_the_way_is_named_in_one_line(
    model: str, token: str | None, message: str, hub: Server, convert: Convert, tmp_path: Path
) -> None:
    def repo(name: str, files: dict[str, bytes | Path], **more: bool) -> None:
        folder = tmp_path / "repos" / name
        folder.mkdir(parents=True)
        for file, data in files.items():
            (folder / file).write_bytes(data if isinstance(data, bytes) else data.read_bytes())
        hub.add(f"org/{name}", folder, **more)

    config, head = DATA / "eagle3" / "config.json", DATA / "hass-layernorms" / "model.safetensors"
    hub.add("org/private", DATA / "eagle3", private=True)
    hub.add("org/gated", DATA / "eagle3", gated=True)
    hub.tokens["hf_other"] = set()
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    repo("words", {"README.md": b"words"})
    repo("config-only", {"config.json": config, "README.md": b"words"})
    repo(
        "torn",
        {"config.json": config, "model.safetensors.index.json": index, "model-00001-of-00002.safetensors": head},
    )
    repo("two", {"config.json": config, "a.safetensors": head, "b.safetensors": head})
    repo("pointer", {"config.json": config, "model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"})

    with pytest.raises(CheckpointError, match=message) as caught:
        convert(model, token=token)

    assert "\n" not in str(caught.value)
    assert str(token) not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_gated_verifier_is_said_before_the_draft_is_fetched(hub: Server, convert: Convert) -> None:
    hub.add("org/gated", VERIFIER, gated=True)

    with pytest.raises(CheckpointError, match=r"org/gated is gated: ask for access at"):
        convert(verifier="org/gated")

    assert not hub.asked("pytorch_model.bin")


def test_offline_it_is_said_what_the_cache_has(hub: Server, convert: Convert, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"nothing of org/eagle3-head is in the cache \S+, and there is no folder"
    ):
        convert(offline=True)
    convert()

    with pytest.raises(CheckpointError, match=r"nothing of \S+@v7 is in the cache .*\(of it the cache has .*main"):
        convert(f"{HEAD}@v7", offline=True)
    with pytest.raises(
        CheckpointError,
        match=r"org/base at commit \w+: model\.safetensors is not in the cache .*\(it has config\.json\)",
    ):
        convert(offline=True, self_contained=True)
    assert "embed_tokens.weight" not in read_tensors(tmp_path / "out")  # that of the conversion before


def test_a_name_with_two_meanings_is_refused(hub: Server, convert: Convert, tmp_path: Path) -> None:
    shutil.copytree(DATA / "eagle3", tmp_path / HEAD)
    shutil.copytree(DATA / "eagle3", tmp_path / "org" / "only-here")

    with pytest.raises(
        CheckpointError, match=rf"{HEAD} is both a folder here and a repository .*write \./{HEAD} or hf"
    ):
        convert(HEAD)
    for unmistakable in (f"./{HEAD}", f"hf://{HEAD}", tmp_path / HEAD, "org/only-here", Path(HEAD)):
        assert convert(unmistakable).algorithm == "eagle3"


def test_a_name_that_the_cache_knows_has_two_meanings_offline_too(
    hub: Server, convert: Convert, tmp_path: Path
) -> None:
    convert()
    shutil.copytree(DATA / "eagle3", tmp_path / HEAD)

    with pytest.raises(CheckpointError, match="is both a folder here and a repository of the Hub"):
        convert(offline=True)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("pytorch_model.bin?", cut=100_000), id="cut in the middle"),
        pytest.param(Fault("pytorch_model.bin?", cut=0), id="cut at once"),
        pytest.param(Fault("pytorch_model.bin?", stall=200_000), id="stalled"),
        pytest.param(Fault("pytorch_model.bin?", status=503, times=3), id="unavailable"),
        pytest.param(Fault("pytorch_model.bin?", status=429, headers={"Retry-After": "0"}), id="asked to wait"),
        pytest.param(Fault("resolve", status=500), id="a broken redirect"),
        pytest.param(Fault("resolve", status=502, methods=("HEAD",)), id="broken metadata"),
        pytest.param(Fault("/api/models", status=504), id="broken listing"),
        pytest.param(Fault("config.json", cut=10), id="a cut config"),
    ],
)
def test_a_passing_fault_is_waited_out(
    fault: Fault, hub: Server, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "TIMEOUT", 0.5)
    convert(DATA / "eagle3", VERIFIER, out="local")
    hub.faults.append(Fault(**vars(fault)))

    convert()

    assert hub.faults[0].times == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_a_download_goes_on_where_the_connection_broke(hub: Server, convert: Convert, tmp_path: Path) -> None:
    size = (DATA / "eagle3" / "pytorch_model.bin").stat().st_size
    hub.faults += [Fault("pytorch_model.bin?", cut=100_000), Fault("pytorch_model.bin?", cut=200_000)]

    convert()

    ranges = [request.range for request in hub.asked("pytorch_model.bin?")]
    assert ranges == [f"bytes={start}-{size - 1}" for start in (0, 100_000, 300_000)]


def test_a_lasting_fault_is_said_and_what_arrived_is_kept(hub: Server, convert: Convert, tmp_path: Path) -> None:
    hub.faults += [Fault("pytorch_model.bin?", cut=100_000), Fault("pytorch_model.bin?", times=99, cut=0)]

    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: the connection was lost after 100000 bytes .*5 more"
    ):
        convert()
    hub.faults.clear()
    hub.requests.clear()
    convert()

    assert [str(request.range).partition("-")[0] for request in hub.asked("bin?")] == ["bytes=100000"]


def command(tmp_path: Path, out: str = "out") -> tuple[object, ...]:
    """Return the arguments of a conversion of the head of the Hub, with a cache of its own."""
    places = ("--cache-dir", tmp_path / "cache", "--output-path", tmp_path / out)
    return ("convert", HEAD, "--verifier", BASE, "--no-validate", "--self-contained", *places)


def wait_for_half(tmp_path: Path) -> None:
    """Wait until a program has stored some of the head, and waits for more."""
    blobs = tmp_path / "cache" / "models--org--eagle3-head" / "blobs"
    seen: list[int] = []

    def waits() -> bool:
        seen.append(sum(path.stat().st_size for path in blobs.glob("*.partial")))
        return seen[-1] > 100_000 and len(set(seen[-5:])) == 1

    wait_for(waits)


def test_a_killed_program_is_continued(hub: Server, convert: Convert, start: Start, tmp_path: Path) -> None:
    hub.faults.append(Fault("pytorch_model.bin?", stall=300_000))
    killed = start(*command(tmp_path))
    wait_for_half(tmp_path)
    killed.kill()
    killed.wait()
    hub.requests.clear()

    convert(DATA / "eagle3", VERIFIER, out="local")
    convert()

    (request,) = hub.asked("pytorch_model.bin?")
    assert int(str(request.range).removeprefix("bytes=").partition("-")[0]) > 100_000
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_programs_at_once_share_the_cache(hub: Server, start: Start, tmp_path: Path) -> None:
    hub.faults.append(Fault("pytorch_model.bin?", cut=200_000))
    running = [start(*command(tmp_path, f"out{number}")) for number in range(3)]

    assert [each.wait(90) for each in running] == [0, 0, 0]

    assert contents(tmp_path / "out0") == contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert sum(size for path, size in hub.sent.items() if path.endswith("pytorch_model.bin")) == 482_548


def test_without_being_told_otherwise_the_usual_cache_is_used(hub: Server, start: Start, tmp_path: Path) -> None:
    arguments = ("convert", HEAD, "--verifier", BASE, "--no-validate", "--self-contained", "--output-path")
    home = {"HF_HOME": str(tmp_path / "home")}
    assert start(*arguments, tmp_path / "out", **home).wait(90) == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} >= {"hub", "assets"}
    hub.requests.clear()

    assert start(*arguments, tmp_path / "again", HF_HUB_OFFLINE="1", **home).wait(90) == 0

    assert not hub.requests
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_another_content_than_the_hub_names_is_refused(hub: Server, convert: Convert, tmp_path: Path) -> None:
    size = (DATA / "eagle3" / "pytorch_model.bin").stat().st_size
    hub.faults.append(Fault("pytorch_model.bin?", times=99, body=b"x" * size))

    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: what arrived has another checksum than the server nam"
    ):
        convert()

    assert not list((tmp_path / "cache").rglob("*.partial"))
    hub.faults.clear()
    assert convert().algorithm == "eagle3"


def test_a_damaged_rest_of_an_earlier_run_is_replaced(hub: Server, convert: Convert, tmp_path: Path) -> None:
    hub.faults += [Fault("pytorch_model.bin?", cut=100_000), Fault("pytorch_model.bin?", times=99, cut=0)]
    with pytest.raises(CheckpointError, match="the connection was lost"):
        convert()
    (partial,) = (tmp_path / "cache").rglob("*.partial")
    partial.write_bytes(b"x" * 100_000)
    hub.faults.clear()

    assert convert().algorithm == "eagle3"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("model.safetensors?", headers={"Content-Range": "bytes 0-65535/99"}, skip=1), "4997376 became 99"),
        (Fault("model.safetensors?", headers={"Content-Range": "bytes 7-65542/4997376"}, skip=1), "sent another part"),
        (Fault("model.safetensors?", body=b"x" * 70_000, skip=1, headers={"Content-Range": None}), "sent another part"),
        (Fault("model.safetensors?", body=b"x" * 70_000, skip=1), "more bytes than it was asked for"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    fault: Fault, message: str, hub: Server, convert: Convert, tmp_path: Path
) -> None:
    hub.faults.append(Fault(**vars(fault)))

    with pytest.raises(CheckpointError, match=message):
        convert(self_contained=True)

    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    assert convert(self_contained=True).algorithm == "eagle3"


def test_a_piece_that_was_damaged_in_the_cache_is_fetched_again(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert(self_contained=True)
    for piece in (tmp_path / "cache" / ".speculators").rglob("[0-9]*-[0-9]*-*"):
        piece.write_bytes(bytes(len(piece.read_bytes())))

    convert(self_contained=True, out="again")

    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_hub_without_ranges_is_read_whole_and_that_is_said(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert(DATA / "eagle3", VERIFIER, out="local", self_contained=True)
    hub.ranges = False

    with pytest.warns(UserWarning, match=r"model\.safetensors is on a server that sends whole files only; all of 5 MB"):
        convert(self_contained=True)

    assert weights(tmp_path / "out") == weights(tmp_path / "local")


@pytest.mark.parametrize("kept", ["nothing", "the header"])
def test_a_hub_that_sent_parts_before_is_read_whole_too(
    kept: str, hub: Server, convert: Convert, tmp_path: Path
) -> None:
    convert(validate=True)
    for piece in (tmp_path / "cache" / ".speculators").rglob("[0-9]*-[0-9]*-*"):
        if kept == "nothing" or not piece.name.startswith("0-"):
            piece.unlink()
    hub.ranges = False

    with pytest.warns(UserWarning, match="sends whole files only; all of 5 MB is downloaded although less is needed"):
        convert(validate=True, out="again")

    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_password_of_the_endpoint_stands_nowhere(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("://", "://me:s3cret@"))
    reach: dict[str, Any] = {"output_path": tmp_path / "out", "cache_dir": tmp_path / "cache", "validate": False}
    with caplog.at_level("DEBUG"):
        convert_model(HEAD, verifier=BASE, **reach)
        with pytest.raises(CheckpointError) as caught:
            convert_model("org/nothing", verifier=BASE, overwrite=True, **reach)

    assert "api/models/org/nothing" in caplog.text
    assert "s3cret" not in caplog.text + "".join(traceback.format_exception(caught.value))


def test_no_signed_address_stands_in_a_log(hub: Server, convert: Convert, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        convert(self_contained=True)

    assert "/pytorch_model.bin" in caplog.text
    assert SIGNATURE not in caplog.text


def test_a_file_that_cannot_be_registered_is_said_as_it_is(hub: Server, convert: Convert) -> None:
    hub.faults.append(Fault("config.json", methods=("HEAD",), status=403, times=99, skip=1))

    with pytest.raises(CheckpointError, match="may not be read with this token"):
        convert()


@pytest.mark.parametrize("provenance", ["{}", '{"verifier": 3}', '{"verifier": {"repository": "org/base"}}'])
def test_provenance_that_says_nothing_is_no_obstacle(
    provenance: str, hub: Server, convert: Convert, tmp_path: Path
) -> None:
    convert()
    (tmp_path / "out" / "provenance.json").write_text(provenance)

    assert validate_model(tmp_path / "out", level="structure", cache_dir=tmp_path / "cache").passed


def test_what_was_converted_with_the_hubs_is_validated_with_it(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert(verifier=f"hf://{BASE}")
    shutil.copytree(VERIFIER, tmp_path / BASE)  # a folder of the same name

    assert validate_model(tmp_path / "out", level="structure", cache_dir=tmp_path / "cache").passed


def test_a_folder_whose_name_is_encoded_is_found_again(hub: Server, convert: Convert, tmp_path: Path) -> None:
    for name, folder in (("100%25 base", VERIFIER), ("100% base", DATA / "eagle3")):
        shutil.copytree(folder, tmp_path / "repo" / name)
    hub.add("org/encoded", tmp_path / "repo")

    convert(verifier="org/encoded:100%25 base")

    assert validate_model(tmp_path / "out", level="structure", cache_dir=tmp_path / "cache").passed


def test_a_folder_may_be_named_by_its_config(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert(f"{hub.url}/{HEAD}/blob/main/config.json", VERIFIER / "config.json")
    convert(out="plain", verifier=VERIFIER)

    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    assert named_verifier(tmp_path / "out") == str(VERIFIER)


def test_no_space_in_the_cache_is_said(hub: Server, convert: Convert, tmp_path: Path) -> None:
    hub.faults.append(Fault("resolve", methods=("HEAD",), times=99, headers={"X-Linked-Size": str(10**18)}))

    with pytest.raises(
        CheckpointError, match=rf"no space for {10**18} bytes in the cache \S+ .*--cache-dir or HF_HOME"
    ):
        convert()


def test_a_cache_that_cannot_be_written_is_said(hub: Server, convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match=r"the cache \S+ cannot be written: .*--cache-dir or HF_HOME"):
        convert(cache_dir=tmp_path / "file")


def test_a_converted_model_on_the_hub_is_validated_there(hub: Server, convert: Convert, tmp_path: Path) -> None:
    convert()
    hub.add("org/converted", tmp_path / "out")

    report = validate_model("org/converted", source=HEAD, cache_dir=tmp_path / "cache")

    assert report.passed
    assert [check.name for check in report.checks] == ["files", "structure", "forward", "parity"]


def test_acceptance_is_measured_with_a_verifier_of_the_hub(hub: Server, convert: Convert, tmp_path: Path) -> None:
    prompts = [list(range(1, 9)), list(range(20, 32))]

    convert()
    report = validate_model(tmp_path / "out", level="acceptance", prompts=prompts, cache_dir=tmp_path / "cache")
    convert(verifier=VERIFIER, out="local")
    local = validate_model(tmp_path / "local", level="acceptance", prompts=prompts)

    assert report.acceptance is not None
    assert report.acceptance == local.acceptance


def test_the_command_shows_one_line_and_no_secret(hub: Server, tmp_path: Path) -> None:
    hub.tokens["hf_other"] = set()
    arguments = ["convert", HEAD, "--verifier", "org/nothing", "--cache-dir", str(tmp_path / "cache")]

    result = CliRunner().invoke(cli, [*arguments, "--token", "hf_other", "--output-path", str(tmp_path / "out")])

    assert result.exit_code == 3
    assert result.output.startswith("Error: http://127.0.0.1")
    assert result.output.count("\n") == 1
    assert "hf_other" not in result.output
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_what_arrived_and_nothing_else(hub: Server, start: Start, tmp_path: Path) -> None:
    hub.faults.append(Fault("pytorch_model.bin?", stall=300_000))
    running = start(*command(tmp_path))
    wait_for_half(tmp_path)

    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]

    assert running.returncode == 130
    assert said == "Interrupted; nothing half-written is left, and what was downloaded is kept\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_the_commands_take_every_kind_of_place(hub: Server, tmp_path: Path) -> None:
    reach = ["--cache-dir", str(tmp_path / "cache"), "--output-path", str(tmp_path / "out")]
    assert CliRunner().invoke(cli, ["convert", HEAD, "--verifier", f"hf://{BASE}", *reach]).exit_code == 0
    asked = len(hub.requests)

    offline = ["validate", str(tmp_path / "out"), "--source", HEAD, "--cache-dir", str(tmp_path / "cache"), "--offline"]
    result = CliRunner().invoke(cli, offline)

    assert (result.exit_code, len(hub.requests)) == (0, asked), result.output
