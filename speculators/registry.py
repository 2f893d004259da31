"""Find installed algorithms and load each when it is first needed."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pluggy

from speculators import hookspecs
from speculators.discovery import Installed, announced, installed
from speculators.errors import AlgorithmError, PluginError, described

if TYPE_CHECKING:
    from speculators.checkpoint import Checkpoint
    from speculators.spec import ConverterSpec

AUTO = "auto"
"""The algorithm name that asks the installed plugins to recognise the checkpoint."""

VARIABLE = "SPECULATORS_PLUGINS"
"""The environment variable that names the plugins to load, separated by commas; all when it is not set."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What an algorithm may be called."""

MEMBERS = ("interface", "name", "summary", "reference", "table", "config")
"""Attributes that a spec must set itself."""


@dataclass(frozen=True)
class Algorithm:
    """An installed algorithm and the distribution that brings it."""

    spec: ConverterSpec
    package: str
    version: str

    @property
    def origin(self) -> str:
        """Package and version."""
        return f"{self.package} {self.version}"


@dataclass(frozen=True)
class BrokenPlugin:
    """An installed plugin that cannot be used, and why."""

    name: str
    package: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.package} {self.version}): {self.reason}"


@dataclass(frozen=True)
class Standing:
    """What an installed plugin is worth.

    Attributes:
        name: The algorithm that it announces.
        package: The distribution that brings it.
        version: Of that distribution.
        entry_point: The module that implements the hooks.
        folder: Where the distribution is installed; empty when that is not known.
        state: ``"ready"``, ``"broken"`` or ``"not loaded"``.
        aliases: Other names of the algorithm; of those that are ready alone.
        reason: Why it is not ready; empty when it is.
    """

    name: str
    package: str
    version: str
    entry_point: str
    folder: str
    state: str
    aliases: tuple[str, ...] = ()
    reason: str = ""


