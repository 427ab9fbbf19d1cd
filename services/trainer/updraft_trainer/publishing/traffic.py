"""The kinds of traffic that replay holds, and when the traffic shifted from some to others, as the registry shows them.

A kind is a cluster of replay: the domain that callers named, or requests that resemble each other. A shift is when half of the
newest requests are of other kinds than after the last shift. Until as many newer ones have come, the traffic counts as between
the two, so one shift is reported once. Shifts are made from the newest stored requests, a sample of the traffic as it came, so
they outlive a restart as far as these do. Older requests and held-out ones are kept in equal parts of each kind.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate

from updraft_rollouts.evidence import OUTLIERS
from updraft_trainer.data.retention import Pool, SampleEntry
from updraft_trainer.data.selection import NUM_RECENT, TrafficMix, one_per_request

MIN_CHANGE = 0.5
"""Share of requests that are of other kinds. Two samples of 64 requests of one mix of five kinds differ by less than 0.3."""

MAX_SHIFTS, MAX_KINDS = 8, 33
"""Limits of a report: the newest shifts; all kinds that count as such, and the outliers."""

_HOUR_MS, _DAY_MS = (timedelta(hours=hours) // timedelta(milliseconds=1) for hours in (1, 24))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    at_ms: int
    """When the first request had ended with which the kind that grew most began to grow, in Unix milliseconds."""
    before: str
    """The kind that lost most."""
    after: str
    """The kind that grew most."""


class ShiftDetector:
    def __init__(self) -> None:
        self.shifts: deque[Shift] = deque(maxlen=MAX_SHIFTS)
        """The oldest first."""
        self._last_order = -1
        """Order of the newest sample that was seen."""
        self._recent: deque[SampleEntry] = deque(maxlen=NUM_RECENT)
        self._before: Counter[str] = Counter()
        """Kinds of `NUM_RECENT` requests after the last shift; empty: the traffic is not settled yet."""
        self._num_since = 0

    def follow(self, entries: Iterable[SampleEntry]) -> None:
        """See what is stored now, in order of admission, with outliers together."""
        for entry in entries:
            if entry.order <= self._last_order:
                continue
            self._last_order = entry.order
            if entry.pool is Pool.WINDOW and all(entry.request != other.request for other in self._recent):
                self._add(entry)

    def _add(self, entry: SampleEntry) -> None:
        self._recent.append(entry)
        self._num_since += 1
        kinds = Counter(recent.cluster for recent in self._recent)
        if not self._before:
            if self._num_since >= NUM_RECENT:
                self._before = kinds
            return
        grown = kinds - self._before
        if grown.total() < MIN_CHANGE * NUM_RECENT:
            return
        after = max(grown, key=grown.__getitem__)
        lost = self._before - kinds
        at_ms = _beginning(self._recent, after).finished_ms
        self.shifts.append(Shift(at_ms=at_ms, before=max(lost, key=lost.__getitem__), after=after))
        self._before, self._num_since = Counter(), 0


def _beginning(entries: Sequence[SampleEntry], kind: str) -> SampleEntry:
    """Return the entry from which on a kind is most above its share of all of them (CUSUM)."""
    members = [entry.cluster == kind for entry in entries]
    share = sum(members) / len(members)
    sums = list(accumulate((is_member - share for is_member in members), initial=0.0))
    return entries[min(range(len(entries)), key=sums.__getitem__)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Stored requests of one kind."""

    name: str
    training: int
    held_out: int
    last_hour: int
    """Those of both that ended within an hour before the newest of all."""
    last_day: int
    recent_share: float
    """Share of today's traffic."""


def kinds(entries: Sequence[SampleEntry], mix: TrafficMix) -> list[Kind]:
    """Return the kinds of these samples' requests, the largest first. Outliers are together."""
    requests = one_per_request(entries)
    newest_ms = max((entry.finished_ms for entry in requests), default=0)
    by_name: dict[str, list[SampleEntry]] = {}
    for entry in requests:
        by_name.setdefault(entry.cluster, []).append(entry)
    found = [_kind(name, members, newest_ms, mix.shares) for name, members in by_name.items()]
    return sorted(found, key=lambda kind: -(kind.training + kind.held_out))[:MAX_KINDS]


def _kind(name: str, members: Sequence[SampleEntry], newest_ms: int, shares: Mapping[str, float]) -> Kind:
    ages_ms = [newest_ms - entry.finished_ms for entry in members]
    held_out = sum(entry.pool is Pool.EVALUATION for entry in members)
    return Kind(
        name=name,
        training=len(members) - held_out,
        held_out=held_out,
        last_hour=sum(age_ms <= _HOUR_MS for age_ms in ages_ms),
        last_day=sum(age_ms <= _DAY_MS for age_ms in ages_ms),
        recent_share=shares.get(name, 0.0),
    )


def label(name: str) -> str:
    """Return a kind as a person reads it. Domains come from callers, and the registry takes printable text only."""
    origin, _, rest = name.partition(":")
    if name == OUTLIERS:
        return "others"
    return "".join(char if char.isprintable() else " " for char in rest) if origin == "domain" else f"unnamed {rest}"
