"""Which of the target's tokens a new draft can propose: a smaller head is what makes drafting cheap.

Chosen once per lineage, for engines cannot swap it. The tokens of the first traffic, then the lowest ids: byte-pair
encoding numbers its tokens by the frequency of their merges, so low ids are common whatever the traffic becomes.
Refused: waiting for enough traffic to count all of it, which would bind the draft to the first domain and serve later.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

MAX_FROM_TRAFFIC = 0.25
"""Share of the vocabulary that the first traffic may choose: it is one domain, and others will come."""


def choose(first_traffic: Iterable[Tensor], *, always: Iterable[int], vocab_size: int, size: int) -> Tensor:
    """int64 [min(size, vocab_size)], ascending. `always` (the end tokens) are in it."""
    size = min(size, vocab_size)
    counts = Counter(token for ids in first_traffic for token in ids.tolist())
    seen = [token for token, _ in counts.most_common(int(size * MAX_FROM_TRAFFIC))]
    chosen = dict.fromkeys([*(token for token in always if token < vocab_size), *seen, *range(size)])
    return torch.tensor(sorted(list(chosen)[:size]), dtype=torch.int64)
