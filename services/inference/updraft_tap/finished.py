"""The message that a request has ended, and the counters of running requests that are in it: verify steps, proposed and
accepted tokens, by version of the draft. Pure.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from updraft_tap.http.terms import Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The part of the message that only a captured request has."""

    tokens: Sequence[int]
    """Prompt and output."""
    sampling: Mapping[str, Any]
    probability: float
    """That with which the policy chose the request."""
    num_cached: int = 0
    """First tokens of the prompt that the server had in its prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The message `finished` of `updraft_tap.wire`; the channel's thread makes its header and its tensor."""

    rid: str
    terms: Terms
    asked: bool
    finish: str
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    duration_s: float
    constrained: bool
    counters: Sequence[Mapping[str, Any]]
    payload: Payload | None
    """None if the request is not captured."""

    @property
    def num_bytes(self) -> int:
        return len(self.rid) + (4 * len(self.payload.tokens) if self.payload else 0)

    def message(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        payload = self.payload
        header = {
            "kind": "finished",
            "rid": self.rid,
            **asdict(self.terms),
            "asked": self.asked,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "preemptions": self.preemptions,
            "duration_us": max(0, round(1e6 * self.duration_s)),
            "constrained": self.constrained,
            "counters": self.counters,
            "probability": payload.probability if payload else 0.0,
            "sampling": payload.sampling if payload else None,
            "cached_tokens": payload.num_cached if payload else 0,
        }
        return header, {"tokens": torch.tensor(payload.tokens, dtype=torch.int32)} if payload else {}


@dataclass(slots=True)
class _Sums:
    timed: int = 0
    """The steps whose time is known."""
    seconds: float = 0.0
    """Time of the `timed` steps."""
    outcomes: dict[tuple[int, int], int] = field(default_factory=dict)
    """Steps by how many tokens were proposed and how many of these accepted: few pairs, whose sums can wait."""

    def by_position(self, kind: int) -> list[int]:
        """Proposed (0) or accepted (1) tokens at each position in the chain of draft tokens."""
        longest = max(proposed for proposed, _ in self.outcomes)
        return [
            sum(steps for outcome, steps in self.outcomes.items() if outcome[kind] > position)
            for position in range(longest)
        ]


@dataclass(slots=True)
class _Request:
    proposer: int | None = None
    sums: _Sums | None = None
    """Those of the proposer, once it has any."""
    step: int = -1
    """The number of its last step."""
    by_version: dict[int | None, _Sums] = field(default_factory=dict)


class Counters:
    """By request. The version of a proposal is that of the draft that made it, a step before its verification.

    A step took the time since the engine's step before. If the request had no part in that, or the engine paused between, the
    time is not known, and counts as the mean of the other steps.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self._step = 0
        self._since_s = 0.0
        """When the last step ended."""

    def verified(self, rid: str, *, proposed: int, accepted: int) -> None:
        """A step verified `proposed` tokens. Raises ValueError if more were accepted."""
        if not 0 <= accepted <= proposed:
            raise ValueError(f"{accepted} of {proposed} draft tokens were accepted")
        request = self._of(rid)
        sums = request.sums
        if sums is None:
            sums = request.sums = request.by_version.setdefault(request.proposer, _Sums())
        outcome = proposed, accepted
        sums.outcomes[outcome] = sums.outcomes.get(outcome, 0) + 1
        if request.step == self._step:
            sums.timed += 1
            sums.seconds += self._clock() - self._since_s

    def drafted(self, rid: str, version: int | None) -> None:
        """Count `version` for the proposals of this step, in an engine that drafts and verifies in one step."""
        request = self._of(rid)
        if request.proposer != version:
            request.proposer, request.sums = version, None

    def proposed(self, rids: Iterable[str], version: int | None) -> None:
        """The draft `version` made the next proposals of these requests; None if that is not known."""
        self._since_s = self._clock()
        self._step += 1
        for rid in rids:
            self.drafted(rid, version)
            self._requests[rid].step = self._step

    def pause(self) -> None:
        """The engine pauses, so the time until the next step is not that of a step."""
        self._step += 1

    def forget(self) -> None:
        """Begin anew with all requests."""
        self._requests.clear()

    def end(self, rid: str) -> list[dict[str, Any]]:
        """The sums of an ended request, for its `Finished`; they are forgotten."""
        request = self._requests.pop(rid, _Request())
        return [_entry(version, sums) for version, sums in request.by_version.items()]

    def _of(self, rid: str) -> _Request:
        request = self._requests.get(rid)
        if request is None:
            request = self._requests[rid] = _Request()
        return request

    def __len__(self) -> int:
        return len(self._requests)


def _entry(version: int | None, sums: _Sums) -> dict[str, Any]:
    steps, by_position = sum(sums.outcomes.values()), sums.by_position(0)
    return {
        "version": version,
        "steps": steps,
        "proposed": sum(by_position),
        "proposed_by_position": by_position,
        "accepted": sums.by_position(1),
        "us": round(1e6 * sums.seconds * steps / max(sums.timed, 1)),
    }
