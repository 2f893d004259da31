"""Rotary parameters of a draft, read from either spelling and written in both.

transformers before 5 spells them ``rope_theta`` and ``rope_scaling``, later versions
``rope_parameters``; exporters of the transition write both. They are the draft's own: a draft is
often trained with another base and scaling than its verifier has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speculators.errors import CheckpointError

DEFAULT_THETA = 10000.0
"""The base that LlamaConfig and the EAGLE and HASS training code take when a config names none."""

RENAMED_TYPES = {"su": "longrope", "mrope": "default", "none": "default"}
"""Old names of scaling types; mrope's sections stay, and plain text rotates as by default."""

REQUIRED_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""Scaling type → what it cannot do without (transformers ``modeling_rope_utils.py``)."""

LISTS = ("short_factor", "long_factor", "mrope_section")
FLAGS = ("truncate", "mrope_interleaved")
"""Fields of a block that are lists or truth values; all others are numbers."""

EXTENDING_TYPES = ("yarn", "longrope", "llama3")
"""Types that scale relative to the positions of pre-training, by default ``max_position_embeddings``."""


def rope_parameters(config: Mapping[str, Any], positions: int) -> tuple[dict[str, Any], list[str]]:
    """Return the rotary parameters of a flat draft config with every field spelled out, and notes.

    Args:
        config: The draft's config, both spellings allowed.
        positions: The draft's own ``max_position_embeddings``, to which scaling types refer that
            name no ``original_max_position_embeddings``.

    Raises:
        CheckpointError: A spelling holds something else than one flat object of numbers, or the two
            contradict each other.
    """
    notes: list[str] = []
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None and not _is_number(config[key]):
            raise CheckpointError(f"config.json says {key} {config[key]!r}, expected a finite number")
    legacy, modern = _block(config, "rope_scaling"), _block(config, "rope_parameters")
    if config.get("rope_theta") is not None:
        legacy["rope_theta"] = config["rope_theta"]
    for key in sorted(legacy.keys() & modern.keys()):
        if legacy[key] != modern[key]:
            raise CheckpointError(
                f"config.json says {key} {legacy[key]!r} in the old spelling and {modern[key]!r} in rope_parameters; "
                "remove the one that the draft was not trained with"
            )
    merged = {"rope_type": "default"} | legacy | modern
    if merged.get("rope_theta") is None:
        merged["rope_theta"] = DEFAULT_THETA
        notes.append("config.json names no rope_theta: 10000, the default of the training code, is written")
    if config.get("partial_rotary_factor") is not None:
        merged.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    notes += _drop_idle_factor(merged)
    if merged["rope_type"] in EXTENDING_TYPES:
        original = config.get("original_max_position_embeddings") or positions
        if not merged.get("original_max_position_embeddings"):
            merged["original_max_position_embeddings"] = original
        if merged.get("factor") is None and merged["rope_type"] != "llama3":
            merged["factor"] = positions / merged["original_max_position_embeddings"]
    _check(merged)
    return merged, notes


def _check(parameters: Mapping[str, Any]) -> None:
    """Refuse a type that nobody knows or that lacks what it needs, and heads that are rotated more than whole."""
    kind = parameters["rope_type"]
    if kind not in REQUIRED_FIELDS:
        raise CheckpointError(f"config.json says rope_type {kind!r}, none of {', '.join(sorted(REQUIRED_FIELDS))}")
    if absent := [name for name in REQUIRED_FIELDS[kind] if parameters.get(name) is None]:
        raise CheckpointError(f"config.json says rope_type {kind!r} without {', '.join(absent)}, which it needs")
    if not 0 < (part := parameters.get("partial_rotary_factor", 1)) <= 1:
        raise CheckpointError(f"config.json says partial_rotary_factor {part!r}, expected at most 1, the whole head")


def _drop_idle_factor(parameters: dict[str, Any]) -> list[str]:
    """Remove what transformers' Llama layers ignore without scaling and vLLM does not; returns notes."""
    if parameters["rope_type"] != "default" or parameters.get("partial_rotary_factor", 1) == 1:
        return []
    factor = parameters.pop("partial_rotary_factor")
    return [
        f"partial_rotary_factor {factor:g} is left out: without scaling, the Llama layers of the training code rotate "
        "whole heads, and engines would rotate parts of them"
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _block(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    block = config.get(key) or {}
    if not isinstance(block, Mapping) or any(isinstance(value, Mapping) for value in block.values()):
        raise CheckpointError(f"config.json says {key} {block!r}, expected one flat JSON object")
    flat = {name: value for name, value in block.items() if value is not None}
    kind = flat.pop("rope_type", flat.get("type"))
    flat.pop("type", None)
    for name, value in flat.items():
        if name in LISTS and isinstance(value, list):
            continue
        if name != "rope_type" and not _is_number(value) and not (name in FLAGS and isinstance(value, bool)):
            raise CheckpointError(f"config.json says {name} {value!r} in {key}, expected a finite number")
    if kind is not None and not isinstance(kind, str):
        raise CheckpointError(f"config.json says rope_type {kind!r} in {key}, expected a name")
    return flat | ({"rope_type": RENAMED_TYPES.get(kind, kind)} if kind is not None else {})


def legacy_scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``rope_scaling`` as transformers before 5 spells ``parameters``; ``None`` without scaling."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return None if scaling == {"rope_type": "default"} else scaling


def serving_positions(parameters: Mapping[str, Any], positions: int, verifier: int | None) -> tuple[int, str]:
    """Return ``max_position_embeddings`` that lets a draft follow its verifier, and a note or ``""``.

    Heads are trained on short sequences, and an engine stops drafting past this number. It is raised
    to the verifier's unless the rotary scaling depends on it (``dynamic``).
    """
    if verifier is None or verifier <= positions:
        return positions, ""
    if parameters["rope_type"] == "dynamic":
        return positions, (
            f"max_position_embeddings stays at {positions}, as dynamic rotary scaling depends on it; "
            f"the verifier has {verifier}"
        )
    return verifier, f"max_position_embeddings is raised from {positions} to the verifier's {verifier}"
