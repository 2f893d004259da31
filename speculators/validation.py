"""Check a converted model at three levels: its structure, its forward, its acceptance.

Nothing is taken from memory: config and tensors are read back from the folder that was written. Where
the source is known, what it computes in its training code's semantics is what the output must compute.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators import digests, dtypes, provenance
from speculators import prompts as prompting
from speculators.checkpoint import Checkpoint, stored_dtype
from speculators.converted import algorithm_of, verifier_of
from speculators.errors import CheckpointError, OptionError, ValidationError, reading
from speculators.guard import stated
from speculators.output import PROVENANCE_FILE
from speculators.plan import Facts, match, plan
from speculators.progress import Progress, unheard
from speculators.prompts import Prompt
from speculators.registry import Registry
from speculators.sources import Access
from speculators.table import Table
from speculators.verifier import Verifier
from speculators.weights import Chunk, TensorInfo, pieces

if TYPE_CHECKING:
    from speculators.acceptance import Acceptance, Continuation
    from speculators.config import SpeculatorConfig
    from speculators.convert import Conversion
    from speculators.draft import Draft
    from speculators.parity import Batch, Run
    from speculators.spec import Alternative, ConverterSpec

LEVELS = ("structure", "forward", "acceptance")
"""What can be checked, each level with those before it."""

LOADED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".py")
"""Endings of files that engines load from a folder."""

NO_TELLING = "no difference to tell"
"""The verdict on an alternative that may be as good as what was converted."""

UNTRAINED = 0.25
"""A first-position rate above this is never called hopeless, however repetitive the text is."""


@dataclass(frozen=True)
class Check:
    """One check and its outcome; ``detail`` has the numbers, or says what is wrong."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Trial:
    """The acceptance that was measured with another value of one option, beside that of the output as it is."""

    option: str
    value: Any
    acceptance: Acceptance
    verdict: str


