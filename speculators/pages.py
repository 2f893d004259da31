"""The page of an algorithm: what becomes of its tensors, its options, its quirks, and how it is served.

Everything comes from the plugin's `ConverterSpec`, so every installed plugin has one, and none says anything else
than what is done. ``docs/algorithms`` holds those of the plugins in this repository.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from speculators.dtypes import FLOATS
from speculators.guard import unguarded
from speculators.table import Drop, Merge, Refuse, Rename, Row, Shared, Split, Table, symbols

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from speculators.registry import Algorithm
    from speculators.spec import ConverterSpec

LAYER_SYMBOLS = frozenset({"heads", "kv_heads", "head_dim"})
"""What the shapes of a table name whose rows come from `speculators.decoder`."""

_MEANING = re.compile(r"^ *``(\w+)``  +(\S.*)$|^ *(\w+): (\S.*)$", re.MULTILINE)
_PLACE = re.compile(r"\{(\w+):(\w+)\}")


@dataclass(frozen=True)
class Option:
    """One keyword argument of an algorithm, as users are told of it.

    Attributes:
        name: What it is called.
        type: Its type in the words of JSON, with the values that are allowed.
        required: Whether it must be given.
        default: Its default, in types that JSON knows.
        description: What it does.
    """

    name: str
    type: str
    required: bool
    default: Any
    description: str


def page(algorithm: Algorithm) -> str:
    """Return the Markdown page of an installed algorithm; it ends with a newline."""
    spec = algorithm.spec
    facts = [f"- Package: `{algorithm.package}`", f"- Reference: <{spec.reference}>"]
    if spec.aliases:
        facts.append(f"- Also called: {_listed(spec.aliases)}")
    sections = [
        f"# {spec.name}\n\n{spec.summary.rstrip('.')}.",
        "\n".join(facts),
        f"## Tensors\n\n{_tensors(spec)}",
        f"## Options\n\n{options_table(spec)}",
    ]
    if spec.quirks:
        sections.append("## Quirks\n\n" + "\n".join(f"- {' '.join(quirk.split())}" for quirk in spec.quirks))
    sections.append(f"## Serving\n\n{_serving(spec)}")
    return "\n\n".join(sections) + "\n"


def options(spec: ConverterSpec) -> list[Option]:
    """Return the options of an algorithm, sorted by name."""
    from pydantic_core import to_jsonable_python

    schema = spec.options.model_json_schema(by_alias=False)
    found = []
    for name, field in sorted(spec.options.model_fields.items()):
        default = None if field.is_required() else to_jsonable_python(_default(field), fallback=str)
        kind = type_name(schema["properties"][name], schema.get("$defs", {}))
        found.append(Option(name, kind, field.is_required(), default, field.description or ""))
    return found


def _default(field: FieldInfo) -> Any:
    try:
        return field.get_default(call_default_factory=True)
    except (TypeError, ValueError):  # it is made from the values of other fields
        return None


def options_table(spec: ConverterSpec) -> str:
    """Return the options of an algorithm as a Markdown table, without a final newline."""
    rows = [
        (
            f"`{each.name}`",
            each.type,
            "required" if each.required else f"`{json.dumps(each.default)}`",
            each.description,
        )
        for each in options(spec)
    ]
    return _markdown(("option", "type", "default", "meaning"), rows)


def type_name(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Describe what a JSON schema allows; null, which stands for an option that is not given, goes without saying."""
    if "$ref" in schema:
        return type_name(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    choices = schema.get("anyOf", schema.get("allOf"))
    if choices:
        return " or ".join(type_name(each, definitions) for each in choices if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {type_name(schema['items'], definitions)}" if "items" in schema else "list"
    limits = [("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "below")]
    return " ".join([kind, *(f"{word} {json.dumps(schema[key])}" for key, word in limits if key in schema)])


def _tensors(spec: ConverterSpec) -> str:
    table = spec.table
    said = []
    if place := next(filter(None, (_PLACE.search(row.source) for row in table.rows)), None):
        start, stop = place.groups()
        said.append(f"`{place.group()}` stands for every number from {start} up to, but not including, `{stop}`.")
    if any("(" in row.source for row in table.rows):
        said.append("`(a|b)` is either spelling.")
    if any("*" in row.source for row in table.rows):
        said.append("`*` is one dotted part of a name and `**` any stretch.")
    if table.prefixes:
        said.append(f"Before any name may stand {_listed(table.prefixes, 'or')}.")
    paragraphs = [" ".join(said)] if said else []
    written = [row for row in table.rows if isinstance(row, Rename | Split | Merge)]
    if written:
        paragraphs.append(_markdown(("in the checkpoint", "in the output", "shape", "notes"), map(_written, written)))
    if table.parts:
        paragraphs.append(
            "A tensor with a part is optional. Those of one part are there together or not at all: "
            f"{_listed(table.parts)}."
        )
    paragraphs += _meanings(spec)
    left = [row for row in table.rows if isinstance(row, Drop | Refuse)]
    if left:
        paragraphs.append("What is not converted, and why:")
        paragraphs.append(_markdown(("in the checkpoint", "becomes", "why"), map(_left, left)))
    return "\n\n".join(paragraphs)


def _written(row: Rename | Split | Merge) -> tuple[str, ...]:
    source = f"`{row.source}`"
    if isinstance(row, Split):
        return source, "<br>".join(f"`{target}`" for target in row.targets), "", "holds them one after another"
    if isinstance(row, Merge):
        return source, f"`{row.target}`", _shape(row.shape), f"piece {row.place} of it"
    target = "same" if row.target == row.source else f"`{row.target}`"
    return source, target, _shape(row.shape), "; ".join(_notes(row))


def _notes(row: Rename) -> Iterable[str]:
    if row.part:
        yield f"part `{row.part}`"
    if row.dtypes != FLOATS:
        yield _listed(row.dtypes, "or")
    if row.derive is not None:
        yield f"where it is missing and {_listed(row.derive.sources, 'and')} is there: {row.derive.why}"
    if isinstance(row, Shared):
        yield from _sharing(row)
    if row.unless:
        yield f"left out where {row.unless}"


def _sharing(row: Shared) -> Iterable[str]:
    theirs = f"the verifier's `{row.verifier}`"
    if row.copies:
        yield f"written even where it equals {theirs}"
    elif row.own:
        yield f"left out where it equals {theirs}"
    else:
        yield f"left out where it equals {theirs}, refused where it does not"
    yield "the verifier's where it is missing"


def _left(row: Drop | Refuse) -> tuple[str, ...]:
    return f"`{row.source}`", "dropped" if isinstance(row, Drop) else "refused", row.why


def _shape(shape: str) -> str:
    dimensions = (re.sub(r"\s*\*\s*", "·", dimension.strip()) for dimension in shape.split(","))
    return f"`[{', '.join(dimensions)}]`"


def _meanings(spec: ConverterSpec) -> list[str]:
    """Return a table of the symbols with what is known to explain them, or a sentence that lists them."""
    used = _symbols(spec.table)
    if not used:
        return []
    known = {}
    if used.keys() >= LAYER_SYMBOLS:
        from speculators import decoder

        known = _explained(decoder.__doc__)
    known |= _explained(inspect.getdoc(type(unguarded(spec)).dims))
    rows = [(f"`{symbol}`", known[symbol]) for symbol in used if symbol in known]
    rest = [symbol for symbol in used if symbol not in known]
    said = [_markdown(("symbol", "stands for"), rows)] if rows else []
    return [*said, f"Sizes that the plugin works out: {_listed(rest)}."] if rest else said


def _symbols(table: Table) -> dict[str, None]:
    """Return the symbols of shapes and of numbered places, in the order of the rows."""
    found: dict[str, None] = {}
    for row in table.rows:
        named = list(row.stops)
        named += symbols(shape) if (shape := _shape_of(row)) else []
        found |= dict.fromkeys(name for name in named if not name.isdigit())
    return found


def _shape_of(row: Row) -> str:
    return row.shape if isinstance(row, Rename | Merge) else ""


def _explained(text: str | None) -> dict[str, str]:
    """Return symbol → meaning from a docstring: a table, or lines such as ``DV: Draft vocabulary.``."""
    found = {one or two: first or second for one, first, two, second in _MEANING.findall(text or "")}
    return {symbol: meaning.rstrip(".").replace("``", "`") for symbol, meaning in found.items()}


def _serving(spec: ConverterSpec) -> str:
    kind = spec.config.model_fields["speculators_model_type"].default
    kind = f"the output type `{kind}`" if isinstance(kind, str) else "the output"
    if spec.vllm is None:
        return f"vLLM does not serve {kind}."
    said = [f"vLLM serves {kind} with the method `{spec.vllm.method}`."]
    if spec.vllm.packages:
        said.append(f"It is taught how by `pip install {' '.join(spec.vllm.packages)}` in its environment.")
    if spec.vllm.settings:
        said.append(f"`--speculative-config` needs `{json.dumps(spec.vllm.settings)}` beside the method.")
    return " ".join(said)


def _listed(names: Iterable[str], word: str = "") -> str:
    quoted = [f"`{name}`" for name in names]
    return f" {word} ".join(quoted) if word else ", ".join(quoted)


def _markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("|" + "|".join(_cell(cell) for cell in line) + "|" for line in lines)


def _cell(text: str) -> str:
    if text == "---":
        return text
    plain = " ".join(text.split()).replace("|", "\\|")
    return f" {plain} " if plain else " "
