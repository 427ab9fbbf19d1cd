"""Exponential backoff with a cap and full jitter.

Full jitter (uniform between zero and the exponential bound) keeps all pods from reconnecting to a restarted registry at
the same instant. The caller waits and decides when to give up.
"""

import random
from typing import Self

_SHARED = random.Random()
"""A generator takes 2.5 kB, and the operator has a back-off for each of a thousand registries."""


class Backoff:
    """An endless iterator of delays in seconds; `reset()` after a success.

    The n-th delay is uniform in [0, min(cap_s, initial_s * 2**n)].
    """

    def __init__(self, *, initial_s: float = 0.2, cap_s: float = 10.0, rng: random.Random | None = None) -> None:
        self._initial_s = initial_s
        self._cap_s = cap_s
        self._rng = rng or _SHARED
        self._bound_s = initial_s

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> float:
        bound_s = min(self._cap_s, self._bound_s)
        self._bound_s = 2 * bound_s
        return self._rng.uniform(0.0, bound_s)

    def reset(self) -> None:
        self._bound_s = self._initial_s