@dataclass(frozen=True)
class Report:
    """The outcome of a validation.

    Attributes:
        checks: Every check that was made, in order.
        acceptance: What was measured, if it was.
        trials: What else was measured in a diagnosis.
    """

    checks: tuple[Check, ...]
    acceptance: Acceptance | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def raise_on_failure(self) -> None:
        """Raise what failed.

        Raises:
            ValidationError: Some check failed; the message holds all that did.
        """
        failed = [f"    {check.name}: {check.detail}" for check in self.checks if not check.passed]
        if failed:
            raise ValidationError("\n".join(["the converted model failed validation:", *failed]))

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON knows."""

        def numbers(acceptance: Acceptance) -> dict[str, Any]:
            return {**vars(acceptance), "rates": acceptance.rates, "length": acceptance.length}

        return {
            "passed": self.passed,
            "checks": [vars(check) for check in self.checks],
            "acceptance": numbers(self.acceptance) if self.acceptance else None,
            "trials": [vars(trial) | {"acceptance": numbers(trial.acceptance)} for trial in self.trials],
        }


def validate_model(
    path: str | Path,
    *,
    verifier: str | Path | None = None,
    source: str | Path | None = None,
    device: str = "cpu",
    level: str = "forward",
    prompts: Sequence[Prompt] | None = None,
    diagnose: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress = unheard,
    registry: Registry | None = None,
    **algorithm_kwargs: Any,
) -> Report:
    """Check any model in the speculators format.

    Args:
        path: The converted model: a local path, a Hugging Face ID (``org/name@revision:folder``) or a URL.
        verifier: The base model, given likewise; the one that its config names by default.
        source: The native checkpoint that it was made from, given likewise, to compare what both compute.
        device: Torch device of the forward and acceptance checks.
        level: ``"structure"``, ``"forward"`` or ``"acceptance"``, each with those before it.
        prompts: Text or token ids to continue for the acceptance check; some are made up by default.
        diagnose: Whether to measure the acceptance of everything else that the checkpoint may have been
            trained with; only at the level ``"acceptance"``.
        token: Token for the Hub; that of ``HF_TOKEN`` or of a login by default.
        cache_dir: Where downloads are kept; huggingface_hub's cache by default.
        offline: Whether nothing but the cache may be used, as where ``HF_HUB_OFFLINE`` says so.
        progress: Called with what is being done, and how many bytes of it are done of how many.
        registry: Where to look for algorithms; the installed plugins by default.
        **algorithm_kwargs: The options with which ``source`` was converted.

    Raises:
        SpeculatorsError: The folder or the verifier cannot be read, or the algorithm is not installed.
            A check that fails is no exception: it is in the report.
    """
    access = Access(token, cache_dir, offline, progress)
    converted = Checkpoint.at(path, access)
    registry = registry or Registry()
    spec = registry.get(algorithm_of(converted)).spec
    base, conversion = Verifier(verifier or verifier_of(converted), access), None
    if source is not None:
        from speculators.convert import prepare, verifying

        native = Checkpoint.at(source, access)
        native.fetch()
        with verifying(native) as verified:
            conversion = prepare(
                native, base, algorithm=spec.name, dtype=None, registry=registry, algorithm_kwargs=algorithm_kwargs
            )
            verified()
            native.place.require_unchanged()
    elif algorithm_kwargs:
        raise OptionError("options of the algorithm say how a source was converted; pass the source as well")
    require_level(level, diagnose)
    files = check_files(converted, read=level != "structure")
    try:
        report = check(
            converted, spec, base, conversion=conversion, device=device, level=level, prompts=prompts, diagnose=diagnose
        )
    except CheckpointError:
        if all(each.passed for each in files):
            raise
        return Report(tuple(files))  # which say why it cannot be read
    return replace(report, checks=(*files, *report.checks))


def check_files(converted: Checkpoint, *, read: bool) -> list[Check]:
    """Compare the files of an output with what was written; no check where its provenance does not tell.

    Args:
        converted: The output.
        read: Whether the content is compared as well, or just the sizes.
    """
    try:
        said = provenance.read_digests(converted)
    except CheckpointError as error:
        return [Check("files", False, str(error))]
    if not said:
        return []
    findings = [
        f"{name} was added"
        for name in converted.place.listing()
        if name.endswith(LOADED) and name not in {*said, PROVENANCE_FILE}
    ]
    for name, written in said.items():
        if not converted.place.has(name):
            findings.append(f"{name} is missing")
            continue
        path = converted.place.path(name)
        with reading(path):
            found = digests.of_file(path) if read else replace(written, size=path.stat().st_size)
        if found.size != written.size:
            findings.append(f"{name} has {found.size} bytes, {written.size} were written")
        elif found != written:
            findings.append(f"the content of {name} is not what was written (SHA-256 {found.sha256[:16]}…)")
    detail = f"{len(said)} files with the {'content' if read else 'sizes'} that {PROVENANCE_FILE} says"
    advice = f"; convert again, or remove {PROVENANCE_FILE} if that is meant"
    return [Check("files", not findings, "; ".join(findings) + advice if findings else detail)]


def check(
    converted: Checkpoint,
    spec: ConverterSpec,
    verifier: Verifier,
    *,
    conversion: Conversion | None = None,
    device: str = "cpu",
    level: str = "forward",
    prompts: Sequence[Prompt] | None = None,
    diagnose: bool = False,
) -> Report:
    """Check a converted model up to ``level``, stopping at the first level that fails.

    Args:
        converted: The output.
        spec: The algorithm that wrote it.
        verifier: The base model.
        conversion: What made it, if that is known; its source is then compared with the output.
        device: Torch device of the forward and acceptance checks.
        level: One of `LEVELS`.
        prompts: What to continue for the acceptance check.
        diagnose: Whether to look for better options at the level ``"acceptance"``.

    Raises:
        OptionError: There is no such level or device, or a diagnosis was asked for at another level.
    """
    require_level(level, diagnose)
    try:
        config = spec.config.read(converted.config)
    except CheckpointError as error:
        return Report((Check("config", False, str(error)),))
    output = _Output(converted, config, spec, verifier)
    checks = [check_structure(output)]
    if level == "structure" or not checks[-1].passed:
        return Report(tuple(checks))
    try:
        checks += check_forward(output, conversion, device)
        if level == "forward" or not checks[-1].passed:
            return Report(tuple(checks))
        measured = _Measurement(output, device, prompts, diagnose)
        checks += measured.checks(conversion)
        return Report(tuple(checks), measured.acceptance, measured.trials)
    except ValidationError as error:
        return Report((*checks, Check(level, False, str(error))))


def require_level(level: str, diagnose: bool = False) -> None:
    """Refuse a level that there is not, and a diagnosis without acceptance.

    Raises:
        OptionError: One of the two.
    """
    if level not in LEVELS:
        raise OptionError(f"validation level {level!r} is none of {', '.join(LEVELS)}")
    if diagnose and level != "acceptance":
        raise OptionError(f"a diagnosis compares acceptance; ask for the level 'acceptance', not {level!r}")


@dataclass(frozen=True)
class _Output:
    converted: Checkpoint
    config: SpeculatorConfig
    spec: ConverterSpec
    verifier: Verifier

    def draft(self, device: str, dtype: str | None = None, config: SpeculatorConfig | None = None) -> Draft:
        from speculators.draft import of_output

        return of_output(self.converted, config or self.config, self.spec, self.verifier, device=device, dtype=dtype)


def check_structure(output: _Output) -> Check:
    """Compare names, shapes and dtypes in the headers with config, table and verifier; needs no torch."""
    tensors, config, spec, verifier = output.converted.tensors, output.config, output.spec, output.verifier
    findings = compare_tensors(tensors, spec, config, verifier.shapes)
    said, _ = stated(spec, config)
    theirs = {"vocab_size": verifier.vocab_size, "target_hidden_size": verifier.hidden_size}
    findings += [
        f"{key} is {size}, the verifier's is {theirs[key]}" for key, size in said.items() if size != theirs[key]
    ]
    if spec.targets(output.converted, spec.draft_to_target) is None and config.draft_vocab_size != verifier.vocab_size:
        findings.append(
            f"draft_vocab_size is {config.draft_vocab_size}, the verifier knows {verifier.vocab_size} tokens, and "
            "nothing maps one to the other"
        )
    findings = findings or spec.inspect(output.converted, config)
    detail = f"{len(tensors)} tensors with the names, shapes and dtypes that config.json requires"
    return Check("structure", not findings, "; ".join(findings) or detail)


def compare_tensors(
    tensors: Mapping[str, TensorInfo],
    spec: ConverterSpec,
    config: SpeculatorConfig,
    verifier_shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Compare an output's tensors with those that its config requires; returns a line for each thing that is wrong.

    Args:
        tensors: What its headers say.
        spec: The algorithm that reads it.
        config: Its config.
        verifier_shapes: Shapes of the verifier's shareable tensors by their role in `Shared`.
    """
    table = Table(tuple(row.as_output() for row in spec.table.moving))
    facts = Facts(dict(spec.dims(config)), spec.parts(config))
    planned = plan(table, tensors, match(table, tensors), facts, verifier_shapes)
    return [*planned.findings, *(f"{name} has no place: {why}" for name, why in planned.dropped.items())]


