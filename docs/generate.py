"""Write the pages that are made from code: the algorithms' and the reference of the plugin interface.

::

    python docs/generate.py            # write them
    python docs/generate.py --check    # exit 1 naming those that are not what this would write

``docs/algorithms`` has a page for each plugin of this repository, which must be installed, and the options in their
READMEs come from the same source. ``docs/plugins/reference.md`` comes from signatures and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import speculators
from speculators import Registry, hookspecs, pages, spec
from speculators.registry import Algorithm

ROOT = Path(__file__).resolve().parents[1]

GENERATED = "<!-- Written by docs/generate.py from the code; change it there. -->\n\n"

WIDTH = 100
"""Characters of a signature on one line."""


def main(arguments: list[str] | None = None) -> int:
    """Write or compare all pages; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and exit 1 if a page is not up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout other than this one")
    given = parser.parse_args(arguments)
    made = everything(given.root)
    kept = {path for path in (given.root / "docs" / "algorithms").glob("*.md") if path not in made}
    stale = sorted(kept | {path for path, text in made.items() if not path.exists() or path.read_text() != text})
    for path in stale:
        name = path.relative_to(given.root)
        if given.check:
            sys.stderr.write(f"{name} is not what docs/generate.py writes; run it\n")
        elif path in kept:
            path.unlink()
            sys.stdout.write(f"removed {name}\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[path])
            sys.stdout.write(f"wrote {name}\n")
    return 1 if given.check and stale else 0


def everything(root: Path) -> dict[Path, str]:
    """Return path → text of every page."""
    ours = own_algorithms(root)
    folder = root / "docs" / "algorithms"
    made = {folder / f"{each.spec.name}.md": GENERATED + pages.page(each) for each in ours}
    made[folder / "README.md"] = GENERATED + algorithms_index(ours)
    made[root / "docs" / "plugins" / "reference.md"] = GENERATED + reference()
    for each in ours:
        readme = root / "plugins" / each.package / "README.md"
        table = re.compile(r"^\| option \|.*\n(?:\|.*\n)+", re.MULTILINE)
        options = pages.options_table(each.spec).replace("\\", r"\\") + "\n"
        made[readme] = table.sub(options, readme.read_text())
    return made


def own_algorithms(root: Path) -> list[Algorithm]:
    """Return the algorithms of the plugins in ``plugins``; those of others may be installed beside them."""
    folders = {path.parent.name for path in (root / "plugins").glob("*/pyproject.toml")}
    found = [each for each in Registry().algorithms if each.package in folders]
    if missing := sorted(folders - {each.package for each in found}):
        raise SystemExit(f"not installed, or broken: {', '.join(missing)}")
    return found


def algorithms_index(algorithms: Iterable[Algorithm]) -> str:
    """Return the page that leads to those of the algorithms."""
    rows = [
        f"| [{each.spec.name}]({each.spec.name}.md) | {each.spec.summary} | `{each.package}` |" for each in algorithms
    ]
    lines = ["| algorithm | converts | package |", "|---|---|---|", *rows]
    return f"# The algorithms\n\n{INDEX}\n\n" + "\n".join(lines) + "\n"


INDEX = """\
What each plugin of this repository does with the tensors of a checkpoint, its options, and what checkpoints of its
family are like. `speculators plugins page NAME` prints the same page of any installed plugin, and
`speculators convert --list-algorithms` the options of all. [The table](../plugins/table.md) explains the rows."""


# The reference. Each heading is one name; what follows comes from the object itself.

GROUPS: Mapping[str, tuple[str, ...]] = {
    "What a plugin implements": (
        "hookimpl",
        "register_converter",
        "ConverterSpec",
        "Options",
        "StatedAs",
        "SpeculatorConfig",
    ),
    "The table": ("Table", "Row", "Rename", "Keep", "Shared", "Split", "Merge", "Drop", "Refuse", "Derive"),
    "What hooks are given": ("Context", "Checkpoint", "Verifier", "match", "Matching", "Match", "Rework", "TensorInfo"),
    "What hooks return": ("Facts", "Original", "Alternative", "Example", "Vllm"),
    "Drafts made of Llama layers": ("LayeredConfig", "DecoderLayerConfig", "decoder"),
    "Torch building blocks": ("modeling",),
    "Errors": (
        "SpeculatorsError",
        "CheckpointError",
        "AlreadyConvertedError",
        "MismatchError",
        "UnavailableError",
        "AlgorithmError",
        "OptionError",
        "PluginError",
        "OutputError",
        "PublishError",
        "UploadError",
        "ExecutorError",
        "ValidationError",
    ),
    "Tests": ("testing",),
    "What users call": (
        "convert_model",
        "ConversionResult",
        "plan_conversion",
        "PlannedConversion",
        "inspect_model",
        "Inspection",
        "validate_model",
        "export_model",
        "ExportResult",
        "diff_models",
        "Difference",
        "read_jobs",
        "run_jobs",
        "Job",
        "JobOutcome",
        "BatchResult",
        "Registry",
        "__version__",
    ),
}
"""Heading → names below it."""

MET = {"Matching": "plan", "Match": "plan", "Rework": "plan", "TensorInfo": "weights"}
"""Types that hooks are given and that need no import → their module."""

MODULES = {"decoder": "decoder", "modeling": "modeling", "testing": "testing"}
"""Heading → module that is described name by name."""

PROMISED: Mapping[str, tuple[str, ...]] = {
    "Table": ("shapes", "native", "parts", "spellings"),
    "Checkpoint": ("tensors", "holds", "info", "array", "tensor", "rows", "stretch"),
    "Verifier": ("shapes", "weights", "has_tokenizer", "find"),
    "Registry": ("names", "algorithms", "broken", "get", "recognise"),
    "SpeculatorConfig": ("verifier_sizes", "positions", "read", "to_json"),
    "LayeredConfig": (),
    "ConversionResult": (),
    "Job": (),
    "BatchResult": ("count", "exit_code"),
    **dict.fromkeys(("Row", "Rename", "Shared", "Split", "Merge", "Derive"), ()),
}
"""Class → those of its methods and properties that are part of the interface; all by default."""

INTRODUCTION = """\
Everything that a plugin may import: from `speculators` the names below, from `speculators.modeling` the torch building
blocks, from `speculators.testing` the tests. What has no heading here is the core's own and may change in any version;
[publishing](publishing.md#versions-of-the-interface) says what may change here. Types that hooks are
given and that are not to be imported say so."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A heading of the reference and what stands below it; ``link`` is what docstrings may call it."""

    level: int
    name: str
    body: tuple[str, ...]
    links: tuple[str, ...] = ()


def reference() -> str:
    """Return the reference of everything that a plugin may import."""
    entries = [Entry(2, "A whole plugin", (example(),))]
    for title, names in GROUPS.items():
        entries.append(Entry(2, title, ()))
        for name in names:
            entries += described(name)
    anchors = _anchors(entries)
    lines = [f"# Reference of the plugin interface\n\n{INTRODUCTION}"]
    for entry in entries:
        code = f"`{entry.name}`" if entry.level > 2 else entry.name
        lines.append(f"{'#' * entry.level} {code}")
        lines += [_linked(part, anchors, entry.links) for part in entry.body if part]
    return "\n\n".join(lines) + "\n"


def example() -> str:
    """Return the complete plugin in the module docstring of `speculators.spec`."""
    return markdown((spec.__doc__ or "").partition("\n")[2])


def described(name: str) -> Iterator[Entry]:
    """Yield the entries of one public name."""
    if name in MODULES:
        yield from module_entries(importlib.import_module(f"speculators.{MODULES[name]}"))
        return
    if name == "register_converter":
        found: Any = hookspecs.register_converter
    elif name in MET:
        found = getattr(importlib.import_module(f"speculators.{MET[name]}"), name)
    else:
        found = getattr(speculators, name)
    yield from entries_of(name, found, 3)


def module_entries(module: Any) -> Iterator[Entry]:
    """Yield a module's own entry and those of its public names."""
    name = module.__name__.removeprefix("speculators.")
    yield Entry(3, module.__name__, (markdown(inspect.getdoc(module) or ""),), (name,))
    constants, aliases = constant_docs(module), _aliases(module)
    for member, found in vars(module).items():
        own = getattr(found, "__module__", "") == module.__name__
        exported = member in getattr(module, "__all__", ())
        if member.startswith("_") or not (own or exported or member in constants or member in aliases):
            continue
        if inspect.isclass(found) or inspect.isfunction(found):
            yield from entries_of(f"{name}.{member}", found, 4)
        elif member in constants:
            yield Entry(4, f"{name}.{member}", (markdown(constants[member]),), (member,))


def _aliases(module: Any) -> set[str]:
    """Return the names that a module gives to what others call differently."""
    body = ast.parse(inspect.getsource(module)).body
    assigned = [line for line in body if isinstance(line, ast.Assign) and isinstance(line.value, ast.Name)]
    return {target.id for line in assigned for target in line.targets if isinstance(target, ast.Name)}


def constant_docs(module: Any) -> dict[str, str]:
    """Return constant → the string below it, of those that hold rows."""
    body = ast.parse(inspect.getsource(module)).body
    docs: dict[str, str] = {}
    for line, below in itertools.pairwise(body):
        name = line.target.id if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) else ""
        if name.endswith("_ROWS") and isinstance(below, ast.Expr):
            docs[name] = str(ast.literal_eval(below.value))
    return docs


