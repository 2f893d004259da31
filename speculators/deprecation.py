"""What was replaced in the plugin interface, and by what.

Whatever is listed here still works, and warns whoever uses it, until the number of the interface rises.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Replacement:
    """What takes the place of something, and since which version of speculators."""

    instead: str
    since: str


MEMBERS: dict[str, Replacement] = {}
"""Member of a spec → what takes its place."""

NAMES: dict[str, Replacement] = {}
"""Public name of `speculators` → the public name that takes its place."""


def warn(what: str, replacement: Replacement, *, stacklevel: int = 2) -> None:
    """Tell the author of a plugin what to use in place of something.

    Warns:
        DeprecationWarning: Names both.
    """
    warnings.warn(
        f"{what} is deprecated since speculators {replacement.since}; use {replacement.instead}",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