def check_forward(output: _Output, conversion: Conversion | None, device: str) -> list[Check]:
    """Run the draft in its own dtype: finite numbers, the same twice, and those of its source.

    The drafts are loaded one after the other, so that no more than one is in memory.
    """
    import torch

    from speculators import parity

    if found := _unsound(output.converted):
        return [Check("forward", False, f"{found}: the weights are unsound")]
    verifier = output.verifier
    _, positions = stated(output.spec, output.config)
    batches = parity.batches(verifier.vocab_size, positions or verifier.max_positions or 0)
    draft = output.draft(device)
    runs = [parity.run(draft, batch) for batch in batches]
    again = parity.run(draft, batches[0])
    mapped = (draft.layers, draft.targets)
    del draft
    named = [("hidden states", run.hidden, again.hidden) for run in runs]
    named += [("logits", run.logits, again.logits) for run in runs if run.logits is not None]  # type: ignore[misc]
    for name, values, _ in named:
        if not torch.isfinite(values).all():
            detail = f"{name} hold NaN or infinity: the weights or their dtype are unsound"
            return [Check("forward", False, detail)]
    if not torch.equal(runs[0].hidden, again.hidden):
        return [Check("forward", False, f"hidden states differ between two runs on {device}")]
    logits, size = runs[0].logits, output.config.draft_vocab_size
    if logits is not None and logits.shape[-1] != size:
        detail = f"the config says draft_vocab_size {size}, and the logits are for {logits.shape[-1]} tokens"
        return [Check("forward", False, detail)]
    seen = f"hidden states {list(runs[0].hidden.shape)}"
    seen += "" if logits is None else f" and logits {list(logits.shape)}"
    unseen = "; no logits, as no file holds the LM head" if logits is None else ""
    checks = [Check("forward", True, f"{seen} finite and repeatable in {output.config.dtype} on {device}{unseen}")]
    if conversion is not None:
        checks.append(_check_parity(runs, mapped, conversion, batches, device, output.config.dtype))
    return checks


