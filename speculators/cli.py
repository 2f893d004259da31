"""The command line: parse, call one library function, print its result."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

import click

import speculators
from speculators.errors import SpeculatorsError, ValidationError

if TYPE_CHECKING:
    from speculators.convert import ConversionResult
    from speculators.registry import Algorithm, Registry
    from speculators.validation import Report


class _Group(click.Group):
    """Turns every expected error into one message and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpeculatorsError as error:
            click.echo(f"Error: {_printable(str(error))}", err=True)
            ctx.exit(error.exit_code)


def _printable(text: str) -> str:
    """Escape control characters, which names in a stranger's checkpoint may hold."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)


class _JsonObject(click.ParamType):  # type: ignore[type-arg] # generic since click 8.3 only
    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value[:200]!r} is no JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is no JSON object; write it as '{{\"name\": value}}'", param, ctx)
        return parsed


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(speculators.__version__, prog_name="speculators")
def cli() -> None:
    """Turn draft models of speculative decoding into one format that inference engines serve."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.captureWarnings(True)


@cli.command(
    epilog="""\b
Examples:
  speculators convert ./EAGLE3-head --algorithm eagle3 --verifier ./Llama-3.1-8B-Instruct
  speculators convert ./head --verifier ./base --algorithm-kwargs '{"norm_before_residual": true}'
  speculators convert --list-algorithms
"""
)
@click.argument("model", required=False)
@click.option("--algorithm", default="auto", show_default=True, help="What trained MODEL; auto lets the plugins look.")
@click.option("--verifier", help="Base model that MODEL drafts for; completes and validates it. Required.")
@click.option("--output-path", default="converted", show_default=True, help="Folder of the converted model.")
@click.option("--validate-device", default="cpu", show_default=True, help="Torch device of the validation.")
@click.option(
    "--validate/--no-validate",
    "-validate/-no-validate",
    default=True,
    show_default=True,
    help="Check shapes, structure and forward of the result before it appears.",
)
@click.option(
    "--algorithm-kwargs",
    type=_JsonObject(),
    default="{}",
    help="Options of the algorithm as a JSON object; --list-algorithms shows them.",
)
@click.option("--dtype", help="Cast floating tensors, e.g. to float16; as stored by default.")
@click.option("--overwrite", is_flag=True, help="Replace a converted model at the output path.")
@click.option("--list-algorithms", is_flag=True, help="List the installed algorithms with their options, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print the list, or the result, as JSON.")
def convert(
    model: str | None,
    algorithm: str,
    verifier: str | None,
    output_path: str,
    validate_device: str,
    validate: bool,
    algorithm_kwargs: dict[str, Any],
    dtype: str | None,
    overwrite: bool,
    list_algorithms: bool,
    as_json: bool,
) -> None:
    """Convert the draft checkpoint MODEL into the speculators format."""
    if list_algorithms:
        _list_algorithms(as_json)
        return
    if model is None:
        raise click.UsageError("MODEL is missing; it is the folder of the draft checkpoint")
    if verifier is None:
        raise click.UsageError("--verifier is missing; it is the folder of the base model that MODEL drafts for")
    clash = sorted(algorithm_kwargs.keys() & _ARGUMENTS)
    if clash:
        raise click.UsageError(f"--algorithm-kwargs holds {', '.join(clash)}, which no algorithm may take")
    from speculators.convert import convert_model

    result = convert_model(
        model,
        verifier=verifier,
        algorithm=algorithm,
        output_path=output_path,
        validate_device=validate_device,
        validate=validate,
        dtype=dtype,
        overwrite=overwrite,
        **algorithm_kwargs,
    )
    click.echo(json.dumps(_as_json(result), indent=2) if as_json else _describe(model, result))


