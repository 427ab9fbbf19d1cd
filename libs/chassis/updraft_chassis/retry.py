"""How long to wait before the next attempt: exponential, capped, with full jitter.

Full jitter (uniform between zero and the exponential bound), because a registry that comes back must not meet all
its pods in the same instant. Only delays: who waits, and when to give up, is the caller's business.
"""

import random
from typing import Self


class Backoff:
    """An endless iterator of delays in seconds; `reset()` after a success.

    The n-th delay is uniform in [0, min(cap_s, initial_s * 2**n)].
    """

    def __init__(self, *, initial_s: float = 0.2, cap_s: float = 10.0, rng: random.Random | None = None) -> None:
        self._initial_s = initial_s
        self._cap_s = cap_s
        self._rng = rng or random.Random()
        self._bound_s = initial_s

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> float:
        bound_s = min(self._cap_s, self._bound_s)
        self._bound_s = 2 * bound_s
        return self._rng.uniform(0.0, bound_s)

    def reset(self) -> None:
        """Start again from the shortest delay."""
        self._bound_s = self._initial_s
