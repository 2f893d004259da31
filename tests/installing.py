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
Announce = Callable[..., None]


def announce(
    site: Path,
    name: str,
    source: str,
    *,
    package: str = "",
    version: str = "0.3.0",
    metadata: str | bytes | None = "Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
    entry_points: str | bytes = "[speculators]\n{name} = {module}\n",
) -> str:
    """Write a plugin's module and its ``.dist-info``, whose files may be damaged; return the module's name."""
    package = package or f"speculators-{name}"
    module = package.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    for file, content in (("METADATA", metadata), ("entry_points.txt", entry_points)):
        if isinstance(content, str):
            filled = content.format(name=name, package=package, version=version, module=module)
            (info / file).write_text(filled)
        elif content is not None:
            (info / file).write_bytes(content)
    return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from before all others."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install plugin packages side by side and return a registry that sees them alone."""

    def add(name: str, source: str, package: str = "", version: str = "0.3.0") -> Registry:
        module = announce(site, name, source, package=package, version=version)
        monkeypatch.delitem(sys.modules, module, raising=False)
        found = [entry for each in distributions(path=[str(site)]) for entry in each.entry_points]
        return Registry(EntryPoints(found))

    return add


@pytest.fixture
def beside_ours(site: Path, monkeypatch: pytest.MonkeyPatch) -> Announce:
    """Install plugin packages beside those of this environment, where every registry and every command sees them."""

    def add(name: str, source: str, **more: str | bytes | None) -> None:
        module = announce(site, name, source, **more)  # type: ignore[arg-type] # a test names files alone
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add
