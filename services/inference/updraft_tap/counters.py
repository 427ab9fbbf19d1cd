"""What speculation did for each running request: verify steps, proposed and accepted tokens, by version of the draft. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Sums:
    steps: int = 0
    proposed: int = 0
    accepted: list[int] = field(default_factory=list)
    """By position in the chain of draft tokens."""

    def add(self, proposed: int, accepted: int) -> None:
        self.steps += 1
        self.proposed += proposed
        self.accepted += [0] * (proposed - len(self.accepted))
        for position in range(accepted):
            self.accepted[position] += 1


@dataclass(slots=True)
class _Request:
    proposer: int | None = None
    by_version: dict[int | None, _Sums] = field(default_factory=dict)


class Counters:
    """By request. The version of a proposal is that of the draft that made it, a step before its verification."""

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}

    def verified(self, rid: str, *, proposed: int, accepted: int) -> None:
        """A step verified `proposed` tokens. Raises ValueError if more were accepted."""
        if not 0 <= accepted <= proposed:
            raise ValueError(f"{accepted} of {proposed} draft tokens were accepted")
        request = self._requests.setdefault(rid, _Request())
        request.by_version.setdefault(request.proposer, _Sums()).add(proposed, accepted)

    def proposed(self, rids: Iterable[str], version: int | None) -> None:
        """The draft `version` made the next proposals of these requests; None if that is not known."""
        for rid in rids:
            self._requests.setdefault(rid, _Request()).proposer = version

    def end(self, rid: str) -> list[dict[str, Any]]:
        """The sums of an ended request, [{version, steps, proposed, accepted (by position)}]; they are forgotten."""
        request = self._requests.pop(rid, _Request())
        return [
            {"version": version, "steps": sums.steps, "proposed": sums.proposed, "accepted": sums.accepted}
            for version, sums in request.by_version.items()
        ]

    def __len__(self) -> int:
        return len(self._requests)