def entries_of(name: str, found: Any, level: int) -> Iterator[Entry]:
    """Yield the entry of a class, function or constant, and of a class's methods."""
    short = name.rpartition(".")[2]
    if name == "ConverterSpec":
        yield from spec_entries(found, level)
    elif inspect.isclass(found):
        if not found.__module__.startswith("speculators"):
            yield Entry(level, name, (f"`{found.__module__}.{found.__qualname__}` under another name.",), (short,))
            return
        yield Entry(level, name, (*class_body(name, found), met(name)), (short,))
        for member, method in methods(short, found):
            body = (code(signature(member, method)), markdown(_doc(method)))
            yield Entry(level + 1, f"{short}.{member}", body, (f"{short}.{member}",))
    elif callable(found) and inspect.isfunction(found):
        yield Entry(level, name, (code(signature(short, found)), markdown(_doc(found))), (short,))
    elif name == "hookimpl":
        yield Entry(level, name, ("Decorates the plugin's implementation of a hook: `@hookimpl`.",), (short,))
    else:
        yield Entry(level, name, ("The installed version, such as `1.0.0`.",), (short,))


def met(name: str) -> str:
    """Say that a type needs no import, where that is so."""
    return "Given to hooks; not to be imported." if name in MET else ""


def class_body(name: str, found: type) -> tuple[str, ...]:
    """Return how a class is made, and its docstring."""
    if issubclass(found, Exception):
        return (
            code(f"class {found.__name__}({found.__bases__[0].__name__})"),
            markdown(_doc(found)),
            f"Exit code of the command line: {found.exit_code}." if hasattr(found, "exit_code") else "",
        )
    return code(construction(found)), markdown(_doc(found)), _descriptions(found)


