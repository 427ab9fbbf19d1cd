"""The live gate's evidence, slice by slice, and its verdicts: the registry's own code on slices from a seeded generator."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tools.pictures.svg import Drawing, Point

from updraft_registry.rollout.comparison import Evidence
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.live import Estimate, LiveJudgement, judge
from updraft_rollouts.policy import Analysis

SEED = 4
NUM_SLICES = 20
REQUESTS = 60
"""Requests that each version finishes in a slice."""
STABLE_TOKENS, STABLE_S = 2.3, 0.013
NOISE = 0.07
"""Standard deviation of a slice's logarithm."""
TOP, BOTTOM, MOST_PERCENT = 84.0, 330.0, 30.0


@dataclass(frozen=True, slots=True)
class Case:
    """A candidate with a true effect on acceptance, and the sentence under its verdict."""

    title: str
    effect: float
    color: str
    ending: str


CASES = (
    Case("10 % better", 0.10, "good", "promoted: serves everywhere"),
    Case("equal", 0.0, "warm", "no verdict: the stable version stays"),
    Case("10 % worse", -0.10, "bad", "rolled back, never tried again"),
)


def looks(case: Case, analysis: Analysis) -> Iterator[LiveJudgement]:
    """The judgement after each slice, up to the first verdict."""
    rng, evidence = random.Random(SEED), Evidence.begin(0)
    for number in range(1, NUM_SLICES + 1):
        change = math.log1p(case.effect) + rng.gauss(0.0, NOISE)
        stable = STABLE_TOKENS * math.exp(rng.gauss(0.0, NOISE))
        evidence = replace(
            evidence,
            slices=number,
            candidate_requests=number * REQUESTS,
            baseline_requests=number * REQUESTS,
            acceptance=evidence.acceptance.plus(stable * math.exp(change), stable),
            latency=evidence.latency.plus(STABLE_S * math.exp(-change), STABLE_S),
        )
        judgement = judge(evidence, analysis)
        yield judgement
        if judgement.verdict is not Verdict.HOLD:
            return


def picture() -> str:
    """Three canaries side by side."""
    drawing = Drawing("The live gate: three canaries, and when their evidence is sufficient", 420)
    drawing.text(
        (20, 24), "Acceptance of the candidate against the stable version, after each slice of traffic", style="bold"
    )
    drawing.text(
        (20, 44), "Dot: the estimate. Bar: where the truth is, at 95 % however often one looks.", color="quiet", size=13
    )
    for number, case in enumerate(CASES):
        _canary(drawing, 62 + 275 * number, case, is_first=number == 0)
    return drawing.render()


def _canary(drawing: Drawing, left: float, case: Case, *, is_first: bool) -> None:
    analysis, width = Analysis(), 235.0
    judgements = list(looks(case, analysis))
    drawing.text((left, TOP - 12), f"In truth {case.title}", color=case.color, style="bold")
    for percent in (-20, -10, 0, 10, 20):
        drawing.line([(left, _y(percent)), (left + width, _y(percent))], color="quiet" if percent == 0 else "line")
        if is_first:
            drawing.text(
                (left - 8, _y(percent) + 4),
                f"{percent:+d} %" if percent else "0 %",
                color="quiet",
                size=12,
                style="end",
            )
    limit = -analysis.max_acceptance_regression_percent
    drawing.line([(left, _y(limit)), (left + width, _y(limit))], color="bad", dashed=True)
    if is_first:
        drawing.text((left + width, _y(limit) + 14), f"fails below {limit} %", color="bad", size=12, style="end")
    for number, judgement in enumerate(judgements):
        x = left + width * (number + 0.5) / NUM_SLICES
        if judgement.acceptance is not None:
            color = case.color if number == len(judgements) - 1 else "quiet"
            _look(drawing, x, judgement.acceptance, color)
    drawing.text((left, BOTTOM + 20), "1", color="quiet", size=12)
    drawing.text((left + width, BOTTOM + 20), f"{NUM_SLICES} slices", color="quiet", size=12, style="end")
    _verdict(drawing, (left, BOTTOM + 46), case, judgements)


def _look(drawing: Drawing, x: float, estimate: Estimate, color: str) -> None:
    if not math.isinf(estimate.high_percent):
        drawing.line([(x, _y(estimate.low_percent)), (x, _y(estimate.high_percent))], color=color, width=3)
    drawing.dot((x, _y(estimate.change_percent)), color=color, radius=3.5)


def _verdict(drawing: Drawing, at: Point, case: Case, judgements: list[LiveJudgement]) -> None:
    verdict, estimate = judgements[-1].verdict, judgements[-1].acceptance
    assert estimate is not None  # every slice has both versions
    head = f"{verdict.value.upper()} after {len(judgements)} slices"
    drawing.text(at, head, color=case.color, style="bold")
    bounds = f"{estimate.change_percent:+.1f} % ({estimate.low_percent:+.1f} to {estimate.high_percent:+.1f} %)"
    drawing.lines((at[0], at[1] + 18), [bounds, case.ending], size=12.5)


def _y(percent: float) -> float:
    clipped = max(-MOST_PERCENT, min(MOST_PERCENT, percent))
    return TOP + (BOTTOM - TOP) * (MOST_PERCENT - clipped) / (2 * MOST_PERCENT)
