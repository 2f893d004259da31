"""Compare a converted head with what the original code computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import DATA, VERIFIER
from safetensors.torch import load_file
from torch import Tensor

from speculators import Checkpoint, Registry, Verifier, convert_model, validate_model
from speculators.convert import prepare
from speculators.draft import Draft, of_output, of_source

TOLERANCE = 1e-4
"""Largest difference over the largest value, in float32."""


PROMPTS = json.loads((VERIFIER / "golden" / "prompts.json").read_text())["prompts"]
"""Token ids of the prompts on which acceptance was measured."""


def acceptance(name: str) -> dict[str, Any]:
    """Read what was measured with the original code: ``reference_64``, and under ``wrong`` what mistakes do."""
    found: dict[str, Any] = json.loads((DATA / name / "golden" / "golden.json").read_text())["acceptance"]
    return found


def counts(measurement: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Return drafts, and how many were accepted at each position."""
    return measurement["drafts"], measurement["accepted_per_position"]


def measured(folder: Path, prompts: int = len(PROMPTS), plugins: Registry | None = None) -> tuple[int, list[int]]:
    """Count the same with our own validation, on the first so many prompts."""
    found = validate_model(folder, level="acceptance", prompts=PROMPTS[:prompts], registry=plugins).acceptance
    assert found is not None
    return found.drafts, list(found.accepted)


def converted_draft(source: Path, folder: Path, verifier: Path = VERIFIER, **options: object) -> Draft:
    """Convert ``source`` and load the result as the validation does, in float32."""
    result = convert_model(source, verifier=verifier, output_path=folder, **options)
    spec = Registry().get(result.algorithm).spec
    converted = Checkpoint(folder)
    config = spec.config.model_validate(converted.config)
    return of_output(converted, config, spec, Verifier(verifier), dtype="float32")


def source_draft(source: Path, verifier: Path = VERIFIER, **options: object) -> Draft:
    """Load ``source`` as the validation does to compare an output with it, in float32."""
    conversion = prepare(
        Checkpoint(source),
        Verifier(verifier),
        algorithm="auto",
        dtype=None,
        registry=Registry(),
        algorithm_kwargs=options,
    )
    return of_source(conversion, dtype="float32")


def golden(name: str) -> dict[str, Tensor]:
    """Read the inputs and outputs of the original code, float32."""
    return load_file(DATA / name / "golden" / "golden.safetensors")


def difference(found: Tensor | None, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value."""
    assert found is not None
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_parity(name: str, folder: Path) -> None:
    """Assert that head and converted head compute the original code's hidden states, logits and tokens."""
    expected = golden(name)
    for draft in (converted_draft(DATA / name, folder), source_draft(DATA / name)):
        hidden, logits = draft.run(expected["draft_input_ids"], expected["verifier_hidden_states"])

        assert logits is not None
        assert difference(hidden, expected["draft_hidden_states"]) < TOLERANCE
        assert difference(logits, expected["draft_logits"]) < TOLERANCE
        tokens = [[draft.target_id(token) for token in row] for row in logits.argmax(-1).tolist()]
        assert tokens == expected["draft_token_ids"].tolist()
