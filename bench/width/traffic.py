"""The shape of the traffic, for the processes that produce and receive it."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Sizes of the target, and the tokens per second that all pods generate, and one request."""

    hidden: int
    vocabulary: int
    top_k: int = 64
    tokens_per_s: float
    request_tokens_per_s: float = 100.0

    @property
    def row_bytes(self) -> int:
        """Approximate bytes of a captured row in fp8 (3 D + 4), with its top-k teacher."""
        return 3 * self.hidden + 4 + 433 * self.top_k // 64


def lengths(shortest: int, longest: int, seed: int) -> Iterator[int]:
    """Output tokens of requests, log-uniform, without end."""
    rng = random.Random(seed)
    while True:
        yield round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
