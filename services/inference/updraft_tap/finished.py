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
    steps: int = 0
    timed: int = 0
    """The steps whose time is known."""
    seconds: float = 0.0
    """Time of the `timed` steps."""
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    """Both by position in the chain of draft tokens."""

    def add(self, proposed: int, accepted: int, seconds: float | None) -> None:
        self.steps += 1
        if seconds is not None:
            self.timed += 1
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
    since_s: float = 0.0
    """When its last step ended."""
    step: int = -1
    """The number of that step."""
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

    def verified(self, rid: str, *, proposed: int, accepted: int) -> None:
        """A step verified `proposed` tokens. Raises ValueError if more were accepted."""
        if not 0 <= accepted <= proposed:
            raise ValueError(f"{accepted} of {proposed} draft tokens were accepted")
        request = self._requests.setdefault(rid, _Request())
        seconds = self._clock() - request.since_s if request.step == self._step else None
        request.by_version.setdefault(request.proposer, _Sums()).add(proposed, accepted, seconds)

    def drafted(self, rid: str, version: int | None) -> None:
        """Count `version` for the proposals of this step, in an engine that drafts and verifies in one step."""
        self._requests.setdefault(rid, _Request()).proposer = version

    def proposed(self, rids: Iterable[str], version: int | None) -> None:
        """The draft `version` made the next proposals of these requests; None if that is not known."""
        now_s = self._clock()
        self._step += 1
        for rid in rids:
            request = self._requests.setdefault(rid, _Request())
            request.proposer, request.since_s, request.step = version, now_s, self._step

    def pause(self) -> None:
        """The engine pauses, so the time until the next step is not that of a step."""
        self._step += 1

    def forget(self) -> None:
        """Begin anew with all requests."""
        self._requests.clear()

    def end(self, rid: str) -> list[dict[str, Any]]:
        """The sums of an ended request, for its `Finished`; they are forgotten."""
        request = self._requests.pop(rid, _Request())
        return [
            {
                "version": version,
                "steps": sums.steps,
                "proposed": sum(sums.proposed),
                "proposed_by_position": sums.proposed,
                "accepted": sums.accepted,
                "us": round(1e6 * sums.seconds * sums.steps / max(sums.timed, 1)),
            }
            for version, sums in request.by_version.items()
        ]

    def __len__(self) -> int:
        return len(self._requests)
