"""Find installed algorithms and load each when it is first needed."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pluggy

from speculators import hookspecs
from speculators.errors import AlgorithmError, CheckpointError, PluginError

if TYPE_CHECKING:
    from speculators.checkpoint import Checkpoint
    from speculators.spec import ConverterSpec

MEMBERS = ("interface", "name", "summary", "reference", "table", "config")
"""Attributes that a spec must set itself."""


@dataclass(frozen=True)
class Algorithm:
    """An installed algorithm and the distribution that brings it."""

    spec: ConverterSpec
    package: str
    version: str


@dataclass(frozen=True)
class BrokenPlugin:
    """An installed plugin that cannot be used, and why."""

    name: str
    package: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.package} {self.version}): {self.reason}"


class Registry:
    """The algorithms that installed plugins bring.

    Args:
        entry_points: Where to look; all installed distributions by default. A test hands in its own.
    """

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        found = importlib.metadata.entry_points(group=hookspecs.GROUP) if entry_points is None else entry_points
        self._entry_points: dict[str, dict[str, EntryPoint]] = {}
        for entry_point in found:
            package, _ = _origin(entry_point)
            self._entry_points.setdefault(entry_point.name, {})[package] = entry_point
        self._loaded: dict[str, Algorithm | BrokenPlugin] = {}

    @property
    def names(self) -> list[str]:
        """Names of all installed algorithms, sorted, healthy or not; imports no plugin."""
        return sorted(self._entry_points)

    @cached_property
    def algorithms(self) -> list[Algorithm]:
        """All healthy algorithms, sorted by name; imports every plugin."""
        return [loaded for loaded in map(self._load, self.names) if isinstance(loaded, Algorithm)]

    @cached_property
    def broken(self) -> list[BrokenPlugin]:
        """All plugins that cannot be used, sorted by name; imports every plugin."""
        return [loaded for loaded in map(self._load, self.names) if isinstance(loaded, BrokenPlugin)]

    def get(self, name: str) -> Algorithm:
        """Return the algorithm called ``name``, or known by that alias.

        Raises:
            AlgorithmError: No installed algorithm has the name; lists those that are.
            PluginError: The plugin that has the name is broken, or two have it.
        """
        if name in self._entry_points:
            loaded = self._load(name)
            if isinstance(loaded, BrokenPlugin):
                raise PluginError(f"the plugin of algorithm {loaded}")
            return loaded
        known = [algorithm for algorithm in self.algorithms if name in algorithm.spec.aliases]
        if len(known) > 1:
            claims = " and ".join(f"{one.spec.name} ({one.package} {one.version})" for one in known)
            raise PluginError(f"{name!r} is an alias of {claims}; name one of them")
        if not known:
            broken = f"; broken: {'; '.join(map(str, self.broken))}" if self.broken else ""
            raise AlgorithmError(f"no algorithm {name!r} is installed; {self.describe_installed()}{broken}")
        return known[0]

    def recognise(self, source: Checkpoint) -> Algorithm:
        """Return the one algorithm that recognises ``source``.

        Raises:
            AlgorithmError: None or several do; lists them.
        """
        matching = []
        for algorithm in self.algorithms:
            try:
                if algorithm.spec.recognises(source):
                    matching.append(algorithm)
            except (CheckpointError, OSError):
                raise
            except Exception as error:
                raise PluginError(
                    f"the plugin {algorithm.package} {algorithm.version} failed to look at {source.name}: "
                    f"{type(error).__name__}: {error}; name the algorithm with --algorithm"
                ) from error
        if len(matching) == 1:
            return matching[0]
        if matching:
            names = ", ".join(algorithm.spec.name for algorithm in matching)
            raise AlgorithmError(f"{source.name} could be any of {names}; choose one with --algorithm")
        sample = ", ".join(list(source.tensors)[:4])
        broken = f" (not asked, as they are broken: {'; '.join(map(str, self.broken))})" if self.broken else ""
        raise AlgorithmError(
            f"no installed algorithm recognises {source.name} with its {len(source.tensors)} tensors "
            f"({sample}, …); {self.describe_installed()}{broken}"
        )

    def describe_installed(self) -> str:
        """Say what is installed, or what to install when nothing is."""
        if self.names:
            return f"installed: {', '.join(self.names)}"
        return f"no algorithm is installed; to have one or all of them: pip install {' '.join(known_packages())}"

    def _load(self, name: str) -> Algorithm | BrokenPlugin:
        if name not in self._loaded:
            claims = self._entry_points[name]
            package, entry_point = next(iter(claims.items()))
            version = _origin(entry_point)[1]
            try:
                if len(claims) > 1:
                    owners = " and ".join(f"{other} {_origin(claim)[1]}" for other, claim in sorted(claims.items()))
                    raise PluginError(f"{owners} both bring an algorithm of this name; uninstall one")
                self._loaded[name] = Algorithm(_load_spec(entry_point)(), package, version)
            except PluginError as error:
                self._loaded[name] = BrokenPlugin(name, package, version, str(error))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin raises must not take the others down
                self._loaded[name] = BrokenPlugin(name, package, version, f"{type(error).__name__}: {error}")
        return self._loaded[name]


def known_packages() -> list[str]:
    """Name the plugin packages that the core's own metadata recommends (its extra ``all``), sorted."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, importlib.metadata.requires("speculators") or [])
    return sorted(each.name for each in requirements if each.marker and "extra" in str(each.marker))


def _origin(entry_point: EntryPoint) -> tuple[str, str]:
    distribution = entry_point.dist
    return (distribution.name, distribution.version) if distribution else (entry_point.value, "?")


def _load_spec(entry_point: EntryPoint) -> type[ConverterSpec]:
    from speculators.config import SpeculatorConfig
    from speculators.spec import INTERFACE, ConverterSpec, Options, Vllm

    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(entry_point.load(), name=entry_point.name)
    manager.check_pending()
    specs = manager.hook.register_converter()
    if len(specs) != 1 or not inspect.isclass(specs[0]) or not issubclass(specs[0], ConverterSpec):
        raise PluginError(f"{entry_point.value} does not return one ConverterSpec class from register_converter")
    spec = specs[0]
    missing = [member for member in MEMBERS if not hasattr(spec, member)] + sorted(spec.__abstractmethods__)
    if missing:
        raise PluginError(f"{spec.__qualname__} lacks {', '.join(missing)}")
    if spec.interface != INTERFACE:
        raise PluginError(
            f"written for plugin interface {spec.interface!r}, this is {INTERFACE}; upgrade the older one"
        )
    for member, base in (("options", Options), ("config", SpeculatorConfig)):
        if not inspect.isclass(getattr(spec, member)) or not issubclass(getattr(spec, member), base):
            raise PluginError(f"{spec.__qualname__}.{member} is no subclass of {base.__name__}")
    if not isinstance(spec.aliases, tuple):
        raise PluginError(f"{spec.__qualname__}.aliases is {spec.aliases!r}, expected a tuple of names")
    if not isinstance(spec.vllm, Vllm | None):
        raise PluginError(f"{spec.__qualname__}.vllm is {spec.vllm!r}, expected a Vllm or None")
    if spec.name != entry_point.name:
        raise PluginError(f"its entry point is named {entry_point.name!r}, its spec {spec.name!r}")
    return spec
