"""Hold plugins to the interface: the types of their members, and what their hooks return.

A hook that raises or returns something else would end a conversion far from its cause. Between the core and
every spec stands a `guarded` proxy, so that the first thing that is wrong is told with the plugin's name.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Set
from functools import partial
from numbers import Integral
from pathlib import Path
from reprlib import Repr
from types import UnionType
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from speculators import deprecation
from speculators.checkpoint import FORMATS
from speculators.config import SpeculatorConfig
from speculators.errors import PluginError, SpeculatorsError, described
from speculators.plan import Facts
from speculators.spec import Alternative, ConverterSpec, Example, Options, Original, Vllm
from speculators.table import Table

if TYPE_CHECKING:
    from torch import nn

PASSING = (SpeculatorsError, KeyboardInterrupt, MemoryError)
"""What a hook may raise: refusals of its own, and what is no plugin's fault."""

MEMBERS: dict[str, tuple[type | UnionType, str]] = {
    "name": (str, "a string"),
    "aliases": (tuple, "a tuple of names"),
    "summary": (str, "a string"),
    "reference": (str, "a string"),
    "quirks": (tuple, "a tuple of sentences"),
    "table": (Table, "a Table"),
    "embedding": (str, "a string"),
    "copies_embedding": (bool, "True or False"),
    "head": (str, "a string"),
    "buffers": (tuple, "a tuple of names"),
    "nested": (tuple, "a tuple of names"),
    "draft_to_target": (str, "a string"),
    "vllm": (Vllm | None, "a Vllm or None"),
}
"""Member of a spec → its type, and how that is called."""

SCHEMAS: dict[str, type[BaseModel]] = {"options": Options, "config": SpeculatorConfig}
"""Member of a spec → the class that it must be a subclass of."""


class HookError(PluginError):
    """A hook failed, or returned something that it must not; ``what`` says which and how."""

    def __init__(self, origin: str, what: str) -> None:
        self.what = what
        super().__init__(f"the plugin {origin} does not keep to the interface: {what}; report this to its authors")


def shown(found: object) -> str:
    """Write something that a plugin made, short and on one line, whatever it is."""
    writer = Repr()
    writer.maxother = writer.maxstring = 120
    return " ".join(writer.repr(found).split())


def check_members(spec: ConverterSpec) -> None:
    """Compare the members of a spec with what they must be.

    Raises:
        PluginError: Names the first that is something else.
    """
    owner = type(spec).__qualname__
    for member, (kind, expected) in MEMBERS.items():
        found = getattr(spec, member)
        if not isinstance(found, kind) or (kind is tuple and not _all(str, found)):
            raise PluginError(f"{owner}.{member} is {shown(found)}, expected {expected}")
    for member, base in SCHEMAS.items():
        found = getattr(spec, member)
        if not inspect.isclass(found) or not issubclass(found, base):
            raise PluginError(f"{owner}.{member} is no subclass of {base.__name__}")
        try:
            found.model_rebuild()
            if member == "options":
                found.model_json_schema()  # which --list-algorithms shows
        except Exception as error:
            raise PluginError(f"{owner}.{member} has no schema: {described(error)}") from error
    for member, replacement in deprecation.MEMBERS.items():
        if users := [each for each in own_classes(spec) if member in vars(each)]:
            deprecation.warn(f"{owner}.{member}", replacement, users[0])
    for hook in HOOKS:
        if not callable(found := getattr(spec, hook)):
            raise PluginError(f"{owner}.{hook} is {shown(found)}, expected a method")


def own_classes(spec: ConverterSpec) -> list[type]:
    """List the classes of a spec that are a plugin's, nearest first."""
    return [each for each in type(unguarded(spec)).__mro__ if not issubclass(ConverterSpec, each)]


def guarded(spec: ConverterSpec, origin: str) -> ConverterSpec:
    """Return ``spec`` with hooks that raise `PluginError` in place of anything unexpected.

    Args:
        spec: What a plugin brings.
        origin: Package and version of the plugin, for messages.
    """
    return cast("ConverterSpec", _Guarded(spec, origin))


STATED = ("vocab_size", "target_hidden_size")
"""Sizes of the verifier that a config may state."""