def construction(found: type) -> str:
    """Return the fields or arguments from which a class is made."""
    if issubclass(found, BaseModel):
        lines = [f"{key}: {annotation}{_default_of(found, key)}" for key, annotation in fields(found).items()]
        return _class(found, lines)
    if dataclasses.is_dataclass(found):
        annotations = fields(found)
        lines = []
        for each in dataclasses.fields(found):
            default = each.default
            if each.default_factory is not dataclasses.MISSING:
                default = each.default_factory()
            said = "" if default is dataclasses.MISSING else f" = {_value(default)}"
            lines.append(f"{each.name}: {annotations[each.name]}{said}")
        return _wrapped(found.__name__, lines, "")
    if "__init__" in vars(found):
        return signature(found.__name__, found.__init__, self=False).removeprefix("def ").removesuffix(" -> None")
    return _class(found, [f"{key}: {said}{_assigned(found, key)}" for key, said in fields(found).items()])


def _class(found: type, lines: list[str]) -> str:
    bases = ", ".join(base.__name__ for base in found.__bases__ if base is not object)
    head = f"class {found.__name__}{f'({bases})' if bases else ''}"
    return "\n".join([f"{head}:", *(f"    {line}" for line in lines)]) if lines else head


def fields(found: type) -> dict[str, str]:
    """Return field → annotation as it is written, the base class's first."""
    annotations: dict[str, str] = {}
    for each in reversed(found.__mro__):
        if each.__module__.startswith("speculators"):
            annotations |= {key: str(said) for key, said in inspect.get_annotations(each).items()}
    return {key: said for key, said in annotations.items() if not key.startswith("_") and key != "model_config"}


def _assigned(found: type, name: str) -> str:
    return f" = {_value(getattr(found, name))}" if hasattr(found, name) else ""


def _default_of(found: type[BaseModel], name: str) -> str:
    field = found.model_fields[name]
    return "" if field.is_required() else f" = {_value(field.get_default(call_default_factory=True))}"


