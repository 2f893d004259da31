"""Whether an output is what a conversion would write now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from speculators import digests, provenance, writer
from speculators.checkpoint import Checkpoint
from speculators.convert import Conversion, payloads_of, prepare, verifying
from speculators.errors import CheckpointError
from speculators.output import CONFIG_FILE, PROVENANCE_FILE
from speculators.registry import Registry
from speculators.sources import local_path
from speculators.validation import LEVELS, check_files
from speculators.verifier import Verifier
from speculators.weights import pieces, read
from speculators.writer import Payload

if TYPE_CHECKING:
    from speculators.batch import Job
    from speculators.sources import Access

LONGEST_VALUE = 60
"""Characters of a value that are shown."""


@dataclass(frozen=True)
class Earlier:
    """An output that is there already.

    Attributes:
        conversion: What would be written now; ``None`` where the output cannot be read.
        difference: What is otherwise in the output; empty where nothing is.
    """

    conversion: Conversion | None
    difference: str


def look(job: Job, access: Access) -> Earlier | None:
    """Compare what is at the output path with what a job would write there; ``None`` where nothing says what it is.

    Everything is decided anew, as before a conversion, and the source is read from its beginning to its end. The
    output is the same when its provenance and its config are those that would be written now, its files are those
    that its provenance names, and tensors that are no plain copies hold what would be computed or fetched now.

    Raises:
        SpeculatorsError: The conversion would be refused now.
    """
    target = local_path(job.output_path)
    if not (target / PROVENANCE_FILE).is_file():
        return None
    try:
        converted = Checkpoint(target)
        recorded = provenance.read_record(converted)
    except CheckpointError as error:
        return Earlier(None, str(error))
    source, base = Checkpoint.at(job.model, access), Verifier(job.verifier, access)
    source.fetch()
    with verifying(source) as verified:
        conversion = prepare(
            source,
            base,
            algorithm=job.algorithm,
            dtype=job.dtype,
            registry=Registry(),
            algorithm_kwargs=job.algorithm_kwargs,
            self_contained=job.self_contained,
            progress=access.progress,
        )
        shard_size = None if job.max_shard_size is None else writer.parse_size(job.max_shard_size)
        level = job.validate_level if job.validation else None
        now = provenance.origin(conversion, verified(), shard_size, level)
    difference = (
        _change(json.loads(json.dumps(now)), recorded)
        or _change_of_config(conversion, recorded)
        or "; ".join(check.detail for check in check_files(converted, read=True) if not check.passed)
        or _change_of_tensors(conversion, converted)
    )
    for place in (source.place, base.checkpoint.place):
        place.require_unchanged()
    return Earlier(conversion, difference)


def _change(now: dict[str, Any], recorded: Mapping[str, Any]) -> str:
    """Say what differs first between a record and what it would be now; what else it records is passed over."""
    wanted = now["converter"].pop("validated")
    then = json.loads(json.dumps({key: recorded.get(key) for key in now}))
    reached = then["converter"].pop("validated", None) if isinstance(then["converter"], dict) else None
    if change := _first_change(now, then):
        return change
    known = (None, *LEVELS)
    if reached not in known or known.index(reached) < known.index(wanted):
        return f"it was validated to the level {reached}, {wanted} is asked for"
    return ""


def _first_change(now: Any, then: Any, place: str = "") -> str:
    if isinstance(now, dict) and isinstance(then, dict):
        changes = (
            _first_change(now.get(key), then.get(key), f"{place}.{key}" if place else key)
            for key in sorted({*now, *then})
        )
        return next(filter(None, changes), "")
    return "" if now == then else f"{place} was {_shown(then)} and is now {_shown(now)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _change_of_config(conversion: Conversion, recorded: Mapping[str, Any]) -> str:
    written = recorded.get("output")
    entry = written.get(CONFIG_FILE) if isinstance(written, dict) else None
    now = digests.of_bytes(conversion.config.to_json().encode())
    return "" if entry == vars(now) else f"its {CONFIG_FILE} is not what would be written now"


def _change_of_tensors(conversion: Conversion, converted: Checkpoint) -> str:
    tensors = {tensor.name: tensor for tensor in payloads_of(conversion)}
    if {name: tensor.info for name, tensor in tensors.items()} != dict(converted.tensors):
        return "it does not hold the tensors that would be written now"
    copied = {move.target for move in conversion.moves}
    changed = (name for name, tensor in tensors.items() if name not in copied and not _is_stored(tensor, converted))
    name = next(changed, None)
    return "" if name is None else f"its {name} does not hold what would be written now"


def _is_stored(tensor: Payload, converted: Checkpoint) -> bool:
    start = 0
    for chunk in tensor.chunks:
        for piece in pieces(chunk):
            if read(converted.stretch(tensor.name, start, start + len(piece))) != piece:
                return False
            start += len(piece)
    return True
