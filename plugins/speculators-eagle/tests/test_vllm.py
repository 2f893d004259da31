"""What vLLM is taught, as far as it shows without vLLM; the real one is in the serving suite."""

from __future__ import annotations

import json
import logging
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, VERIFIER

from speculators import convert_model
from speculators_eagle.vllm import describe, register


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (entry_point,) = entry_points(group="vllm.general_plugins", name="speculators_eagle")

    assert entry_point.load() is register


def test_without_vllm_it_says_so_and_raises_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING):
        register()

    assert "cannot teach vLLM (not installed)" in caplog.text


@pytest.mark.parametrize(
    ("name", "layernorms", "fusion_bias"),
    [("eagle1-fc-bias", False, True), ("eagle1-no-bias", False, False), ("hass-layernorms", True, False)],
)
def test_the_model_is_told_what_the_head_has(name: str, layernorms: bool, fusion_bias: bool, tmp_path: Path) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out", validate=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layer = config["transformer_layer_config"]

    describe(config, layer)

    assert layer["architectures"] == ["EagleSpeculatorForCausalLM"]
    assert (layer["speculator"]["layernorms"], layer["speculator"]["fusion_bias"]) == (layernorms, fusion_bias)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layernorms": None}, "layernorms None: Input should be a valid boolean"),
        ({"architectures": 1}, "architectures 1"),
    ],
)
def test_a_config_that_is_none_of_the_type_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    convert_model(DATA / "eagle1-fc-bias", verifier=VERIFIER, output_path=tmp_path / "out", validate=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | changes

    with pytest.raises(ValueError, match=f"no config of a speculator of type 'eagle': {why}"):
        describe(config, config["transformer_layer_config"])


def test_vllm_is_imported_by_its_own_module_only() -> None:
    root = Path(__file__).parents[3]
    files = [file for folder in ("speculators", "plugins") for file in (root / folder).rglob("*.py")]
    importing = {
        file.parent for file in files if re.search(r"^\s*(from|import) vllm\b", file.read_text(), re.MULTILINE)
    }

    assert importing == {root / "plugins" / "speculators-eagle" / "speculators_eagle" / "vllm"}
