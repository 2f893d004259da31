"""Plugins that are installed for real: a module and its ``.dist-info`` in a folder on ``sys.path``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoints, distributions
from pathlib import Path

import pytest

from speculators import Registry

TOY = (Path(__file__).parent / "toy" / "speculators_toy" / "__init__.py").read_text()

Install = Callable[..., Registry]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install plugin packages side by side and return a registry that sees them alone."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(name: str, source: str, package: str = "", version: str = "0.3.0") -> Registry:
        package = package or f"speculators-{name}"
        module = package.replace("-", "_")
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[speculators]\n{name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)
        found = [entry for each in distributions(path=[str(site)]) for entry in each.entry_points]
        return Registry(EntryPoints(found))

    return add