@cli.command(
    epilog="""\b
Examples:
  speculators validate converted
  speculators validate converted --level acceptance --prompts prompts.json --device cuda
"""
)
@click.argument("path")
@click.option("--verifier", help="Base model; the one that the config of PATH names by default.")
@click.option("--device", default="cpu", show_default=True, help="Torch device of forward and acceptance.")
@click.option("--level", default="forward", show_default=True, help="structure, forward or acceptance.")
@click.option(
    "--prompts", type=click.File("rb"), help="JSON list of prompts, each a list of token ids, for acceptance."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def validate(
    path: str, verifier: str | None, device: str, level: str, prompts: IO[bytes] | None, as_json: bool
) -> None:
    """Check the converted model in the folder PATH: structure, forward, acceptance."""
    from speculators.validation import validate_model

    report = validate_model(
        path, verifier=verifier, device=device, level=level, prompts=_read_prompts(prompts) if prompts else None
    )
    click.echo(_report_as_json(report) if as_json else _printable(_describe_report(report)))
    if not report.passed:
        raise SystemExit(ValidationError.exit_code)


def _read_prompts(file: IO[bytes]) -> list[list[int]]:
    try:
        content = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{file.name} is no JSON: {error}") from error
    prompts = content.get("prompts") if isinstance(content, dict) else content
    whole = isinstance(prompts, list) and all(isinstance(prompt, list) and prompt for prompt in prompts)
    if not prompts or not whole or not all(type(token) is int for prompt in prompts for token in prompt):
        raise click.UsageError(f"{file.name} holds no prompts; expected a JSON list of lists of token ids")
    return list(prompts)


def _describe_report(report: Report) -> str:
    lines = [f"{'passed' if check.passed else 'FAILED'} {check.name}: {check.detail}" for check in report.checks]
    if report.acceptance is not None:
        for position, rate in enumerate(report.acceptance.rates, 1):
            lines.append(f"    token {position}  {'#' * round(40 * rate):<40}  {rate:.3f}")
    return "\n".join(lines)


def _report_as_json(report: Report) -> str:
    from dataclasses import asdict

    facts = {"passed": report.passed, **asdict(report)}
    if report.acceptance is not None:
        facts["acceptance"] |= {"rates": report.acceptance.rates, "length": report.acceptance.length}
    return json.dumps(facts, indent=2)


_ARGUMENTS = {
    "model",
    "verifier",
    "algorithm",
    "output_path",
    "validate_device",
    "validate",
    "dtype",
    "overwrite",
    "registry",
}
"""Names of `convert_model`'s own arguments."""


def _describe(model: str, result: ConversionResult) -> str:
    lines = [f"Converted {model} with {result.algorithm} ({result.package})"]
    changed = {source: target for source, target in result.renamed.items() if source != target}
    lines += _section("renamed", changed, " -> ")
    lines += _section("kept", {source: "" for source, target in result.renamed.items() if source == target}, "")
    lines += _section("left out", result.dropped, ": ")
    lines += _section("completed", result.completed, ": ")
    lines += [f"note: {note}" for note in result.notes]
    if result.validation is None:
        lines.append("not validated")
    else:
        lines += [f"checked {check.name}: {check.detail}" for check in result.validation.checks]
    return _printable("\n".join([*lines, f"Wrote {result.output_path}"]))


def _section(title: str, entries: Mapping[str, str], arrow: str) -> list[str]:
    return [f"{title}:", *(f"    {name}{arrow}{text}" for name, text in sorted(entries.items()))] if entries else []


def _as_json(result: ConversionResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(result), "output_path": str(result.output_path)}


def _list_algorithms(as_json: bool) -> None:
    from speculators.registry import Registry, known_packages

    registry = Registry()
    algorithms = [_algorithm_facts(algorithm) for algorithm in registry.algorithms]
    broken = [vars(plugin) for plugin in registry.broken]
    if as_json:
        install = [] if registry.names else known_packages()
        click.echo(json.dumps({"algorithms": algorithms, "broken": broken, "install": install}, indent=2))
    else:
        click.echo(_printable(_listing(registry, algorithms)))


def _algorithm_facts(algorithm: Algorithm) -> dict[str, Any]:
    from pydantic_core import to_jsonable_python

    spec = algorithm.spec
    schema = spec.options.model_json_schema(by_alias=False)["properties"]
    return {
        "name": spec.name,
        "aliases": list(spec.aliases),
        "summary": spec.summary,
        "reference": spec.reference,
        "package": algorithm.package,
        "version": algorithm.version,
        "options": [
            {
                "name": name,
                "type": _type_name(schema[name]),
                "default": None if field.is_required() else to_jsonable_python(field.get_default(), fallback=str),
                "description": field.description or "",
            }
            for name, field in sorted(spec.options.model_fields.items())
        ],
    }


def _type_name(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_name(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    kind = str(schema.get("type", "any"))
    return f"list of {_type_name(schema['items'])}" if kind == "array" and "items" in schema else kind


def _listing(registry: Registry, algorithms: list[dict[str, Any]]) -> str:
    if not registry.names:
        message = registry.describe_installed()
        return message[0].upper() + message[1:]
    lines: list[str] = []
    for facts in algorithms:
        known_as = f" (also {', '.join(facts['aliases'])})" if facts["aliases"] else ""
        lines += [
            f"{facts['name']}{known_as}: {facts['summary']}",
            f"    {facts['reference']}",
            f"    from {facts['package']} {facts['version']}",
            "    options:",
        ]
        for option in facts["options"]:
            lines.append(f"        {option['name']} ({option['type']}, default {json.dumps(option['default'])})")
            lines.append(f"            {option['description']}")
        lines.append("")
    lines += [f"broken: {plugin}" for plugin in registry.broken]
    return "\n".join(lines).rstrip("\n")
