"""Chooses the target's tokens that a draft can propose. A small draft vocabulary makes drafting cheap.

It is chosen from recent traffic of all kinds and then the lowest ids: byte-pair encoding numbers its tokens by the frequency of
their merges, so low ids are common in any traffic. The head's rows are the target's, so another choice needs no training.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MAX_FROM_TRAFFIC = 0.5
"""Share of the vocabulary that traffic chooses. The rest serves kinds of traffic that have not been seen."""


def choose(traffic: Iterable[Tensor], *, always: Iterable[int], vocab_size: int, size: int) -> Tensor:
    """int64 [min(size, vocab_size)], ascending, including those of `always` (the end tokens) that are in the vocabulary."""
    size = min(size, vocab_size)
    counts = Counter(token for ids in traffic for token in ids.tolist())
    common = [token for token, _ in counts.most_common(int(size * MAX_FROM_TRAFFIC))]
    chosen = dict.fromkeys([*(token for token in always if 0 <= token < vocab_size), *common, *range(size)])
    return torch.tensor(sorted(list(chosen)[:size]), dtype=torch.int64)


def unknown_share(texts: Sequence[Tensor], token_ids: Tensor) -> float:
    """Share of the tokens of `texts` that a draft with this vocabulary cannot propose."""
    tokens = torch.cat([*texts, token_ids[:0]])
    return 1.0 - float(torch.isin(tokens, token_ids).float().mean()) if len(tokens) else 0.0
