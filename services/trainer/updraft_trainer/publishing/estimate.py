"""Counts the verify steps that a draft would have needed for a held-out output, by an exact walk of greedy chain decoding.

Rejected: an average over positions, where a long predictable run would count at every position although decoding skips it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from updraft_draft.network import DraftNetwork
from updraft_rollouts.evidence import Gain, Paired, gain
from updraft_trainer.data.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class GainEstimate:
    """A candidate compared with a baseline on the same held-out requests, in their order."""

    trace_ids: tuple[str, ...]
    domains: tuple[str, ...]
    pairs: tuple[Paired, ...]

    def gain(self, confidence: float) -> Gain | None:
        """None for fewer than two requests."""
        return gain(self.pairs, confidence) if len(self.pairs) > 1 else None


def verify_steps(network: DraftNetwork, samples: Sequence[Sample], *, lookahead: int) -> list[int]:
    """Verify steps per sample that greedy decoding with `lookahead` drafts needs for the output after its first token."""
    return [len(steps) for steps in walk(network, samples, lookahead=lookahead)]


@torch.no_grad()
def walk(network: DraftNetwork, samples: Sequence[Sample], *, lookahead: int) -> list[list[int]]:
    """Accepted drafts of each of those verify steps, per sample."""
    steps = []
    for sample in samples:
        with torch.autocast("cpu", torch.bfloat16):
            hits = _hits(network, sample, lookahead)
        steps.append(_walk(hits, first=sample.first_output, last=sample.num_rows))
    return steps


def num_tokens(sample: Sample) -> int:
    """Output tokens from verify steps: all but the first, which comes from prefill."""
    return sample.num_rows - sample.first_output


def compare(samples: Sequence[Sample], candidate: Sequence[int], baseline: Sequence[int] | None) -> GainEstimate:
    """Pair the steps of both. Without `baseline`, decoding runs without a draft: one token per step."""
    tokens = [num_tokens(sample) for sample in samples]
    pairs = zip(tokens, candidate, baseline or tokens, strict=True)
    return GainEstimate(
        trace_ids=tuple(sample.trace_id for sample in samples),
        domains=tuple(sample.domain for sample in samples),
        pairs=tuple(Paired(tokens=t, candidate_steps=c, baseline_steps=b) for t, c, b in pairs),
    )


def _hits(network: DraftNetwork, sample: Sample, lookahead: int) -> Tensor:
    """bool [R + 1, lookahead]: whether draft j, proposed when token c (the row) is the newest, is the token c + 1 + j."""
    rows = sample.num_rows
    first_row = max(0, sample.first_output - 1)
    ids = torch.cat([sample.ids[1:], torch.zeros(lookahead, dtype=torch.long)])[None, : rows + lookahead - 1]
    states = network.unroll(sample.aux[None], ids, num_steps=lookahead, first_row=first_row)
    hits = torch.zeros(rows + 1, lookahead, dtype=torch.bool)
    for j, state in enumerate(states):
        drafts = network.token_ids[network.logits(state[0]).argmax(-1)]
        actual = sample.ids[first_row + 2 + j :]
        count = min(len(actual), len(drafts))
        hits[first_row + 1 : first_row + 1 + count, j] = drafts[:count] == actual[:count]
    return hits


def _walk(hits: Tensor, *, first: int, last: int) -> list[int]:
    """Accepted drafts of each verify step from token `first` to token `last`, without drafting beyond `last`."""
    num_accepted = hits.long().cumprod(-1).sum(-1).tolist()
    token, accepted = first, []
    while token < last:
        accepted.append(min(num_accepted[token], last - token - 1))
        token += 1 + accepted[-1]
    return accepted
