"""The report as data: the content of `report.json`. docs/reference/report.md is generated from these classes.

Raw answers are kept next to every number derived from them. Times are seconds from the start of the run (after the set-up),
unless stated otherwise.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import chain
from math import sqrt
from statistics import median
from typing import Any, Self

from pydantic import Field

from updraft_cli.demo.plan import Arm, SegmentName
from updraft_cli.results import Bar, Machine, Row

SCHEMA = 1

BySegment = dict[SegmentName, float | None]
ByArm = dict[Arm, BySegment]


class Answer(Row):
    """One request as its client saw it, with the server's `usage.updraft`."""

    prompt: int
    """Number of the prompt, in the order of the run's seed."""
    output_tokens: int
    """Tokens of the answer."""
    verify_steps: int
    """Forward passes of the target after the first token."""
    proposed: int
    """Draft tokens that the target verified."""
    accepted: int
    """Draft tokens that it accepted."""
    drafter: str
    """Drafter of most of them: none, ngram or eagle3."""
    draft_version: int
    """Version of the last draft that was used; 0 = none."""
    first_token_s: float
    """From sending the request to the first text."""
    duration_s: float
    """From sending the request to the end."""
    gaps_s: tuple[float, ...]
    """Times between arrivals of text: one per verify step, because several tokens may arrive together."""
    error: str = ""
    """Reason of a failure; empty if it succeeded."""


class Request(Answer):
    """One request of the live traffic."""

    number: int
    """From 1, in the order of their ends."""
    segment: SegmentName
    """Segment of the traffic."""
    domain: str
    """Domain of the prompts."""
    started_s: float
    """Time of sending."""


class Measured(Row):
    """Several answers of one arm together."""

    requests: int
    """Number of requests."""
    failed: int
    """Number of failed requests; the fields below cover the others."""
    output_tokens: int
    """Tokens of all answers."""
    verify_steps: int
    """Forward passes of the target after the first token of each answer."""
    acceptance_length: float | None
    """Tokens per verify step: (output tokens - 1 per request) / verify steps. The first token needs no verify step."""
    acceptance_error_percent: float | None
    """Standard error of the acceptance length in percent of it, from its spread over requests; null below two requests."""
    wall_s: float
    """Time in which only this arm was served."""
    tokens_per_second: float | None
    """Output tokens / wall_s, which includes the prompts."""
    median_gap_s: float | None
    """Median time between arrivals of text."""
    max_gap_s: float | None
    """Longest time between arrivals of text."""
    answers: tuple[Answer, ...]
    """The raw answers."""

    @classmethod
    def of(cls, answers: Sequence[Answer], wall_s: float) -> Self:
        good = [answer for answer in answers if not answer.error]
        gaps = list(chain.from_iterable(answer.gaps_s for answer in good))
        output_tokens = sum(answer.output_tokens for answer in good)
        return cls(
            requests=len(answers),
            failed=len(answers) - len(good),
            output_tokens=output_tokens,
            verify_steps=sum(answer.verify_steps for answer in good),
            acceptance_length=acceptance_length(good),
            acceptance_error_percent=acceptance_error_percent(good),
            wall_s=round(wall_s, 4),
            tokens_per_second=round(output_tokens / wall_s, 3) if output_tokens and wall_s > 0 else None,
            median_gap_s=median(gaps) if gaps else None,
            max_gap_s=max(gaps, default=None),
            answers=tuple(answers),
        )


class ArmResult(Row):
    """One arm at one report point."""

    draft_version: int
    """Version that was measured; 0 = none, also for arms that use no learned draft."""
    acceptance_length: float | None
    """From `fixed` if measured, else from `timed`."""
    tokens_per_second: float | None
    """From `timed`."""
    fixed: Measured | None
    """Prompts in batches, with the same number of draft tokens for every draft: for the acceptance length."""
    timed: Measured | None
    """One prompt at a time, with the number of draft tokens that the engine chooses: for the speed."""
    is_copy: bool = False
    """True for the frozen draft before the shift: not measured, because it is `adaptive` by definition."""

    @classmethod
    def of(cls, fixed: Measured | None, timed: Measured | None) -> Self:
        measured = fixed or timed
        answers = measured.answers if measured else ()
        return cls(
            draft_version=max((answer.draft_version for answer in answers), default=0),
            acceptance_length=measured.acceptance_length if measured else None,
            tokens_per_second=timed.tokens_per_second if timed else None,
            fixed=fixed,
            timed=timed,
        )


class Point(Row):
    """One report point: live traffic waits while the same held-out prompts go through all arms."""

    number: int
    """From 1."""
    segment: SegmentName
    """Segment of the traffic."""
    domain: str
    """Domain of its held-out prompts."""
    is_start: bool
    """Whether it is the first of its segment."""
    is_end: bool
    """Whether it is the last of its segment, which also measures speed."""
    at_s: float
    """Start."""
    duration_s: float
    """Time that live traffic waited for it."""
    after_requests: int
    """Live requests that had ended before."""
    arms: dict[Arm, ArmResult]
    """Results by arm; an arm that was not measured is absent."""


class Swap(Row):
    """The serving process loaded another draft."""

    at_s: float
    """Time at which it was observed, up to a second after it happened."""
    after_requests: int
    """Live requests that had ended before."""
    version: int
    """Version that was loaded; 0 = none."""


