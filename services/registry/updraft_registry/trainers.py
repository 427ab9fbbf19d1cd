"""Each trainer's newest report: its last publication or why there is none, its progress, and its demand.

Reports are in memory only, because trainers repeat them. The report of a trainer that has been silent for `expiry_s` does not
count any more.
"""

from dataclasses import dataclass

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Exhausted

DEFAULT_EXPIRY_S = 45.0
"""Trainers repeat themselves every ten seconds."""

MAX_TRAINERS = 10_000
"""A trainer can report before its speculator has a version, so trainers have a limit of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    text: str
    learning: registry_pb2.Learning
    demand: float | None
    at_s: float


class Trainers:
    """The newest report by speculator. Times are monotonic seconds."""

    def __init__(self, *, expiry_s: float = DEFAULT_EXPIRY_S) -> None:
        self._expiry_s = expiry_s
        self._reports: dict[str, _Report] = {}
        self._silent: dict[str, None] = {}
        """Speculators whose trainer stated a demand and went away, in the order in which they did."""

    def report(
        self,
        speculator: str,
        message: str,
        learning: registry_pb2.Learning,
        now_s: float,
        *,
        demand: float | None = None,
    ) -> bool:
        """Keep a report; true if it has news for watchers. Exhausted if there are `MAX_TRAINERS` others."""
        if speculator not in self._reports and len(self._reports) >= MAX_TRAINERS:
            raise Exhausted(f"this registry has reports of {MAX_TRAINERS} trainers, which is the limit")
        is_new = (self.message(speculator), self.learning(speculator)) != (message, learning)
        self._reports[speculator] = _Report(text=message, learning=learning, demand=demand, at_s=now_s)
        self._silent.pop(speculator, None)
        return is_new

    def expire(self, now_s: float) -> bool:
        """Forget trainers that have been silent for too long; true if there were any."""
        silent = [name for name, report in self._reports.items() if now_s - report.at_s > self._expiry_s]
        for name in silent:
            if self._reports.pop(name).demand is not None:
                self._silent[name] = None
        while len(self._silent) > MAX_TRAINERS:
            del self._silent[next(iter(self._silent))]
        return bool(silent)

    @property
    def speculators(self) -> list[str]:
        """Those whose trainer reports, also if nothing else is known of them yet."""
        return list(self._reports)

    def message(self, speculator: str) -> str:
        """Empty if no trainer reports."""
        report = self._reports.get(speculator)
        return report.text if report else ""

    def learning(self, speculator: str) -> registry_pb2.Learning | None:
        """None if no trainer reports."""
        report = self._reports.get(speculator)
        return report.learning if report else None

    def demand(self, speculator: str) -> float | None:
        """That of one trainer; None if it never said."""
        report = self._reports.get(speculator)
        return report.demand if report else 0.0 if speculator in self._silent else None

    @property
    def demands(self) -> dict[str, float]:
        """Captured tokens per second that each trainer can use: none after it went away. Without those that never said."""
        stated = {name: report.demand for name, report in self._reports.items() if report.demand is not None}
        return dict.fromkeys(self._silent, 0.0) | stated