def _unsound(converted: Checkpoint) -> str:
    """Say which weights hold values that are no numbers; nothing when all are."""
    found = (unsound(name, info.dtype, [converted.stretch(name)]) for name, info in converted.tensors.items())
    return "; ".join(filter(None, found))


def unsound(name: str, dtype: str, chunks: Iterable[Chunk]) -> str:
    """Say how many values of a tensor are no numbers; nothing when all are. Reads all chunks in any case."""
    count = 0
    for chunk in chunks:
        count += sum(dtypes.count_unsound(piece, dtype) for piece in pieces(chunk)) if dtype in dtypes.FLOATS else 0
    return f"{name} holds {count} values that are NaN or infinite" if count else ""


def _check_parity(
    runs: Sequence[Run],
    mapped: tuple[tuple[int, ...], Any],
    conversion: Conversion,
    batches: Sequence[Batch],
    device: str,
    dtype: str,
) -> Check:
    """Compare runs of the output with the same runs of its source, as the training code computes them."""
    from speculators import parity
    from speculators.draft import of_source

    source = of_source(conversion, device=device, dtype=dtype)
    # Where the source was cast up, embeddings that it shares with the verifier are no longer rounded.
    tolerance = max(parity.TOLERANCES[name] for name in (dtype, stored_dtype(conversion.context.source)))
    worst: dict[str, float] = {}
    problems = []
    if mapped[0] != source.layers:
        problems.append(
            f"the output reads the states that enter layers {list(mapped[0])} of the verifier, "
            f"its source those of {list(source.layers)}"
        )
    if lost := parity.count_differences(mapped[1], source.targets):
        problems.append(f"{lost} draft tokens stand for other tokens of the verifier than in the source")
    where, largest = "", tolerance
    for run, batch in zip(runs, batches, strict=True):
        expected = parity.run(source, batch)
        differences = {"hidden states": parity.relative(run.hidden, expected.hidden)}
        if run.logits is not None and expected.logits is not None:
            differences["logits"] = parity.relative(run.logits, expected.logits)
        worst = {name: max(worst.get(name, 0.0), value) for name, value in differences.items()}
        if max(differences.values()) > largest:
            largest = max(differences.values())
            where = parity.first_difference(run, expected, source.sources, conversion, tolerance)
    where = where or "NaN or infinity hides where"
    off = " and ".join(f"{name} by {value:.2g}" for name, value in worst.items() if not value <= tolerance)
    if off:
        problems.append(
            f"{off} of the largest value away from what the source computes (allowed {tolerance:.0e}); {where}"
        )
    if problems:
        return Check("parity", False, "; ".join(problems))
    if not any(worst.values()):
        return Check("parity", True, f"{' and '.join(worst)} are exactly what the source computes")
    close = " and ".join(f"{name} within {value:.1g}" for name, value in worst.items())
    return Check("parity", True, f"{close} of what the source computes (allowed {tolerance:.0e})")


