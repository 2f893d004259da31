"""Tell how an output is served."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speculators.config import SpeculatorConfig
    from speculators.spec import Vllm
    from speculators.verifier import Verifier


@dataclass(frozen=True)
class Instructions:
    """What to type so that vLLM serves an output.

    Attributes:
        command: The shell command; relative paths in it, and in the output, hold where the conversion was run.
        packages: What must be installed beside vLLM.
        note: What the user must know to use it, if anything.
    """

    command: str
    packages: tuple[str, ...] = ()
    note: str = ""


def instructions(
    vllm: Vllm, config: SpeculatorConfig, output_path: Path | str, verifier: Verifier, *, elsewhere: bool = False
) -> Instructions:
    """Return how vLLM serves the output at ``output_path``.

    It takes the verifier from the output's config if it can load that: a folder here with weights, or a
    repository of the Hub. Otherwise the user must have it somewhere else and name it.

    Args:
        vllm: What vLLM has to be told about the type.
        config: The output's config.
        output_path: Where vLLM finds the output, or what stands for that.
        verifier: The base model.
        elsewhere: Whether that is another machine, which has no folder of this one.
    """
    path, place = str(output_path), verifier.checkpoint.place
    path = f"./{path}" if path.startswith("-") else path
    gone = elsewhere and place.local is not None
    if gone or not place.loadable or verifier.weights is None:
        tokens = config.speculators_config.proposal_methods[0].speculative_tokens
        settings = {**vllm.settings, "model": path, "method": vllm.method, "num_speculative_tokens": tokens}
        arguments = ["VERIFIER", "--speculative-config", json.dumps(settings)]
        why = "vLLM loads nothing from there" if not place.loadable else "there are no weights"
        why = "config.json names a folder of the machine where it was converted" if gone else why
        called = place.identity["folder"] if gone else place.reference
        note = f"VERIFIER stands for a folder or a Hugging Face ID of {called}; {why}"
    else:
        # Where the output is a repository as well, vLLM would look for the verifier's revision in both.
        revision = [] if elsewhere or not place.revision else ["--revision", place.revision]
        arguments, note = [path, *revision], ""
        if place.local is not None and not verifier.has_tokenizer:
            arguments.append("--skip-tokenizer-init")
            note = f'{place.reference} has no tokenizer: send lists of token ids, with "return_token_ids": true'
    return Instructions(shlex.join(["vllm", "serve", *arguments]), vllm.packages, note)
