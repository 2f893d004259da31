"""JSON from strangers: read in bounded time and memory, with one meaning or none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

LARGEST = 32 << 20
"""Bytes of a config, a header or an index; the indexes of the largest models have about 26 MB."""

LARGEST_TEXT = 8 << 20
"""Bytes of one with other characters than ASCII, of which a single one makes every other take four bytes."""

MOST_CONTAINERS = 250_000
"""Objects and lists in one; a header has three for each tensor, and each takes some hundred bytes of memory."""

MOST_ITEMS = 500_000
"""Commas in one."""


def parse(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: It is none, or too large, too deep, or ambiguous; the message says which.
    """
    if len(data) > LARGEST:
        raise ValueError(f"it has {len(data)} bytes, more than any config, header or index")
    if len(data) > LARGEST_TEXT and (b"\\u" in data or not data.isascii()):
        raise ValueError(f"it has {len(data)} bytes and other characters than ASCII, as no large header or index")
    if data.count(b"{") + data.count(b"[") > MOST_CONTAINERS or data.count(b",") > MOST_ITEMS:
        raise ValueError("it holds more objects and lists than any config, header or index")
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unambiguous)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text: {error.reason} at byte {error.start}") from None
    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}, expected an object")
    if b"\\ud" in data or b"\\uD" in data:
        _require_text(content)
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that occurs twice with different values, of which each reader takes another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"it says {key!r} twice, and differently")
    return found


def _require_text(content: dict[str, Any]) -> None:
    """Refuse halves of characters, which no file can hold again."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {error.object[error.start]!r}, which is half of a character") from None


def strict(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are NaN or infinite become strings."""
    if isinstance(value, Mapping):
        return {key: strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
