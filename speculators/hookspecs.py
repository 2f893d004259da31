"""Every hook that a plugin can implement. Start reading here.

A plugin is a Python distribution with an entry point in the group ``speculators``. The entry
point's name is the algorithm's name, its value a module that implements the hooks below::

    [project.entry-points.speculators]
    toy = "speculators_toy"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from speculators.spec import ConverterSpec

GROUP = "speculators"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def register_converter() -> type[ConverterSpec]:  # type: ignore[empty-body]
    """Return the class that converts one algorithm's checkpoints; a plugin decorates its own with `hookimpl`.

    Called once, when the algorithm is first needed. The class is refused when a member is missing or of
    another type than `ConverterSpec` says, when its ``name`` is not the entry point's, or when it was written
    for another version of the interface.

    Returns:
        A subclass of `ConverterSpec` that can be made without arguments; the class, no instance.

    Raises:
        Exception: Whatever it raises, and whatever importing the module raises, makes the plugin a broken one, which
            disturbs no other.
    """
