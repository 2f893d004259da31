"""EAGLE v1 and v2 keep to the interface."""

from __future__ import annotations

from checkpoints import DATA, VERIFIER

from speculators.testing import Conformance


class TestFusionBias(Conformance):
    algorithm = "eagle"
    checkpoint = DATA / "eagle1-fc-bias"
    verifier = VERIFIER
    reference = DATA / "eagle1-fc-bias" / "golden" / "golden.safetensors"
    optional = ("fc.bias",)


class TestNoBias(Conformance):
    algorithm = "eagle"
    checkpoint = DATA / "eagle1-no-bias"
    verifier = VERIFIER
    reference = DATA / "eagle1-no-bias" / "golden" / "golden.safetensors"


class TestExample(Conformance):
    algorithm = "eagle"
