"""The live gate: with the required confidence, is the candidate better or worse than the stable version on live traffic?

Every bound is wrong with probability at most alpha = 1 - confidence over the whole life of a canary, so it can be read
at any time and acted on at once. A promotion depends on one bound (acceptance is higher), so a candidate that is not better
is promoted with probability at most alpha. The latency estimate can only veto, which makes promotions rarer. Promoting a
candidate that is merely not worse was refused: without a gain, it is not worth a swap of the whole fleet.
"""

import math
from dataclasses import dataclass

from updraft_registry.rollout.comparison import Evidence, Ratio
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.sequence import lower, upper
from updraft_rollouts.policy import ACCEPTANCE_IS_HIGHER, Analysis, acceptance_is_lower, latency_is_higher


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Candidate against stable: the change in percent and its bounds, which are -100 and infinity until they exist."""

    candidate: float
    stable: float
    change_percent: float
    low_percent: float
    high_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveJudgement:
    """A verdict, the sentence that a person reads, and the estimates; None before the first observation."""

    verdict: Verdict
    reason: str
    acceptance: Estimate | None = None
    """Tokens per verify step."""
    latency: Estimate | None = None
    """Seconds between tokens."""
    is_tolerable: bool = True
    """No estimate is beyond its limit, with or without confidence, so the candidate may go to more pods."""


def judge(evidence: Evidence, analysis: Analysis) -> LiveJudgement:
    """Decide on the evidence so far. Deciding often does not weaken the guarantee."""
    alpha = 1.0 - analysis.confidence
    acceptance, latency = _estimate(evidence.acceptance, alpha), _estimate(evidence.latency, alpha)
    failed = _failed(evidence, analysis, acceptance, latency)
    missing = _missing(evidence, analysis, acceptance, latency)
    if failed:
        verdict, why = Verdict.FAIL, failed
    elif missing:
        verdict, why = Verdict.HOLD, missing
    else:
        verdict, why = Verdict.PASS, ACCEPTANCE_IS_HIGHER
    summary = _summary(evidence, analysis, acceptance, latency)
    return LiveJudgement(
        verdict=verdict,
        reason=f"{why}: {summary}",
        acceptance=acceptance,
        latency=latency,
        is_tolerable=_is_tolerable(analysis, acceptance, latency),
    )


def _failed(evidence: Evidence, analysis: Analysis, acceptance: Estimate | None, latency: Estimate | None) -> str:
    """Why the candidate fails; empty if it does not."""
    if evidence.failures > analysis.failure_limit and _fails_more_often(evidence):
        against = f" against {evidence.baseline_failures} with the stable version" if evidence.baseline_failures else ""
        failures = f"{evidence.failures} errors or crashes with the candidate{against}"
        return f"{failures}, limit {analysis.failure_limit}"
    allowed = analysis.max_acceptance_regression_percent
    if acceptance is not None and acceptance.high_percent < -allowed:
        return acceptance_is_lower(allowed)
    allowed = analysis.max_latency_regression_percent
    if latency is not None and latency.low_percent > allowed:
        return latency_is_higher(allowed)
    return ""


def _fails_more_often(evidence: Evidence) -> bool:
    """More than twice as often per request as the stable version: a failure of both is not the candidate's fault."""
    candidate_requests, baseline_requests = max(1, evidence.candidate_requests), max(1, evidence.baseline_requests)
    return evidence.failures * baseline_requests > 2 * evidence.baseline_failures * candidate_requests


def _missing(evidence: Evidence, analysis: Analysis, acceptance: Estimate | None, latency: Estimate | None) -> str:
    """Why the candidate cannot be promoted yet; empty if it can."""
    if acceptance is None:
        return "waiting for traffic on both versions"
    if acceptance.low_percent <= 0.0:
        return "acceptance is not significantly higher yet"
    if latency is None:
        return f"{ACCEPTANCE_IS_HIGHER}, but latency is unknown"
    if latency.change_percent > analysis.max_latency_regression_percent:
        return (
            f"{ACCEPTANCE_IS_HIGHER}, but latency is higher by more than {analysis.max_latency_regression_percent:g} %"
        )
    if evidence.candidate_requests < analysis.min_samples:
        return f"{ACCEPTANCE_IS_HIGHER}, but {analysis.min_samples} requests are required"
    return ""


def _is_tolerable(analysis: Analysis, acceptance: Estimate | None, latency: Estimate | None) -> bool:
    is_slow = latency is not None and latency.change_percent > analysis.max_latency_regression_percent
    is_worse = acceptance is not None and acceptance.change_percent < -analysis.max_acceptance_regression_percent
    return not (is_slow or is_worse)


def _summary(evidence: Evidence, analysis: Analysis, acceptance: Estimate | None, latency: Estimate | None) -> str:
    parts = []
    if acceptance is not None:
        lengths = f"{acceptance.candidate:.2f} against {acceptance.stable:.2f} tokens per step"
        parts.append(f"{lengths}, {_change(acceptance, analysis)}")
    if latency is not None:
        times = f"{1000 * latency.candidate:.3g} against {1000 * latency.stable:.3g} ms per token"
        parts.append(f"{times}, {_change(latency, analysis)}")
    requests, slices = _count(evidence.candidate_requests, "request"), _count(evidence.slices, "slice")
    return "; ".join((*parts, f"{requests} in {slices}"))


def _estimate(ratio: Ratio, alpha: float) -> Estimate | None:
    if ratio.change.count == 0:
        return None
    return Estimate(
        candidate=_exp(ratio.baseline.mean + ratio.change.mean),
        stable=_exp(ratio.baseline.mean),
        change_percent=_percent(ratio.change.mean),
        low_percent=_percent(lower(ratio.change, alpha)),
        high_percent=_percent(upper(ratio.change, alpha)),
    )


def _change(estimate: Estimate, analysis: Analysis) -> str:
    change = f"{estimate.change_percent:+.1f} %"
    if math.isinf(estimate.high_percent):
        return f"{change} (no bounds yet)"
    bounds = f"{estimate.low_percent:+.1f} to {estimate.high_percent:+.1f} %"
    return f"{change} ({bounds} at {analysis.confidence * 100:g} %)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _percent(log_ratio: float) -> float:
    return 100.0 * (_exp(log_ratio) - 1.0)


def _exp(logarithm: float) -> float:
    """Infinity on overflow, which slices that contradict each other cause."""
    try:
        return math.exp(logarithm)
    except OverflowError:
        return math.inf
