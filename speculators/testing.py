"""Tests that a plugin inherits: `Conformance`, for pytest.

::

    from pathlib import Path
    from speculators.testing import Conformance

    DATA = Path(__file__).parent / "data"

    class TestMedusa(Conformance):
        algorithm = "medusa"
        checkpoint = DATA / "medusa"
        verifier = DATA / "verifier"
        reference = DATA / "golden.safetensors"

Each class is one native checkpoint; write one for every kind that your training code saves. Checks that a
plugin fails say what is wrong with it; ``docs/plugins/conformance.md`` lists the mistakes that they find.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest

from speculators import Registry, examples
from speculators.conformance import CHECKS, Bench, Check, NonconformanceError

__all__ = ["Conformance", "NonconformanceError", "write_example"]


def write_example(algorithm: str, folder: Path) -> tuple[Path, Path]:
    """Write the example that an installed plugin brings below ``folder``; return the draft's folder and the verifier's.

    Raises:
        PluginError: The plugin brings none, or one that its own table does not describe.
    """
    draft, verifier, _ = examples.write_example(Registry().get(algorithm).spec, folder)
    return draft, verifier


class Conformance:
    """Everything that the interface promises, as tests of one algorithm on one native checkpoint.

    Attributes:
        algorithm: Name of the algorithm; its plugin must be installed.
        checkpoint: A tiny native checkpoint; what the plugin's ``example`` describes by default.
        verifier: Its base model; the Llama for which examples are made by default.
        options: Keyword arguments of the algorithm with which it is converted.
        reference: A safetensors file with outputs of the original code, float32: ``draft_input_ids`` ``[B, T]``,
            ``verifier_hidden_states`` ``[B, T, S]`` and ``draft_logits`` ``[B, T, DV]``, or ``[B, T, K, DV]`` where
            one pass proposes ``K`` tokens; ``draft_hidden_states`` ``[B, T, H]`` and ``draft_token_ids`` if it tells
            them, and ``input_ids``, which the verifier read. Without it, nothing but the plugin's own words say what
            is right.
        optional: Source names of tensors without each of which the checkpoint is another draft, but a valid one.
        dropped: Source names of tensors that are no part of the draft, such as buffers.
    """

    algorithm: ClassVar[str]
    checkpoint: ClassVar[Path | None] = None
    verifier: ClassVar[Path | None] = None
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    reference: ClassVar[Path | None] = None
    optional: ClassVar[Collection[str]] = ()
    dropped: ClassVar[Collection[str]] = ()
    _bench: ClassVar[Bench]

    def __init_subclass__(cls, **more: Any) -> None:
        """Refuse an attribute that is misspelt, as nothing would read it.

        Raises:
            TypeError: Names it, and what is meant.
        """
        super().__init_subclass__(**more)
        known = [name for name in Conformance.__annotations__ if not name.startswith("_")]
        for name in vars(cls).keys() - set(known):
            if meant := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                raise TypeError(f"{cls.__qualname__}.{name} is nothing that the checks read; {meant[0]} is meant?")

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that are closed when dropped
    @pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
    def test_conformance(self, check: Check, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Run one check; what was converted for one is there for the next."""
        own = type(self)
        if "_bench" not in vars(own):
            own._bench = Bench(
                own.algorithm,
                tmp_path_factory.mktemp("conformance"),
                own.checkpoint,
                own.verifier,
                own.options,
                own.reference,
                own.optional,
                own.dropped,
            )
        if check.needs == "reference" and own.reference is None:
            pytest.skip("there are no reference outputs of the original code")
        check.run(own._bench)