class Estimate(Row):
    """The trainer's estimate of its candidate, on captured requests that it never trains on."""

    at_s: float
    """Time at which it was observed, up to a second after it was made."""
    optimizer_steps: int
    """Training steps of the candidate."""
    loss: float | None
    """Loss of the last step."""
    candidate_length: float
    """Acceptance length of the candidate."""
    baseline_length: float
    """Acceptance length of the served draft."""
    gain_percent: float
    """Gain of the candidate over the served draft."""
    gain_low_percent: float
    """Lower bound of the gain; it decides whether the candidate is published."""
    gain_high_percent: float
    """Upper bound of the gain."""


class Transition(Row):
    """A decision of the registry about a version."""

    at_s: float
    """Time of the decision."""
    version: int
    """The version concerned."""
    phase: str
    """New phase: stable, superseded, rejected, ..."""
    reason: str
    """Reason, in a sentence."""
    actor: str
    """Actor of the decision: gate, operator, ..."""


class Part(Row):
    """One segment."""

    name: SegmentName
    """Segment of the traffic."""
    domain: str
    """Domain of the prompts."""
    started_s: float
    """Start, including the report point there."""
    ended_s: float
    """End."""
    live_s: float
    """Time with live traffic."""
    requests: int
    """Live requests."""
    acceptance_length: float | None
    """Acceptance length of the live requests, with the number of draft tokens that the engine chose."""
    tokens_per_second: float | None
    """Output tokens of the live requests / live_s."""


class Summary(Row):
    """The main numbers. null: not measured."""

    acceptance_length: ByArm
    """At the last report point of each segment, by arm."""
    acceptance_length_mean: ByArm
    """Mean over the report points of each segment."""
    tokens_per_second: ByArm
    """At the last report point of each segment, by arm."""
    tokens_per_second_mean: ByArm
    """Mean over the report points of each segment that measured it."""
    acceptance_error_percent: float | None
    """Largest standard error of an acceptance length of the adaptive draft at a report point, in percent."""
    swaps: int
    """Swaps of the serving process."""
    swap_pause_mean_s: float | None
    """Mean pause of its decode loop per swap, by its own clock."""
    requests: int
    """Live requests."""
    probe_requests: int
    """Requests of the report points."""
    failed_requests: int
    """Failed requests, of both kinds."""
    restarts: int
    """Processes that ended by themselves and were restarted."""
    set_up_s: float
    """Time from the start of `make demo` (or of the command) until everything was ready."""
    total_s: float
    """Time from the same start to the finished report."""


class Report(Row):
    """One run of the demo."""

    schema_version: int = SCHEMA
    """Increased when a field changes its meaning."""
    updraft_version: str
    """Version of the installed package."""
    commit: str
    """Commit of the code, with + if files differ from it; empty outside a repository."""
    started: datetime
    """When the run began, UTC."""
    is_complete: bool
    """Whether the run was complete; false after Ctrl-C or a failure."""
    stopped_by: str
    """Reason if it was not complete; else empty."""
    machine: Machine
    """The machine."""
    model: str
    """The target model."""
    minutes: float
    """Planned length of the run."""
    streams: int
    """Concurrent live requests."""
    seed: int
    """Seed of the choice and the order of the prompts."""
    settings: dict[str, str]
    """Settings that differ from those of `updraft up`."""
    frozen_version: int
    """Version that served at the shift and was frozen; 0 = none, and the frozen arm has no draft."""
    summary: Summary
    """The main numbers."""
    bars: tuple[Bar, ...]
    """The requirements, and whether each is met."""
    parts: tuple[Part, ...]
    """The segments."""
    points: tuple[Point, ...]
    """The report points: every arm on the same held-out prompts."""
    requests: tuple[Request, ...]
    """The live requests."""
    swaps: tuple[Swap, ...]
    """The swaps."""
    estimates: tuple[Estimate, ...]
    """The trainer's estimates of its candidates."""
    transitions: tuple[Transition, ...]
    """Decisions of the registry, oldest first."""
    charts: dict[str, Any] = Field(default_factory=dict)
    """The console's charts at the end of the run, by name, as docs/console.md describes them; empty if there was none."""


def acceptance_length(answers: Iterable[Answer]) -> float | None:
    """Return tokens per verify step over all answers that had a step; None if none had."""
    stepped = [answer for answer in answers if answer.verify_steps]
    if not stepped:
        return None
    tokens = sum(answer.output_tokens - 1 for answer in stepped)
    return round(tokens / sum(answer.verify_steps for answer in stepped), 4)


def acceptance_error_percent(answers: Iterable[Answer]) -> float | None:
    """Return the standard error of `acceptance_length`, in percent: that of a ratio, with requests as the sample."""
    stepped = [answer for answer in answers if answer.verify_steps]
    if len(stepped) < 2:
        return None
    tokens = [answer.output_tokens - 1 for answer in stepped]
    steps = [answer.verify_steps for answer in stepped]
    length, num = sum(tokens) / sum(steps), len(stepped)
    residuals = sum((token - length * step) ** 2 for token, step in zip(tokens, steps, strict=True))
    return round(100 * sqrt(num / (num - 1) * residuals) / sum(tokens), 2)
