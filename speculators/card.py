"""The model card: ``README.md`` with the metadata that the Hub reads, and what a person asks about an output.

It names nothing that changes from run to run, no machine and no path, so that the same input gives the same bytes.
What strangers wrote (names of tensors, values of configs) is shown as it is, and never as Markdown or HTML.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from speculators import __version__, output
from speculators.errors import CheckpointError, printable
from speculators.serving import instructions
from speculators.sources.locations import hub_endpoint, redacted

if TYPE_CHECKING:
    from speculators.acceptance import Acceptance
    from speculators.convert import Conversion
    from speculators.registry import Algorithm
    from speculators.sources import Folder
    from speculators.spec import Context
    from speculators.validation import Report

LIBRARY = "speculators"
"""What the Hub calls the library that wrote a model."""

MOST_ROWS = 1000
"""Tensors that are listed."""

LONGEST_METADATA = 64 << 10
"""Characters of a source's metadata that are read; what is longer is not read at all."""

LONGEST_LICENSE = 200
"""Characters of an identifier, name or address of a license."""

_METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
"""Where the Hub looks for metadata: between lines of dashes, at the beginning of a card."""

_PLAIN = re.compile(r"[\w.,:;=+@/(){}\[\]\"' -]+", re.ASCII)
"""Text that means itself between backticks, also in a table."""


