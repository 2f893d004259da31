"""Whatever a checkpoint holds, its bytes arrive; whatever is damaged, one clear refusal comes of it and nothing else.

Inputs are the same in every run. ``SPECULATORS_FUZZ=10`` takes ten times as many, other ones each time.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, VERIFIER, Copy, read_tensors, write_checkpoint
from generated import TORCH, Generated, Stored, checkpoints
from hostile import changes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from speculators import SpeculatorsError, convert_model, validate_model
from speculators.errors import printable

TIMES = int(os.environ.get("SPECULATORS_FUZZ", "0"))


def examples(count: int) -> settings:
    """Take so many inputs: the same in every run, or more and other ones where that is asked for."""
    return settings(
        max_examples=count * max(TIMES, 1),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def read_output(folder: Path) -> dict[str, Stored]:
    """Read an output with the safetensors library."""
    found = {}
    names = {dtype: name for name, dtype in TORCH.items()}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            for name in file.keys():  # noqa: SIM118 - it is no dict
                tensor = file.get_tensor(name)
                data = bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())
                assert name not in found
                found[name] = Stored(names[tensor.dtype], tuple(tensor.shape), data)
    return found


@examples(100)
@given(generated=checkpoints(), shard=st.one_of(st.none(), st.integers(1, 2000)))
def test_every_tensor_arrives_bit_by_bit(generated: Generated, shard: int | None) -> None:
    with tempfile.TemporaryDirectory() as place:
        source, verifier = generated.write(Path(place))

        convert_model(
            source,
            verifier=verifier,
            algorithm=generated.algorithm,
            output_path=Path(place, "out"),
            validate=False,
            max_shard_size=shard,
        )

        assert read_output(Path(place, "out")) == generated.expected
        report = validate_model(Path(place, "out"), verifier=verifier, level="structure")
        assert report.passed, report


Change = Callable[[bytes], bytes]

HEADS = {"eagle": "eagle1-no-bias", "hass": "hass-layernorms", "eagle3": "eagle3"}


@cache
def _sound() -> Path:
    """Make sound drafts, verifier and outputs once, small enough to be damaged often."""
    place = Path(tempfile.mkdtemp(prefix="speculators-sound-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for algorithm, name in HEADS.items():
        config = json.loads((DATA / name / "config.json").read_text())
        write_checkpoint(place / algorithm, config, read_tensors(DATA / name))
        write_checkpoint(place / f"{algorithm} sharded", config, read_tensors(DATA / name), "sharded-safetensors")
        convert_model(place / algorithm, verifier=VERIFIER, output_path=place / f"{algorithm} output", validate=False)
    shutil.copytree(VERIFIER, place / "verifier", ignore=shutil.ignore_patterns("golden"))
    return place


def _damage(path: Path, change: Change) -> None:
    """Change a JSON file, or the header of a safetensors file."""
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(change(data))
        return
    (length,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + length])
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _files(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def untouched(folder: Path, *, but: str) -> Iterator[None]:
    """Allow nothing but a `SpeculatorsError` that can be printed, and no change outside a folder."""
    before, message = _files(folder), ""
    try:
        yield
    except SpeculatorsError as error:
        message = printable(str(error))
    finally:
        after = _files(folder)
        assert len(message.encode()) < 500_000
        assert {name: data for name, data in after.items() if name.partition("/")[0] != but} == before


SOURCES = (
    *((algorithm, f"{algorithm}/config.json") for algorithm in HEADS),
    *((algorithm, f"{algorithm}/config.json") for algorithm in HEADS),
    *((algorithm, f"{algorithm}/model.safetensors") for algorithm in HEADS),
    ("eagle3 sharded", "eagle3 sharded/model.safetensors.index.json"),
    ("eagle3 sharded", "eagle3 sharded/model-00001-of-00003.safetensors"),
    *((algorithm, "verifier/config.json") for algorithm in HEADS),
    ("eagle", "verifier/model.safetensors"),
)
"""What is converted, and which file of it or of its verifier is damaged."""


@examples(200)
@given(damaged=st.sampled_from(SOURCES), change=changes(), forward=st.booleans())
def test_a_damaged_source_or_verifier_is_refused_or_converts_to_something_sound(
    damaged: tuple[str, str], change: Change, forward: bool
) -> None:
    name, path = damaged
    with tempfile.TemporaryDirectory() as place:
        tmp = Path(place)
        for folder in (name, "verifier"):
            shutil.copytree(_sound() / folder, tmp / folder)
        _damage(tmp / path, change)
        with untouched(tmp, but="out"):
            convert_model(
                tmp / name,
                verifier=tmp / "verifier",
                output_path=tmp / "out",
                validate=forward,
                algorithm=name.split()[0],
            )
            report = validate_model(tmp / "out", verifier=tmp / "verifier", level="structure")
            assert report.passed, report


OUTPUT_FILES = ("config.json", "config.json", "config.json", "model.safetensors", "provenance.json")


@examples(300)
@given(
    algorithm=st.sampled_from(tuple(HEADS)),
    file=st.sampled_from(OUTPUT_FILES),
    change=changes(),
    level=st.sampled_from(("structure", "forward")),
)
def test_a_damaged_output_is_refused_or_reported(algorithm: str, file: str, change: Change, level: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        tmp = Path(place)
        shutil.copytree(_sound() / f"{algorithm} output", tmp / "output")
        if file != "provenance.json":
            (tmp / "output" / "provenance.json").unlink()
        _damage(tmp / "output" / file, change)
        with untouched(tmp, but=""):
            report = validate_model(tmp / "output", verifier=VERIFIER, level=level)
            assert len("".join(check.detail for check in report.checks)) < 10_000_000
            json.dumps(report.to_dict())
            printable(str(report)).encode()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("dtype",), "x", "dtype 'x'"),
        (("dtype",), "load", "dtype 'load'"),
        (("dtype",), "int8", "dtype 'int8'"),
        (("draft_vocab_size",), 10**12, "draft_vocab_size 1000000000000"),
        (("transformer_layer_config", "num_hidden_layers"), 10**9, "L is 1000000000, at most 1000 can be converted"),
        (("transformer_layer_config", "num_attention_heads"), 0, "num_attention_heads 0"),
        (("transformer_layer_config", "max_position_embeddings"), 10**30, "max_position_embeddings 10000000000"),
        (("transformer_layer_config", "num_aux_hidden_states"), "x", "num_aux_hidden_states is 'x'"),
        (("transformer_layer_config", "num_aux_hidden_states"), 10**9, "naux"),
        (("speculators_config", "proposal_methods", 0, "speculative_tokens"), 10**9, "speculative_tokens 1000000000"),
    ],
    ids=str,
)
def test_an_impossible_output_fails_a_check(
    place: tuple[str | int, ...], value: object, message: str, tmp_path: Path
) -> None:
    shutil.copytree(_sound() / "eagle3 output", tmp_path / "output")
    (tmp_path / "output" / "provenance.json").unlink()
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    holder = config
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    (tmp_path / "output" / "config.json").write_text(json.dumps(config))

    report = validate_model(tmp_path / "output", verifier=VERIFIER)

    assert not report.passed
    assert message in report.checks[-1].detail


@pytest.mark.parametrize(
    "config",
    [{"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 2**64}}, {"partial_rotary_factor": 2}],
    ids=str,
)
@pytest.mark.parametrize("name", ["eagle1-no-bias", "eagle3"])
def test_rotary_parameters_that_nothing_can_compute_are_refused(
    name: str, config: dict[str, object], variant: Copy, tmp_path: Path
) -> None:
    # A partial factor counts only where positions are scaled; without scaling it is left out, with a note.
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}} | config

    with pytest.raises(SpeculatorsError, match=r"the draft model cannot be run|partial_rotary_factor 2, expected"):
        convert_model(variant(name, config=scaled), verifier=VERIFIER, output_path=tmp_path / "out")

    assert not (tmp_path / "out").exists()
