"""How many tokens to draft: the k that maximises expected tokens a second, from measured acceptance and measured cost.

With a_i the probability that draft i is kept given that those before it were, a chain of k gives 1 + a_1 + a_1 a_2 + ... tokens
a step (Leviathan et al. 2023, equation 1, without its assumption that all a_i are equal). k = 0 is a normal answer. Both
inputs are decayed averages, so that a better draft is noticed; now and then a full chain is drafted to keep them alive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PROBE_EVERY, PROBE_STEPS = 32, 2
"""Of 32 steps two draft full chains whatever is chosen: about 1 % of the time, and a better draft is noticed in seconds.

Two, for the first one after a pause also feeds the draft what it missed, and its time says nothing.
"""
DECAY = 0.02
"""Weight of the newest observation: a memory of about 50 steps a sequence."""
OUTLIER = 2.0
"""A step may count at most this many averages: a neighbour on the machine must not look like a dear draft."""


def expected_tokens(acceptance: Sequence[float], k: int) -> float:
    """Tokens of a verify step with `k` drafts, the target's own included; `acceptance` is conditional, by position."""
    total, alive = 1.0, 1.0
    for rate in acceptance[:k]:
        alive *= rate
        total += alive
    return total


def best_lookahead(acceptance: Sequence[float], cost: Callable[[int], float], max_k: int) -> int:
    """The k in 0..max_k with the most expected tokens a second; `cost(k)` is the seconds of a step with k drafts."""
    return max(range(max_k + 1), key=lambda k: expected_tokens(acceptance, k) / cost(k))


@dataclass(slots=True)
class _Average:
    value: float = 0.0
    count: int = 0

    def add(self, value: float, decay: float = DECAY) -> None:
        """Plain mean at first, exponentially decayed later."""
        self.count += 1
        self.value += (value - self.value) * max(decay, 1 / self.count)


@dataclass(slots=True)
class Lookahead:
    """Chooses k for each step. `is_fixed` always answers `max_k` (for measurements)."""

    max_k: int
    is_fixed: bool = False
    last: int = 0
    _acceptance: list[_Average] = field(default_factory=list)
    _verify: dict[tuple[int, int], _Average] = field(default_factory=dict)
    _draft: dict[tuple[int, int], _Average] = field(default_factory=dict)
    _steps: int = 0
    _is_behind: bool = True
    """The draft has steps to catch up with: no draft was made in the last one."""

    def __post_init__(self) -> None:
        self._acceptance = [_Average() for _ in range(self.max_k)]

    def reset_acceptance(self) -> None:
        """Forget what an earlier draft did: a new one starts from a full chain."""
        self._acceptance = [_Average() for _ in range(self.max_k)]

    def choose(self, *, batch: int) -> int:
        """Drafts a sequence for a step of `batch` sequences."""
        self._steps += 1
        self._is_behind = self.last == 0
        is_unknown = self.max_k > 0 and self._acceptance[0].count < 8
        if self.is_fixed or is_unknown or self._steps % PROBE_EVERY < PROBE_STEPS:
            self.last = self.max_k
        else:
            rates = [average.value for average in self._acceptance]
            self.last = best_lookahead(rates, lambda k: self._cost(batch, k), self.max_k)
        return self.last

    def observe_acceptance(self, proposed: int, accepted: int) -> None:
        """Of one sequence's step."""
        for position in range(min(proposed, accepted + 1, self.max_k)):
            self._acceptance[position].add(1.0 if position < accepted else 0.0)

    def observe_cost(self, *, batch: int, width: int, verify_s: float, draft_s: float) -> None:
        """Of one step: `width` rows a sequence were verified, after `draft_s` seconds of drafting."""
        _observe(self._verify, (batch, width), verify_s)
        if width > 1 and not self._is_behind:
            _observe(self._draft, (batch, width - 1), draft_s / (width - 1))

    def _cost(self, batch: int, k: int) -> float:
        """Seconds of a step; from the nearest measured neighbour where this (batch, k) was never run."""
        return _nearest(self._verify, batch, k + 1, otherwise=1.0) + k * _nearest(self._draft, batch, k, otherwise=0.0)


def _observe(table: dict[tuple[int, int], _Average], key: tuple[int, int], seconds: float) -> None:
    average = table.setdefault(key, _Average())
    average.add(min(seconds, OUTLIER * average.value) if average.count > 3 else seconds)


def _nearest(table: dict[tuple[int, int], _Average], batch: int, width: int, *, otherwise: float) -> float:
    if not table:
        return otherwise  # all k then look alike, or drafting free: the longest chain wins and is measured
    key = min(table, key=lambda key: (abs(key[0] - batch), abs(key[1] - width), key))
    return table[key].value
