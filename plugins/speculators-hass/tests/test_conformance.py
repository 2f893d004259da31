"""HASS keeps to the interface."""

from __future__ import annotations

from checkpoints import DATA, VERIFIER

from speculators.testing import Conformance


class TestLayernorms(Conformance):
    algorithm = "hass"
    checkpoint = DATA / "hass-layernorms"
    verifier = VERIFIER
    reference = DATA / "hass-layernorms" / "golden" / "golden.safetensors"
    optional = ("fc.bias",)


class TestExample(Conformance):
    algorithm = "hass"
