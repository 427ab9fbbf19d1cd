"""A demo that nobody ran: a recording with curves as one would hope for, made in milliseconds."""

import math
from collections.abc import Sequence

from tests.support.clock import ManualClock

from updraft_cli.demo.plan import Arm, SegmentName, fixed_arms, is_last, make_plan, timed_arms
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import Answer, Estimate, Measured, Report, Transition
from updraft_cli.demo.run import make_report
from updraft_cli.demo.summary import summarise

SPEEDS = {Arm.NONE: 38.0, Arm.NGRAM: 58.0, Arm.FROZEN: 42.0, Arm.ADAPTIVE: 49.0, Arm.AUTO: 55.0}
LENGTHS = {Arm.NONE: 1.0, Arm.NGRAM: 1.75, Arm.FROZEN: 1.2, Arm.AUTO: 1.9}
_ENDS = {SegmentName.FIRST: 1.55, SegmentName.SHIFTED: 1.7, SegmentName.RETURNED: 1.65}
_STARTS = {SegmentName.FIRST: 1.0, SegmentName.SHIFTED: 1.2, SegmentName.RETURNED: 1.5}


def answer(length: float = 1.5, *, tokens: int = 61, version: int = 1, error: str = "", prompt: int = 0) -> Answer:
    """One request with `length` tokens a verify step."""
    steps = 0 if error else round((tokens - 1) / length)
    return Answer(
        prompt=prompt,
        output_tokens=0 if error else tokens,
        verify_steps=steps,
        proposed=3 * steps,
        accepted=max(0, tokens - 1 - steps),
        drafter="eagle3" if version else "none",
        draft_version=version,
        first_token_s=0.2,
        duration_s=3.0,
        gaps_s=(0.05,) * steps,
        error=error,
    )


def measured(length: float, *, speed: float = 40.0, num: int = 4, version: int = 0) -> Measured:
    """Answers that give `speed` tokens a second together."""
    answers = [answer(length, version=version, prompt=prompt) for prompt in range(num)]
    return Measured.of(answers, sum(a.output_tokens for a in answers) / speed)


def recorded(*, segments: int = 3, minutes: float = 9.0) -> Recording:
    """The recording of a run of so many segments."""
    clock = ManualClock()
    recording = Recording(plan=make_plan(minutes=minutes, streams=4, seed=0), clock=clock)
    for segment in recording.plan.segments[:segments]:
        recording.begin(segment.name, segment.domain)
        if segment.name is SegmentName.SHIFTED:
            recording.frozen_version = recording.served_version
            clock.advance(12)
        for point in range(segment.num_points):
            progress = point / (segment.num_points - 1)
            if point:
                _stretch(recording, clock, segment.name, progress)
            _point(recording, clock, segment.name, progress, is_end=is_last(segment, point))
        recording.end()
    recording.swap_pause_mean_s = 0.003 if recording.swaps else None
    recording.is_complete = segments == len(recording.plan.segments)
    return recording


def report_of(recording: Recording, *, stopped_by: str = "") -> Report:
    """The report of a recording."""
    summary = summarise(recording, set_up_s=200.0, total_s=700.0)
    return make_report(recording, summary, model="SmolLM2-135M-Instruct", stopped_by=stopped_by)


def _length(segment: SegmentName, progress: float) -> float:
    """Quick at first, then slower, as learning is."""
    return _STARTS[segment] + (_ENDS[segment] - _STARTS[segment]) * (1 - math.exp(-3 * progress)) / (1 - math.exp(-3))


def _stretch(recording: Recording, clock: ManualClock, segment: SegmentName, progress: float) -> None:
    start_s = recording.now_s
    for number in range(28):
        clock.advance(2.0)
        wobble = 0.12 * math.sin(7.3 * len(recording.requests))
        live = max(1.0, _length(segment, progress) + wobble)
        recording.add_request(
            answer(live, version=recording.served_version), started_s=max(start_s, recording.now_s - 8)
        )
        if number == 14:
            _publish(recording, segment, progress)
    recording.add_live_s(recording.now_s - start_s)


def _publish(recording: Recording, segment: SegmentName, progress: float) -> None:
    candidate, baseline = _length(segment, progress), _length(segment, progress - 0.3) if progress > 0.3 else 1.0
    recording.note_estimate(
        Estimate(
            at_s=recording.now_s,
            optimizer_steps=20 * len(recording.requests),
            loss=2.0,
            candidate_length=round(candidate, 4),
            baseline_length=round(baseline, 4),
            gain_percent=100 * (candidate / baseline - 1),
            gain_low_percent=100 * (candidate / baseline - 1) - 4,
            gain_high_percent=100 * (candidate / baseline - 1) + 4,
        )
    )
    version = len(recording.transitions) + 1
    is_taken = version != 4
    told = f"acceptance length {candidate:.2f} against {baseline:.2f}"
    recording.transitions.append(
        Transition(
            at_s=recording.now_s,
            version=version,
            phase="stable" if is_taken else "rejected",
            reason=f"{told}: better" if is_taken else f"{told}: not significantly 1 %",
            actor="gate",
        )
    )
    if is_taken:
        recording.note_served(version)


def _point(recording: Recording, clock: ManualClock, segment: SegmentName, progress: float, *, is_end: bool) -> None:
    started_s = recording.now_s
    clock.advance(30.0 if is_end else 8.0)
    recording.add_point(
        _arms(recording, fixed_arms(segment, is_end=is_end), segment, progress),
        _arms(recording, timed_arms(segment), segment, progress) if is_end else {},
        is_start=progress == 0,
        is_end=is_end,
        started_s=started_s,
    )


def _arms(recording: Recording, arms: Sequence[Arm], segment: SegmentName, progress: float) -> dict[Arm, Measured]:
    drafted = {Arm.ADAPTIVE: recording.served_version, Arm.FROZEN: recording.frozen_version}
    lengths = {**LENGTHS, Arm.ADAPTIVE: _length(segment, progress)}
    if segment is SegmentName.RETURNED:
        lengths[Arm.FROZEN] = _ENDS[SegmentName.FIRST]
    return {arm: measured(lengths[arm], speed=SPEEDS[arm], version=drafted.get(arm, 0)) for arm in arms}
