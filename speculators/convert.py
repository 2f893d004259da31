"""Convert a native draft checkpoint into the speculators format."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from speculators import card, dtypes, output, provenance, writer
from speculators.beside import Beside
from speculators.checkpoint import Checkpoint, stored_dtype
from speculators.config import MODEL_TYPE_KEY
from speculators.digests import Digest
from speculators.errors import (
    AlreadyConvertedError,
    CheckpointError,
    MismatchError,
    OptionError,
    PublishError,
    SpeculatorsError,
    described,
)
from speculators.guard import HookError
from speculators.operations import cast, derive
from speculators.plan import Derivation, Facts, Move, Plan, match, plan
from speculators.progress import Progress, adding_up, unheard
from speculators.registry import AUTO, Algorithm, Registry
from speculators.serving import Instructions, instructions
from speculators.sharing import Completion, Equal, complete, settle
from speculators.sources import Access
from speculators.spec import Context, ConverterSpec
from speculators.verifier import Verifier
from speculators.writer import Payload

if TYPE_CHECKING:
    from speculators.config import SpeculatorConfig
    from speculators.publish import Destination
    from speculators.validation import Report


@dataclass(frozen=True)
class Conversion:
    """Everything that is decided about a conversion before a byte is written.

    Attributes:
        context: What it starts from.
        algorithm: The plugin that does it.
        facts: What the plugin found out about the source.
        config: The output's config.
        moves: Tensors to write under new names, sorted by them.
        derivations: Tensors to make.
        dropped: Source name → why it is left out.
        equal: Source name → the verifier's tensor that it equals, of those that are left out for that.
        completions: Tensors of the verifier's to write.
        from_verifier: Output name → the verifier's tensor that engines use in its place.
        notes: What the user should know, one sentence each.
        self_contained: Whether what drafts share with the verifier was to be written.
    """

    context: Context
    algorithm: Algorithm
    facts: Facts
    config: SpeculatorConfig
    moves: tuple[Move, ...]
    derivations: tuple[Derivation, ...]
    dropped: dict[str, str]
    equal: dict[str, Equal]
    completions: tuple[Completion, ...]
    from_verifier: dict[str, str]
    notes: tuple[str, ...]
    self_contained: bool = False

    @property
    def renamed(self) -> dict[str, str]:
        """Source name → output name, of every tensor that is written as it is."""
        return {move.source: move.target for move in self.moves}

    @property
    def reworked(self) -> dict[str, tuple[str, ...]]:
        """Source name → names of the tensors into which it is cut or joined."""
        found: dict[str, tuple[str, ...]] = {}
        for made in self.derivations:
            for source in made.sources if made.reworks else ():
                found[source] = (*found.get(source, ()), made.target)
        return found

    @property
    def completed(self) -> dict[str, str]:
        """Output name → what it is completed with."""
        return (
            {made.target: made.why for made in self.derivations if not made.reworks}
            | {each.target: f"the verifier's {each.role} was written" for each in self.completions}
            | {name: f"the verifier's {role} is used" for name, role in self.from_verifier.items()}
        )


@dataclass(frozen=True)
class ConversionResult:
    """What `convert_model` did.

    Attributes:
        output_path: The folder that holds the converted model.
        source: What was converted, as the user named it, without secrets.
        algorithm: Name of the algorithm.
        package: The plugin package that did it, with its version.
        renamed: Source name → output name, of every tensor that was written as it is.
        reworked: Source name → names of the tensors into which it was cut or joined.
        dropped: Source name → why it was left out.
        completed: Output name → what it was completed with: made from other tensors, written from the
            verifier, or left to the verifier, whose tensor engines share.
        notes: What the user should know, one sentence each.
        serving: How vLLM serves the output; ``None`` when it does not serve its type.
        validation: The outcome of every check; ``None`` when validation was switched off.
        pushed_to: Address of the repository that the output was pushed to, if it was.
    """

    output_path: Path
    source: str
    algorithm: str
    package: str
    renamed: dict[str, str]
    reworked: dict[str, tuple[str, ...]]
    dropped: dict[str, str]
    completed: dict[str, str]
    notes: tuple[str, ...]
    serving: Instructions | None
    validation: Report | None
    pushed_to: str | None = None


def convert_model(
    model: str | Path,
    *,
    verifier: str | Path,
    algorithm: str = AUTO,
    output_path: str | Path = "converted",
    validate_device: str = "cpu",
    validate: bool = True,
    validate_level: str = "forward",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    self_contained: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress = unheard,
    registry: Registry | None = None,
    **algorithm_kwargs: Any,
) -> ConversionResult:
    """Convert the draft checkpoint ``model`` and write it to ``output_path``.

    Args:
        model: The native checkpoint: a local path, a Hugging Face ID (``org/name@revision:folder``) or a URL.
        verifier: The base model, given likewise; its config completes and checks the draft's, and its
            weights, if there are any, tell which of the draft's tensors are copies. Of weights that lie
            elsewhere, only what is needed is fetched.
        algorithm: Name or alias of an installed algorithm, or ``"auto"`` to let the plugins look.
        output_path: Folder to write.
        validate_device: Torch device on which the converted draft is run.
        validate: Whether to check the result before it appears.
        validate_level: How far: ``"structure"``, ``"forward"`` or ``"acceptance"``, each with those before it.
        dtype: Cast floating tensors to this dtype (``"float16"``, …); as stored by default.
        max_shard_size: Most bytes of tensors per file (``"5GB"``); one file by default.
        overwrite: Whether to replace a converted model at ``output_path``.
        self_contained: Whether to write the tensors that drafts share with their verifier, so that the output
            loads without it.
        push_to_hub: Repository of the Hub (``org/name``) to upload the output to when it is complete.
        private: Whether a repository that is made for it is private.
        token: Token for the Hub; that of ``HF_TOKEN`` or of a login by default.
        cache_dir: Where downloads are kept; huggingface_hub's cache by default.
        offline: Whether nothing but the cache may be used, as where ``HF_HUB_OFFLINE`` says so.
        progress: Called with what is being done, and how many bytes of it are done of how many.
        registry: Where to look for algorithms; the installed plugins by default.
        **algorithm_kwargs: The algorithm's own options, as ``--list-algorithms`` shows them.

    Raises:
        PublishError: The output was not uploaded. Where that was not known before, it is complete at ``output_path``,
            and the error's ``result`` says what was done.
        SpeculatorsError: Anything that keeps the conversion from being right. ``output_path`` is
            then as it was before.
    """
    registry = registry or Registry()
    target, shard_size = check_arguments(
        model,
        verifier,
        algorithm=algorithm,
        output_path=output_path,
        validate_level=validate_level if validate else None,
        dtype=dtype,
        max_shard_size=max_shard_size,
        registry=registry,
        algorithm_kwargs=algorithm_kwargs,
    )
    access = Access(token, cache_dir, offline, progress)
    destination = find_destination(push_to_hub, access, private)
    report = None
    with output.staged(target, overwrite) as folder:
        source, base = Checkpoint.at(model, access), Verifier(verifier, access)
        require_native(source)
        if validate and source.place.local is None:
            require_device(validate_device)  # of local files, checksums are computed while this imports torch
        source.fetch()
        with verifying(source) as verified:
            if validate:
                require_device(validate_device)
            conversion = prepare(
                source,
                base,
                algorithm=algorithm,
                dtype=dtype,
                registry=registry,
                algorithm_kwargs=algorithm_kwargs,
                self_contained=self_contained,
                progress=progress,
            )
            spec = conversion.algorithm.spec
            serving = instructions(spec.vllm, conversion.config, target, base) if spec.vllm else None
            with output.writing(target):
                write(
                    conversion,
                    folder,
                    verified,
                    max_shard_size=shard_size,
                    validated=validate_level if validate else None,
                    progress=progress,
                )
        if validate:
            from speculators.validation import check

            progress("validating", 0, 0)
            report = check(
                Checkpoint(folder),
                spec,
                conversion.context.verifier,
                conversion=conversion,
                device=validate_device,
                level=validate_level,
            )
            report.raise_on_failure()
        licensed, doubts = _license(source)
        name = destination.name if destination else None
        text = card.model_card(conversion, report=report, license=licensed, max_shard_size=shard_size, repository=name)
        with output.writing(target):
            writer.write_text(folder, output.CARD_FILE, text)
        for read in (source, base.checkpoint):
            read.place.require_unchanged()
    result = ConversionResult(
        output_path=target,
        source=source.name,
        algorithm=spec.name,
        package=conversion.algorithm.origin,
        renamed=conversion.renamed,
        reworked=conversion.reworked,
        dropped=conversion.dropped,
        completed=conversion.completed,
        notes=(*conversion.notes, *doubts, *(destination.doubts(base) if destination else ())),
        serving=serving,
        validation=report,
    )
    if destination is None:
        return result
    return _push(result, destination, f"Convert {card.called(source.place)} with {card.versions(conversion.algorithm)}")


def find_destination(repository: str | None, access: Access, private: bool) -> Destination | None:
    """Return where to push to, if that was asked for and can be."""
    if repository is None:
        if private:
            raise OptionError("private says how a repository is made; name one to push to (--push-to-hub)")
        return None
    from speculators.publish import Destination

    return Destination.find(repository, access, private=private)


def _push(result: ConversionResult, destination: Destination, message: str) -> ConversionResult:
    """Upload what was converted, and say so in its result."""
    try:
        pushed = destination.push(result.output_path, message)
    except PublishError as error:
        error.result = result
        raise
    except KeyboardInterrupt:
        warnings.warn(f"the output is complete in {result.output_path}; its upload was interrupted", stacklevel=2)
        raise
    return replace(result, pushed_to=pushed.url, notes=(*result.notes, *pushed.notes))


def _license(source: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """Return the license of a source as its card says it, and a note where that cannot be read."""
    try:
        return card.source_license(source.place), []
    except CheckpointError as error:
        return {}, [f"the card names no license, as that of the source cannot be read: {error}"]


def check_arguments(
    model: str | Path,
    verifier: str | Path,
    *,
    algorithm: str,
    output_path: str | Path,
    validate_level: str | None,
    dtype: str | None,
    max_shard_size: str | int | None,
    registry: Registry,
    algorithm_kwargs: dict[str, Any],
) -> tuple[Path, int | None]:
    """Refuse what no conversion can be asked for, before anything is read; the arguments are `convert_model`'s.

    Returns:
        The folder to write, and the most bytes of tensors per file, if that was asked for.

    Raises:
        SpeculatorsError: An argument is wrong by itself.
    """
    target = output.target_of(output_path, (model, verifier))
    shard_size = None if max_shard_size is None else writer.parse_size(max_shard_size)
    if validate_level is not None:
        from speculators.validation import require_level

        require_level(validate_level)
    require_dtype(dtype)
    if algorithm != AUTO:
        parse_options(registry.get(algorithm), algorithm_kwargs)
    return target, shard_size


@contextmanager
def verifying(source: Checkpoint) -> Iterator[Callable[[], dict[str, Digest]]]:
    """Read a source for its digests and compare it with its checksums, beside other work.

    Yields:
        What waits for the digests of all files that were read.

    Raises:
        CheckpointError: The source was damaged after it was written, also where that led to another error of it.
    """
    stopped = Event()
    with Beside(lambda: source.digests(stopped)) as verified:
        try:
            yield verified.result
        except CheckpointError:
            if source.checked:
                verified.result()
            raise
        finally:
            stopped.set()


def require_native(source: Checkpoint) -> None:
    """Refuse a source that is an output.

    Raises:
        AlreadyConvertedError: It is one.
    """
    if MODEL_TYPE_KEY in source.config:
        raise AlreadyConvertedError(
            f"{source.name} is in the speculators format already (type {source.config[MODEL_TYPE_KEY]!r}, written by "
            f"speculators {source.config.get('speculators_version', 'of an unknown version')}); nothing was converted"
        )


def require_dtype(dtype: str | None) -> None:
    """Refuse a dtype that nothing can be cast to.

    Raises:
        OptionError: It is none of those that can be written.
    """
    if dtype is not None and dtypes.STORED_NAMES.get(dtype) not in dtypes.FLOATS:
        known = ", ".join(dtypes.TORCH_NAMES[name] for name in dtypes.FLOATS)
        raise OptionError(f"dtype {dtype!r} is none of {known}")


def require_device(name: str) -> None:
    """Refuse a device on which nothing can be run; imports torch.

    Raises:
        OptionError: It is one.
    """
    from speculators.draft import find_device

    find_device(name)


def prepare(
    source: Checkpoint,
    verifier: Verifier,
    *,
    algorithm: str,
    dtype: str | None,
    registry: Registry,
    algorithm_kwargs: dict[str, Any],
    self_contained: bool = False,
    progress: Progress = unheard,
) -> Conversion:
    """Read, recognise, plan and configure: all of a conversion but the writing.

    Raises:
        SpeculatorsError: Anything that keeps the conversion from being right.
    """
    require_native(source)
    require_dtype(dtype)
    chosen = registry.recognise(source) if algorithm == AUTO else registry.get(algorithm)
    spec = chosen.spec
    context, facts, planned = examine(source, verifier, spec, parse_options(chosen, algorithm_kwargs), dtype)
    if planned.findings:
        raise MismatchError(
            f"{source.name} cannot be converted as {spec.name!r} (nothing was written):",
            planned.findings,
            advice=_advice(chosen, planned, registry),
        )
    settled = settle(planned.comparisons, context, self_contained=self_contained, progress=progress)
    notes = settled.notes
    left = dict(planned.from_verifier) | {
        comparison.move.target: comparison.row.verifier
        for comparison in planned.comparisons
        if comparison.move.source in settled.dropped
    }
    completions: list[Completion] = []
    if self_contained:
        rounded = {spec.embedding: stored_dtype(source)} if spec.copies_embedding else {}
        completions, unroomed = complete(left, context, spec.table, rounded)
        notes += unroomed
    written = {each.target for each in completions}
    config, more = spec.configure(context, facts)
    return Conversion(
        context,
        chosen,
        facts,
        config,
        tuple(sorted((*planned.moves, *settled.kept), key=lambda move: move.target)),
        planned.derivations,
        {**planned.dropped, **settled.dropped},
        settled.equal,
        tuple(completions),
        {target: role for target, role in left.items() if target not in written},
        (*facts.notes, *notes, *more),
        self_contained,
    )


def examine(
    source: Checkpoint, verifier: Verifier, spec: ConverterSpec, options: Any, dtype: str | None
) -> tuple[Context, Facts, Plan]:
    """Find out what becomes of each tensor by names and shapes; what stands in the way is among the plan's findings.

    Raises:
        SpeculatorsError: Nothing more can be found out.
    """
    matching = match(spec.table, source.tensors)
    context = Context(source, verifier, options, matching, dtype, spec.nested)
    facts = spec.examine(context) if not matching.refused else Facts({})  # an unsupported kind says all
    return context, facts, plan(spec.table, source.tensors, matching, facts, verifier.shapes)


def parse_options(algorithm: Algorithm, given: dict[str, Any]) -> Any:
    """Check keyword arguments against the algorithm's schema.

    Raises:
        OptionError: Names every unknown or ill-typed one and lists those that exist.
        PluginError: A validator raises what pydantic does not know.
    """
    from pydantic import ValidationError

    schema = algorithm.spec.options
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            name = ".".join(map(str, detail["loc"])) or "options"
            if detail["type"] == "extra_forbidden":
                problems.append(f"{algorithm.spec.name} has no option {name!r}")
            else:
                problems.append(f"{name}: {detail['msg'].removeprefix('Value error, ')} (got {detail['input']!r})")
        known = ", ".join(sorted(schema.model_fields))
        raise OptionError(f"{'; '.join(problems)}. Options of {algorithm.spec.name}: {known}") from error
    except (SpeculatorsError, MemoryError):
        raise
    except Exception as error:
        raise HookError(algorithm.origin, f"a validator of its options raised {described(error)}") from error


def _advice(chosen: Algorithm, planned: Plan, registry: Registry) -> str:
    if not any("matches no row" in finding for finding in planned.findings):
        return ""
    return (
        f"If another algorithm saved it, pass --algorithm ({registry.describe_installed()}); if {chosen.spec.name!r} "
        f"should know these tensors, the table of {chosen.package} lacks rows."
    )


def write(
    conversion: Conversion,
    folder: Path,
    read: Callable[[], dict[str, Digest]],
    *,
    max_shard_size: int | None = None,
    validated: str | None = None,
    progress: Progress = unheard,
) -> None:
    """Write config, weights and provenance of a prepared conversion into ``folder``.

    Args:
        conversion: What to write.
        folder: Where to write.
        read: Waits for the digests of the source's files.
        max_shard_size: Bytes of tensors per file; one file by default.
        validated: How far the caller checks the output before it appears; not at all by default.
        progress: Told about the bytes that were written.

    Raises:
        CheckpointError: The source was changed meanwhile.
    """
    payloads = list(payloads_of(conversion))
    report = adding_up(progress, "writing", sum(payload.info.nbytes for payload in payloads))
    written = writer.write_text(folder, output.CONFIG_FILE, conversion.config.to_json())
    written |= writer.write_bytes(folder, output.NATIVE_CONFIG_FILE, conversion.context.source.config_bytes)
    written |= writer.write_safetensors(folder, payloads, max_shard_size=max_shard_size, report=report)
    record = provenance.describe(conversion, read(), written, max_shard_size, validated)
    writer.write_text(folder, output.PROVENANCE_FILE, record)


def payloads_of(conversion: Conversion) -> Iterator[Payload]:
    """Yield every tensor that a conversion writes; its bytes are read or made when they are asked for.

    Raises:
        PluginError: An operation of the table fails; perhaps only while bytes are asked for.
        CheckpointError: A value cannot be cast; only while bytes are asked for.
    """
    source, weights = conversion.context.source, conversion.context.verifier.weights
    asked = conversion.context.dtype
    for move in conversion.moves:
        yield _cast(Payload(move.target, move.info, map(source.stretch, [move.source])), asked)
    for made in conversion.derivations:
        yield _cast(Payload(made.target, *derive(made, source)), asked)
    for each in conversion.completions:
        assert weights is not None  # noqa: S101 - a completion has come from them
        chunks = weights.chunks(each.source, 0, each.info.nbytes)
        yield _cast(_cast(Payload(each.target, each.info, chunks), each.dtype), asked)


def _cast(payload: Payload, dtype: str | None) -> Payload:
    wanted, stored = dtypes.STORED_NAMES[dtype] if dtype else None, payload.info.dtype
    if wanted is None or stored not in dtypes.FLOATS or stored == wanted:
        return payload
    chunks = cast(payload.chunks, payload.name, stored, wanted)
    return Payload(payload.name, replace(payload.info, dtype=wanted), chunks)
