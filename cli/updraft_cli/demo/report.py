"""The report as data: what `report.json` holds. docs/reference/report.md is generated from these classes.

Raw answers are kept next to every number that was made of them. Times are seconds from the start of the run (after the
set-up), unless they say otherwise.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import chain
from math import sqrt
from statistics import median
from typing import Self

from updraft_cli.demo.plan import Arm, SegmentName
from updraft_cli.results import Bar, Machine, Row

SCHEMA = 1

BySegment = dict[SegmentName, float | None]
ByArm = dict[Arm, BySegment]


class Answer(Row):
    """One request as its client saw it, with what the server said in `usage.updraft`."""

    prompt: int
    """Number of the prompt in the order of the run's seed."""
    output_tokens: int
    """Tokens of the answer."""
    verify_steps: int
    """Forward passes of the target after the first token."""
    proposed: int
    """Drafts that the target looked at."""
    accepted: int
    """Drafts that it kept."""
    drafter: str
    """Who made most of them: none, ngram or eagle3."""
    draft_version: int
    """The registry's number of the last draft that was used; 0 = none."""
    first_token_s: float
    """From sending the request to the first text."""
    duration_s: float
    """From sending the request to the end."""
    gaps_s: tuple[float, ...]
    """Times between arrivals of text: one a verify step, since several tokens may arrive together."""
    error: str = ""
    """Why it failed; empty if it did not."""


class Request(Answer):
    """One request of the live traffic."""

    number: int
    """From 1, in the order in which they ended."""
    segment: SegmentName
    """Which part of the traffic it belongs to."""
    domain: str
    """Which prompts."""
    started_s: float
    """When it was sent."""


class Measured(Row):
    """Several answers of one arm together."""

    requests: int
    """How many were sent."""
    failed: int
    """How many of them failed; the numbers below are of the others."""
    output_tokens: int
    """Tokens of all answers."""
    verify_steps: int
    """Forward passes of the target after the first token of each answer."""
    acceptance_length: float | None
    """Tokens a verify step: (output tokens - 1 for each request) / verify steps. The first token costs no such step."""
    acceptance_error_percent: float | None
    """Standard error of the acceptance length in percent of it, from its spread over requests; null below two requests."""
    wall_s: float
    """Time that the arm had the machine's serving to itself."""
    tokens_per_second: float | None
    """Output tokens / wall_s; prompts are read in that time too."""
    median_gap_s: float | None
    """Between arrivals of text."""
    max_gap_s: float | None
    """The longest of them."""
    answers: tuple[Answer, ...]
    """The raw answers."""

    @classmethod
    def of(cls, answers: Sequence[Answer], wall_s: float) -> Self:
        """Sum up."""
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
    """The draft that was measured; 0 = none, and for arms without drafts of their own."""
    acceptance_length: float | None
    """From `fixed` where it is there, else from `timed`."""
    tokens_per_second: float | None
    """From `timed`."""
    fixed: Measured | None
    """All prompts at once with the same number of drafts for every draft: for the acceptance length."""
    timed: Measured | None
    """One prompt at a time, and as many drafts as the engine likes: for the speed."""
    is_copy: bool = False
    """Not measured, but by definition the same as `adaptive`: the frozen draft before the shift."""

    @classmethod
    def of(cls, fixed: Measured | None, timed: Measured | None) -> Self:
        """Put together what was measured of an arm."""
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
    """Which part of the traffic it belongs to."""
    domain: str
    """Whose held-out prompts it asks."""
    is_start: bool
    """The first one of its segment."""
    is_end: bool
    """The last one of its segment: speed is measured too."""
    at_s: float
    """When it began."""
    duration_s: float
    """How long live traffic waited for it."""
    after_requests: int
    """Live requests that had ended by then."""
    arms: dict[Arm, ArmResult]
    """What was measured, by arm; an arm that was not measured is absent."""


