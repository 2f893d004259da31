"""What an output in the speculators format says about itself: who reads it, and for which verifier it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speculators import provenance
from speculators.checkpoint import Checkpoint
from speculators.config import MODEL_TYPE_KEY
from speculators.errors import CheckpointError
from speculators.sources import HubLocation, LocalLocation, parse
from speculators.sources.locations import COMMIT


def algorithm_of(converted: Checkpoint) -> str:
    """Return the name of the algorithm that reads an output.

    Raises:
        CheckpointError: It is none, or names none.
    """
    if MODEL_TYPE_KEY not in converted.config:
        raise CheckpointError(f"{converted.name} is not in the speculators format; convert it first")
    block = block_of(converted.config)
    if not isinstance(block.get("algorithm"), str):
        raise CheckpointError(f"the config of {converted.name} names no speculators_config.algorithm")
    return str(block["algorithm"])


def verifier_of(converted: Checkpoint) -> str:
    """Return the verifier that an output names, at the commit that was read where that is known.

    Raises:
        CheckpointError: It names none, or one that a stranger's config must not have read here.
    """
    named = reference_of(converted.config).get("name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"the config of {converted.name} names no verifier; pass --verifier")
    read = _provenance(converted)
    repository, _, folder = named.partition(":")
    if read.get("repository") == repository and COMMIT.fullmatch(str(read.get("commit"))):
        return f"hf://{repository}@{read['commit']}/{folder}"
    location = parse(named)
    trusted = (HubLocation,) if converted.place.local is None else (HubLocation, LocalLocation)
    if not isinstance(location, trusted):
        raise CheckpointError(
            f"the config of {converted.name} names {location.name} as its verifier; "
            "pass it with --verifier if you trust it"
        )
    return named


def block_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the block that tells how a config's draft is run; nothing where there is none."""
    block = config.get("speculators_config")
    return block if isinstance(block, Mapping) else {}


def reference_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config says of its verifier; nothing where that is missing."""
    reference = block_of(config).get("verifier")
    return reference if isinstance(reference, Mapping) else {}


def _provenance(converted: Checkpoint) -> Mapping[str, Any]:
    """Return what an output says about the verifier that it was converted with, as far as it can be read."""
    try:
        read = provenance.read_record(converted).get("verifier")
    except CheckpointError:
        return {}
    return read if isinstance(read, dict) else {}
