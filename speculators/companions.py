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

MODEL_FILES = ("config.json", "generation_config.json")
"""What a model is loaded from, beside its weights."""

TOKENIZER_COMPANIONS = (
    "config.json",
    *TOKENIZER_FILES,
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt", "chat_template.jinja"),
)
"""What tokenizers are loaded from; these are looked for also where a server does not list its files."""

ENDINGS = (".model", ".tiktoken", "vocab.txt", "dict.txt")
"""What the names of others end in that hold a vocabulary."""

ELSEWHERE = re.compile(r".*_implementation.*|transformers_weights|attribute_map|sub_configs|auto_map")
"""Keys of a config that name code or weights, or set what has no place in a file; the rest says enough without them."""

TOKENS = re.compile(r".*_tokens?|.*_tokens_decoder|.*_side|chat_template|model_input_names|auto_map|errors|backend")
"""Keys of a tokenizer's settings that are kept whatever they hold; of others numbers, flags and nothing are."""

TOKENIZER_CLASS = re.compile(r"(?!Auto|Rag)\w+Tokenizer(Fast)?|(Tokenizers|Python|SentencePiece|MistralCommon)Backend")
"""What the class of a tokenizer may be called; any other class of transformers would be made, and read what it does."""


def choose(listed: Iterable[str], has: Callable[[str], bool], *, weights: bool) -> set[str]:
    """Return the names of the files that transformers may read, of those that are there.

    Args:
        listed: Everything in the folder, as far as that is known.
        has: Tells whether a file is there.
        weights: Whether it loads the model, or the tokenizer.
    """
    vocabularies = [name for name in listed if name.endswith(ENDINGS)]
    return {name for name in (MODEL_FILES if weights else (*TOKENIZER_COMPANIONS, *vocabularies)) if has(name)}


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
        kept = {key: value for key, value in content.items() if not ELSEWHERE.fullmatch(key)}
        return {key: _model_settings(value) for key, value in kept.items() if _is_class_of_tokenizer(key, value)}
    return [_model_settings(each) for each in content] if isinstance(content, list) else content


def _tokenizer_settings(content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    return {
        key: value
        for key, value in content.items()
        if TOKENS.fullmatch(key) or value is None or isinstance(value, int | float) or key == "tokenizer_class"
        if _is_class_of_tokenizer(key, value)
    }


def _is_class_of_tokenizer(key: str, value: Any) -> bool:
    """Tell whether a setting names a class of tokenizers, or is another setting."""
    return key != "tokenizer_class" or (isinstance(value, str) and TOKENIZER_CLASS.fullmatch(value) is not None)


CLEANED: Mapping[str, Callable[[Any], Any]] = {
    "config.json": _model_settings,
    "tokenizer_config.json": _tokenizer_settings,
    "special_tokens_map.json": _tokenizer_settings,
}
"""File → what is left of its content."""
