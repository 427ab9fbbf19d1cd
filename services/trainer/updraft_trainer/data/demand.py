"""How many captured tokens per second the trainer can use. Times are monotonic seconds.

What training uses up is half of its speed over the times that a sample is used, because half of a batch is fresh. Around that
the demand keeps a backlog of fresh samples: too little and training pauses, too much and pods capture what nobody reads in
time. Missing requests, held-out ones above all, are demanded within a minute.

Whatever training can use, the demand is bounded by what intake can store: what is more would wait in the streams, and push out
what was asked for.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import Pool, ReplayLimits

FITTED_SAMPLES = 128
"""Samples for a draft in closed form: half a minute of one core. With more, acceptance length hardly rises."""

FRESH_SHARE = 0.5
"""Part of a batch that is fresh; see `selection`."""

BACKLOG_S = 60.0
"""Training time on fresh samples that should wait in replay."""

BURST = 4.0
"""Demand without a backlog, over what training uses up. With twice the backlog it is as much lower."""

FILL_S = 60.0
"""Time in which missing requests should come."""

HELD_OUT_SHARE = 0.1
"""Part of captured requests that is held out, at least: pods prefer them while credits are scarce."""

FIRST_REQUEST_TOKENS = 1000.0
"""Captured tokens of a request, before any is known."""

HEADROOM = 1.1
"""Demand with empty streams, over what intake stores while it is busy: it gets faster as its batches fill up."""

FULL_SHARE = 0.5
"""Nothing is demanded with streams as full as this. Requests that are being captured still come in, for a minute."""

_INTAKE_HORIZON_S = 30.0
"""Busy time after which a measurement of intake counts little."""

_LEAST_INTAKE_S = 1.0
"""Busy time before which intake's speed is unknown."""

_HORIZON_S = 60.0
"""Training time after which a measurement counts little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayFill:
    """Stored requests, and how many there should be. `unused`: uses of whole requests that fresh samples are still good for."""

    num_training: int = 0
    num_held_out: int = 0
    wanted_training: int
    wanted_held_out: int
    unused: float = 0.0

    @property
    def num_missing(self) -> float:
        """Requests to capture until there are enough of both."""
        training, held_out = self.wanted_training - self.num_training, self.wanted_held_out - self.num_held_out
        return max(0.0, training / (1.0 - HELD_OUT_SHARE), held_out / HELD_OUT_SHARE)


def demand(fill: ReplayFill, *, speed: float, request_tokens: float, max_uses: int) -> float:
    """Captured tokens per second. `speed` is the number of them that training reads per second, also repeatedly; 0: unknown."""
    needed = fill.num_missing * request_tokens / FILL_S
    if not speed:
        return needed
    backlog_s = fill.unused * request_tokens / (FRESH_SHARE * speed)
    return max(needed, speed * FRESH_SHARE / max_uses * math.pow(BURST, 1.0 - backlog_s / BACKLOG_S))


def wanted_that_fit(count: int, stored: tuple[int, int], max_bytes: int) -> int:
    """`count`, or as many requests as fit: those without room are not missing. `stored`: requests and their bytes."""
    num_stored, num_bytes = stored
    # One less than fit on average: when the next one is larger than the mean, an old one gives way to it.
    return min(count, max(0, math.floor(max_bytes * num_stored / num_bytes) - 1)) if num_bytes else count


def storable(speed: float | None, fullness: float) -> float:
    """Captured tokens per second that intake can take. `speed`: how many it stores while it is busy; None: unknown.
    `fullness`: share of the stream that waits. Pods react within a minute, a stream may fill up in ten seconds: so the bound
    follows the speed, and fullness corrects it."""
    room = max(0.0, 1.0 - fullness / FULL_SHARE)
    if speed is None:
        return math.inf if room else 0.0
    return HEADROOM * speed * room


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDemand:
    """Captured tokens per second that one rank can use, and that each of its shards can take."""

    usable: float
    storable: float


def combined_demand(ranks: Sequence[RankDemand], num_shards: int) -> float:
    """The demand of all ranks. Each of all shards gets the same part, so the slowest one decides what can be stored."""
    return min(sum(rank.usable for rank in ranks), num_shards * min(rank.storable for rank in ranks))


class IntakeSpeed:
    """Tokens that intake stores per second of the time in which it has something to store."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def stored(self, tokens: int, seconds: float) -> None:
        """So many tokens were stored in this time, since those before or since there was something to store."""
        keep = math.exp(-seconds / _INTAKE_HORIZON_S)
        self._tokens, self._seconds = keep * self._tokens + tokens, keep * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float | None:
        return self._tokens / self._seconds if self._seconds >= _LEAST_INTAKE_S else None


class DemandMeter:
    """Measures training, and looks into replay. Thread-safe, so that the demand is stated while training is busy."""

    def __init__(
        self,
        replay: Replay,
        limits: ReplayLimits,
        *,
        num_held_out: int,
        max_uses: int,
        num_fitted: int = FITTED_SAMPLES,
    ) -> None:
        """`num_held_out`, `num_fitted`: requests that this rank needs to judge drafts, and to fit them in closed form."""
        self._replay = replay
        self._limits = limits
        self._num_held_out = num_held_out
        self._num_fitted = num_fitted
        self._max_uses = max_uses
        self._tokens = self._seconds = 0.0
        self._since_s: float | None = None
        self._sample_tokens: float | None = None
        self._measuring = threading.Lock()
        self.uses: Callable[[], Mapping[str, int]] = dict
        """How often each sample was used so far, by trace id."""

    def trained(self, sizes: Sequence[int], *, start_s: float, end_s: float) -> None:
        """A step on samples of so many captured tokens. The time since the last step counts, because evaluations are a part of
        training."""
        with self._measuring:
            seconds = end_s - (start_s if self._since_s is None else self._since_s)
            keep = math.exp(-seconds / _HORIZON_S)
            self._tokens, self._seconds = keep * self._tokens + sum(sizes), keep * self._seconds + seconds
            self._sample_tokens = sum(sizes) / len(sizes)
            self._since_s = end_s

    def paused(self) -> None:
        """There was nothing to train on, which says nothing about the speed."""
        with self._measuring:
            self._since_s = None

    def tokens_per_s(self) -> float:
        """The demand."""
        uses = self.uses()
        ids, fill = self._replay.training_ids(), self._fill()
        num_chunks = len(ids) / fill.num_training if fill.num_training else 1.0
        unused = sum(max(0, self._max_uses - uses.get(trace_id, 0)) for trace_id in ids)
        with self._measuring:
            speed = self._tokens / self._seconds if self._seconds else 0.0
            sample_tokens = self._sample_tokens
        return demand(
            replace(fill, unused=unused / num_chunks),
            speed=speed,
            request_tokens=FIRST_REQUEST_TOKENS if sample_tokens is None else sample_tokens * num_chunks,
            max_uses=self._max_uses,
        )

    def _fill(self) -> ReplayFill:
        held_out, training = self._stored(Pool.EVALUATION), self._stored(Pool.WINDOW, Pool.RESERVOIR)
        limits = self._limits
        return ReplayFill(
            num_training=training[0],
            num_held_out=held_out[0],
            wanted_training=wanted_that_fit(self._num_fitted, training, limits.window_bytes + limits.reservoir_bytes),
            wanted_held_out=wanted_that_fit(self._num_held_out, held_out, limits.evaluation_bytes),
        )

    def _stored(self, *pools: Pool) -> tuple[int, int]:
        """Requests and bytes in these pools together."""
        return self._replay.num_requests(*pools), sum(map(self._replay.num_bytes, pools))
