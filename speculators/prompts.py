"""What the verifier continues when acceptance is measured: token ids, text, or nothing given at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from speculators.verifier import Verifier

Prompt = str | Sequence[int]

TEXTS = (
    "Explain to a ten-year-old why the sky is blue in the day and red in the evening.",
    "Write a Python function that merges two sorted lists into one sorted list, with a docstring.",
    "A train leaves at 9:40 and arrives at 13:05, with a stop of 25 minutes on the way. How long did it move?",
    "Summarise the causes of the French Revolution in five bullet points.",
    "Translate into German: The library is closed on Sundays, but you can return books at any time.",
    "Write a short, polite e-mail that asks a colleague to move Thursday's meeting to Friday morning.",
    "What is the difference between a process and a thread? Give one situation in which each is the better choice.",
    "Tell me a story of about a hundred words that begins with: The lighthouse keeper had not seen a ship for weeks.",
)
"""Prompts that stand in where none are given: conversation, code, arithmetic, translation."""

SAMPLES, SAMPLE_LENGTH, SEED = 16, 32, 0
"""Prompts that a verifier without tokenizer makes up itself, their length in tokens, and their seed."""


def read(path: str | Path) -> list[Prompt]:
    """Read prompts: a JSON list of strings or of lists of token ids, or a text file with one on each line.

    Raises:
        OptionError: The file cannot be read or holds something else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line]
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "text"
        raise OptionError(f"{path} is no valid {kind}: {error}") from error
    prompts = content.get("prompts") if isinstance(content, dict) else content
    if not isinstance(prompts, list) or not prompts or not all(map(_is_prompt, prompts)):
        raise OptionError(f"{path} holds no prompts; expected a JSON list of strings or of lists of token ids")
    return prompts


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def token_ids(prompts: Sequence[Prompt], verifier: Verifier) -> list[list[int]]:
    """Turn prompts into the verifier's token ids; text goes through its chat template if it has one.

    Raises:
        OptionError: A prompt is text and the verifier has no tokenizer, or an id is outside its vocabulary.
    """
    tokenizer = None
    found = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            found.append(list(prompt))
            continue
        tokenizer = tokenizer or _tokenizer(verifier)
        if tokenizer is None:
            raise OptionError(
                f"the prompts are text, but the verifier {verifier.name} has no tokenizer; give lists of token ids"
            )
        found.append(_encode(tokenizer, prompt))
    for ids in found:
        if outside := [token for token in ids if not 0 <= token < verifier.vocab_size]:
            raise OptionError(
                f"a prompt holds token {outside[0]}, the verifier's vocabulary ends at {verifier.vocab_size}"
            )
    return found


def made_up(verifier: Verifier, model: PreTrainedModel) -> list[list[int]]:
    """Return prompts for want of given ones: bundled text, or what a verifier without tokenizer samples."""
    if verifier.has_tokenizer:
        return token_ids(TEXTS, verifier)
    import torch

    start = verifier.text.get("bos_token_id")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(SEED)
        if type(start) is int and 0 <= start < verifier.vocab_size:
            first = torch.full((SAMPLES, 1), start)
        else:
            first = torch.randint(verifier.vocab_size, (SAMPLES, 1))
        first = first.to(model.device)
        output = model.generate(  # type: ignore[operator] # torch types every attribute of a module as a tensor
            first,
            attention_mask=torch.ones_like(first),
            max_new_tokens=SAMPLE_LENGTH - 1,
            do_sample=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    ids: list[list[int]] = output.tolist()
    return ids


def _tokenizer(verifier: Verifier) -> Any:
    if not verifier.has_tokenizer:
        return None
    from transformers import AutoTokenizer

    try:
        with verifier.checkpoint.gathered(weights=False) as folder:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # what goes wrong depends on the tokenizer's library
        raise CheckpointError(f"transformers cannot load the tokenizer of {verifier.name}: {error}") from error


def _encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return ids
