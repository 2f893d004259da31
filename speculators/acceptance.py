"""Measure how many draft tokens the verifier accepts, as greedy speculative decoding would.

Speculative decoding changes no output, so the verifier's greedy continuation is generated once and
every step of drafting is replayed against it: after each verification the draft starts from the
verifier's own hidden states, proposes a chain, and the longest agreeing prefix is accepted. The
counts are those of EAGLE's reference code and of vLLM with one sequence's chain at temperature 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speculators.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from speculators.draft import Draft

NEW_TOKENS = 48
"""Tokens that the verifier generates after each prompt."""

EVIDENT = 3.0
"""Standard errors by which one way to run a draft must beat another to be evidently better."""


@dataclass(frozen=True)
class Continuation:
    """A prompt that the verifier has continued greedily.

    Attributes:
        tokens: Ids of the prompt and of what follows it.
        prompt: How many of them are the prompt's.
        states: Layer of the verifier → ``[1, T, H]`` hidden states that enter it.
    """

    tokens: list[int]
    prompt: int
    states: Mapping[int, Tensor]


@dataclass(frozen=True)
class Acceptance:
    """How often drafted tokens were accepted.

    Attributes:
        prompts: How many prompts were continued.
        drafts: How many chains were proposed.
        accepted: How many chains were accepted up to each position at least.
        commonest: How many chains would have had their first token accepted if it were always the same one.
        by_prompt: How many chains each prompt took; fewer is better, as the generated tokens are the same.
    """

    prompts: int
    drafts: int
    accepted: tuple[int, ...]
    commonest: int
    by_prompt: tuple[int, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Accepted tokens at each position over all chains."""
        return tuple(count / self.drafts for count in self.accepted)

    @property
    def per_step(self) -> float:
        """Draft tokens that are accepted at one verification, on average."""
        return sum(self.accepted) / self.drafts

    @property
    def length(self) -> float:
        """Mean acceptance length: tokens that one verification yields, its own included."""
        return 1 + self.per_step

    def evidently_better(self, other: Acceptance) -> bool:
        """Tell whether the difference to ``other`` on the same prompts is more than chance."""
        saved = [theirs - ours for ours, theirs in zip(self.by_prompt, other.by_prompt, strict=True)]
        mean = sum(saved) / len(saved)
        spread = math.sqrt(sum((value - mean) ** 2 for value in saved) / max(1, len(saved) - 1))
        return mean > 0 and len(saved) > 1 and mean > EVIDENT * spread / math.sqrt(len(saved))


def continue_prompts(
    verifier: PreTrainedModel, prompts: Sequence[Sequence[int]], layers: Collection[int], *, depth: int
) -> list[Continuation]:
    """Let the verifier continue each prompt greedily, far enough to judge chains of ``depth`` tokens.

    Args:
        verifier: The base model.
        prompts: Token ids.
        layers: Whose hidden states to keep; the number of layers means those after the final norm.
        depth: Tokens per chain.
    """
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=verifier.device)
        with torch.no_grad():
            output = verifier.generate(  # type: ignore[operator] # torch types every attribute of a module as a tensor
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS + depth,
                min_new_tokens=NEW_TOKENS + depth,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            every = verifier(output, output_hidden_states=True).hidden_states
        found.append(Continuation(output[0].tolist(), len(prompt), {layer: every[layer] for layer in layers}))
    return found


def measure(draft: Draft, continuations: Sequence[Continuation], *, depth: int) -> Acceptance:
    """Replay drafting along ``continuations`` and count what the verifier accepts.

    Args:
        draft: The draft.
        continuations: What the verifier generated, with the hidden states that the draft reads.
        depth: Tokens per chain.
    """
    import torch

    accepted = [0] * depth
    by_prompt = []
    firsts: Counter[int] = Counter()
    for continuation in continuations:
        tokens = continuation.tokens
        states = torch.cat([continuation.states[layer] for layer in draft.layers], dim=-1)
        known = continuation.prompt + 1  # prefill yields the first token
        drafts = 0
        while known - continuation.prompt < NEW_TOKENS:
            chain = propose(draft, tokens[:known], states[:, : known - 1], depth)
            agreed = _agreement(chain, tokens[known : known + depth])
            firsts[tokens[known]] += 1
            drafts += 1
            for position in range(agreed):
                accepted[position] += 1
            known += agreed + 1
        by_prompt.append(drafts)
    ((_, commonest),) = firsts.most_common(1)
    return Acceptance(len(by_prompt), sum(by_prompt), tuple(accepted), commonest, tuple(by_prompt))


def propose(draft: Draft, tokens: Sequence[int], states: Tensor, depth: int) -> list[int]:
    """Propose ``depth`` tokens after ``tokens``, greedily.

    Args:
        draft: The draft.
        tokens: ``T+1`` ids, of which all but the first are embedded.
        states: ``[1, T, S]`` hidden states of the verifier for all but the last token.
        depth: Tokens to propose.

    Raises:
        CheckpointError: No file holds the LM head.
    """
    import torch

    chain: list[int] = []
    with torch.no_grad():
        hidden = draft.combine(states)
        for _ in range(depth):
            ids = torch.tensor([[*tokens[1:], *chain]])
            fed_back, head_input = draft.forward(ids, hidden)
            logits = draft.logits(head_input[:, -1:])
            if logits is None:
                raise CheckpointError("neither the draft nor its verifier holds the LM head; acceptance needs it")
            chain.append(draft.target_id(int(logits.argmax())))
            hidden = torch.cat((hidden, fed_back[:, -1:]), dim=1)
    return chain


def _agreement(chain: Sequence[int], truth: Sequence[int]) -> int:
    agreed = 0
    while agreed < len(chain) and chain[agreed] == truth[agreed]:
        agreed += 1
    return agreed
