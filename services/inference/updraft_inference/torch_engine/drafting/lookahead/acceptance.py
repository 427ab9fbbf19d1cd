"""How often drafts are accepted, by position in the proposal: decayed, per sequence, with a prior that all sequences share.

The rate of a position is conditional on the drafts before it being accepted. Its estimate is the mean of a Beta posterior
whose counts fade, so a drafter that improved, or traffic that became harder, shows soon.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.proposal import CHAIN_ALONE, NO_MATCH, ProposalSource

POSITIONS = 5
"""Positions with a rate of their own. Later ones share the last rate, because proposals that got so far go on much alike."""
_SHARED_MEMORY, _OWN_MEMORY = 100.0, 40.0
_PRIOR_WEIGHT, _OWN_WEIGHT = 2.0, 4.0
_NUM_RECENT = 200
"""Proposals that `AcceptanceTable.recent` averages."""


class AcceptanceEstimator:
    """Rates of one source. `memory`: about how many observations of a position count."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._accepted = [0.0] * POSITIONS
        self._observed = [0.0] * POSITIONS

    def observe(self, accepted: int, *, is_rejected: bool) -> None:
        """The first `accepted` drafts of a proposal were accepted; then one was rejected, or none was left."""
        for position in range(accepted):
            self._add(position, 1.0)
        if is_rejected:
            self._add(accepted, 0.0)

    def num_observed(self, position: int) -> float:
        return self._observed[min(position, POSITIONS - 1)]

    def rates(self, priors: Sequence[float], weight: float) -> list[float]:
        """Probability that the draft at each of `POSITIONS` is accepted given those before it.

        A prior counts like `weight` observations.
        """
        return [
            (accepted + prior * weight) / (observed + weight)
            for accepted, observed, prior in zip(self._accepted, self._observed, priors, strict=True)
        ]

    def _add(self, position: int, value: float) -> None:
        i, fade = min(position, POSITIONS - 1), 1.0 - 1.0 / self._memory
        self._accepted[i] = self._accepted[i] * fade + value
        self._observed[i] = self._observed[i] * fade + 1.0


def _prior(source: ProposalSource) -> float:
    """The rate assumed before anything was observed."""
    if source.is_chain:
        return 0.5
    return 0.1 if source.is_weak else 0.3


class Score(NamedTuple):
    """The first `accepted` tokens of a proposal came true; then another token came (`is_rejected`), or none was left."""

    source: ProposalSource
    accepted: int
    is_rejected: bool


class _Kind(NamedTuple):
    """Proposals that are estimated together."""

    source: ProposalSource
    is_sampled: bool


@dataclass(slots=True)
class PendingMatch:
    """An n-gram proposal that waits for the tokens it predicts, whether it is verified or not.

    So lookup needs no exploration: its acceptance is known without the cost of verifying. One proposal waits at a time.
    """

    _ids: list[int] = field(default_factory=list)
    _source: ProposalSource = NO_MATCH
    _accepted: int = 0

    def watch(self, ids: list[int], source: ProposalSource) -> None:
        if ids and not self._ids:
            self._ids, self._source, self._accepted = ids, source, 0

    def score(self, token_ids: list[int]) -> Score | None:
        """Compare with the tokens that came next. The score, once it is known."""
        if not self._ids:
            return None
        for token in token_ids:
            is_rejected = token != self._ids[self._accepted]
            self._accepted += not is_rejected
            if is_rejected or self._accepted == len(self._ids):
                self._ids = []
                return Score(self._source, self._accepted, is_rejected)
        return None


@dataclass(slots=True, eq=False)
class SequenceStats:
    """The record of one sequence's proposals."""

    is_sampled: bool = False
    """The target's tokens are sampled, which makes them harder to predict."""
    chain: ProposalSource = CHAIN_ALONE
    """Source of the last step's chain, if it had one."""
    pending: PendingMatch = field(default_factory=PendingMatch)
    estimators: defaultdict[ProposalSource, AcceptanceEstimator] = field(
        default_factory=lambda: defaultdict(lambda: AcceptanceEstimator(_OWN_MEMORY))
    )


class AcceptanceTable:
    """Acceptance of every source, separately for sampled and for greedy sequences."""

    def __init__(self) -> None:
        self._shared = defaultdict[_Kind, AcceptanceEstimator](lambda: AcceptanceEstimator(_SHARED_MEMORY))
        self._recent = {drafter: deque[_Kind](maxlen=_NUM_RECENT) for drafter in Drafter}

    def reset_chains(self) -> None:
        """Another draft model is served."""
        for kind in [kind for kind in self._shared if kind.source.is_chain]:
            del self._shared[kind]
        for drafter in (Drafter.EAGLE3, Drafter.HYBRID):
            self._recent[drafter].clear()

    def observe(self, stats: SequenceStats, source: ProposalSource, accepted: int, *, is_rejected: bool) -> None:
        for estimator in (self._shared[_Kind(source, stats.is_sampled)], stats.estimators[source]):
            estimator.observe(accepted, is_rejected=is_rejected)

    def survival(self, stats: SequenceStats, source: ProposalSource, length: int) -> list[float]:
        """Probability that all of the first i + 1 draft tokens are accepted, for i below `length`; it never rises."""
        return _survival(stats.estimators[source], self._shared[_Kind(source, stats.is_sampled)], source, length)

    def num_chains(self, *, is_sampled: bool) -> float:
        """Chains of the draft model that are remembered of this kind of requests."""
        return sum(
            estimator.num_observed(0)
            for kind, estimator in self._shared.items()
            if kind.source.is_chain and kind.is_sampled is is_sampled
        )

    def count(self, drafter: Drafter, stats: SequenceStats, source: ProposalSource) -> None:
        """A proposal was chosen."""
        self._recent[drafter].append(_Kind(source, stats.is_sampled))

    def recent(self, drafter: Drafter, length: int) -> float:
        """Mean survival of the recent proposals' first `length` drafts; NaN if there were none. Any thread may call it."""
        counts = Counter(tuple(self._recent[drafter]))
        if not counts:
            return math.nan
        nothing = AcceptanceEstimator(1.0)
        total = sum(
            num * _survival(nothing, self._shared.get(kind, nothing), kind.source, length)[-1]
            for kind, num in counts.items()
        )
        return total / counts.total()


def _survival(
    own: AcceptanceEstimator, shared: AcceptanceEstimator, source: ProposalSource, length: int
) -> list[float]:
    rates = own.rates(shared.rates([_prior(source)] * POSITIONS, _PRIOR_WEIGHT), _OWN_WEIGHT)
    rates += rates[-1:] * (length - POSITIONS)
    return list(accumulate(rates[:length], mul))
