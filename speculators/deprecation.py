"""What was replaced in the plugin interface, and by what.

Whatever is listed here still works, and warns whoever uses it, until the number of the interface rises.
"""

from __future__ import annotations

import sys
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


def warn(what: str, replacement: Replacement, user: type | None = None) -> None:
    """Tell the author of a plugin what to use in place of something.

    Args:
        what: What was used.
        replacement: What to use.
        user: The class that used it; whoever called the caller by default.

    Warns:
        DeprecationWarning: Names both.
    """
    message = f"{what} is deprecated since speculators {replacement.since}; use {replacement.instead}"
    if user is None:
        warnings.warn(message, DeprecationWarning, stacklevel=3)
        return
    file = getattr(sys.modules.get(user.__module__), "__file__", None) or user.__module__
    warnings.warn_explicit(message, DeprecationWarning, file, 1, module=user.__module__)
