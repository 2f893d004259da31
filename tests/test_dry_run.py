"""A dry run says what a conversion does, fails where it fails, and writes nothing."""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, TRAINED, VERIFIER, Copy, read_tensors, write_checkpoint
from click.testing import CliRunner, Result
from installing import Install
from loopback import Server
from test_operations import GATED, layouts

from speculators import OutputError, PlannedConversion, PluginError, ValidationError, convert_model, plan_conversion
from speculators.cli import cli
from speculators.cli.convert import FATES
from speculators.output import check_writable


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where no conversion lies at the default path."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything under a folder with when it was changed and what it holds."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


def options(planned: PlannedConversion) -> dict[str, tuple[Any, str]]:
    return {option.name: (option.value, option.origin) for option in planned.options}


CHOICES: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16", "max_shard_size": "150KB"},
    {"self_contained": True, "speculative_tokens": 2, "use_verifier_embed_tokens": True},
]


@pytest.mark.parametrize("more", CHOICES, ids=["plain", "cast and sharded", "self-contained"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_conversion_does_what_was_planned(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"verifier": VERIFIER, "output_path": tmp_path / "deep" / "out", **more}

    planned = plan_conversion(DATA / name, **arguments)
    assert not any(tmp_path.iterdir())
    done = convert_model(DATA / name, validate_level="structure", **arguments)

    assert planned.renamed == done.renamed
    assert planned.reworked == done.reworked
    assert planned.dropped == done.dropped
    assert planned.completed == done.completed
    assert (planned.notes, planned.serving, planned.algorithm) == (done.notes, done.serving, done.algorithm)
    assert planned.validation == done.validation
    assert planned.config == (done.output_path / "config.json").read_text()
    sizes = {
        path.name: path.stat().st_size
        for path in done.output_path.iterdir()
        if path.name not in ("provenance.json", "README.md")
    }
    assert {file.name: file.bytes for file in planned.files} == sizes


@pytest.mark.parametrize("name", TRAINED)
def test_every_tensor_has_a_fate_with_what_is_written(name: str, tmp_path: Path) -> None:
    from speculators import Checkpoint

    arguments: dict[str, Any] = {"verifier": VERIFIER, "output_path": tmp_path / "out", "dtype": "float16"}
    planned = plan_conversion(DATA / name, **arguments)
    done = convert_model(DATA / name, validate=False, **arguments)

    source, written = Checkpoint(DATA / name).tensors, Checkpoint(done.output_path).tensors
    told = {tensor.target: (tensor.dtype, tensor.shape, tensor.bytes) for tensor in planned.tensors if tensor.dtype}
    assert told == {name: (info.dtype, info.shape, info.nbytes) for name, info in written.items()}
    assert {name for tensor in planned.tensors for name in tensor.sources} == set(source)
    assert {tensor.fate for tensor in planned.tensors} <= set(FATES)
    assert all(tensor.stored == source[tensor.sources[0]].dtype for tensor in planned.tensors if tensor.stored)


@pytest.mark.parametrize("stored", layouts())
def test_what_is_cut_joined_and_made_is_told(stored: str, install: Install, tmp_path: Path) -> None:
    registry = install("gated", GATED)
    tensors = {name: value.clone() for name, value in layouts()[stored].items()}
    source = write_checkpoint(tmp_path / "source", {}, tensors, "bin")
    arguments: dict[str, Any] = {"verifier": VERIFIER, "algorithm": "gated", "registry": registry}

    planned = plan_conversion(source, **arguments)
    done = convert_model(source, output_path=tmp_path / "out", validate=False, **arguments)

    assert (planned.renamed, planned.reworked, planned.completed) == (done.renamed, done.reworked, done.completed)
    expected: dict[str, dict[tuple[str, ...], set[str]]] = {
        "apart": {"renamed": {("toy.weight",): {"linear.weight"}}},
        "fused": {"cut": {("fused.weight",): {"linear.weight", "gate.weight"}}},
        "in pieces": {"joined": {("upper.weight", "lower.weight"): {"linear.weight"}}},
        "without what can be made": {"made": {("gate.weight",): {"scale"}}},
    }
    found: dict[str, dict[tuple[str, ...], set[str]]] = {}
    for tensor in planned.tensors:
        assert tensor.target is not None
        found.setdefault(tensor.fate, {}).setdefault(tensor.sources, set()).add(tensor.target)
    assert found.items() >= expected[stored].items()


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ('return "F32", [b', 'raise ValueError("no ones")\n    return "F32", [b', PluginError, "ValueError: no ones"),
        ("// 2)] * 2", "// 2)]", PluginError, "made 256 bytes for 'scale', expected 512"),
        (
            "def build(self, config):",
            "def inspect(self, converted, config):\n"
            "        return [f\"sum {converted.array('scale').sum()}, {converted.tensors['linear.weight']}\"]\n\n"
            "    def build(self, config):",
            ValidationError,
            "sum 128.0, F32 [128, 256]",
        ),
    ],
    ids=["fails", "makes too little", "finds something wrong"],
)
def test_a_plugin_that_fails_late_fails_the_plan(
    old: str, new: str, error: type[Exception], message: str, install: Install, tmp_path: Path
) -> None:
    assert old in GATED
    registry = install("gated", GATED.replace(old, new))
    source = write_checkpoint(tmp_path / "source", {}, layouts()["without what can be made"])
    said = []
    for function in (plan_conversion, convert_model):
        with pytest.raises(error, match=re.escape(message)) as raised:
            function(source, verifier=VERIFIER, algorithm="gated", registry=registry, output_path=tmp_path / "out")
        said.append(str(raised.value))

    assert said[0] == said[1]
    assert not (tmp_path / "out").exists()