class Swap(Row):
    """Another draft took over in the serving process."""

    at_s: float
    """When it was seen: up to a second later than it was."""
    after_requests: int
    """Live requests that had ended by then."""
    version: int
    """The draft that took over; 0 = none."""


class Estimate(Row):
    """What the trainer thought of its candidate, on captured requests that are never trained on."""

    at_s: float
    """When it was seen: up to a second later than it was made."""
    optimizer_steps: int
    """Steps of training behind the candidate."""
    loss: float | None
    """Loss of the last of them."""
    candidate_length: float
    """Acceptance length of the candidate."""
    baseline_length: float
    """Acceptance length of what served."""
    gain_percent: float
    """Of the candidate over what served."""
    gain_low_percent: float
    """Lower bound of the gain; it decides whether the candidate is published."""
    gain_high_percent: float
    """Upper bound of the gain."""


class Transition(Row):
    """What the registry decided on a version."""

    at_s: float
    """When it was decided."""
    version: int
    """The draft that it was about."""
    phase: str
    """What it became: stable, superseded, rejected, ..."""
    reason: str
    """Why, in a sentence."""
    actor: str
    """Who decided."""


class Part(Row):
    """One segment as it went."""

    name: SegmentName
    """Which part of the traffic."""
    domain: str
    """Which prompts."""
    started_s: float
    """When it began; the report point at its start is part of it."""
    ended_s: float
    """When it ended."""
    live_s: float
    """Of that, with live traffic."""
    requests: int
    """Live requests."""
    acceptance_length: float | None
    """Of the live requests, with as many drafts as the engine liked."""
    tokens_per_second: float | None
    """Output tokens of the live requests / live_s."""


class Summary(Row):
    """The numbers to quote. null: not measured."""

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
    """Times that the serving process took another draft."""
    swap_pause_mean_s: float | None
    """How long its decode loop stood still for one, on average, by its own clock."""
    requests: int
    """Live requests."""
    probe_requests: int
    """Requests of the report points."""
    failed_requests: int
    """Of both."""
    restarts: int
    """Processes that ended by themselves and were started again."""
    set_up_s: float
    """From the start of `make demo` (or of the command) until everything could serve."""
    total_s: float
    """From the same moment to the finished report."""


class Report(Row):
    """One run of the demo."""

    schema_version: int = SCHEMA
    """Raised when a field changes its meaning."""
    updraft_version: str
    """Of the installed package."""
    commit: str
    """Commit of the code, with + where files differ from it; empty outside a repository."""
    started: datetime
    """When the run began, UTC."""
    is_complete: bool
    """Whether it went to its end; false after Ctrl-C or a failure."""
    stopped_by: str
    """Why it did not go to its end; empty if it did."""
    machine: Machine
    """Where it ran."""
    model: str
    """The target model."""
    minutes: float
    """Planned length of the run."""
    streams: int
    """Requests that live traffic keeps running at once."""
    seed: int
    """Of the choice and the order of the prompts."""
    settings: dict[str, str]
    """What was set differently from `updraft up`."""
    frozen_version: int
    """The draft that served at the shift and was frozen; 0 = none served, and frozen is no draft."""
    summary: Summary
    """The numbers to quote."""
    bars: tuple[Bar, ...]
    """What had to hold, and whether it did."""
    parts: tuple[Part, ...]
    """The segments as they went."""
    points: tuple[Point, ...]
    """The report points: every arm on the same held-out prompts."""
    requests: tuple[Request, ...]
    """The live requests."""
    swaps: tuple[Swap, ...]
    """When another draft took over."""
    estimates: tuple[Estimate, ...]
    """What the trainer thought of its candidates."""
    transitions: tuple[Transition, ...]
    """What the registry decided, oldest first."""


def acceptance_length(answers: Iterable[Answer]) -> float | None:
    """Return tokens a verify step over all answers that had one; None if none had."""
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