def model_card(
    conversion: Conversion,
    *,
    report: Report | None = None,
    license: Mapping[str, Any] | None = None,
    max_shard_size: int | None = None,
    repository: str | None = None,
) -> str:
    """Return the card of an output.

    Args:
        conversion: What was done.
        report: The outcome of the checks, if there were any.
        license: The license in the Hub's own keys, as `source_license` returns it.
        max_shard_size: Bytes of tensors per file, if that was asked for.
        repository: The repository of the Hub that the output goes to, if that is known.
    """
    from huggingface_hub import ModelCardData

    context, spec = conversion.context, conversion.algorithm.spec
    tags = [LIBRARY, "speculative-decoding", conversion.config.speculators_model_type, spec.name]
    metadata = ModelCardData(
        base_model=_repository(context.verifier.checkpoint.place),
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*tags, *(["vllm"] if spec.vllm else [])])),
        **(license or {}),
    )
    sections = (
        _summary(conversion, license or {}),
        _serving(conversion, repository),
        _checks(report),
        _notes(conversion),
        _config(conversion),
        _tensors(conversion),
        _reproduction(conversion, max_shard_size),
    )
    body = "\n".join(line for section in sections for line in section)
    return output.marked(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def called(place: Folder) -> str:
    """Return what a card calls a checkpoint: a repository at its commit, an address, or the name of a folder."""
    found = place.identity
    inside = "/".join(str(found[key]) for key in ("path", "file") if key in found)
    if "repository" in found:
        return f"{found['repository']}@{found['commit']}{f':{inside}' if inside else ''}"
    if "url" in found:
        return f"{found['url']}{f'/{place.file}' if place.file else ''}"
    return f"{found['folder']}{f'/{inside}' if inside else ''}"


def versions(algorithm: Algorithm) -> str:
    """Return which packages converted something."""
    return f"speculators {__version__}, {algorithm.origin}"


def source_license(place: Folder) -> dict[str, Any]:
    """Return what the card of a source says about its license, in the Hub's own keys; nothing where it says nothing.

    Raises:
        CheckpointError: There is a card, and it cannot be read.
    """
    if "url" in place.identity or not place.has(output.CARD_FILE):
        return {}
    try:
        with place.path(output.CARD_FILE).open("rb") as file:
            text = file.read(4 * LONGEST_METADATA).decode(errors="replace")
    except OSError as error:
        raise CheckpointError(f"{output.CARD_FILE} cannot be read: {error.strerror or error}") from error
    said = _metadata(text)
    found = {key: said[key].strip() for key in ("license", "license_name", "license_link") if _is_short(said.get(key))}
    several = said.get("license")
    if isinstance(several, list) and several and all(map(_is_short, several)):
        found["license"] = [each.strip() for each in several]
    if "license" not in found:
        return {}
    if link := found.pop("license_link", ""):
        found |= _license_link(link, place)
    return found


def _metadata(text: str) -> Mapping[str, Any]:
    import yaml

    block = _METADATA.match(text.removeprefix("\ufeff"))
    if block is None or len(block[1]) > LONGEST_METADATA:
        return {}
    try:
        found = yaml.safe_load(block[1])
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_short(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.strip()) <= LONGEST_LICENSE


def _license_link(link: str, place: Folder) -> dict[str, str]:
    """Return a link that leads to the same file from elsewhere, if there is one."""
    if re.match(r"https?://", link):
        return {"license_link": link} if redacted(link) == link.partition("#")[0] else {}
    repository, commit = (place.identity.get(key) for key in ("repository", "commit"))
    if repository is None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", link, re.ASCII) or ".." in link:
        return {}
    return {"license_link": f"{_page(str(repository))}/blob/{commit}/{link}"}


def _page(repository: str) -> str:
    return f"{redacted(hub_endpoint())}/{repository}"


def _repository(place: Folder) -> str | None:
    found = place.identity.get("repository")
    return None if found is None else str(found)


def _summary(conversion: Conversion, said: Mapping[str, Any]) -> Iterator[str]:
    context, algorithm = conversion.context, conversion.algorithm
    source, verifier = context.source.place, context.verifier.checkpoint.place
    given = _given(context)
    licenses = [said["license"]] if isinstance(said.get("license"), str) else said.get("license", [])
    yield f"# {_text(_short(source))} in the speculators format"
    yield ""
    yield f"A draft model for speculative decoding with the verifier {_text(_short(verifier))}."
    yield "Its tensors were converted from another format, not trained anew."
    yield ""
    rows = {
        "converted from": _linked(source),
        "verifier": _linked(verifier),
        "output type": _code(conversion.config.speculators_model_type),
        "algorithm": f"{_code(algorithm.spec.name)} ({_text(algorithm.spec.reference)})",
        "converter": _text(versions(algorithm)),
        "options": _code(json.dumps(given)) if given else "none given",
        "dtype": f"cast to {_code(context.dtype)}" if context.dtype else f"as stored: {_code(conversion.config.dtype)}",
        "license": ", ".join(map(_code, licenses)) if licenses else "the source names none",
    }
    yield from _table(("", ""), rows.items())


def _given(context: Context) -> dict[str, Any]:
    """Return the options that were given."""
    from pydantic_core import to_jsonable_python

    values = to_jsonable_python(context.options, fallback=str)
    return {name: values[name] for name in sorted(context.options.model_fields_set & values.keys())}


def _short(place: Folder) -> str:
    """Return the last part of a checkpoint's name."""
    return called(place).partition("@")[0].rstrip("/").rpartition("/")[2]


def _linked(place: Folder) -> str:
    repository = _repository(place)
    name = _code(called(place))
    return name if repository is None else f"[{name}]({_page(repository)})"


def _serving(conversion: Conversion, repository: str | None) -> Iterator[str]:
    vllm, verifier = conversion.algorithm.spec.vllm, conversion.context.verifier
    if vllm is None:
        return
    here = repository or "MODEL"
    serving = instructions(vllm, conversion.config, here, verifier, elsewhere=True)
    yield from _heading("Serve it")
    if repository is None:
        yield "`MODEL` stands for this folder, or for the repository that holds it."
        yield ""
    install = [shlex.join(["pip", "install", *serving.packages])] if serving.packages else []
    yield from _block([*install, serving.command])
    if serving.note:
        yield ""
        yield _text(f"{serving.note}.")


def _checks(report: Report | None) -> Iterator[str]:
    yield from _heading("Validation")
    if report is None:
        yield "It was not validated when it was converted."
        return
    yield "What the converted model was checked for before it appeared:"
    yield ""
    rows = [(_text(check.name), "passed" if check.passed else "failed", _text(check.detail)) for check in report.checks]
    yield from _table(("check", "", "what was found"), rows)
    if report.acceptance is not None:
        yield ""
        yield from _acceptance(report.acceptance)


def _acceptance(measured: Acceptance) -> Iterator[str]:
    yield (
        f"What the verifier accepts of {measured.drafts} drafts over {measured.prompts} prompts, greedily "
        f"({measured.length:.2f} tokens per pass of the verifier):"
    )
    yield ""
    yield from _table(
        ("draft token", "accepted"), ((str(n), f"{rate:.3f}") for n, rate in enumerate(measured.rates, 1))
    )


def _notes(conversion: Conversion) -> Iterator[str]:
    if not conversion.notes:
        return
    yield from _heading("Notes")
    context = conversion.context
    names = {place.name: _short(place) for place in (context.source.place, context.verifier.checkpoint.place)}
    for note in conversion.notes:
        yield f"- {_text(_without_paths(note, names))}"


def _without_paths(text: str, names: Mapping[str, str]) -> str:
    """Return a text in which checkpoints are called as anywhere else, not as on this machine."""
    for name in sorted(names, key=len, reverse=True):
        text = names[name].join(re.split(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])", text))
    return text


def _config(conversion: Conversion) -> Iterator[str]:
    """List what stands at the top of the config: what was asked for, or found out."""
    written = json.loads(conversion.config.to_json())
    tokens = conversion.config.speculators_config.proposal_methods[0].speculative_tokens
    values = {key: value for key, value in written.items() if not isinstance(value, dict)}
    yield from _heading("Configuration")
    yield from _table(
        ("`config.json`", ""),
        (
            (_code(key), _code(json.dumps(value)))
            for key, value in sorted({**values, "speculative_tokens": tokens}.items())
        ),
    )


def _tensors(conversion: Conversion) -> Iterator[str]:
    rows = list(_tensor_rows(conversion))
    yield from _heading("Tensors")
    yield "<details>"
    yield f"<summary>What became of each tensor ({len(rows)})</summary>"
    yield ""
    yield from _table(("source", "output", "what was done"), rows[:MOST_ROWS])
    if len(rows) > MOST_ROWS:
        yield ""
        yield f"… and {len(rows) - MOST_ROWS} more."
    yield ""
    yield "</details>"


def _tensor_rows(conversion: Conversion) -> Iterator[tuple[str, str, str]]:
    for source, target in sorted(conversion.renamed.items()):
        yield _code(source), _code(target), "kept" if source == target else "renamed"
    for source, targets in sorted(conversion.reworked.items()):
        yield _code(source), ", ".join(map(_code, targets)), "cut or joined"
    for source, why in sorted(conversion.dropped.items()):
        yield _code(source), "", f"left out: {_text(why)}"
    for target, why in sorted(conversion.completed.items()):
        yield "", _code(target), f"completed: {_text(why)}"


def _reproduction(conversion: Conversion, max_shard_size: int | None) -> Iterator[str]:
    context, spec = conversion.context, conversion.algorithm.spec
    places = {"SOURCE": context.source.place, "VERIFIER": context.verifier.checkpoint.place}
    source, verifier = (name if place.local is not None else called(place) for name, place in places.items())
    command = ["speculators", "convert", source, "--algorithm", spec.name, "--verifier", verifier]
    given = _given(context)
    command += ["--algorithm-kwargs", json.dumps(given)] if given else []
    command += ["--dtype", context.dtype] if context.dtype else []
    command += ["--max-shard-size", f"{max_shard_size}B"] if max_shard_size else []
    command += ["--self-contained"] if conversion.self_contained else []
    yield from _heading("Make it again")
    for name, place in places.items():
        if place.local is not None:
            yield f"`{name}` stands for {_code(called(place))}, a folder of the machine where it was converted."
            yield ""
    yield from _block([shlex.join(command)])
    yield ""
    yield "`provenance.json` has the versions, and the SHA-256 of every file that was read and written."
    yield ""


def _heading(title: str) -> Iterator[str]:
    yield from ("", f"## {title}", "")


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _block(lines: Iterable[str]) -> Iterator[str]:
    shown = [_line(line) for line in lines]
    longest = max(map(len, re.findall("`+", "\n".join(shown))), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}console", *shown, fence)


def _line(text: str) -> str:
    """Return a text on one line, without control characters."""
    return printable(text.replace("\n", "\\n"))


def _code(text: str) -> str:
    """Return a text as code, whatever it holds, also in a cell of a table."""
    shown = _line(text)
    if _PLAIN.fullmatch(shown) and shown == shown.strip():
        return f"`{shown}`"
    return f"<code>{re.sub(r'[^A-Za-z0-9 ./]', lambda found: f'&#{ord(found[0])};', shown)}</code>"


def _text(text: str) -> str:
    """Return a text that reads as it stands, whatever marks of Markdown, HTML or formulas it holds."""
    shown = re.sub(r"[&<>$\\]", lambda found: f"&#{ord(found[0])};", _line(text))
    shown = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", shown)
    shown = re.sub(r"[*\[\]`|~]", lambda found: f"\\{found[0]}", shown)
    return re.sub(r"^( *\d*)([-#+=.)])", r"\1\\\2", shown)
