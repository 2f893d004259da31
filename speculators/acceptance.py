"""Measure how many draft tokens the verifier accepts, as greedy speculative decoding would.

Speculative decoding changes no output, so the verifier's greedy continuation is generated once and
every step of drafting is replayed against it: after each verification the draft starts from the
verifier's own hidden states, proposes a chain, and the longest agreeing prefix is accepted. The
counts are those of EAGLE's reference code and of vLLM with one sequence's chain at temperature 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from speculators.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from speculators.draft import Draft

Item = TypeVar("Item", bound=Sequence[int])

NEW_TOKENS = 48
"""Tokens that the verifier generates after each prompt."""

AT_ONCE = 16
"""Prompts that are continued or drafted for side by side."""

EVIDENT = 3.0
"""Standard errors by which one way to run a draft must beat another to be evidently better."""


@dataclass(frozen=True)
class Continuation:
    """A prompt that the verifier has continued greedily.

    Attributes:
        tokens: Ids of the prompt and of what follows it.
        prompt: How many of them are the prompt's.
        states: Layer of the verifier → ``[T, H]`` hidden states that enter it, on the CPU.
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

    found: list[Continuation] = []
    for batch in _batches(sorted(prompts, key=len), same_length=True):
        ids = torch.tensor(batch, device=verifier.device)
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
        for row, tokens in enumerate(output.tolist()):
            states = {layer: every[layer][row].cpu() for layer in layers}
            found.append(Continuation(tokens, ids.shape[1], states))
    return found


def _batches(items: Sequence[Item], *, same_length: bool = False) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        if len(batch) == AT_ONCE or (same_length and batch and len(batch[0]) != len(item)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def measure(draft: Draft, continuations: Sequence[Continuation], *, depth: int) -> Acceptance:
    """Replay drafting along ``continuations`` and count what the verifier accepts.

    Args:
        draft: The draft.
        continuations: What the verifier generated, with the hidden states that the draft reads.
        depth: Tokens per chain.

    Raises:
        CheckpointError: No file holds the LM head.
    """
    accepted = [0] * depth
    by_prompt: list[int] = []
    firsts: Counter[int] = Counter()
    for start in range(0, len(continuations), AT_ONCE):
        replays = [_Replay(each, each.prompt + 1) for each in continuations[start : start + AT_ONCE]]
        while running := [replay for replay in replays if replay.known - replay.continuation.prompt < NEW_TOKENS]:
            chains = propose(draft, [(each.continuation, each.known) for each in running], depth)
            for replay, chain in zip(running, chains, strict=True):
                truth = replay.continuation.tokens[replay.known : replay.known + depth]
                agreed = _agreement(chain, truth)
                firsts[truth[0]] += 1
                for position in range(agreed):
                    accepted[position] += 1
                replay.drafts += 1
                replay.known += agreed + 1
        by_prompt += [replay.drafts for replay in replays]
    ((_, commonest),) = firsts.most_common(1)
    return Acceptance(len(by_prompt), sum(by_prompt), tuple(accepted), commonest, tuple(by_prompt))


@dataclass
class _Replay:
    """How far drafting has come: ``known`` tokens are verified; prefill yields the first."""

    continuation: Continuation
    known: int
    drafts: int = 0


def propose(draft: Draft, prefixes: Sequence[tuple[Continuation, int]], depth: int) -> list[list[int]]:
    """Propose ``depth`` tokens after each prefix, greedily.

    Prefixes of different lengths are run side by side, filled up at the end, which no earlier
    position sees. A draft that makes all tokens in one pass is run once.

    Args:
        draft: The draft.
        prefixes: Continuations, each with how many of its tokens are known.
        depth: Tokens to propose.

    Raises:
        CheckpointError: No file holds the LM head.
        ValidationError: The draft model cannot be run.
    """
    import torch

    from speculators.draft import running

    lengths = torch.tensor([known - 1 for _, known in prefixes])  # the last known token has no state yet
    rows, longest = torch.arange(len(prefixes)), int(lengths.max())
    ids = torch.zeros(len(prefixes), longest + depth, dtype=torch.long)
    states = torch.zeros(len(prefixes), longest, draft.state_size)
    for row, (continuation, known) in enumerate(prefixes):
        ids[row, : known - 1] = torch.tensor(continuation.tokens[1:known])
        chosen = [continuation.states[layer][: known - 1] for layer in draft.layers]
        states[row, : known - 1] = torch.cat(chosen, dim=-1)
    chains: list[list[int]] = [[] for _ in prefixes]
    with running():
        hidden = draft.combine(states)
        if draft.tokens is not None:
            _, head_input = draft.forward(ids[:, :longest], hidden)
            ranked = _logits(draft, head_input[rows, lengths - 1])[:, :depth].argmax(dim=-1)
            return [[draft.target_id(token) for token in chain] for chain in ranked.tolist()]
        hidden = torch.cat((hidden, hidden.new_zeros(len(prefixes), depth, hidden.shape[-1])), dim=1)
        for step in range(depth):
            width = longest + step
            fed_back, head_input = draft.forward(ids[:, :width], hidden[:, :width])
            last = lengths - 1 + step
            tokens = [draft.target_id(token) for token in _logits(draft, head_input[rows, last]).argmax(-1).tolist()]
            for chain, token in zip(chains, tokens, strict=True):
                chain.append(token)
            ids[rows, last + 1] = torch.tensor(tokens)
            hidden[rows, last + 1] = fed_back[rows, last]
    return chains


def _logits(draft: Draft, head_input: Tensor) -> Tensor:
    logits = draft.logits(head_input)
    if logits is None:
        raise CheckpointError("neither the draft nor its verifier holds the LM head; acceptance needs it")
    return logits


def _agreement(chain: Sequence[int], truth: Sequence[int]) -> int:
    agreed = 0
    while agreed < len(chain) and chain[agreed] == truth[agreed]:
        agreed += 1
    return agreed