class Registry:
    """The algorithms that installed plugins bring, as far as the environment does not leave them out.

    Args:
        entry_points: Where to look; all installed distributions by default. A test hands in its own.
    """

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        self._claims: dict[str, list[Installed]] = {}
        for plugin in installed() if entry_points is None else map(announced, entry_points):
            self._claims.setdefault(plugin.name, []).append(plugin)
        named = os.environ.get(VARIABLE)
        self._named = None if named is None else {name.strip() for name in named.split(",")} - {""}
        self._loaded: dict[str, Algorithm | BrokenPlugin] = {}

    @property
    def names(self) -> list[str]:
        """Names of all installed algorithms but those left out, sorted, healthy or not; imports no plugin."""
        return sorted(name for name in self._claims if self._named is None or name in self._named)

    @property
    def left_out(self) -> list[str]:
        """Names of the installed algorithms that the environment leaves out, sorted; they are never imported."""
        return sorted(self._claims.keys() - self.names)

    @property
    def not_installed(self) -> list[str]:
        """Names that the environment asks for and no plugin has, sorted."""
        return sorted((self._named or set()) - self._claims.keys())

    @cached_property
    def algorithms(self) -> list[Algorithm]:
        """All healthy algorithms, sorted by name; imports every plugin."""
        return [loaded for loaded in map(self._load, self.names) if isinstance(loaded, Algorithm)]

    @cached_property
    def broken(self) -> list[BrokenPlugin]:
        """All plugins that cannot be used, sorted by name; imports every plugin."""
        return [loaded for loaded in map(self._load, self.names) if isinstance(loaded, BrokenPlugin)]

    def describe_owner(self, name: str) -> str | None:
        """Return package and version of what brings an algorithm of this name or alias; ``None`` when nothing does."""
        if name in self._claims:
            return " and ".join(claim.origin for claim in self._claims[name])
        return " and ".join(f"{each.spec.name}, {each.origin}" for each in self._known_as(name)) or None

    @property
    def contested(self) -> dict[str, list[Algorithm]]:
        """Alias → the algorithms that are known by it, where these are several; imports every plugin."""
        known: dict[str, list[Algorithm]] = {}
        for algorithm in self.algorithms:
            for alias in dict.fromkeys(algorithm.spec.aliases):
                known.setdefault(alias, []).append(algorithm)
        return {alias: claiming for alias, claiming in sorted(known.items()) if len(claiming) > 1}

    @property
    def standings(self) -> list[Standing]:
        """Everything that is installed, sorted by name; imports every plugin that is not left out."""
        return [self._standing(plugin) for name in sorted(self._claims) for plugin in self._claims[name]]

    def standing(self, name: str) -> Standing:
        """Return what the one installed plugin called ``name``, or known by that alias, is worth.

        Raises:
            AlgorithmError: None is called so.
            PluginError: Several are.
        """
        if name not in self._claims:
            name = self.get(name).spec.name
        if len(self._claims[name]) > 1:
            self.get(name)
        return self._standing(self._claims[name][0])

    def get(self, name: str) -> Algorithm:
        """Return the algorithm called ``name``, or known by that alias.

        Raises:
            AlgorithmError: No installed algorithm has the name, or the environment leaves it out; lists
                those that are there.
            PluginError: The plugin that has the name is broken, or two have it.
        """
        if name in self.left_out:
            raise AlgorithmError(
                f"{name!r} ({self._claims[name][0].origin}) is installed, but {VARIABLE} leaves it out; "
                f"add it there, or unset {VARIABLE}"
            )
        if name in self._claims:
            loaded = self._load(name)
            if isinstance(loaded, BrokenPlugin):
                raise PluginError(f"the plugin of algorithm {loaded}")
            return loaded
        if name in self.contested:
            raise PluginError(describe_contested(name, self.contested[name]))
        known = self._known_as(name)
        if not known:
            broken = f"; broken: {'; '.join(map(str, self.broken))}" if self.broken else ""
            raise AlgorithmError(f"no algorithm {name!r} is installed; {self.describe_installed()}{broken}")
        return known[0]

    def recognise(self, source: Checkpoint) -> Algorithm:
        """Return the one algorithm that recognises ``source``.

        Raises:
            AlgorithmError: None or several do; lists them.
            PluginError: A plugin failed to tell.
        """
        from speculators.guard import HookError

        matching = []
        for algorithm in self.algorithms:
            try:
                if algorithm.spec.recognises(source):
                    matching.append(algorithm)
            except HookError as error:
                raise PluginError(
                    f"the plugin {algorithm.origin} failed to look at {source.name}: "
                    f"{error.what}; name the algorithm with --algorithm"
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
        said = []
        if self.names:
            said.append(f"installed: {', '.join(self.names)}")
        elif not self.left_out:
            packages = " ".join(known_packages())
            said.append(f"no algorithm is installed; to have one or all of them: pip install {packages}")
        if self.left_out:
            said.append(f"{VARIABLE} leaves out {', '.join(self.left_out)}")
        if self.not_installed:
            said.append(self.describe_not_installed())
        return "; ".join(said)

    def describe_not_installed(self) -> str:
        """Say what the environment asks for in vain; empty when there is nothing."""
        missing = ", ".join(map(repr, self.not_installed))
        return f"{VARIABLE} names {missing}, which no installed plugin is called" if missing else ""

    def _known_as(self, alias: str) -> list[Algorithm]:
        return [algorithm for algorithm in self.algorithms if alias in algorithm.spec.aliases]

    def _load(self, name: str) -> Algorithm | BrokenPlugin:
        if name not in self._loaded:
            plugin = self._claims[name][0]
            try:
                self._loaded[name] = self._usable(plugin)
            except (KeyboardInterrupt, MemoryError, DeprecationWarning):  # the last where warnings are made errors
                raise
            except BaseException as error:  # noqa: BLE001 - whatever a plugin raises must not take the others down
                reason = str(error) if isinstance(error, PluginError) else described(error)
                self._loaded[name] = BrokenPlugin(name, plugin.package, plugin.version, reason)
        return self._loaded[name]

    def _usable(self, plugin: Installed) -> Algorithm:
        claims = self._claims[plugin.name]
        if len(claims) > 1:
            owners = " and ".join(sorted(claim.origin for claim in claims))
            raise PluginError(f"{owners} both bring an algorithm of this name; uninstall one")
        if plugin.damage:
            raise PluginError(plugin.damage)
        if wrong := _wrong_name(plugin.name):
            raise PluginError(f"its name {plugin.name!r} {wrong}; the package must give it another")
        from speculators.guard import guarded

        spec = _load_spec(plugin)
        for alias in spec.aliases:
            if wrong := _wrong_name(alias):
                raise PluginError(f"the alias {alias!r} of {plugin.name!r} {wrong}; the package must give it another")
            if alias in self._claims:
                owner = "its own name" if alias == plugin.name else f"the name of {self._claims[alias][0].origin}"
                raise PluginError(f"the alias {alias!r} of {plugin.name!r} is {owner}; the package must drop it")
        return Algorithm(guarded(spec, plugin.origin), plugin.package, plugin.version)

    def _standing(self, plugin: Installed) -> Standing:
        where = (plugin.name, plugin.package, plugin.version, plugin.value, plugin.folder)
        if plugin.name in self.left_out:
            return Standing(*where, "not loaded", reason=f"{VARIABLE} leaves it out")
        loaded = self._load(plugin.name)
        if isinstance(loaded, BrokenPlugin):
            return Standing(*where, "broken", reason=loaded.reason)
        return Standing(*where, "ready", loaded.spec.aliases)


def describe_contested(alias: str, claiming: Iterable[Algorithm]) -> str:
    """Say which algorithms share an alias, and what to do."""
    claims = " and ".join(f"{one.spec.name} ({one.origin})" for one in claiming)
    return f"{alias!r} is an alias of {claims}; name one of them"


def known_packages() -> list[str]:
    """Name the plugin packages that the core's own metadata recommends (its extra ``all``), sorted."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, importlib.metadata.requires("speculators") or [])
    return sorted(each.name for each in requirements if each.marker and each.marker.evaluate({"extra": "all"}))


def _wrong_name(name: str) -> str:
    """Say what keeps something from being a name; empty when nothing does."""
    if name == AUTO:
        return "asks the plugins to look at the checkpoint"
    return "" if PLAIN_NAME.fullmatch(name) else "is none: it takes letters, digits, '.', '_' and '-'"


def _load_spec(plugin: Installed) -> ConverterSpec:
    from speculators.guard import check_members
    from speculators.spec import INTERFACE, ConverterSpec

    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(EntryPoint(plugin.name, plugin.value, hookspecs.GROUP).load(), name=plugin.name)
    manager.check_pending()
    specs = manager.hook.register_converter()
    if len(specs) != 1 or not inspect.isclass(specs[0]) or not issubclass(specs[0], ConverterSpec):
        raise PluginError(f"{plugin.value} does not return one ConverterSpec class from register_converter")
    made = specs[0]
    missing = [member for member in MEMBERS if not hasattr(made, member)] + sorted(made.__abstractmethods__)
    if missing:
        raise PluginError(f"{made.__qualname__} lacks {', '.join(missing)}")
    if made.interface != INTERFACE:
        raise PluginError(
            f"written for plugin interface {made.interface!r}, this is {INTERFACE}; upgrade the older one"
        )
    try:
        spec: ConverterSpec = made()
    except Exception as error:
        raise PluginError(f"{made.__qualname__} cannot be made without arguments: {described(error)}") from error
    check_members(spec)
    if spec.name != plugin.name:
        raise PluginError(f"its entry point is named {plugin.name!r}, its spec {spec.name!r}")
    return spec
