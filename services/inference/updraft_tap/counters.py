"""What speculation did for each running request: verify steps, proposed and accepted tokens, by version of the draft. Pure."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Sums:
    steps: int = 0
    seconds: float = 0.0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    """Both by position in the chain of draft tokens."""

    def add(self, proposed: int, accepted: int, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        missing = [0] * (proposed - len(self.proposed))
        self.proposed += missing
        self.accepted += missing
        for position in range(proposed):
            self.proposed[position] += 1
            self.accepted[position] += position < accepted


@dataclass(slots=True)
class _Request:
    proposer: int | None = None
    since_s: float | None = None
    """When the step before ended."""
    by_version: dict[int | None, _Sums] = field(default_factory=dict)


class Counters:
    """By request. The version of a proposal is that of the draft that made it, a step before its verification."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._requests: dict[str, _Request] = {}

    def verified(self, rid: str, *, proposed: int, accepted: int) -> None:
        """A step verified `proposed` tokens. Raises ValueError if more were accepted."""
        if not 0 <= accepted <= proposed:
            raise ValueError(f"{accepted} of {proposed} draft tokens were accepted")
        request = self._requests.setdefault(rid, _Request())
        seconds = 0.0 if request.since_s is None else self._clock() - request.since_s
        request.by_version.setdefault(request.proposer, _Sums()).add(proposed, accepted, seconds)

    def proposed(self, rids: Iterable[str], version: int | None) -> None:
        """The draft `version` made the next proposals of these requests; None if that is not known."""
        now_s = self._clock()
        for rid in rids:
            request = self._requests.setdefault(rid, _Request())
            request.proposer, request.since_s = version, now_s

    def end(self, rid: str) -> list[dict[str, Any]]:
        """The sums of an ended request, as the message `finished` has them; they are forgotten."""
        request = self._requests.pop(rid, _Request())
        return [
            {
                "version": version,
                "steps": sums.steps,
                "proposed": sum(sums.proposed),
                "proposed_by_position": sums.proposed,
                "accepted": sums.accepted,
                "us": round(1e6 * sums.seconds),
            }
            for version, sums in request.by_version.items()
        ]

    def __len__(self) -> int:
        return len(self._requests)