def _descriptions(found: type) -> str:
    if not issubclass(found, BaseModel):
        return ""
    said = [(name, field.description) for name, field in found.model_fields.items() if field.description]
    own = [(name, text) for name, text in said if name in inspect.get_annotations(found)]
    return "\n".join(f"- `{name}`: {text}" for name, text in own)


def methods(name: str, found: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines itself, as far as they are promised."""
    for member, defined in vars(found).items():
        is_method = inspect.isfunction(defined) or isinstance(defined, property | classmethod)
        is_method = is_method or type(defined).__name__ == "cached_property"
        if is_method and not member.startswith("_") and member in PROMISED.get(name, (member,)):
            yield member, defined


def spec_entries(found: type[spec.ConverterSpec], level: int) -> Iterator[Entry]:
    """Yield the entries of `ConverterSpec`: itself, each member, each hook."""
    intro, explained = _without_attributes(_doc(found))
    annotations = inspect.get_annotations(found)
    hooks = dict(methods("ConverterSpec", found))
    rows = ["| member | required | default |", "|---|---|---|"]
    for name in annotations:
        required = not hasattr(found, name)
        rows.append(f"| `{name}` | {'yes | ' if required else f'no | `{_value(getattr(found, name))}`'} |")
    for name in hooks:
        required = name in found.__abstractmethods__
        rows.append(f"| `{name}()` | {'yes | ' if required else 'no | see there'} |")
    yield Entry(
        level,
        "ConverterSpec",
        (code("class ConverterSpec(ABC, Generic[Config])"), markdown(intro), "\n".join(rows)),
        ("ConverterSpec",),
    )
    for name, annotation in annotations.items():
        default = f"Default: `{_value(getattr(found, name))}`." if hasattr(found, name) else "Required."
        body = (code(f"{name}: {annotation}"), markdown(explained[name]), default)
        yield Entry(level + 1, f"ConverterSpec.{name}", body, (f"ConverterSpec.{name}",))
    for name, hook in hooks.items():
        needed = "Required." if name in found.__abstractmethods__ else "Optional."
        body = (code(signature(name, hook)), needed, markdown(_doc(hook)))
        yield Entry(level + 1, f"ConverterSpec.{name}", body, (f"ConverterSpec.{name}", name))


def _without_attributes(text: str) -> tuple[str, dict[str, str]]:
    """Take the section of attributes out of a docstring."""
    before, _, section = text.partition("\nAttributes:\n")
    return before, dict(_items(section.splitlines()))


# Signatures.


class _Plain:
    """A text whose ``repr`` is the text, so that annotations are shown without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(name: str, found: Any, *, self: bool = True) -> str:
    """Return how something is called, as it is written: ``def name(arguments) -> result``, or a property's type."""
    if isinstance(found, property) or type(found).__name__ == "cached_property":
        getter: Any = found.fget if isinstance(found, property) else found.func
        return f"{name}: {inspect.signature(getter).return_annotation}  # a property"
    function = found.__func__ if isinstance(found, classmethod) else found
    read = inspect.signature(function)
    parameters = [str(_plainly(each)) for each in read.parameters.values()]
    if not self:
        del parameters[0]
    kinds = [each.kind for each in read.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY) - (not self), "*")
    result = "" if read.return_annotation is read.empty else f" -> {read.return_annotation}"
    return ("@classmethod\n" if isinstance(found, classmethod) else "") + _wrapped(f"def {name}", parameters, result)


def _plainly(parameter: inspect.Parameter) -> inspect.Parameter:
    annotation, default = parameter.annotation, parameter.default
    if annotation is not parameter.empty:
        annotation = _Plain(str(annotation))
    if default is not parameter.empty:
        default = _Plain(_value(default))
    return parameter.replace(annotation=annotation, default=default)


def _value(value: Any) -> str:
    """Write a default so that it reads like code and is the same everywhere."""
    if inspect.isclass(value) or inspect.isfunction(value):
        return str(value.__name__)
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value).replace("'", '"')


def _wrapped(name: str, parameters: list[str], result: str) -> str:
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {each}," for each in parameters), f"){result}"])


def code(text: str) -> str:
    """Return text as a block of Python."""
    return f"```python\n{text}\n```"


# Docstrings.

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Warns):$")


def markdown(text: str) -> str:
    """Turn a docstring in Google style into Markdown; names in single backticks are linked later."""
    return "\n\n".join(_blocks(inspect.cleandoc(text).splitlines()))


