"""The live gate: with the required confidence, is the candidate better or worse than the stable version on live traffic?

Every bound is wrong with probability at most alpha = 1 - confidence over the whole life of a canary, so it can be read
at any time and acted on at once. A promotion depends on one bound (acceptance is higher), so a candidate that is not better
is promoted with probability at most alpha. The latency estimate can only veto, which makes promotions rarer. Promoting a
candidate that is merely not worse was refused: without a gain, it is not worth a swap of the whole fleet.

A domain can veto too. All domains seen so far share one alpha (Bonferroni), because with sixteen of them one would look worse
by chance. A domain that appears after others had bounds shares with them from then on, which costs a little more than alpha.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from updraft_registry.rollout.comparison import MAX_DOMAINS, Evidence, Ratio
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.sequence import lower, upper
from updraft_registry.rollout.speedup import Speedup
from updraft_rollouts.evidence import shown_name
from updraft_rollouts.policy import (
    ACCEPTANCE_IS_HIGHER,
    USELESS_ACCEPTANCE_LENGTH,
    Analysis,
    acceptance_is_lower,
    latency_is_higher,
)

MIN_DOMAIN_SLICES = 4
"""From here on the estimate of a domain can delay a promotion: less is noise. A bound can exist from then on, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Candidate against stable: the change in percent and its bounds, which are -100 and infinity until they exist."""

    candidate: float
    stable: float
    change_percent: float
    low_percent: float
    high_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEstimate:
    """The change of acceptance in one domain."""

    name: str
    estimate: Estimate
    num_slices: int

    def __str__(self) -> str:
        return f"for {shown_name(self.name)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveJudgement:
    """A verdict, the sentence that a person reads, and the estimates; None before the first observation."""

    verdict: Verdict
    reason: str
    acceptance: Estimate | None = None
    """Tokens per verify step."""
    latency: Estimate | None = None
    """Seconds between tokens."""
    domains: tuple[DomainEstimate, ...] = ()
    """Tokens per verify step in the domains that were compared, the worst change first."""
    is_tolerable: bool = True
    """No estimate is beyond its limit, with or without confidence, so the candidate may go to more pods."""


def judge(evidence: Evidence, analysis: Analysis) -> LiveJudgement:
    """Decide on the evidence so far. Deciding often does not weaken the guarantee."""
    alpha = 1.0 - analysis.confidence
    acceptance, latency = _estimate(evidence.acceptance, alpha), _estimate(evidence.latency, alpha)
    domains = _domains(evidence, alpha)
    failed = (
        _failures(evidence, analysis) or _failed(analysis, acceptance, latency) or _failed_domain(analysis, domains)
    )
    missing = _missing(evidence, analysis, acceptance, latency) or _doubtful_domain(analysis, domains)
    summary = _summary(evidence, analysis, acceptance, latency)
    return LiveJudgement(
        verdict=_verdict(failed, missing),
        reason=f"{failed or missing or ACCEPTANCE_IS_HIGHER}: {summary}",
        acceptance=acceptance,
        latency=latency,
        domains=tuple(domains),
        is_tolerable=_is_tolerable(analysis, acceptance, latency),
    )


def judge_without_baseline(evidence: Evidence, analysis: Analysis, speedup: Speedup | None) -> LiveJudgement:
    """The same against no draft: the candidate wins if it is accepted and speculation with it pays.

    `speedup` is what the canary's pods measure; None: nothing, and acceptance alone decides, which has to be above what a draft
    costs. Above 1 is nothing: a length is never below. No number of requests is required,
    because any draft can be told from none by a few slices. While speculation does not pay, engines that measure it draft
    nothing, so a failure has time until there are slices.
    """
    alpha = 1.0 - analysis.confidence
    acceptance = _estimate(evidence.acceptance, alpha)
    failed, missing = _failures(evidence, analysis), ""
    if acceptance is None or math.isinf(acceptance.high_percent):
        missing = "waiting for traffic"
    elif acceptance.low_percent <= 0.0:
        missing = "no draft token is surely accepted yet"
    elif speedup is None and acceptance.low_percent <= 100.0 * (USELESS_ACCEPTANCE_LENGTH - 1.0):
        missing = f"acceptance is not surely above {USELESS_ACCEPTANCE_LENGTH:g} tokens per step yet"
    elif speedup is not None and speedup.high < 1.0:
        failed = failed or "decoding is significantly slower than without a draft"
    elif speedup is not None and speedup.low <= 1.0:
        missing = "decoding is not significantly faster than without a draft yet"
    won = "decoding is significantly faster than without a draft" if speedup else "draft tokens are accepted"
    parts = [_summary(evidence, analysis, acceptance, None)]
    if speedup is not None:
        parts.insert(0, f"speedup {speedup.ratio:.2f} ({speedup.low:.2f} to {speedup.high:.2f} at 90 %)")
    return LiveJudgement(
        verdict=_verdict(failed, missing),
        reason=f"{failed or missing or won}: {'; '.join(parts)}",
        acceptance=acceptance,
    )


def _verdict(failed: str, missing: str) -> Verdict:
    return Verdict.FAIL if failed else Verdict.HOLD if missing else Verdict.PASS


def _failures(evidence: Evidence, analysis: Analysis) -> str:
    """Why the candidate fails by its errors and crashes; empty if it does not."""
    if evidence.failures <= analysis.failure_limit or not _fails_more_often(evidence):
        return ""
    against = f" against {evidence.baseline_failures} without it" if evidence.baseline_failures else ""
    failures = f"{evidence.failures} errors or crashes with the candidate{against}"
    return f"{failures}, limit {analysis.failure_limit}"


def _failed(analysis: Analysis, acceptance: Estimate | None, latency: Estimate | None) -> str:
    """Why the candidate fails by its estimates; empty if it does not."""
    allowed = analysis.max_acceptance_regression_percent
    if acceptance is not None and acceptance.high_percent < -allowed:
        return acceptance_is_lower(allowed)
    allowed = analysis.max_latency_regression_percent
    if latency is not None and latency.low_percent > allowed:
        return latency_is_higher(allowed)
    return ""


def _domains(evidence: Evidence, alpha: float) -> list[DomainEstimate]:
    """The domains that were compared, the worst first. They share alpha with those that were only seen: these will follow."""
    num_seen = len(evidence.domains.keys() | evidence.open.domains)
    found = []
    for name, domain in evidence.domains.items():
        estimate = _estimate(domain.acceptance, alpha / min(num_seen, MAX_DOMAINS))
        if estimate is not None:
            found.append(DomainEstimate(name=name, estimate=estimate, num_slices=domain.acceptance.change.count))
    return sorted(found, key=lambda domain: domain.estimate.change_percent)


def _failed_domain(analysis: Analysis, domains: Sequence[DomainEstimate]) -> str:
    """The domain in which the candidate is surely worse; empty if there is none."""
    allowed = analysis.max_domain_regression_percent
    for domain in domains:
        if domain.estimate.high_percent < -allowed:
            return f"{acceptance_is_lower(allowed, str(domain))} ({_lengths(domain.estimate)})"
    return ""


def _doubtful_domain(analysis: Analysis, domains: Sequence[DomainEstimate]) -> str:
    """The domain in which the candidate looks worse, surely or not; empty if there is none."""
    allowed = analysis.max_domain_regression_percent
    for domain in domains:
        if domain.num_slices >= MIN_DOMAIN_SLICES and domain.estimate.change_percent < -allowed:
            return (
                f"{ACCEPTANCE_IS_HIGHER}, but lower {domain} by more than {allowed:g} % ({_lengths(domain.estimate)})"
            )
    return ""


def _fails_more_often(evidence: Evidence) -> bool:
    """More than twice as often per request as the stable version: a failure of both is not the candidate's fault."""
    candidate_requests, baseline_requests = max(1, evidence.candidate_requests), max(1, evidence.baseline_requests)
    return evidence.failures * baseline_requests > 2 * evidence.baseline_failures * candidate_requests


def _missing(evidence: Evidence, analysis: Analysis, acceptance: Estimate | None, latency: Estimate | None) -> str:
    """Why the candidate cannot be promoted yet; empty if it can."""
    if acceptance is None:
        return "the two pods contradict each other" if evidence.slices else "waiting for traffic on both versions"
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
        parts.append(f"{_lengths(acceptance)}, {_change(acceptance, analysis)}")
    if latency is not None:
        times = f"{1000 * latency.candidate:.3g} against {1000 * latency.stable:.3g} ms per token"
        parts.append(f"{times}, {_change(latency, analysis)}")
    uncounted = sum(evidence.failures_by_pod.values()) - evidence.failures
    if uncounted > 0:
        parts.append(f"{_count(uncounted, 'more error')} of single pods not counted")
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


def _lengths(acceptance: Estimate) -> str:
    return f"{acceptance.candidate:.2f} against {acceptance.stable:.2f} tokens per step"


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