def test_where_each_value_comes_from(variant: Copy) -> None:
    def planned(name: str, config: dict[str, Any] | None = None, folder: str = "source", **more: Any) -> Any:
        return options(plan_conversion(variant(name, config=config, folder=folder), verifier=VERIFIER, **more))

    plain = planned("eagle3")
    assert plain == {
        "algorithm": ("eagle3", "detected"),
        "dtype": ("float16", "native config"),
        "eagle_aux_hidden_state_layer_ids": (None, "default"),
        "fc_norm": (False, "detected"),
        "norm_before_fc": (False, "detected"),
        "norm_before_residual": (False, "default"),
        "norm_output": (False, "default"),
        "rope_theta": (10000.0, "default"),
        "speculative_tokens": (3, "default"),
        "use_verifier_embed_tokens": (False, "default"),
    }
    nested = {"norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 5]}
    said = planned("eagle3", {"eagle_config": nested, "norm_output": False}, "nested")
    assert said["norm_before_residual"] == (True, "native config")
    assert said["eagle_aux_hidden_state_layer_ids"] == ([1, 3, 5], "native config")
    assert said["norm_output"] == (False, "native config")
    empty = planned("eagle3", {"eagle_aux_hidden_state_layer_ids": []}, "empty")
    assert empty["eagle_aux_hidden_state_layer_ids"] == (None, "default")
    given = {"norm_output": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 5], "speculative_tokens": 3}
    asked = planned("eagle3", {"eagle_aux_hidden_state_layer_ids": []}, "asked", algorithm="eagle3", **given)
    assert {name: asked[name] for name in given} == {name: (value, "kwarg") for name, value in given.items()}
    assert asked["algorithm"] == ("eagle3", "kwarg")
    left = planned("eagle3", None, "left", norm_output=None, use_verifier_embed_tokens=False)
    assert (left["norm_output"], left["use_verifier_embed_tokens"]) == ((False, "default"), (False, "kwarg"))


def test_where_the_base_and_what_tensors_show_come_from(variant: Copy) -> None:
    def planned(name: str, config: dict[str, Any], folder: str, **more: Any) -> Any:
        return options(plan_conversion(variant(name, config=config, folder=folder), verifier=VERIFIER, **more))

    modern = planned("eagle1-no-bias", {"rope_parameters": {"rope_theta": 5e5}, "torch_dtype": None}, "modern")
    assert modern["rope_theta"] == (5e5, "native config")
    assert modern["dtype"] == ("bfloat16", "detected")
    assert modern["fusion_bias"] == (False, "detected")
    assert planned("eagle3", {"rope_theta": 1e4}, "top")["rope_theta"] == (1e4, "native config")
    assert planned("eagle3", {"rope_theta": 1e4}, "over", rope_theta=2e4)["rope_theta"] == (2e4, "kwarg")
    # What nobody reads there says nothing, even where it says the same.
    unread = {"speculative_tokens": 3, "use_verifier_embed_tokens": True, "layernorms": False}
    hass = planned("hass-layernorms", unread, "unread", dtype="float32")
    assert hass["layernorms"] == (True, "detected")
    assert hass["speculative_tokens"] == (3, "default")
    assert hass["use_verifier_embed_tokens"] == (False, "default")
    assert hass["dtype"] == ("float32", "kwarg")


