"""What the suites share: the trained checkpoints, and checkpoints made on the spot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
VERIFIER = DATA / "verifier"
TRAINED = {
    "eagle1-fc-bias": "eagle",
    "eagle1-no-bias": "eagle",
    "hass-fc-bias": "eagle",
    "hass-layernorms": "hass",
    "eagle3": "eagle3",
}
"""Trained checkpoint → the algorithm that ``auto`` finds for it."""

Tensors = dict[str, torch.Tensor]
Copy = Callable[..., Path]


def read_tensors(folder: Path) -> Tensors:
    """Read all weights of a checkpoint folder with torch's and safetensors' own loaders."""
    tensors: Tensors = {}
    for file in folder.glob("*.bin"):
        tensors |= torch.load(file, weights_only=True)
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unrecorded(folder: Path) -> Path:
    """An output like another writer's, which says nothing of what it was made from."""
    for name in ("provenance.json", "native_config.json"):
        (folder / name).unlink()
    return folder


def weights(folder: Path) -> bytes:
    """Read the weight file of an output."""
    return (folder / "model.safetensors").read_bytes()


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Tensors, layout: str = "safetensors") -> Path:
    """Write a checkpoint in one of the layouts that training code leaves behind."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = [tensors]
    if layout.startswith("sharded"):
        names = sorted(tensors)
        shards = [{name: tensors[name] for name in names[start::3]} for start in range(3)]
    safe = layout.endswith("safetensors")
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}" if len(shards) > 1 else f"{stem}.{suffix}"
        weight_map |= dict.fromkeys(shard, name)
        if safe:
            save_file(shard, folder / name, {"format": "pt"})
        else:
            torch.save(shard, folder / name, _use_new_zipfile_serialization=layout != "legacy-bin")
    if len(shards) > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def variant(tmp_path: Path) -> Copy:
    """Copy a trained checkpoint with changes to its config, its tensors or its layout.

    A change whose value is ``None`` removes the config key or the tensor.
    """

    def copy(
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor | None] | None = None,
        rename: Callable[[str], str] = lambda name: name,
        layout: str = "safetensors",
        folder: str = "source",
    ) -> Path:
        changed = json.loads((DATA / name / "config.json").read_text()) | (config or {})
        content = {rename(key): value for key, value in read_tensors(DATA / name).items()} | (tensors or {})
        return write_checkpoint(
            tmp_path / folder,
            {key: value for key, value in changed.items() if value is not None},
            {key: value for key, value in content.items() if value is not None},
            layout,
        )

    return copy


@pytest.fixture
def speaking(tmp_path: Path) -> Path:
    """The verifier with a tokenizer whose ids are bytes, as those that it was trained on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path / "speaking"
    shutil.copytree(VERIFIER, folder, ignore=shutil.ignore_patterns("golden"))
    characters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
