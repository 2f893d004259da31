"""Options that several commands have."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import getfullargspec
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

Command = TypeVar("Command", bound=Callable[..., Any])


class JsonObject(click.ParamType):  # type: ignore[type-arg] # generic since click 8.3 only
    """A JSON object, as ``--algorithm-kwargs`` takes it."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Parse it, or say what keeps it from being one."""
        if isinstance(value, dict):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value[:200]!r} is no JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is no JSON object; write it as '{{\"name\": value}}'", param, ctx)
        return parsed


class AlgorithmName(click.ParamType):  # type: ignore[type-arg] # generic since click 8.3 only
    """The name of an algorithm; a shell completes those that are installed."""

    name = "algorithm"

    def __init__(self, *more: str) -> None:
        self.more = more

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """List the installed algorithms, without importing any, that begin like what was typed."""
        from speculators.registry import Registry

        installed: list[str] = []
        with suppress(Exception):  # of packages that are damaged; commands say what is wrong with them
            installed = Registry().names
        return [CompletionItem(name) for name in (*self.more, *installed) if name.startswith(incomplete)]


class Word(click.ParamType):  # type: ignore[type-arg] # generic since click 8.3 only
    """Any text, of which a shell completes the usual ones; which of them are right is for the library to say."""

    def __init__(self, name: str, *usual: str) -> None:
        self.name = name
        self.usual = usual

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """List those of the usual words that begin like what was typed."""
        return [CompletionItem(word) for word in self.usual if word.startswith(incomplete)]


class Place(click.ParamType):  # type: ignore[type-arg] # generic since click 8.3 only
    """Where something lies: a path, of which a shell completes those that are here, or a name of somewhere else.

    Args:
        name: What help calls it.
        kind: ``"dir"`` where only folders will do, else ``"file"``.
    """

    def __init__(self, name: str, kind: str = "file") -> None:
        self.name = name
        self.kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Have the shell list what is here."""
        return [CompletionItem(incomplete, type=self.kind)]


SOURCE = Place("source")
FOLDER = Place("folder", "dir")
FILE = Place("file")
LEVEL = Word("level", "structure", "forward", "acceptance")
DEVICE = Word("device", "cpu", "cuda", "mps", "xpu")
DTYPE = Word("dtype", "bfloat16", "float16", "float32", "float64")


def algorithm_kwargs(text: str) -> Callable[[Command], Command]:
    """Add the option with an algorithm's own options."""
    return click.option("--algorithm-kwargs", type=JsonObject(), default="{}", help=text)


def reaching(command: Command) -> Command:
    """Add the options that say how places on other machines are reached."""
    return with_options(
        command,
        click.option(
            "--token",
            type=Word("token"),
            envvar="SPECULATORS_TOKEN",
            help="Token for the Hub; that of HF_TOKEN or of a login by default.",
        ),
        click.option(
            "--cache-dir",
            type=FOLDER,
            envvar="SPECULATORS_CACHE_DIR",
            help="Where downloads are kept; huggingface_hub's cache by default.",
        ),
        click.option(
            "--offline",
            is_flag=True,
            envvar="SPECULATORS_OFFLINE",
            help="Use nothing but the cache, as HF_HUB_OFFLINE=1 says for all.",
        ),
    )


def with_options(command: Command, *options: Callable[[Command], Command]) -> Command:
    """Add options to a command, which help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def refuse_clashes(algorithm_kwargs: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse options of an algorithm that are called like arguments of the function they are handed to."""
    named = getfullargspec(function)
    clash = sorted(algorithm_kwargs.keys() & {*named.args, *named.kwonlyargs})
    if clash:
        raise click.UsageError(f"--algorithm-kwargs holds {', '.join(clash)}, which no algorithm may take")


def examples(text: str) -> str:
    """Return the epilog of a command: commands that can be typed, also where they go on behind a backslash."""
    return "\n".join(["\b", "Examples:", *textwrap.indent(textwrap.dedent(text).strip(), "  ").split("\n")])
