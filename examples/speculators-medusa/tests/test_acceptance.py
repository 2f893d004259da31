"""The verifier of this repository's tests accepts what the original code proposes."""

from __future__ import annotations

import json
from pathlib import Path

from speculators import convert_model, validate_model

HEADS = Path(__file__).parent / "data" / "medusa"
VERIFIER = Path(__file__).parents[3] / "tests" / "data" / "verifier"


def test_the_verifier_accepts_as_many_tokens_as_of_the_original(tmp_path: Path) -> None:
    prompts = json.loads((VERIFIER / "golden" / "prompts.json").read_text())["prompts"][:16]
    expected = json.loads((HEADS / "golden" / "golden.json").read_text())["acceptance"]["reference_16"]

    convert_model(HEADS, verifier=VERIFIER, output_path=tmp_path / "out")
    measured = validate_model(tmp_path / "out", level="acceptance", prompts=prompts).acceptance

    assert measured is not None
    assert measured.drafts == expected["drafts"]
    assert list(measured.accepted) == expected["accepted_per_position"]
