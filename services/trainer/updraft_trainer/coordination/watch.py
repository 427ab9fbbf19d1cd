"""What a rank is busy with, and a sentence if that takes too long: a trainer never stalls in silence.

A rank that computes is busy; one in a collective operation waits for others. The phases are the commands of rank 0.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from updraft_chassis.clock import Clock

SILENT_S = 10.0
"""Without a new heartbeat for so long, a rank is taken for one that hangs: it posts one every two seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What a rank is busy with, for how many seconds, and whether it waits for other ranks. `name` is empty if it is idle."""

    name: str = ""
    for_s: float = 0.0
    is_waiting: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """Another rank's phase in its last heartbeat, and the seconds since then."""

    rank: int
    phase: Phase
    silent_s: float

    @property
    def holds_up_s(self) -> float:
        """For how long others may have waited for it: since its last heartbeat, or since it is busy alone."""
        is_alone = bool(self.phase.name) and not self.phase.is_waiting
        return max(self.silent_s, self.phase.for_s if is_alone else 0.0)

    def __str__(self) -> str:
        if self.silent_s > SILENT_S:
            return f"rank {self.rank}, which has not been heard of for {self.silent_s:.0f} s"
        if not self.phase.name:
            return f"rank {self.rank}, which is idle"
        return f"rank {self.rank}, which has been busy with {self.phase.name} for {self.phase.for_s:.0f} s"


class Watch:
    """One thread changes the phase, any thread reads it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._phase = ("", 0.0)
        self._is_waiting = False

    def begin(self, name: str) -> None:
        """Another phase begins; "" if there is nothing to do."""
        self._phase = (name, self._clock.monotonic())

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
        name, since_s = self._phase
        if not name:
            return Phase()
        return Phase(name=name, for_s=self._clock.monotonic() - since_s, is_waiting=self._is_waiting)


class StallLog:
    """Says when a phase has taken `limit_s`, and again each time that it has taken twice as long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._next_s = limit_s

    def sentence(self, rank: int, phase: Phase, others: Sequence[PeerState]) -> str:
        """What to say now; empty if nothing. A rank that is idle waits for rank 0."""
        leader = next((other for other in others if other.rank == 0), None)
        lasts_s = phase.for_s if phase.name or leader is None else leader.holds_up_s
        if not self._is_due(lasts_s):
            return ""
        if not phase.name:
            return f"rank {rank} is idle, and waits for {leader}"
        busy = f"rank {rank} has been busy with {phase.name} for {phase.for_s:.0f} s"
        waits_for = [str(other) for other in others if not other.phase.is_waiting or other.silent_s > SILENT_S]
        return f"{busy}, and waits for {'; '.join(waits_for) or 'other ranks'}" if phase.is_waiting else busy

    def _is_due(self, lasts_s: float) -> bool:
        if lasts_s < self._limit_s:
            self._next_s = self._limit_s
        if lasts_s < self._next_s:
            return False
        while self._next_s <= lasts_s:
            self._next_s *= 2
        return True