def broken(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = next(folder.glob("*.bin"))
        file.write_bytes(change(file.read_bytes()))

    return damage


def flipped(data: bytes) -> bytes:
    """One bit of a tensor changed, of which a checksum alone tells."""
    place = data.index(b"/data/0") + 200
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


FAILING: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "option": (["--algorithm-kwargs", '{"typo": 1}'], {}, 2),
    "contradicting option": (["--algorithm-kwargs", '{"fc_norm": true}'], {}, 3),
    "dtype": (["--dtype", "float17"], {}, 2),
    "shard size": (["--max-shard-size", "many"], {}, 2),
    "device": (["--validate-device", "cuba"], {}, 2),
    "level": (["--validate-level", "all"], {}, 2),
    "algorithm": (["--algorithm", "eagle4"], {}, 3),
    "wrong algorithm": (["--algorithm", "hass"], {}, 3),
    "a flag said twice": ([], {"config": {"norm_output": True, "eagle_config": {"norm_output": False}}}, 3),
    "a missing tensor": ([], {"tensors": {"norm.weight": None}}, 3),
    "an unknown tensor": ([], {"tensors": {"mystery.weight": torch.ones(2)}}, 3),
    "a value too large to cast": (
        ["--dtype", "float16"],
        {"tensors": {"norm.weight": torch.full((128,), 1e30, dtype=torch.float32)}},
        3,
    ),
    "damage": ([], {"layout": "bin", "damage": broken(flipped)}, 3),
    "maps that disagree": ([], {"tensors": {"t2d": torch.ones(256, dtype=torch.bool)}}, 3),
}


@pytest.mark.parametrize("case", FAILING)
def test_it_fails_where_the_conversion_fails(case: str, variant: Copy, tmp_path: Path) -> None:
    more, changes, code = FAILING[case]
    damage = changes.get("damage", lambda folder: None)
    source = variant("eagle3", **{key: value for key, value in changes.items() if key != "damage"})
    damage(source)
    before = tree(tmp_path)
    command = ["convert", source, "--verifier", VERIFIER, "--output-path", tmp_path / "out", *more]

    planned = run(*command, "--dry-run")
    assert tree(tmp_path) == before
    done = run(*command, "--no-validate" if case not in ("device", "level") else "--quiet")

    assert (planned.exit_code, planned.output) == (done.exit_code, done.output)
    assert planned.exit_code == code


