"""Acceptance of every trained head, and of deliberate mistakes, count for count as the original code's."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import DATA, TRAINED, VERIFIER
from damaged import SPECS, registry
from golden import acceptance, counts, measured

from speculators import convert_model

pytestmark = pytest.mark.slow

UNLIKE = ("token_ids_not_shifted", "d2t_ignored")
"""Mistakes that are not measured: the first is made alike but for one token, the second is refused before it is run."""


@pytest.mark.parametrize("name", TRAINED)
def test_a_converted_head_is_accepted_as_the_original_was(name: str, tmp_path: Path) -> None:
    convert_model(DATA / name, verifier=VERIFIER, output_path=tmp_path / "out")

    assert measured(tmp_path / "out", 64) == counts(acceptance(name)["reference_64"])


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        (name, mistake)
        for name, specs in SPECS.items()
        for mistake in acceptance(name)["wrong"]
        if mistake in specs and mistake not in UNLIKE
    ],
)
def test_a_mistake_costs_what_it_cost_the_original(name: str, mistake: str, tmp_path: Path) -> None:
    spec = SPECS[name][mistake]
    plugins = registry(spec)
    convert_model(
        DATA / name,
        algorithm=spec.name,
        verifier=VERIFIER,
        output_path=tmp_path / "out",
        registry=plugins,
        validate=False,
    )
    wrong = acceptance(name)["wrong"][mistake]

    assert measured(tmp_path / "out", wrong["prompts"], plugins) == counts(wrong)
