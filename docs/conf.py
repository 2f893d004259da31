"""How Sphinx makes the site; ``docs/build.py`` runs it.

The source folder is the repository, and every page lies where a code host shows it. So a relative link is written
once and works in both places, also one that leaves ``docs``. Pages are plain Markdown: what only a site needs, its
navigation and what is made from docstrings, is added while they are read (`read_page`). Nothing is fetched.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import speculators

sys.path.insert(0, str(Path(__file__).parent))
generate = importlib.import_module("generate")

project = "speculators"
author = "the authors of speculators"
version = release = speculators.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/**/*.md", "plugins/*/README.md", "examples/*/README.md"]
exclude_patterns = [".*", "**/.*", "speculators", "tests", "benchmarks", "build", "dist", "converted"]

# Links: each heading has the anchor that a code host gives it, and one that leads nowhere is an error.
myst_heading_anchors = 6
nitpicky = True
nitpick_ignore_regex = [
    # Types of third parties and of the standard library, whose pages would have to be fetched.
    (r"py:.*", r"(_pytest|collections|concurrent|importlib|pathlib|re|threading|types|typing|typing_extensions)\..*"),
    (r"py:.*", r"(nn|np|numpy|pydantic|torch)\..*"),
    (r"py:.*", r"(JsonValue|NDArray|Path|PluginManager|PluginManager\.register|PreTrainedModel)"),
    # The core's own, which stand in signatures and need not be known.
    (r"py:class", r"(speculators\.spec\.)?Config"),
    (r"py:obj", r"[A-Z_]+"),
    (r"py:class", r"(speculators\.config\.)?(SpeculatorsBlock|Size)"),
    (r"py:class", r"speculators\.(conformance\.checks\.Check|digests\.Digest|sources\..*|weights\.Extent)"),
]

# Docstrings: Google's style, a name in single backticks is a reference.
default_role = "py:obj"
autodoc_default_options = {"member-order": "bysource", "exclude-members": "model_config"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_display_short_literal_types = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

highlight_language = "text"  # of blocks that name none: what is printed
maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"speculators {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_copy_source = False
html_show_copyright = False

NAVIGATION: dict[str, dict[str, tuple[str, ...]]] = {
    "docs/index": {
        "Use it": (
            "/docs/getting-started",
            "/docs/convert",
            "/docs/sources",
            "/docs/inspecting",
            "/docs/validation",
            "/docs/serving",
            "/docs/exporting",
            "/docs/diff",
            "/docs/batch",
            "/docs/publishing-models",
            "/docs/terminal",
            "/docs/faq",
        ),
        "Look it up": (
            "/docs/cli",
            "/docs/api",
            "/docs/algorithms/README",
            "/docs/output-format",
            "/docs/json",
            "/docs/performance",
            "/docs/reliability",
        ),
        "Extend it": ("/docs/plugins/README",),
        "The project": ("/CHANGELOG", "/CONTRIBUTING", "/SECURITY", "Readme </README>"),
    },
    "docs/algorithms/README": {"": ("/docs/algorithms/*",)},
    "docs/plugins/README": {
        "": (
            "/docs/plugins/tutorial",
            "/docs/plugins/table",
            "/docs/plugins/reference",
            "/docs/plugins/conformance",
            "/docs/plugins/publishing",
            "/plugins/*/README",
            "/examples/*/README",
        )
    },
}
"""Page → caption → pages below it in the navigation. Other pages in ``docs`` follow under the first caption."""


def navigation(page: str) -> str:
    """Return the hidden tables of contents of a page."""
    tables: dict[str, tuple[str, ...]] = {**NAVIGATION.get(page, {})}
    if page == root_doc:
        first, named = next(iter(tables)), {page, *(each.strip("/") for pages in tables.values() for each in pages)}
        others = sorted(f"docs/{path.stem}" for path in Path(__file__).parent.glob("*.md"))
        tables[first] += tuple(f"/{each}" for each in others if each not in named)
    return "".join(
        "\n```{toctree}\n:hidden:\n:glob:\n"
        + (f":caption: {caption}\n" if caption else "")
        + "\n".join(pages)
        + "\n```\n"
        for caption, pages in tables.items()
    )


CALLS = "What users call"


def api() -> str:
    """Return a section for each group of public names, what users call first; no name is left out."""
    groups = dict(generate.GROUPS)
    order = {CALLS: groups.pop(CALLS), "What these return": returned(), "Errors": groups.pop("Errors"), **groups}
    grouped = {name for names in order.values() for name in names}
    order["More"] = tuple(name for name in speculators.__all__ if name not in grouped)
    return "".join(
        f"\n## {title}\n\n```{{eval-rst}}\n" + "\n".join(map(described, names)) + "\n```\n"
        for title, names in order.items()
        if names
    )


def returned() -> tuple[str, ...]:
    """Name, with their modules, the classes that users are given and need not import: those in annotations."""
    waiting = [found for found in (getattr(speculators, name) for name in generate.GROUPS[CALLS]) if callable(found)]
    names: dict[str, None] = {}
    while waiting:
        one = waiting.pop(0)
        texts = list(generate.fields(one).values()) if inspect.isclass(one) else [one.__annotations__["return"]]
        if inspect.isclass(one):
            texts += [generate.signature(*method).rpartition("->")[2] for method in generate.methods(one.__name__, one)]
        for word in dict.fromkeys(re.findall(r"\b[A-Z]\w+", " ".join(texts))):
            found = meant(word, sys.modules[one.__module__])
            name = f"{getattr(found, '__module__', '')}.{word}".removeprefix("speculators.")
            own = inspect.isclass(found) and found.__module__.startswith("speculators.")
            if own and word not in {*speculators.__all__, *generate.MET} and name not in names:
                names[name] = None
                waiting.append(found)
    return tuple(names)


def meant(name: str, module: Any) -> Any:
    """Return what a name in an annotation means in its module, also one that is imported for the type checker alone."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module and any(each.name == name for each in node.names):
            return getattr(importlib.import_module(node.module), name, None)
    return getattr(module, name, None)


