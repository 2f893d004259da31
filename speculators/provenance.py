"""``provenance.json``: what an output was made from, by what, and the digest of each of its files.

It names nothing that changes from run to run, no machine and no path, so that the same input gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from speculators import __version__, traces
from speculators.checkpoint import read_json
from speculators.digests import Digest
from speculators.errors import CheckpointError
from speculators.output import OWN_FILES, PROVENANCE_FILE

if TYPE_CHECKING:
    from speculators.checkpoint import Checkpoint
    from speculators.convert import Conversion

VERSION = 1
"""The version of what this module writes."""


def describe(
    conversion: Conversion,
    read: Mapping[str, Digest],
    written: Mapping[str, Digest],
    max_shard_size: int | None,
    validated: str | None,
) -> str:
    """Return the content of ``provenance.json``.

    Args:
        conversion: What was done.
        read: Name → digest of every file of the source that was read.
        written: Name → digest of every file of the output but this one.
        max_shard_size: Bytes of tensors per file, if that was asked for.
        validated: How far the output is checked before it appears; ``None`` when it is not.
    """
    record = origin(conversion, read, max_shard_size, validated)
    record["tensors"] = {name: trace.to_json() for name, trace in traces.of_conversion(conversion).items()}
    record["output"] = {name: asdict(written[name]) for name in written}
    return json.dumps(record, indent=2, sort_keys=True) + "\n"


def origin(
    conversion: Conversion, read: Mapping[str, Digest], max_shard_size: int | None, validated: str | None
) -> dict[str, Any]:
    """Return all of a record but what was written, which follows from this; the arguments are those of `describe`."""
    from pydantic_core import to_jsonable_python

    context, algorithm = conversion.context, conversion.algorithm
    verifier = context.verifier.checkpoint
    return {
        "version": VERSION,
        "source": {**context.source.place.identity, "files": {name: asdict(read[name]) for name in read}},
        "verifier": {**verifier.place.identity, "files": verifier.files_read},
        "converter": {
            "speculators": __version__,
            "package": algorithm.package,
            "package_version": algorithm.version,
            "algorithm": algorithm.spec.name,
            "options": to_jsonable_python(context.options, fallback=str),
            "dtype": context.dtype,
            "max_shard_size": max_shard_size,
            "self_contained": conversion.self_contained,
            "table_sha256": algorithm.spec.table.sha256,
            "validated": validated,
        },
    }


def read_record(converted: Checkpoint) -> Mapping[str, Any]:
    """Return what an output says about itself; nothing where it says nothing.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not converted.place.has(PROVENANCE_FILE):
        return {}
    return read_json(converted.place.path(PROVENANCE_FILE), f"{converted.name}/{PROVENANCE_FILE}")


def read_digests(converted: Checkpoint) -> dict[str, Digest]:
    """Return name → digest of each file of an output as it was written; nothing where nothing says so.

    Raises:
        CheckpointError: The record is damaged.
    """
    said = read_record(converted).get("output", {})
    if not isinstance(said, dict) or not all(map(_is_entry, said, said.values())):
        raise CheckpointError(f"{converted.name}/{PROVENANCE_FILE} has no sizes and checksums under 'output'")
    return {name: Digest(entry["size"], entry["sha256"]) for name, entry in said.items()}


def _is_entry(name: str, entry: object) -> bool:
    if not OWN_FILES.fullmatch(name) or name == PROVENANCE_FILE or not isinstance(entry, dict):
        return False
    return type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)
