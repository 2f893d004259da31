"""Measure how many draft tokens the verifier accepts, as greedy speculative decoding would.

Speculative decoding changes no output, so the verifier's greedy continuation is generated once and
every step of drafting is replayed against it: after each verification the draft starts from the
verifier's own hidden states, proposes a chain, and the longest agreeing prefix is accepted. The
counts are those of EAGLE's reference code and of vLLM with one sequence's chain at temperature 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speculators.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from speculators.draft import Draft


@dataclass(frozen=True)
class Acceptance:
    """How often drafted tokens were accepted.

    Attributes:
        prompts: How many prompts were continued.
        drafts: How many chains were proposed.
        accepted: How many chains were accepted up to each position at least.
    """

    prompts: int
    drafts: int
    accepted: tuple[int, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Accepted tokens at each position over all chains."""
        return tuple(count / self.drafts for count in self.accepted)

    @property
    def length(self) -> float:
        """Mean acceptance length: tokens that one verification yields, its own included."""
        return 1 + sum(self.accepted) / self.drafts


def measure(
    draft: Draft, verifier: PreTrainedModel, prompts: Sequence[Sequence[int]], *, depth: int, new_tokens: int
) -> Acceptance:
    """Continue ``prompts`` by ``new_tokens`` tokens each and count what the verifier accepts.

    Args:
        draft: The draft, on the verifier's device.
        verifier: The base model.
        prompts: Token ids.
        depth: Tokens per chain.
        new_tokens: Tokens to generate for each prompt.
    """
    drafts = 0
    accepted = [0] * depth
    for prompt in prompts:
        tokens, states = _continuation(draft, verifier, prompt, new_tokens + depth)
        known = len(prompt) + 1  # prefill yields the first token
        while known - len(prompt) < new_tokens:
            chain = propose(draft, tokens[:known], states[:, : known - 1], depth)
            agreed = _agreement(chain, tokens[known : known + depth])
            drafts += 1
            for position in range(agreed):
                accepted[position] += 1
            known += agreed + 1
    return Acceptance(len(prompts), drafts, tuple(accepted))


def propose(draft: Draft, tokens: Sequence[int], states: Tensor, depth: int) -> list[int]:
    """Propose ``depth`` tokens after ``tokens``, greedily.

    Args:
        draft: The draft.
        tokens: ``T+1`` ids, of which all but the first are embedded.
        states: ``[1, T, S]`` hidden states of the verifier for all but the last token.
        depth: Tokens to propose.
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


def _continuation(
    draft: Draft, verifier: PreTrainedModel, prompt: Sequence[int], count: int
) -> tuple[list[int], Tensor]:
    import torch

    ids = torch.tensor([list(prompt)], device=draft.device)
    with torch.no_grad():
        output = verifier.generate(  # type: ignore[operator] # torch types every attribute of a module as a tensor
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        every = verifier(output, output_hidden_states=True).hidden_states
    chosen = [every[index] for index in draft.state_layers(len(every) - 1)]
    return output[0].tolist(), torch.cat(chosen, dim=-1)


def _agreement(chain: Sequence[int], truth: Sequence[int]) -> int:
    agreed = 0
    while agreed < len(chain) and chain[agreed] == truth[agreed]:
        agreed += 1
    return agreed
