"""Chooses the target's tokens that a new draft can propose. A small draft vocabulary makes drafting cheap.

It is chosen once per lineage, because engines cannot swap it: the tokens of the first traffic, then the lowest ids. Byte-pair
encoding numbers its tokens by the frequency of their merges, so low ids are common in any traffic. Rejected: waiting until the
traffic covers the whole vocabulary, which would delay the first draft and tie it to the first domain.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

MAX_FROM_TRAFFIC = 0.25
"""Share of the vocabulary that is chosen by the first traffic, which may be a single domain."""


def choose(first_traffic: Iterable[Tensor], *, always: Iterable[int], vocab_size: int, size: int) -> Tensor:
    """int64 [min(size, vocab_size)], ascending, including `always` (the end tokens)."""
    size = min(size, vocab_size)
    counts = Counter(token for ids in first_traffic for token in ids.tolist())
    common = [token for token, _ in counts.most_common(int(size * MAX_FROM_TRAFFIC))]
    chosen = dict.fromkeys([*(token for token in always if token < vocab_size), *common, *range(size)])
    return torch.tensor(sorted(list(chosen)[:size]), dtype=torch.int64)
