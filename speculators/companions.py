"""What transformers is given of a verifier beside its weights: settings, and no names of anything elsewhere.

Its own reading of these files has gone where they pointed: to files of any place (CWE-22), and to code on the Hub that
stands in for attention and experts. So what could point anywhere is left out before it looks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from speculators.errors import UnavailableError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
"""Any of these beside a verifier's config means that it has a tokenizer."""

NAMED = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"),
)
"""Names of the commonest, for servers that do not list their files."""

ENDINGS = (".json", ".model", ".jinja", ".tiktoken", "vocab.txt", "merges.txt", "dict.txt")
"""What the names of others end in."""

INDEX = ".index.json"
"""What the name of a sharded checkpoint's index ends in, after that of the whole."""

FOREIGN = "adapter_"
"""What the names of files begin with that belong to another model, which they name."""

ELSEWHERE = re.compile(r".*_implementation.*|transformers_weights")
"""Keys of a config that name code or weights; what stands in for them is what the rest says."""

TOKENS = re.compile(
    r".*_tokens?|.*_tokens_decoder|.*_side|tokenizer_class|chat_template|model_input_names|auto_map|errors|backend"
)
"""Keys of a tokenizer's settings that are kept whatever they hold; of others numbers, flags and nothing are."""


def choose(listed: Iterable[str], has: Callable[[str], bool]) -> set[str]:
    """Return the names of the files that transformers may read, of those that are there.

    Args:
        listed: Everything in the folder, as far as that is known.
        has: Tells whether a file is there.
    """
    fitting = {name for name in (*NAMED, *listed) if name.endswith(ENDINGS) and not name.endswith(INDEX)}
    return {name for name in fitting if not name.startswith(FOREIGN) and has(name)}


def clean(folder: Path) -> None:
    """Leave out of a folder of links what names other places; the links' targets stay as they are.

    Raises:
        ValueError: A file holds no JSON.
        UnavailableError: The disk refuses.
    """
    for name, cleaned in CLEANED.items():
        path = folder / name
        if not path.exists():
            continue
        content = cleaned(json.loads(path.read_bytes()))
        try:
            path.unlink()
            path.write_text(json.dumps(content))
        except OSError as error:
            raise UnavailableError(f"no temporary file can be written: {error.strerror or error}") from error


def _model_settings(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _model_settings(value) for key, value in content.items() if not ELSEWHERE.fullmatch(key)}
    return [_model_settings(each) for each in content] if isinstance(content, list) else content


def _tokenizer_settings(content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    return {
        key: value
        for key, value in content.items()
        if TOKENS.fullmatch(key) or value is None or isinstance(value, int | float)
    }


CLEANED: Mapping[str, Callable[[Any], Any]] = {
    "config.json": _model_settings,
    "tokenizer_config.json": _tokenizer_settings,
    "special_tokens_map.json": _tokenizer_settings,
}
"""File → what is left of its content."""
