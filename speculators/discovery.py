"""What the metadata of installed packages says about plugins; none is imported.

`importlib.metadata.entry_points` ends with an exception as soon as one package, whosever it is, has damaged
metadata. Here each line that is wrong is a finding about that line alone.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError

from speculators.errors import described
from speculators.hookspecs import GROUP

UNKNOWN = "?"
"""Stands for what no metadata tells."""


@dataclass(frozen=True)
class Installed:
    """A plugin as its package announces it.

    Attributes:
        name: Its entry point's name, which is the algorithm's.
        package: The distribution that brings it.
        version: Of that distribution.
        value: Its entry point's value: the module that implements the hooks.
        folder: Where the distribution is installed; empty when that is not known.
        damage: What is wrong with the announcement; empty when nothing is.
    """

    name: str
    package: str
    version: str
    value: str
    folder: str = ""
    damage: str = ""

    @property
    def origin(self) -> str:
        """Package and version."""
        return f"{self.package} {self.version}"


def installed() -> Iterator[Installed]:
    """Yield the plugins of all installed packages; of two copies of a package the one that Python imports."""
    seen = set()
    for distribution in importlib.metadata.distributions():
        lines = list(_lines(distribution))
        if not lines:
            continue
        package, version, damage = _identity(distribution)
        key = re.sub(r"[-_.]+", "-", package).lower()
        if package != UNKNOWN and (key in seen or _is_hidden(distribution, package)):
            continue
        seen.add(key)
        for name, value, wrong in lines:
            yield Installed(name, package, version, value, _folder(distribution), wrong or damage)


def announced(entry_point: EntryPoint) -> Installed:
    """Describe an entry point that somebody else has found."""
    name, value, distribution = entry_point.name, entry_point.value, entry_point.dist
    wrong = _wrong(f"{name} = {value}", value)
    if distribution is None:
        return Installed(name, value, UNKNOWN, value, damage=wrong)
    package, version, damage = _identity(distribution)
    return Installed(name, package, version, value, _folder(distribution), wrong or damage)


def unreadable() -> Iterator[str]:
    """Yield what to do about each package that keeps Python from finding entry points, those of pydantic among them."""
    for distribution in importlib.metadata.distributions():
        try:
            list(distribution.entry_points)
        except Exception as error:  # noqa: BLE001 - it depends on the damage
            package, version, _ = _identity(distribution)
            yield (
                f"entry_points.txt of the package {package} {version} in {_folder(distribution)} is damaged "
                f"({described(error)}), so that others cannot be imported; install that package again or remove it"
            )


def _lines(distribution: Distribution) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and what is wrong, of each entry point in our group."""
    group = ""
    for line in map(str.strip, _text(distribution).splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line.strip("[]").strip()
        elif group == GROUP and line and not line.startswith("#"):
            name, _, value = map(str.strip, line.partition("="))
            yield name, value, _wrong(line, value)


def _wrong(line: str, value: str) -> str:
    fits = EntryPoint.pattern.match(value) and not value.startswith(".")
    return "" if fits else f"entry_points.txt has the line {line!r}, expected 'name = module'"


def _text(distribution: Distribution) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as error:
        return error.object.decode(errors="replace")
    except OSError:  # nobody can tell what it holds
        return ""


def _identity(distribution: Distribution) -> tuple[str, str, str]:
    """Return name and version of a package, and what is wrong when its metadata do not tell them."""
    try:
        metadata = distribution.metadata
        package, version = ((metadata.get_all(key) or [""])[0].strip() for key in ("Name", "Version"))
    except Exception:  # noqa: BLE001 - what a missing or damaged file leads to differs between Python's versions
        package = version = ""
    if package and version:
        return package, version, ""
    damage = "its package has no METADATA that tells name and version; install it again"
    return package or UNKNOWN, version or UNKNOWN, damage


def _is_hidden(distribution: Distribution, package: str) -> bool:
    try:
        return _folder(importlib.metadata.distribution(package)) != _folder(distribution)
    except PackageNotFoundError:  # its folder is not named after it
        return False


def _folder(distribution: Distribution) -> str:
    return str(distribution.locate_file(""))