def stated(spec: ConverterSpec, config: SpeculatorConfig) -> tuple[dict[str, int], int | None]:
    """Return what a config says of its verifier's sizes, and of the draft's positions; both may be a plugin's code.

    Raises:
        HookError: They are something else.
    """
    origin = cast("_Guarded", spec)._origin if isinstance(spec, _Guarded) else type(spec).__module__
    owner = type(config).__qualname__
    try:
        sizes, positions = config.verifier_sizes, config.positions
    except Exception as error:
        raise HookError(origin, f"{owner} raised {described(error)}") from error
    if not isinstance(sizes, dict) or not {*STATED}.issuperset(sizes) or not _all(Integral, sizes.values()):
        raise HookError(origin, f"{owner}.verifier_sizes is {shown(sizes)}, expected whole numbers for {STATED}")
    if positions is not None and (type(positions) is not int or positions < 1):
        raise HookError(origin, f"{owner}.positions is {shown(positions)}, expected a positive whole number or None")
    return sizes, positions


def unguarded(spec: ConverterSpec) -> ConverterSpec:
    """Return what the plugin brought, to look at its class."""
    return cast("_Guarded", spec)._spec if isinstance(spec, _Guarded) else spec


class _Guarded:
    def __init__(self, spec: ConverterSpec, origin: str) -> None:
        self._spec = spec
        self._origin = origin

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self._spec, name)
        return partial(self._call, name, found) if name in HOOKS else found

    def _call(self, hook: str, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            result = method(*given, **named)
        except PASSING:
            raise
        except BaseException as error:
            if hook == "build" and isinstance(error, Exception):
                raise  # a config that a stranger wrote may be at fault, which is for the caller to say
            raise HookError(self._origin, f"{hook} raised {described(error)}") from error
        try:
            HOOKS[hook](self._spec, result)
        except PASSING:
            raise
        except _Unfit as error:
            raise HookError(self._origin, f"{hook} returned {error}") from None
        except BaseException as error:
            raise HookError(self._origin, f"what {hook} returned cannot be read: {described(error)}") from error
        return result


class _Unfit(Exception):  # noqa: N818 - never leaves this module
    """What was found, and what was expected."""


def _require(fits: bool, found: object, expected: str, place: str = "") -> None:
    if not fits:
        raise _Unfit(f"{place}{shown(found)}, expected {expected}")


def _all(kind: type, found: Any) -> bool:
    return all(isinstance(each, kind) and type(each) is not bool for each in found)


def _listed(kind: type, found: Any) -> bool:
    return isinstance(found, list | tuple) and _all(kind, found)


def _recognises(spec: ConverterSpec, found: Any) -> None:
    _require(isinstance(found, bool), found, "True or False")


def _dims(spec: ConverterSpec, found: Any, place: str = "") -> None:
    fits = isinstance(found, Mapping) and _all(str, found.keys()) and _all(Integral, found.values())
    _require(fits, found, "a mapping from symbols to whole numbers", place)


def _parts(spec: ConverterSpec, found: Any, place: str = "") -> None:
    known = {row.part for row in spec.table.moving} - {""}
    expected = f"a frozenset of parts of the table ({', '.join(sorted(known)) or 'it has none'})"
    _require(isinstance(found, Set) and known.issuperset(found), found, expected, place)


def _facts(spec: ConverterSpec, found: Any) -> None:
    _require(isinstance(found, Facts), found, "Facts")
    _dims(spec, found.dims, "Facts with dims ")
    _parts(spec, found.parts, "Facts with parts ")
    _require(_listed(str, found.notes), found.notes, "a tuple of sentences", "Facts with notes ")
    _require(_listed(str, found.findings), found.findings, "a tuple of lines", "Facts with findings ")


def _configured(spec: ConverterSpec, found: Any) -> None:
    expected = f"({spec.config.__name__}, list of sentences)"
    _require(isinstance(found, tuple) and len(found) == 2, found, expected)
    _require(isinstance(found[0], spec.config) and _listed(str, found[1]), found, expected)


def _layers(spec: ConverterSpec, found: Any, place: str = "") -> None:
    fits = isinstance(found, tuple) and bool(found) and _all(Integral, found)
    _require(fits, found, "a tuple of at least one layer's number", place)


def _inspected(spec: ConverterSpec, found: Any) -> None:
    _require(_listed(str, found), found, "a list of findings")


def _alternatives(spec: ConverterSpec, found: Any) -> None:
    _require(_listed(Alternative, found), found, "a list of Alternative")
    for each in found:
        fits = isinstance(each.option, str) and isinstance(each.config, spec.config) and _is_json(each.value)
        expected = f"an option's name, a value that JSON knows and a {spec.config.__name__}"
        _require(fits, (each.option, each.value, each.config), expected, "an Alternative with ")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _exported(spec: ConverterSpec, found: Any) -> None:
    _require(found is None or (isinstance(found, dict) and _is_json(found)), found, "a dict that JSON knows, or None")


def _original(spec: ConverterSpec, found: Any) -> None:
    _require(isinstance(found, Original), found, "an Original")
    _model(spec, found.model, "an Original with the model ")
    fits = isinstance(found.names, Mapping) and _all(str, found.names.keys()) and _all(str, found.names.values())
    _require(fits, found.names, "a mapping from parameters to source names", "an Original with names ")
    _layers(spec, found.state_layers, "an Original with state_layers ")
    _require(isinstance(found.embedding, str), found.embedding, "a source name", "an Original with the embedding ")
    _require(isinstance(found.head, str), found.head, "a source name", "an Original with the head ")
    _targets(spec, found.targets, "an Original with targets ")


def _model(spec: ConverterSpec, found: Any, place: str = "") -> None:
    from torch import nn

    _require(isinstance(found, nn.Module), found, "a torch module", place)
    lacking = [member for member, there in _offers(found).items() if not there]
    expected = "a torch module with combine, forward and state_size"
    _require(not lacking, type(found), f"{expected}, and it lacks {', '.join(lacking)}", place)
    if wrong := _wrong_offers(found):
        raise _Unfit(f"{place}{shown(type(found))} {wrong}")


def _offers(model: nn.Module) -> dict[str, bool]:
    from torch import nn

    return {
        "combine": callable(getattr(model, "combine", None)),
        "forward": getattr(model.forward, "__func__", None) is not nn.Module.forward,
        "state_size": isinstance(getattr(model, "state_size", None), int),
    }


def _wrong_offers(model: nn.Module) -> str:
    for name in ("draft_tokens", "most_tokens"):
        count = getattr(model, name, 1)
        if type(count) is not int or count < 1:
            return f"with {name} {shown(count)}, expected a positive whole number"
    for name in ("embed", "logits"):
        if not callable(getattr(model, name, len)):
            return f"with {name} that cannot be called"
    return ""


def _example(spec: ConverterSpec, found: Any) -> None:
    if found is None:
        return
    _require(isinstance(found, Example), found, "an Example or None")
    _dims(spec, found.dims, "an Example with dims ")
    _parts(spec, found.parts, "an Example with parts ")
    fits = isinstance(found.config, Mapping) and _is_json(dict(found.config))
    _require(fits, found.config, "what JSON knows", "an Example with the config ")
    arrays = isinstance(found.tensors, Mapping) and all(map(_is_array, found.tensors.values()))
    _require(arrays and _all(str, found.tensors), found.tensors, "names and arrays", "an Example with tensors ")
    fits = isinstance(found.file, str) and Path(found.file).name == found.file and Path(found.file).suffix in FORMATS
    _require(fits, found.file, f"a name that ends in {', '.join(FORMATS)}", "an Example with the file ")
    fits = isinstance(found.optional, Set) and _all(str, found.optional)
    _require(fits, found.optional, "a frozenset of names", "an Example with optional ")


def _is_array(found: object) -> bool:
    import numpy as np

    return isinstance(found, np.ndarray)


def _targets(spec: ConverterSpec, found: Any, place: str = "") -> None:
    if found is not None:
        import numpy as np

        fits = isinstance(found, np.ndarray) and found.ndim == 1 and found.dtype.kind in "iu"
        _require(fits, found, "None or a one-dimensional array of whole numbers", place)


HOOKS: dict[str, Callable[[ConverterSpec, Any], None]] = {
    "recognises": _recognises,
    "examine": _facts,
    "configure": _configured,
    "dims": _dims,
    "parts": _parts,
    "state_layers": _layers,
    "inspect": _inspected,
    "alternatives": _alternatives,
    "export_config": _exported,
    "original": _original,
    "targets": _targets,
    "build": _model,
    "example": _example,
}
"""Hook → the check of its result."""
