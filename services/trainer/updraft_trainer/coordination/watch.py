"""The activity of a rank, and a sentence if it takes too long: a trainer never stalls in silence.

A rank that computes is busy; one in a collective operation waits for others. torch.compile may take many minutes once:
that is logged, and counts as a stall after half an hour.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from updraft_chassis.clock import Clock

SILENT_S = 10.0
"""Without a new heartbeat for so long, a rank is taken for one that hangs: it posts one every two seconds."""

MAX_COMPILE_S = 1800.0
"""A compiler that takes longer hangs: the longest waits of ranks for each other end after half an hour too."""


class Activity(StrEnum):
    """Activities of a rank. The values are labels of metrics, `words` are those of sentences."""

    IDLE = "idle"
    JOIN = "join"
    FIRST_DRAFT = "first_draft"
    LOAD = "load"
    COMPILE = "compile"
    STEP = "step"
    MARK_GOOD = "mark_good"
    BASELINE = "baseline"
    ESTIMATE = "estimate"
    FIT = "fit"
    PUBLISH = "publish"
    COLLECT = "collect"
    SAVE = "save"
    END = "end"

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Activity.IDLE: "nothing",
    Activity.JOIN: "the wait for the other ranks to start",
    Activity.FIRST_DRAFT: "a first draft",
    Activity.LOAD: "the start of another draft",
    Activity.COMPILE: "compiling a training step",
    Activity.STEP: "a training step",
    Activity.MARK_GOOD: "keeping good weights",
    Activity.BASELINE: "the draft that serves",
    Activity.ESTIMATE: "an estimate",
    Activity.FIT: "a fit in closed form",
    Activity.PUBLISH: "an upload",
    Activity.COLLECT: "collecting the learner's state",
    Activity.SAVE: "a save",
    Activity.END: "the end",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The activity of a rank, for how many seconds, and whether it waits for other ranks."""

    activity: Activity = Activity.IDLE
    for_s: float = 0.0
    is_waiting: bool = False

    @property
    def is_idle(self) -> bool:
        return self.activity is Activity.IDLE


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """Another rank's phase in its last heartbeat, and the seconds since then."""

    rank: int
    phase: Phase
    silent_s: float

    @property
    def holds_up_s(self) -> float:
        """For how long others may have waited for it: since its last heartbeat, or since it is busy alone."""
        is_alone = not self.phase.is_idle and not self.phase.is_waiting
        return max(self.silent_s, self.phase.for_s if is_alone else 0.0)

    @property
    def is_silent(self) -> bool:
        return self.silent_s > SILENT_S

    def __str__(self) -> str:
        if self.is_silent:
            return f"rank {self.rank}, which has not been heard of for {self.silent_s:.0f} s"
        if self.phase.is_idle:
            return f"rank {self.rank}, which is idle"
        return f"rank {self.rank}, which has been busy with {self.phase.activity.words} for {self.phase.for_s:.0f} s"


class Watch:
    """One thread changes the phase, any thread reads it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._phase = (Activity.IDLE, 0.0)
        self._is_waiting = False

    def begin(self, activity: Activity) -> None:
        """Another phase begins."""
        self._phase = (activity, self._clock.monotonic())

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """A phase within another one, whose time restarts afterwards."""
        before, _ = self._phase
        self.begin(activity)
        try:
            yield
        finally:
            self.begin(before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """During a collective operation."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    @property
    def phase(self) -> Phase:
        activity, since_s = self._phase
        if activity is Activity.IDLE:
            return Phase()
        return Phase(activity=activity, for_s=self._clock.monotonic() - since_s, is_waiting=self._is_waiting)


class StallLog:
    """Says when a phase has taken `limit_s`, and again each time that it has taken twice as long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._next_s = limit_s

    def sentence(self, rank: int, phase: Phase, others: Sequence[PeerState]) -> str:
        """The sentence to log now; empty if none is due. A rank that is idle waits for rank 0."""
        awaited = _awaited(phase, others)
        lasts_s = max((one.holds_up_s for one in awaited), default=0.0) if phase.is_idle else phase.for_s
        if not self._is_due(lasts_s):
            return ""
        waits = f", and waits for {'; '.join(map(str, awaited)) or 'other ranks'}"
        if phase.is_idle:
            return f"rank {rank} is idle{waits}"
        busy = f"rank {rank} has been busy with {phase.activity.words} for {phase.for_s:.0f} s"
        return busy + waits if phase.is_waiting else busy

    def _is_due(self, lasts_s: float) -> bool:
        if lasts_s < self._limit_s:
            self._next_s = self._limit_s
        if lasts_s < self._next_s:
            return False
        while self._next_s <= lasts_s:
            self._next_s *= 2
        return True


def is_compiling(phase: Phase, others: Sequence[PeerState]) -> bool:
    """Whether that is why a phase takes long: this rank compiles, or each rank that it waits for, and for a usual time."""
    does = [_compiles(one.phase) and not one.is_silent for one in _awaited(phase, others)]
    return _compiles(phase) or (bool(does) and all(does))


def _compiles(phase: Phase) -> bool:
    return phase.activity is Activity.COMPILE and phase.for_s <= MAX_COMPILE_S


def _awaited(phase: Phase, others: Sequence[PeerState]) -> list[PeerState]:
    """The ranks that one in this phase waits for, by their heartbeats; an idle one waits for rank 0."""
    if phase.is_idle:
        return [other for other in others if other.rank == 0]
    return [other for other in others if not other.phase.is_waiting or other.is_silent] if phase.is_waiting else []
