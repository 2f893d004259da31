"""What a plugin is told that uses something of the interface that was replaced."""

from __future__ import annotations

import pytest
from installing import TOY, Install

import speculators
from speculators import deprecation
from speculators.deprecation import Replacement


def test_a_member_that_was_replaced_still_counts_and_warns(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deprecation.MEMBERS, "examine", Replacement("look_at", since="1.2"))
    registry = install("toy", TOY)

    with pytest.warns(DeprecationWarning, match=r"^Toy\.examine is deprecated since speculators 1\.2; use look_at$"):
        algorithm = registry.get("toy")

    assert algorithm.spec.name == "toy"


def test_a_member_that_the_plugin_leaves_as_it_is_does_not_warn(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(deprecation.MEMBERS, "state_layers", Replacement("states", since="1.2"))

    assert install("toy", TOY).get("toy").spec.name == "toy"


def test_a_public_name_that_was_replaced_is_still_there_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deprecation.NAMES, "Same", Replacement("speculators.Keep", since="1.2"))

    with pytest.warns(
        DeprecationWarning, match="speculators.Same is deprecated since speculators 1.2; use speculators.Keep"
    ):
        found = speculators.Same

    assert found is speculators.Keep
    with pytest.raises(AttributeError, match="has no attribute 'Never'"):
        _ = speculators.Never
