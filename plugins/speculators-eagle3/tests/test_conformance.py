"""EAGLE-3 keeps to the interface."""

from __future__ import annotations

from checkpoints import DATA, VERIFIER

from speculators.testing import Conformance


class TestTrained(Conformance):
    algorithm = "eagle3"
    checkpoint = DATA / "eagle3"
    verifier = VERIFIER
    reference = DATA / "eagle3" / "golden" / "golden.safetensors"
    optional = ("d2t", "t2d")  # either is made from the other


class TestExample(Conformance):
    algorithm = "eagle3"
