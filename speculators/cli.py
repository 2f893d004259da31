"""The command line: parse, call one library function, print its result."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar

import click

import speculators
from speculators.errors import ENVIRONMENT, SpeculatorsError, ValidationError, is_out_of_memory, printable
from speculators.progress import on_terminal

if TYPE_CHECKING:
    from speculators.conformance import Verdict
    from speculators.convert import ConversionResult
    from speculators.registry import Algorithm, Registry, Standing
    from speculators.validation import Report


Command = TypeVar("Command", bound=Callable[..., Any])


BUG, BY_SIGNAL = 1, 128
"""The exit codes of an error that nobody expected, and, with a signal's number added, of a run that it ended."""


class _Ended(KeyboardInterrupt):
    """Somebody asked the program to end; raised where it is, so that what it holds is tidied up."""

    def __init__(self, number: int) -> None:
        self.number = number


def _end(number: int, frame: object) -> None:
    raise _Ended(number)


@contextmanager
def _ending_tidily() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does, unless they are ignored already (as under nohup)."""
    asked = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handled = [number for number in asked if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        handled = []
    for number in handled:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


class _Group(click.Group):
    """Turns every expected error into one message and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings(), _ending_tidily():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except click.UsageError as error:
                from speculators.sources.locations import redacted_text

                raise click.UsageError(redacted_text(error.format_message()), error.ctx) from None
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except BrokenPipeError:  # who read the output has gone; what was done is done
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for what is still to be flushed
                ctx.exit(BY_SIGNAL + 13)
            except KeyboardInterrupt as error:
                click.echo("Interrupted; nothing half-written is left, and what was downloaded is kept", err=True)
                ctx.exit(BY_SIGNAL + (error.number if isinstance(error, _Ended) else signal.SIGINT))
            except Exception as error:  # noqa: BLE001 - every error has its exit code
                message, code = _explained(error)
                click.echo(message, err=True)
                ctx.exit(code)


def _explained(error: Exception) -> tuple[str, int]:
    """Return what to print about an error, and the exit code."""
    if isinstance(error, SpeculatorsError):
        return f"Error: {printable(str(error))}", error.exit_code
    if is_out_of_memory(error):
        return "Error: out of memory; nothing was kept. Make some free, or convert on a larger machine", ENVIRONMENT
    if isinstance(error, OSError):
        return f"Error: {printable(str(error))}", ENVIRONMENT
    if isinstance(error, TypeError | ValueError):  # what reading entry points ends with, where one package is damaged
        from speculators.discovery import unreadable

        if found := "; ".join(unreadable()):
            return f"Error: {printable(found)}", SpeculatorsError.exit_code
    lines = "".join(traceback.format_exception(error))
    return f"{lines}This is a bug of speculators {speculators.__version__}; please report it with the lines above", BUG


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    click.echo(f"Warning: {printable(str(message))}", err=True)


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


