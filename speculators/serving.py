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


def instructions(vllm: Vllm, config: SpeculatorConfig, output_path: Path, verifier: Verifier) -> Instructions:
    """Return how vLLM serves the output at ``output_path``.

    It takes the verifier from the output's config if it can load that: a folder here with weights, or a
    repository of the Hub. Otherwise the user must have it somewhere else and name it.
    """
    path, place = str(output_path), verifier.checkpoint.place
    if place.loadable and verifier.weights is not None:
        arguments = ["vllm", "serve", path, *(["--revision", place.revision] if place.revision else [])]
        if verifier.has_tokenizer:
            return Instructions(shlex.join(arguments), vllm.packages)
        note = f"{verifier.name} has no tokenizer, so prompts must be lists of token ids"
        return Instructions(shlex.join([*arguments, "--skip-tokenizer-init"]), vllm.packages, note)
    tokens = config.speculators_config.proposal_methods[0].speculative_tokens
    settings = json.dumps({**vllm.settings, "model": path, "num_speculative_tokens": tokens})
    return Instructions(
        shlex.join(["vllm", "serve", "VERIFIER", "--speculative-config", settings]),
        vllm.packages,
        f"VERIFIER stands for a folder or a Hugging Face ID with the weights of {verifier.name}, which vLLM cannot "
        "load from there",
    )
