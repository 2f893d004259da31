"""Write a new plugin: a complete, tested package that converts its own example, to be changed step by step."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

import speculators
from speculators import output
from speculators.errors import OptionError
from speculators.registry import AUTO, Registry
from speculators.sources import local_path
from speculators.spec import INTERFACE

NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
"""What the algorithm of a new plugin may be called: what is also a name of a package."""

LONGEST_NAME = 30
"""Characters of a name; lines of the package are to stay readable."""

TEMPLATE = Path(__file__).with_name("template")
"""The package as it is before names are filled in."""

SUFFIX = ".tmpl"
"""What the names of template files end in, so that no tool takes them for code."""


def write(name: str, folder: Path | None = None) -> Path:
    """Write the package of a new algorithm.

    Args:
        name: The algorithm's name, as users type it.
        folder: Where to write; ``speculators-NAME`` in the working folder by default.

    Returns:
        The folder.

    Raises:
        OptionError: The name is none, or is an installed algorithm's.
        OutputError: Something stands there already, or it cannot be written.
    """
    if name == AUTO:
        raise OptionError(
            f"{name!r} asks the plugins to look at a checkpoint, and is no algorithm; choose another name"
        )
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise OptionError(
            f"{name!r} is no name for an algorithm: it takes up to {LONGEST_NAME} lower-case letters and digits, in "
            "parts joined by '-' or '_', and begins with a letter"
        )
    registry = Registry()
    alike = [each for each in registry.names if each.replace("_", "-") == name.replace("_", "-")]
    if (taken := registry.describe_owner(next(iter(alike), name))) is not None:
        raise OptionError(f"an algorithm {name!r} is installed already ({taken}); choose another name")
    cls = "".join(part.capitalize() for part in re.split("[-_]", name))
    if clash := {f"{cls}{kind}" for kind in ("Algorithm", "Config", "Draft", "Options")} & {*speculators.__all__}:
        raise OptionError(f"{name!r} would have a class {min(clash)}, which speculators has, too; choose another name")
    values = {
        "name": name,
        "package": f"speculators-{name.replace('_', '-')}",
        "module": f"speculators_{name.replace('-', '_')}",
        "type": name.replace("-", "_"),
        "cls": cls,
        "version": ".".join(speculators.__version__.split(".")[:2]),
        "interface": str(INTERFACE),
    }
    target = local_path(folder if folder is not None else values["package"])
    output.check_vacant(target)
    with output.staged(target) as place, output.writing(target):
        _fill(TEMPLATE, place, values)
    return target


def _fill(template: Path, folder: Path, values: dict[str, str]) -> None:
    for entry in sorted(template.iterdir()):
        name = {"package": values["module"], "test.py": f"test_{values['type']}.py"}.get(
            entry.name.removesuffix(SUFFIX), entry.name.removesuffix(SUFFIX)
        )
        if entry.is_dir():
            (folder / name).mkdir()
            _fill(entry, folder / name, values)
        else:
            text = Template(entry.read_text("utf-8")).substitute(values)
            (folder / name).write_text(text, "utf-8", newline="\n")