def _reaching(command: Command) -> Command:
    """Add the options that say how places on other machines are reached."""
    options = (
        click.option("--token", help="Token for the Hub; that of HF_TOKEN or of a login by default."),
        click.option("--cache-dir", help="Where downloads are kept; huggingface_hub's cache by default."),
        click.option("--offline", is_flag=True, help="Use nothing but the cache, as HF_HUB_OFFLINE=1 says for all."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(speculators.__version__, prog_name="speculators")
def cli() -> None:
    """Turn draft models of speculative decoding into one format that inference engines serve."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


@cli.command(
    epilog="""\b
Examples:
  speculators convert ./EAGLE3-head --algorithm eagle3 --verifier ./Llama-3.1-8B-Instruct
  speculators convert yuhuili/EAGLE3-LLaMA3.1-Instruct-8B --verifier meta-llama/Llama-3.1-8B-Instruct
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
    help="Check the result before it appears.",
)
@click.option(
    "--validate-level", default="forward", show_default=True, help="How far: structure, forward or acceptance."
)
@click.option(
    "--algorithm-kwargs",
    type=_JsonObject(),
    default="{}",
    help="Options of the algorithm as a JSON object; --list-algorithms shows them.",
)
@click.option("--dtype", help="Cast floating tensors, e.g. to float16; as stored by default.")
@click.option("--max-shard-size", help="Most bytes of tensors per file, e.g. 5GB; one file by default.")
@click.option("--quiet", is_flag=True, help="Show no progress, which a terminal shows by default.")
@click.option("--overwrite", is_flag=True, help="Replace a converted model at the output path.")
@click.option("--self-contained", is_flag=True, help="Write what drafts share with the verifier, too.")
@_reaching
@click.option("--list-algorithms", is_flag=True, help="List the installed algorithms with their options, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print the list, or the result, as JSON.")
def convert(
    model: str | None,
    algorithm: str,
    verifier: str | None,
    output_path: str,
    validate_device: str,
    validate: bool,
    validate_level: str,
    algorithm_kwargs: dict[str, Any],
    dtype: str | None,
    max_shard_size: str | None,
    quiet: bool,
    overwrite: bool,
    self_contained: bool,
    token: str | None,
    cache_dir: str | None,
    offline: bool,
    list_algorithms: bool,
    as_json: bool,
) -> None:
    """Convert the draft checkpoint MODEL into the speculators format.

    MODEL and VERIFIER are local paths, Hugging Face IDs (org/name@revision:folder) or URLs.
    """
    if list_algorithms:
        _list_algorithms(as_json)
        return
    if model is None:
        raise click.UsageError("MODEL is missing; it is the draft checkpoint")
    if verifier is None:
        raise click.UsageError("--verifier is missing; it is the base model that MODEL drafts for")
    _refuse_clashes(algorithm_kwargs, _CONVERT_ARGUMENTS)
    from speculators.convert import convert_model

    with on_terminal(quiet) as progress:
        result = convert_model(
            model,
            verifier=verifier,
            algorithm=algorithm,
            output_path=output_path,
            validate_device=validate_device,
            validate=validate,
            validate_level=validate_level,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            self_contained=self_contained,
            token=token,
            cache_dir=cache_dir,
            offline=offline,
            progress=progress,
            **algorithm_kwargs,
        )
    click.echo(json.dumps(_as_json(result), indent=2) if as_json else _describe(result))


@cli.command(
    epilog="""\b
Examples:
  speculators validate converted
  speculators validate converted --source ./EAGLE3-head
  speculators validate converted --level acceptance --prompts prompts.json --device cuda
  speculators validate converted --diagnose --device cuda
"""
)
@click.argument("path")
@click.option("--verifier", help="Base model; the one that the config of PATH names by default.")
@click.option("--source", help="Native checkpoint that PATH was made from; both must compute the same.")
@click.option(
    "--algorithm-kwargs", type=_JsonObject(), default="{}", help="Options with which --source was converted, as JSON."
)
@click.option("--device", default="cpu", show_default=True, help="Torch device of forward and acceptance.")
@click.option(
    "--level", help="structure, forward or acceptance; forward by default, acceptance with --prompts or --diagnose."
)
@click.option("--prompts", help="File of prompts for acceptance, text or token ids; some are made up by default.")
@click.option("--diagnose", is_flag=True, help="Find out with which options the checkpoint was trained.")
@_reaching
@click.option("--quiet", is_flag=True, help="Show no progress, which a terminal shows by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def validate(
    path: str,
    verifier: str | None,
    source: str | None,
    algorithm_kwargs: dict[str, Any],
    device: str,
    level: str | None,
    prompts: str | None,
    diagnose: bool,
    token: str | None,
    cache_dir: str | None,
    offline: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check the converted model PATH: structure, forward, acceptance."""
    _refuse_clashes(algorithm_kwargs, _VALIDATE_ARGUMENTS)
    from speculators import prompts as prompting
    from speculators.validation import validate_model

    given = prompting.read(prompts) if prompts else None
    with on_terminal(quiet) as progress:
        report = validate_model(
            path,
            verifier=verifier,
            source=source,
            device=device,
            level=level or ("acceptance" if prompts or diagnose else "forward"),
            prompts=given,
            diagnose=diagnose,
            token=token,
            cache_dir=cache_dir,
            offline=offline,
            progress=progress,
            **algorithm_kwargs,
        )
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else "\n".join(_describe_report(report)))
    if not report.passed:
        raise SystemExit(ValidationError.exit_code)


@cli.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  speculators plugins
  speculators plugins check eagle3
  speculators plugins new my-heads
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List all installed plugins, also broken ones, and where they come from."""
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError(f"--json belongs behind {ctx.invoked_subcommand}, where that takes it")
        return
    from dataclasses import asdict

    from speculators.discovery import unreadable
    from speculators.registry import Registry

    registry, damaged = Registry(), list(unreadable())
    if as_json:
        facts = {
            "plugins": [asdict(standing) for standing in registry.standings],
            "contested": {alias: [one.spec.name for one in known] for alias, known in registry.contested.items()},
            "not_installed": registry.not_installed,
            "damaged": damaged,
        }
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo(printable("\n".join([*_describe_plugins(registry), *damaged])))


_single = copy(plugins)
_single.hidden = True
cli.add_command(_single, "plugin")  # as one says with the name of one plugin behind it


@plugins.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def check(name: str, as_json: bool) -> None:
    """Check whether the installed plugin NAME keeps what the interface promises, on the example that it brings."""
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from speculators import conformance
    from speculators.registry import Registry

    registry = Registry()
    plugin = registry.standing(name)
    with tempfile.TemporaryDirectory() as folder:
        bench = conformance.Bench(plugin.name, Path(folder), registry=registry)
        findings = conformance.judge(bench)
        passed = all(finding.passed for finding in findings)
        complete = passed and bench.has_checkpoint
    if as_json:
        facts = {
            "plugin": asdict(plugin),
            "passed": passed,
            "complete": complete,
            "checks": [asdict(finding) for finding in findings],
        }
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo(printable("\n".join(_describe_verdict(plugin, findings))))
        if passed and not complete:
            click.echo("it brings no example, so nothing was converted")
    if not passed:
        raise SystemExit(ValidationError.exit_code)


@plugins.command()
@click.argument("name")
@click.option("--output-path", default="example", show_default=True, help="Folder of draft and verifier.")
def example(name: str, output_path: str) -> None:
    """Write the tiny checkpoint that the plugin NAME brings as an example, and its verifier, to try conversions."""
    from speculators.examples import place_example
    from speculators.registry import Registry

    draft, verifier = place_example(Registry().get(name).spec, output_path)
    command = shlex.join(["speculators", "convert", str(draft), "--verifier", str(verifier)])
    click.echo(printable(f"Wrote {draft} and {verifier}; convert them with\n    {command}"))


@plugins.command()
@click.argument("name")
@click.option("--output-path", help="Folder of the package; speculators-NAME by default.")
def new(name: str, output_path: str | None) -> None:
    """Write a package that adds the algorithm NAME: complete, tested, and to be changed step by step."""
    from pathlib import Path

    from speculators import scaffold

    folder = scaffold.write(name, Path(output_path) if output_path else None)
    package = shlex.quote(f"{folder}[test]")
    text = f"Wrote {folder}; go on with\n    pip install -e {package}\n    speculators plugins check {name}\n"
    click.echo(printable(f"{text}and read {folder / 'README.md'}"))


@plugins.command()
@click.argument("name")
def page(name: str) -> None:
    """Print what the plugin NAME says about itself as a page in Markdown: table, options, quirks."""
    from speculators.pages import page as described_page
    from speculators.registry import Registry

    click.echo(printable(described_page(Registry().get(name))), nl=False)


BAR = 30
"""Characters of a bar that stands for everything accepted."""


def _describe_report(report: Report) -> list[str]:
    width = max(len(check.name) for check in report.checks)
    lines = []
    for check in report.checks:
        verdict = click.style("passed", fg="green") if check.passed else click.style("FAILED", fg="red", bold=True)
        lines.append(f"{check.name:<{width}}  {verdict}  {printable(check.detail)}")
        if check.name == "acceptance" and report.acceptance is not None:
            for position, rate in enumerate(report.acceptance.rates, 1):
                lines.append(f"    draft token {position}  {'#' * round(BAR * rate):<{BAR}}  {rate:.3f}")
        if check.name == "diagnosis":
            most = max((trial.acceptance.per_step for trial in report.trials), default=0) or 1  # not 0 for all
            for trial in report.trials:
                named = f"{trial.option}={json.dumps(trial.value)}: {trial.acceptance.per_step:.2f}, {trial.verdict}"
                lines.append(f"    {'#' * round(BAR * trial.acceptance.per_step / most):<{BAR}}  {named}")
    failed = [check.name for check in report.checks if not check.passed]
    lines.append(f"Not fit to serve: {', '.join(failed)} failed" if failed else "Everything that was checked is right")
    return lines


def _refuse_clashes(algorithm_kwargs: Mapping[str, Any], arguments: set[str]) -> None:
    clash = sorted(algorithm_kwargs.keys() & arguments)
    if clash:
        raise click.UsageError(f"--algorithm-kwargs holds {', '.join(clash)}, which no algorithm may take")


_CONVERT_ARGUMENTS = {
    "model",
    "verifier",
    "algorithm",
    "output_path",
    "validate_device",
    "validate",
    "validate_level",
    "dtype",
    "max_shard_size",
    "overwrite",
    "self_contained",
    "token",
    "cache_dir",
    "offline",
    "progress",
    "registry",
}
"""Names of `convert_model`'s own arguments."""

_VALIDATE_ARGUMENTS = {
    "path",
    "verifier",
    "source",
    "device",
    "level",
    "prompts",
    "diagnose",
    "token",
    "cache_dir",
    "offline",
    "progress",
    "registry",
}
"""Names of `validate_model`'s own arguments."""


def _describe(result: ConversionResult) -> str:
    lines = [f"Converted {result.source} with {result.algorithm} ({result.package})"]
    changed = {source: target for source, target in result.renamed.items() if source != target}
    lines += _section("renamed", changed, " -> ")
    lines += _section("kept", {source: "" for source, target in result.renamed.items() if source == target}, "")
    lines += _section("cut or joined", {name: ", ".join(made) for name, made in result.reworked.items()}, " -> ")
    lines += _section("left out", result.dropped, ": ")
    lines += _section("completed", result.completed, ": ")
    lines += [f"note: {note}" for note in result.notes]
    lines = [printable(line) for line in lines]
    if result.validation is None:
        lines.append("not validated")
    else:
        lines += _describe_report(result.validation)
    lines.append(f"Wrote {printable(str(result.output_path))}")
    if result.serving is not None:
        lines += ["", "Serve it where vLLM is installed:"]
        if result.serving.packages:
            lines.append(f"    {printable(shlex.join(['pip', 'install', *result.serving.packages]))}")
        lines.append(f"    {printable(result.serving.command)}")
        if result.serving.note:
            lines.append(printable(result.serving.note))
    return "\n".join(lines)


def _section(title: str, entries: Mapping[str, str], arrow: str) -> list[str]:
    return [f"{title}:", *(f"    {name}{arrow}{text}" for name, text in sorted(entries.items()))] if entries else []


def _as_json(result: ConversionResult) -> dict[str, Any]:
    from dataclasses import asdict

    report = result.validation.to_dict() if result.validation else None
    return {**asdict(result), "output_path": str(result.output_path), "validation": report}


def _list_algorithms(as_json: bool) -> None:
    from speculators.registry import Registry, known_packages

    registry = Registry()
    algorithms = [_algorithm_facts(algorithm) for algorithm in registry.algorithms]
    broken = [vars(plugin) for plugin in registry.broken]
    if as_json:
        install = [] if registry.names or registry.left_out else known_packages()
        click.echo(json.dumps({"algorithms": algorithms, "broken": broken, "install": install}, indent=2))
    else:
        click.echo(printable(_listing(registry, algorithms)))


def _describe_plugins(registry: Registry) -> list[str]:
    from speculators.registry import describe_contested

    lines = []
    for each in registry.standings:
        known_as = f" (also {', '.join(each.aliases)})" if each.aliases else ""
        lines.append(f"{each.name}{known_as}: {each.state}{f', {each.reason}' if each.reason else ''}")
        lines.append(f"    from {each.package} {each.version}{f' in {each.folder}' if each.folder else ''}")
        lines.append(f"    entry point {each.entry_point}")
    if not lines:
        message = registry.describe_installed()
        lines.append(message[0].upper() + message[1:])
    elif registry.not_installed:
        lines.append(registry.describe_not_installed())
    lines += [describe_contested(alias, known) for alias, known in registry.contested.items()]
    return lines


def _describe_verdict(plugin: Standing, findings: list[Verdict]) -> list[str]:
    width = max(len(finding.check) for finding in findings)
    lines = [f"{plugin.name}, from {plugin.package} {plugin.version}"]
    for finding in findings:
        verdict = "passed" if finding.passed else "FAILED"
        lines.append(f"    {finding.check:{width}}  {verdict}  {finding.detail}".rstrip())
    failed = sum(not finding.passed for finding in findings)
    lines.append(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    return lines


def _algorithm_facts(algorithm: Algorithm) -> dict[str, Any]:
    from dataclasses import asdict

    from speculators.pages import options

    spec = algorithm.spec
    return {
        "name": spec.name,
        "aliases": list(spec.aliases),
        "summary": spec.summary,
        "reference": spec.reference,
        "package": algorithm.package,
        "version": algorithm.version,
        "options": [asdict(option) for option in options(spec)],
    }


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
            default = "required" if option["required"] else f"default {json.dumps(option['default'])}"
            lines.append(f"        {option['name']} ({option['type']}, {default})")
            lines.append(f"            {option['description']}")
        lines.append("")
    lines += [f"broken: {plugin}" for plugin in registry.broken]
    return "\n".join(lines).rstrip("\n")
