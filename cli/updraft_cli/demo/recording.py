"""All measurements of a run so far: traffic, probes and watch write here.

However the run ends, the report is made from it.
"""

from dataclasses import dataclass, field
from typing import Any

from updraft_chassis.clock import Clock
from updraft_cli.demo.plan import ALONE_COST, Arm, Plan, SegmentName
from updraft_cli.demo.report import (
    Answer,
    ArmResult,
    Estimate,
    Measured,
    Part,
    Point,
    Request,
    Swap,
    Transition,
    acceptance_length,
)

_FIRST_PROBE_REQUEST_S = 0.6
"""A guess until the first is measured: some 50 tokens at 80 tokens per second, of eight requests together."""


@dataclass(slots=True)
class _Span:
    segment: SegmentName
    domain: str
    started_s: float
    ended_s: float | None = None
    live_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Recording:
    """One run; written by one event loop."""

    plan: Plan
    clock: Clock
    doing: str = "starting"
    """Current activity, for a person."""
    requests: list[Request] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The console's, at the end."""
    restarts: list[str] = field(default_factory=list)
    served_version: int = 0
    frozen_version: int = 0
    optimizer_steps: int = 0
    """The trainer's count, as last read."""
    swap_pause_mean_s: float | None = None
    """By the serving process's clock; None before the first swap."""
    is_complete: bool = False
    start_s: float = field(init=False)
    start_unix_s: float = field(init=False)
    _spans: list[_Span] = field(default_factory=list)
    _probed_s: float = 0.0
    _probe_requests: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.start_s, self.start_unix_s = self.clock.monotonic(), self.clock.now()

    @property
    def now_s(self) -> float:
        """Seconds since the start of the run."""
        return round(self.clock.monotonic() - self.start_s, 3)

    @property
    def segment(self) -> SegmentName | None:
        return self._spans[-1].segment if self._spans and self._spans[-1].ended_s is None else None

    @property
    def probe_request_s(self) -> float:
        """Mean cost of a request of an acceptance probe so far; one that runs alone counts as `ALONE_COST`."""
        return self._probed_s / self._probe_requests if self._probe_requests else _FIRST_PROBE_REQUEST_S

    def begin(self, segment: SegmentName, domain: str) -> None:
        self._spans.append(_Span(segment, domain, self.now_s))

    def end(self) -> None:
        self._spans[-1].ended_s = self.now_s

    def add_live_s(self, seconds: float) -> None:
        self._spans[-1].live_s += seconds

    def add_request(self, answer: Answer, *, started_s: float) -> None:
        span = self._spans[-1]
        self.requests.append(
            Request(
                **answer.model_dump(),
                number=len(self.requests) + 1,
                segment=span.segment,
                domain=span.domain,
                started_s=started_s,
            )
        )

    def add_point(
        self, fixed: dict[Arm, Measured], timed: dict[Arm, Measured], *, is_start: bool, is_end: bool, started_s: float
    ) -> None:
        """Add a report point. Before the shift, the frozen draft is the adaptive one."""
        span = self._spans[-1]
        arms = {arm: ArmResult.of(fixed.get(arm), timed.get(arm)) for arm in Arm if arm in fixed or arm in timed}
        if span.segment is SegmentName.FIRST and Arm.ADAPTIVE in arms:
            arms[Arm.FROZEN] = arms[Arm.ADAPTIVE].model_copy(update={"is_copy": True})
        self._probed_s += self.now_s - started_s
        self._probe_requests += sum(measured.requests for measured in fixed.values())
        self._probe_requests += ALONE_COST * sum(measured.requests for measured in timed.values())
        self.points.append(
            Point(
                number=len(self.points) + 1,
                segment=span.segment,
                domain=span.domain,
                is_start=is_start,
                is_end=is_end,
                at_s=started_s,
                duration_s=round(self.now_s - started_s, 3),
                after_requests=len(self.requests),
                arms=arms,
            )
        )

    def note_served(self, version: int) -> None:
        """Record the version that the engine reports."""
        if version != self.served_version:
            self.served_version = version
            self.swaps.append(Swap(at_s=self.now_s, after_requests=len(self.requests), version=version))

    def note_estimate(self, estimate: Estimate) -> None:
        """Record the trainer's estimate of its candidate, if it changed."""
        self.optimizer_steps = estimate.optimizer_steps
        last = self.estimates[-1] if self.estimates else None
        if last is None or _opinion(last) != _opinion(estimate):
            self.estimates.append(estimate)

    @property
    def parts(self) -> list[Part]:
        """The segments so far."""
        return [_part(self, span) for span in self._spans]

    def part(self, segment: SegmentName) -> Part | None:
        """Return one segment; None if it has not begun."""
        return next((_part(self, span) for span in self._spans if span.segment is segment), None)


def _part(recording: Recording, span: _Span) -> Part:
    requests = [request for request in recording.requests if request.segment is span.segment and not request.error]
    tokens = sum(request.output_tokens for request in requests)
    return Part(
        name=span.segment,
        domain=span.domain,
        started_s=span.started_s,
        ended_s=recording.now_s if span.ended_s is None else span.ended_s,
        live_s=round(span.live_s, 3),
        requests=sum(request.segment is span.segment for request in recording.requests),
        acceptance_length=acceptance_length(requests),
        tokens_per_second=round(tokens / span.live_s, 3) if tokens and span.live_s > 0 else None,
    )


def _opinion(estimate: Estimate) -> tuple[float, ...]:
    return (estimate.candidate_length, estimate.baseline_length, estimate.gain_percent, estimate.gain_low_percent)
