"""Options that several commands have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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

        return [CompletionItem(name) for name in (*self.more, *Registry().names) if name.startswith(incomplete)]


def algorithm_kwargs(text: str) -> Callable[[Command], Command]:
    """Add the option with an algorithm's own options."""
    return click.option("--algorithm-kwargs", type=JsonObject(), default="{}", help=text)


def reaching(command: Command) -> Command:
    """Add the options that say how places on other machines are reached."""
    options = (
        click.option(
            "--token", envvar="SPECULATORS_TOKEN", help="Token for the Hub; that of HF_TOKEN or of a login by default."
        ),
        click.option(
            "--cache-dir",
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
    for option in reversed(options):
        command = option(command)
    return command


def refuse_clashes(algorithm_kwargs: Mapping[str, Any], arguments: frozenset[str]) -> None:
    """Refuse options of an algorithm that are called like arguments of the function they are handed to."""
    clash = sorted(algorithm_kwargs.keys() & arguments)
    if clash:
        raise click.UsageError(f"--algorithm-kwargs holds {', '.join(clash)}, which no algorithm may take")


def examples(text: str) -> str:
    """Return the epilog of a command: commands that can be typed, one a line."""
    return "\n".join(["\b", "Examples:", *(f"  {line.strip()}" for line in text.strip().split("\n"))])
