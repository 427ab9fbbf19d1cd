"""Schedule of the demo: three segments of live traffic, with report points between stretches of it. Pure.

The budget is wall time: the remaining report points are paid for at the cost measured so far, and traffic gets the rest of
the segment. A slow machine therefore serves fewer requests, and does not take longer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

LOOKAHEAD = 3
"""Draft tokens per verify step of the acceptance probes: the maximum of serving, and the same for every draft."""

MAX_TOKENS = 80
"""Output tokens of a live request."""

MIN_STRETCH_S = 4.0
"""Minimum live traffic between two report points: without any, nothing could be learned between them."""

ALONE_COST = 3
"""A request that runs alone costs about three times its share of eight that run together."""

ENOUGH_ERROR_PERCENT = 4.0
"""Standard error of an acceptance length at which a report point asks no more prompts: below the bar of 5."""

_PROBE_SHARE = 0.4
"""Maximum share of a segment's time for acceptance probes: on a slow machine, learning matters more than precision."""

_SHORT_MINUTES = 5.0
"""Below it, report points are fewer and smaller: a demonstration, not a measurement."""

SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # More held-out requests, and fewer needed: on two cores a first draft should win in about a minute.
        "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.25",
        "UPDRAFT_TRAINER_MIN_SAMPLES": "6",
        "UPDRAFT_REGISTRY_GATE_MIN_SAMPLES": "6",
        # A domain has only some hundred requests to learn from, and a core is free to repeat them.
        "UPDRAFT_TRAINER_MAX_USES": "16",
        # Every report point sends the same prompts: n-gram lookup would find its own answers to them.
        "UPDRAFT_INFERENCE_REMEMBERED_TOKENS": "0",
    }
)
"""Settings of the demo that differ from those of `updraft up`."""


class Arm(StrEnum):
    NONE = "none"
    NGRAM = "ngram"
    FROZEN = "frozen"
    ADAPTIVE = "adaptive"
    AUTO = "auto"
    """The server's own choice: here the adaptive draft, mixed with n-gram lookup."""


class SegmentName(StrEnum):
    FIRST = "first"
    SHIFTED = "shifted"
    RETURNED = "returned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of the run with traffic of one domain; report points are at its start, in between, and at its end."""

    name: SegmentName
    domain: str
    share: float
    num_points: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probing:
    """Size of a report point. Acceptance varies between prompts, so its error falls with their number; speed hardly does."""

    num_prompts: int
    """Held-out prompts of the domain on which acceptance is measured, at most."""
    batch: int
    """Prompts that are asked before the error is looked at again."""
    num_timed: int
    """The first few of them, on which speed is measured."""
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run, without the set-up."""

    minutes: float
    streams: int
    seed: int
    segments: tuple[Segment, ...]
    probing: Probing

    @property
    def total_s(self) -> float:
        return self.minutes * 60

    @property
    def num_points(self) -> int:
        return sum(segment.num_points for segment in self.segments)

    def end_s(self, name: SegmentName) -> float:
        """Return the planned end of a segment, in seconds from the start of the run."""
        share = 0.0
        for segment in self.segments:
            share += segment.share
            if segment.name is name:
                break
        return share * self.total_s


def make_plan(*, minutes: float, streams: int, seed: int) -> Plan:
    """Return the plan for a run of `minutes`."""
    is_short = minutes < _SHORT_MINUTES
    points = (2, 3, 2) if is_short else (3, 4, 2)
    return Plan(
        minutes=minutes,
        streams=streams,
        seed=seed,
        segments=(
            Segment(name=SegmentName.FIRST, domain="code", share=0.35, num_points=points[0]),
            Segment(name=SegmentName.SHIFTED, domain="math", share=0.40, num_points=points[1]),
            Segment(name=SegmentName.RETURNED, domain="code", share=0.25, num_points=points[2]),
        ),
        probing=Probing(num_prompts=8, batch=8, num_timed=2, max_tokens=32)
        if is_short
        else Probing(num_prompts=40, batch=8, num_timed=4, max_tokens=40),
    )


def fixed_arms(segment: SegmentName, *, is_end: bool = False) -> tuple[Arm, ...]:
    """Return the arms whose acceptance is measured. Before the shift nothing is frozen, and n-gram lookup does not learn."""
    drafts = (Arm.ADAPTIVE,) if segment is SegmentName.FIRST else (Arm.ADAPTIVE, Arm.FROZEN)
    return (Arm.NGRAM, *drafts) if is_end else drafts


def timed_arms(segment: SegmentName) -> tuple[Arm, ...]:
    """Return the arms whose speed is measured at the last point of a segment."""
    return (Arm.NONE, Arm.NGRAM, *fixed_arms(segment), Arm.AUTO)


def fixed_requests(plan: Plan, segment: Segment, point: int) -> int:
    """Return the requests of the acceptance probe of report point `point` (from 0), at most."""
    return len(fixed_arms(segment.name, is_end=is_last(segment, point))) * plan.probing.num_prompts


def timed_requests(plan: Plan, segment: Segment, point: int) -> int:
    """Return the cost of the speed probe of report point `point` (from 0), in requests of an acceptance probe."""
    return ALONE_COST * len(timed_arms(segment.name)) * plan.probing.num_timed if is_last(segment, point) else 0


def probe_limit_s(plan: Plan, segment: Segment) -> float:
    """Return the time after which the acceptance probe of a report point asks no further batch."""
    return _PROBE_SHARE * segment.share * plan.total_s / segment.num_points


def is_last(segment: Segment, point: int) -> bool:
    """Whether report point `point` (from 0) ends the segment; speed is measured only there."""
    return point == segment.num_points - 1


def stretch_s(plan: Plan, segment: Segment, point: int, *, now_s: float, probe_request_s: float) -> float:
    """Return the length of traffic before report point `point` (from 0; none before the first).

    `probe_request_s` is the cost of a request of an acceptance probe so far.
    """
    if point == 0:
        return 0.0
    ahead = range(point, segment.num_points)
    limit_s = probe_limit_s(plan, segment)
    fixed_s = sum(min(limit_s, probe_request_s * fixed_requests(plan, segment, later)) for later in ahead)
    cost_s = fixed_s + probe_request_s * sum(timed_requests(plan, segment, later) for later in ahead)
    return max(MIN_STRETCH_S, (plan.end_s(segment.name) - now_s - cost_s) / len(ahead))