def occupied(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "out"


def below_a_lost_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link" / "out"


def in_the_way(folder: Path) -> Path:
    (folder / ".out.speculators").write_text("")
    return folder / "out"


def left_by_a_dead_run(folder: Path) -> Path:
    """The previous output was moved aside, and is put back first: it would be replaced."""
    old = folder / ".out.speculators" / "old"
    old.mkdir(parents=True)
    (old / "config.json").write_text('{"speculators_model_type": "eagle3"}')
    return folder / "out"


PLACES: list[tuple[Callable[[Path], Path], list[str]]] = [
    (occupied, []),
    (occupied, ["--overwrite"]),
    (below_a_file, []),
    (below_a_lost_link, []),
    (in_the_way, []),
    (left_by_a_dead_run, []),
    (lambda folder: folder / "new" / ("x" * 300) / "out", []),
]


@pytest.mark.parametrize(("place", "more"), PLACES)
def test_a_place_that_cannot_be_written_is_refused_alike(
    place: Callable[[Path], Path], more: list[str], tmp_path: Path
) -> None:
    target = place(tmp_path)
    before = tree(tmp_path)
    command = ["convert", DATA / "eagle3", "--verifier", VERIFIER, "--output-path", target, *more]

    planned = run(*command, "--dry-run")
    assert tree(tmp_path) == before
    done = run(*command, "--no-validate")

    assert done.exit_code == planned.exit_code == 5
    assert planned.output.startswith("Error: ")


def test_a_folder_that_may_not_be_written_is_refused() -> None:
    folder, is_root = Path(tempfile.mkdtemp()), os.geteuid() == 0
    folder.chmod(0o555)
    os.seteuid(65534 if is_root else os.geteuid())  # nobody
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            check_writable(folder / "new" / "out", overwrite=False)
    finally:
        os.seteuid(0 if is_root else os.geteuid())
        folder.rmdir()


def test_an_output_that_may_be_replaced_stays_as_it_is(tmp_path: Path) -> None:
    for file in convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out").output_path.iterdir():
        os.utime(file, (1, 1))
    before = tree(tmp_path)
    command = ["convert", DATA / "eagle1-no-bias", "--verifier", VERIFIER, "--output-path", tmp_path / "out"]

    assert run(*command, "--dry-run").exit_code == 5
    assert run(*command, "--dry-run", "--overwrite").exit_code == 0
    assert tree(tmp_path) == before


def test_acceptance_needs_a_verifier_with_weights(tmp_path: Path) -> None:
    (tmp_path / "verifier").mkdir()
    (tmp_path / "verifier" / "config.json").write_bytes((VERIFIER / "config.json").read_bytes())
    command = ["convert", DATA / "eagle3", "--verifier", tmp_path / "verifier", "--output-path", tmp_path / "out"]

    assert run(*command, "--dry-run").exit_code == 0
    refused = run(*command, "--dry-run", "--validate-level", "acceptance")

    assert refused.exit_code == 3
    assert refused.output == run(*command, "--validate-level", "acceptance").output
    assert run(*command, "--dry-run", "--validate-level", "acceptance", "--no-validate").exit_code == 0


def test_a_remote_source_is_planned_like_a_local_one(server: Server, tmp_path: Path) -> None:
    server.add("org/head", DATA / "eagle3")
    remote = plan_conversion("org/head", verifier=VERIFIER, cache_dir=tmp_path / "cache")
    local = plan_conversion(DATA / "eagle3", verifier=VERIFIER)

    assert (remote.tensors, remote.config) == (local.tensors, local.config)


def test_its_arguments_are_those_of_the_conversion() -> None:
    planned, done = inspect.signature(plan_conversion), inspect.signature(convert_model)

    assert planned.parameters == done.parameters


def test_what_is_printed(tmp_path: Path, variant: Copy) -> None:
    source = variant("eagle3", tensors={"t2d": None, "embed_tokens.weight": torch.zeros(256, 128)})
    more = ["--algorithm-kwargs", '{"use_verifier_embed_tokens": true}', "--dtype", "bfloat16"]
    command = ["convert", source, "--verifier", VERIFIER, "--output-path", tmp_path / "out", *more]

    result = run(*command, "--dry-run")

    assert result.exit_code == 0
    shown = result.output.splitlines()
    assert shown[0] == f"Would convert {source} with eagle3 (speculators-eagle3 1.0.0)"
    assert shown[1:4] == ["options:", '    algorithm  "eagle3"  detected', '    dtype  "bfloat16"  kwarg']
    assert "    midlayer.hidden_norm.weight -> layers.0.hidden_norm.weight  F16->BF16  [128]  256 B" in shown
    assert "    fc.weight  F16->BF16  [128, 384]  98.3 kB" in shown
    assert "    d2t -> t2d  BOOL  [256]  256 B  made from d2t" in shown
    assert "    embed_tokens.weight  the verifier's embed_tokens is used" in shown
    assert "    embed_tokens.weight  F32  [256, 128]  the verifier's embed_tokens was asked for" in shown
    assert shown[-1] == f"Nothing was written. {tmp_path / 'out'} would hold 15 tensors in 480.3 kB"
    document = json.loads(run(*command, "--dry-run", "--json").output)
    assert document["schema"] == "speculators.plan/1"
    assert "\n".join(shown[shown.index("config.json:") + 1 : -1]) == json.dumps(
        document["config"], indent=2, sort_keys=True
    )
    assert document["tensors"][0] == {
        "fate": "kept",
        "sources": ["d2t"],
        "target": "d2t",
        "shape": [64],
        "stored": "I64",
        "dtype": "I64",
        "bytes": 512,
        "why": "",
    }


def test_values_that_are_no_numbers_are_seen(variant: Copy) -> None:
    weight = read_tensors(DATA / "eagle3")["fc.weight"].clone()
    weight[3, 5] = float("nan")
    source = variant("eagle3", tensors={"fc.weight": weight})

    for convert in (plan_conversion, convert_model):
        with pytest.raises(ValidationError, match=r"fc\.weight holds 1 values that are NaN or infinite"):
            convert(source, verifier=VERIFIER, output_path="out")
