"""Chooses the target's tokens that a draft can propose. A small draft vocabulary makes drafting cheap.

The head's rows are the target's, so another choice needs no training.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PRIOR_TOKENS = 300.0
"""Weight of the prior, in tokens of traffic. With 100, tokens of unseen traffic were missed more often; with 1,000, tokens that
the traffic is likely to contain (`python -m bench.learning.vocabulary`)."""

PRIOR_OFFSET = 256
"""The prior of token i is proportional to 1 / (i + offset): Zipf's law over ids, because byte-pair encoding numbers its tokens
by the frequency of their merges, so low ids are common in any traffic."""


def choose(counts: Tensor, *, always: Iterable[int], size: int) -> Tensor:
    """int64 [min(size, vocab)], ascending: the likeliest tokens after traffic with these `counts`, float [vocab], and those of
    `always` (the end tokens) that are in the vocabulary."""
    vocab_size = len(counts)
    prior = 1.0 / (torch.arange(vocab_size) + PRIOR_OFFSET)
    scores = counts + PRIOR_TOKENS * prior / prior.sum()
    scores[[token for token in always if 0 <= token < vocab_size]] = torch.inf
    return scores.topk(min(size, vocab_size)).indices.sort().values


def count(texts: Iterable[Tensor], vocab_size: int) -> Tensor:
    """Occurrences of each token in the texts, float32 [vocab_size]."""
    counts = torch.zeros(vocab_size)
    for ids in texts:
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def unknown_share(texts: Sequence[Tensor], token_ids: Tensor) -> float:
    """Share of the tokens of `texts` that a draft with this vocabulary cannot propose."""
    tokens = torch.cat([*texts, token_ids[:0]])
    return 1.0 - float(torch.isin(tokens, token_ids).float().mean()) if len(tokens) else 0.0