class _Measurement:
    """Acceptance of an output, of its source, and of what else the checkpoint may have been trained with.

    Verifier and draft run in the verifier's dtype, as inference engines run them.
    """

    def __init__(self, output: _Output, device: str, prompts: Sequence[Prompt] | None, diagnose: bool) -> None:
        from speculators.acceptance import continue_prompts

        self.output = output
        self.device = device
        self.diagnose = diagnose
        self.trials: tuple[Trial, ...] = ()
        given = None if prompts is None else prompting.token_ids(prompts, output.verifier)
        if given is not None and not given:
            raise OptionError("the list of prompts is empty; leave it out to have some made up")
        self.model = output.verifier.load(device)
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.depth = output.config.speculators_config.proposal_methods[0].speculative_tokens
        layers = range(output.verifier.num_layers + 1)
        self.continuations: list[Continuation] = continue_prompts(
            self.model, given or prompting.made_up(output.verifier, self.model), layers, depth=self.depth
        )
        self.acceptance = self._measure(output.draft(device, self.dtype))

    def _measure(self, draft: Draft) -> Acceptance:
        from speculators.acceptance import measure

        draft.hold(self.model, self.output.verifier.weights)
        return measure(draft, self.continuations, depth=self.depth)

    def checks(self, conversion: Conversion | None) -> list[Check]:
        found = [self._verdict()]
        if conversion is not None:
            found.append(self._check_source(conversion))
        if self.diagnose:
            found.append(self._check_options())
        return found

    def _verdict(self) -> Check:
        measured = self.acceptance
        rates = " / ".join(f"{rate:.3f}" for rate in measured.rates)
        detail = (
            f"each pass of the verifier yields {measured.length:.2f} tokens (mean acceptance length); "
            f"rates {rates} over {measured.drafts} drafts in {self.dtype}"
        )
        if not measured.accepted[0]:
            return Check("acceptance", False, f"{detail}: the verifier accepts nothing that the draft proposes")
        floor = min(measured.commonest / measured.drafts, UNTRAINED)
        if measured.rates[0] < floor:
            return Check(
                "acceptance", False, f"{detail}: always proposing the commonest token would do better ({floor:.3f})"
            )
        return Check("acceptance", True, detail)

    def _check_source(self, conversion: Conversion) -> Check:
        from speculators.draft import of_source

        theirs = self._measure(of_source(conversion, device=self.device, dtype=self.dtype))
        ours = self.acceptance
        detail = f"the source accepts {list(theirs.accepted)} of {theirs.drafts} drafts"
        if (theirs.drafts, theirs.accepted) == (ours.drafts, ours.accepted):
            return Check("acceptance parity", True, f"{detail}, exactly as the output does")
        return Check("acceptance parity", False, f"{detail}, the output {list(ours.accepted)} of {ours.drafts}")

    def _check_options(self) -> Check:
        """Change one option after another as long as that is evidently better, and say what came out."""
        spec, verifier = self.output.spec, self.output.verifier
        config, best = self.output.config, self.acceptance
        chosen: dict[str, Any] = {}
        while True:
            trials = []
            for other in spec.alternatives(config, verifier):
                if other.option not in chosen:
                    draft = self.output.draft(self.device, self.dtype, other.config)
                    trials.append((self._measure(draft), other))
            if not chosen:
                self.trials = tuple(self._trial(other, measured) for measured, other in trials)
            better = [trial for trial in trials if trial[0].evidently_better(best)]
            if not better:
                break
            best, leading = max(better, key=lambda trial: trial[0].per_step)
            config = leading.config
            chosen[leading.option] = leading.value
        if chosen:
            return Check("diagnosis", False, self._advice(chosen, best))
        return Check("diagnosis", True, self._confirmation())

    def _advice(self, chosen: Mapping[str, Any], best: Acceptance) -> str:
        values = ", ".join(f"{option}={json.dumps(value)}" for option, value in chosen.items())
        return (
            f"{values} accepts {best.per_step:.2f} tokens per step, as converted {self.acceptance.per_step:.2f}: "
            f"convert with --algorithm-kwargs '{json.dumps(chosen)}', and correct config.json if it says otherwise"
        )

    def _trial(self, other: Alternative, measured: Acceptance) -> Trial:
        verdict = NO_TELLING
        if measured.evidently_better(self.acceptance):
            verdict = "evidently better"
        elif self.acceptance.evidently_better(measured):
            verdict = "evidently worse"
        return Trial(other.option, other.value, measured, verdict)

    def _confirmation(self) -> str:
        if not self.trials:
            return "tensors leave nothing open"
        detail = f"nothing accepts evidently more than as converted, {self.acceptance.per_step:.2f} tokens per step"
        unclear = any(trial.verdict == NO_TELLING for trial in self.trials)
        return f"{detail}; more prompts may tell more" if unclear else detail