def described(name: str) -> str:
    """Return the directive that describes a public name, or one with its module."""
    module = {**generate.MET, "register_converter": "hookspecs"}.get(name, "")
    module, _, name = name.rpartition(".") if "." in name else (module, "", name)
    if name in generate.MODULES:
        imported = importlib.import_module(f"speculators.{generate.MODULES[name]}")  # pydantic wants no TYPE_CHECKING
        return f".. automodule:: {imported.__name__}\n   :members:\n"
    found = getattr(importlib.import_module(f"speculators.{module}") if module else speculators, name)
    directive = f"{f'{module}.' if module else ''}{name}\n"
    if inspect.isfunction(found):
        return f".. autofunction:: speculators.{directive}"
    if not inspect.isclass(found):
        said = "\n".join(part for entry in generate.entries_of(name, found, 3) for part in entry.body)
        return f".. py:data:: speculators.{directive}\n   {said.replace('`', '``')}\n"
    kind = "exception" if issubclass(found, Exception) else "class"
    members = [member for member, _ in generate.methods(name, found)]
    listed = f":members: {', '.join(members)}" if members else ""
    return f".. auto{kind}:: speculators.{directive}   {listed}\n"


def read_page(app: Any, page: str, source: list[str]) -> None:
    """Add what the site alone needs."""
    source[0] += navigation(page) + (api() if page == "docs/api" else "")


def keep_sentence(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Break an attribute's first line after its colon; napoleon would take what stands before it for a type."""
    if what in {"attribute", "data", "property"} and lines:
        lines[:1] = lines[0].replace(": ", ":\n", 1).split("\n")


def shorten(app: Any, what: str, name: str, found: Any, options: Any, given: str | None, returned: str | None) -> Any:
    """Leave the fields of pydantic's models to the list of attributes, and say what is made anew each time as code."""
    if hasattr(found, "model_fields"):
        return "", None
    return (given.replace("<factory>", "..."), returned) if given and "<factory>" in given else None


def find_short_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Find what a docstring calls by its short name, as ``Checkpoint`` or ``Registry.get``, wherever it lies."""
    domain, target = env.get_domain("py"), node.get("reftarget", "")
    known = sorted((name for name in domain.objects if name.endswith(f".{target}")), key=lambda name: name.count("."))
    if node.get("refdomain") != "py" or not known:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", known[0], node, content)


def leave_builtins(app: Any, page: Any) -> None:
    """Keep the type ``bytes`` from being taken for a class's attribute of that name."""
    for node in list(page.findall(lambda each: each.tagname == "pending_xref")):
        if node.get("reftype") == "class" and hasattr(builtins, node.get("reftarget", "")):
            node.replace_self(node.children)


def as_code(app: Any, ctx: Any, lines: list[str]) -> None:
    """Show options in the text of a command as code, and keep ``org/name@revision`` from being an address of mail."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((".. ", ":")):
            lines[i] = re.sub(r"(?<![\w`-])--[a-z][a-z-]+", r"``\g<0>``", line).replace("@", r"\@")


def show_examples(app: Any, ctx: Any, lines: list[str]) -> None:
    """Show the indented commands of an epilogue as a block; sphinx-click makes them lines of text."""
    commands = [line.removeprefix("|   ") for line in lines if line.startswith("|   ")]
    if commands:
        said = [line.removeprefix("| ") for line in lines if not line.startswith("|   ")]
        lines[:] = [*said, "", ".. code-block:: console", "", *(f"   {line}" for line in commands), ""]
    else:
        as_code(app, ctx, lines)


def setup(app: Any) -> None:
    """Tell Sphinx what is to be done."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", keep_sentence, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten)
    for part in ("description", "options", "arguments"):
        app.connect(f"sphinx-click-process-{part}", as_code)
    app.connect("sphinx-click-process-epilog", show_examples)
    app.connect("doctree-read", leave_builtins)
    app.connect("missing-reference", find_short_name)