def _blocks(lines: list[str]) -> Iterator[str]:
    while lines:
        if not lines[0].strip():
            lines = lines[1:]
            continue
        count = next((number for number, line in enumerate(lines) if not line.strip()), len(lines))
        block, rest = lines[:count], lines[count:]
        if SECTION.match(block[0]):
            indented = _indented(lines[1:])
            yield _section(block[0][:-1], lines[1 : 1 + indented])
            lines = lines[1 + indented :]
        elif block[0].startswith("==="):
            yield _table(block)
            lines = rest
        elif block[-1].endswith("::"):
            said = "\n".join(block)[:-1]
            if said.strip(":\n"):
                yield said
            indented = _indented(rest)
            yield _literal(rest[:indented])
            lines = rest[indented:]
        elif len(block) > 1 and block[1].startswith("    ") and not block[0].startswith(" "):
            yield "\n".join(f"- {term}: {said}" for term, said in _definitions(block))
            lines = rest
        else:
            yield "\n".join(block)
            lines = rest


def _indented(lines: list[str]) -> int:
    """Count the lines at the beginning that are indented or empty."""
    return next((number for number, line in enumerate(lines) if line.strip() and line[0] != " "), len(lines))


def _section(title: str, lines: list[str]) -> str:
    text = textwrap.dedent("\n".join(lines)).strip("\n")
    if title in ("Returns", "Yields"):
        return f"{title}: {' '.join(text.split())}"
    items = [f"- {_term(name, title)}: {said}" for name, said in _items(text.splitlines())]
    return "\n".join([f"{'Arguments' if title == 'Args' else title}:", "", *items])


def _term(name: str, title: str) -> str:
    return f"`{name}`" if title == "Raises" else f"``{name}``"


def _items(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of the entries of a section."""
    name, said = "", ""
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if line.strip() and not line.startswith(" "):
            if name:
                yield name, " ".join(said.split())
            name, _, said = line.partition(": ")
            name = name.rstrip(":")
        else:
            said += f" {line}"
    if name:
        yield name, " ".join(said.split())


def _definitions(block: list[str]) -> Iterator[tuple[str, str]]:
    term, said = "", ""
    for line in block:
        if line.startswith(" "):
            said += f" {line}"
            continue
        if term:
            yield term, " ".join(said.split())
        term, said = line, ""
    yield term, " ".join(said.split())


def _table(block: list[str]) -> str:
    width = len(block[0].split()[0])
    rows = [(line[:width].strip(), line[width:].strip()) for line in block if not line.startswith("===")]
    return "\n".join(["| name | meaning |", "|---|---|", *(f"| {name} | {said} |" for name, said in rows)])


def _literal(lines: list[str]) -> str:
    text = textwrap.dedent("\n".join(lines)).strip("\n")
    if text.startswith("["):
        return f"```toml\n{text}\n```"
    return code(re.sub(r"^((?!@).+)\n+(?=class |def |@)", r"\1\n\n\n", text, flags=re.MULTILINE))  # as ruff has it


NAME = re.compile(r"(```.*?```)|``(.+?)``|(?<!`)`([^`\n]+)`(?!`)", re.DOTALL)


def _linked(text: str, anchors: Mapping[str, str], own: tuple[str, ...]) -> str:
    """Turn literals into Markdown's, and names that have a heading into links to it."""

    def replaced(found: re.Match[str]) -> str:
        block, literal, name = found.groups()
        if block or literal:
            return block or f"`{literal}`"
        target = anchors.get(name) or anchors.get(name.removeprefix("speculators."))
        return f"[`{name}`](#{target})" if target and name not in own else f"`{name}`"

    return NAME.sub(replaced, text)


def _anchors(entries: Iterable[Entry]) -> dict[str, str]:
    """Return name → anchor of its heading, as GitHub makes them."""
    used: dict[str, int] = {}
    found: dict[str, str] = {}
    for entry in entries:
        anchor = re.sub(r"[^\w\- ]", "", entry.name.lower()).replace(" ", "-")
        count = used.get(anchor, 0)
        used[anchor] = count + 1
        for link in entry.links:
            found.setdefault(link, f"{anchor}-{count}" if count else anchor)
    return found


def _doc(found: Any) -> str:
    return inspect.getdoc(found) or ""


if __name__ == "__main__":
    raise SystemExit(main())
