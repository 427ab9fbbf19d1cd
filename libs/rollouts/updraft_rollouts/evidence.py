"""How sure we are that one draft needs fewer verify steps than another for the same held-out tokens.

The unit is the request: tokens of one request are anything but independent. Acceptance length is tokens per verify step, so
over the same tokens the ratio of the two lengths is (sum of baseline steps) / (sum of candidate steps), a ratio of paired
means. Its logarithm gets a jackknife variance (Quenouille 1956; Cochran, "Sampling Techniques", 3rd ed. 1977, ch. 6) and a
Student t interval whose degrees of freedom are those of the effective number of requests, (sum t)^2 / sum t^2 over their
tokens t (Kish, "Survey Sampling", 1965): a few long requests count as a few. Measured on equally good drafts and lognormal
lengths (sigma 0.8), 8 requests, 80 %: the interval lies above zero in 10.7 % of cases, where linearisation (the delta
method), which was refused, has 13.9 %.

Held-out requests are not a sample of today's traffic: they are kept for every kind of it. Weights turn them into one, as in
post-stratification (Cochran, ch. 5A): a request weighs its kind's share of today's traffic over the kind's requests here. The
jackknife is that of strata (Jones, "Jackknife methods for estimators of means", Biometrika 1974), with Satterthwaite's degrees
of freedom (1946).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

MIN_KIND_SAMPLES = 4
"""Requests of a kind from which on it has a verdict of its own; with fewer, Student's t has hardly a quantile."""

KIND_CONFIDENCE = 0.9
"""Two-sided confidence of all these verdicts together: an equal draft is called worse somewhere in at most 5 % of cases."""

ALL_OLD = "old"
"""The kinds that are not part of today's traffic, together. Kinds have a colon in their names."""

OUTLIERS = "outliers"
"""Requests that are like few others, together: they have a share of today's traffic, but are no kind and have no verdict of
their own."""

MAX_SHOWN_CHARS = 40

MAX_LOSS_PERCENT = 1.0
"""Loss in a kind of today's traffic that is tolerated for a gain in its mix."""

MAX_OLD_LOSS_PERCENT = 5.0
"""The same for a kind that today's traffic does not contain."""

MIN_TENANT_SHARE = 0.1
"""Share of today's traffic from which on a tenant has a verdict of its own, so at most ten have one. Smaller ones are part of
their kinds of traffic only: otherwise anyone could hold up a draft with a few requests."""

_TENANT = "tenant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One held-out request: its tokens, and the verify steps that each of the two drafts needs for them.

    `kind` is its kind of traffic, and `weight` what it counts for in today's: 0 if its kind is not part of that. `tenant` is
    the hash of its tenant, in hexadecimal, or empty.
    """

    tokens: int
    candidate_steps: int
    baseline_steps: int
    kind: str = ""
    weight: float = 1.0
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Acceptance lengths in tokens per verify step, and the relative gain between them in percent with its interval."""

    candidate: float
    baseline: float
    percent: float
    low_percent: float
    high_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KindLoss:
    """A kind of traffic, or a tenant (`tenant:` and its hash), for which a candidate is surely worse: the change in acceptance
    length, and the requests behind it."""

    kind: str
    percent: float
    num_samples: int

    def __str__(self) -> str:
        label, _, name = self.kind.partition(":")
        if self.kind == ALL_OLD:
            kind = "older traffic"
        elif label == "domain":
            kind = shown_name(name)
        elif label == _TENANT:
            kind = f"tenant {name}"
        else:
            kind = f"unnamed kind {shown_name(name)}"
        return f"surely worse for {kind} ({self.percent:+.1f} %, {self.num_samples} requests)"


def shown_name(name: str) -> str:
    """The name of a kind of traffic for a sentence: quoted and cut, because callers choose it and terminals show it."""
    return repr(name[:MAX_SHOWN_CHARS])


def gain(samples: Sequence[Paired], confidence: float) -> Gain:
    """Relative gain in acceptance length over the weighted samples, with its two-sided interval at `confidence`.

    At least two samples need a weight above 0. The shares of kinds are known, so that a draft gains more in one kind than in
    another is no doubt: each kind is a stratum.
    """
    samples = weighted(samples)
    sums = _sums(samples)
    log_ratio = math.log(sums.baseline_steps / sums.candidate_steps)
    least = min(s.weight for s in samples)
    variance, by_degrees = 0.0, 0.0
    for own in _strata(samples):
        part = _variance(own, sums, least)
        variance += part
        by_degrees += part**2 / max(1.0, _num_equal(own) - 1.0)
    degrees = max(1.0, variance**2 / by_degrees) if by_degrees else 1.0
    margin = student_t(0.5 + confidence / 2, degrees) * math.sqrt(variance)
    return Gain(
        candidate=sums.tokens / sums.candidate_steps,
        baseline=sums.tokens / sums.baseline_steps,
        percent=_percent(log_ratio),
        low_percent=_percent(log_ratio - margin),
        high_percent=_percent(log_ratio + margin),
    )


class _Sums(NamedTuple):
    weight: float
    tokens: float
    candidate_steps: float
    baseline_steps: float


def _sums(samples: Sequence[Paired]) -> _Sums:
    return _Sums(
        weight=sum(s.weight for s in samples),
        tokens=sum(s.weight * s.tokens for s in samples),
        candidate_steps=sum(s.weight * s.candidate_steps for s in samples),
        baseline_steps=sum(s.weight * s.baseline_steps for s in samples),
    )


def _strata(samples: Sequence[Paired]) -> list[list[Paired]]:
    """The samples by kind. Kinds of fewer than `MIN_KIND_SAMPLES` are one stratum, or a part of the largest if they have as few
    together."""
    kinds: dict[str, list[Paired]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, []).append(sample)
    few = [sample for own in kinds.values() if len(own) < MIN_KIND_SAMPLES for sample in own]
    strata = sorted((own for own in kinds.values() if len(own) >= MIN_KIND_SAMPLES), key=len)
    if strata and len(few) < MIN_KIND_SAMPLES:
        return [*strata[:-1], strata[-1] + few]
    return [*strata, few] if few else strata


def _variance(own: Sequence[Paired], sums: _Sums, least: float) -> float:
    """The part of one stratum in the variance of the logarithm of the ratio: each request is left out in turn, and the
    others of its stratum count for it. `least`: of steps that are left, also if rounding says that there are none."""
    mine = _sums(own)

    def left(total: float, of_mine: float, of_one: float, one: Paired) -> float:
        factor = mine.weight / max(least, mine.weight - one.weight)
        return max(least, total - of_mine + factor * (of_mine - one.weight * of_one))

    left_out = [
        math.log(
            left(sums.baseline_steps, mine.baseline_steps, one.baseline_steps, one)
            / left(sums.candidate_steps, mine.candidate_steps, one.candidate_steps, one)
        )
        for one in own
    ]
    mean = sum(left_out) / len(own)
    return (len(own) - 1) / len(own) * sum((x - mean) ** 2 for x in left_out)


def _num_equal(samples: Sequence[Paired]) -> float:
    """How many requests of equal length say as much (Kish)."""
    return _sums(samples).tokens ** 2 / sum((s.weight * s.tokens) ** 2 for s in samples)


def weighted(samples: Sequence[Paired]) -> list[Paired]:
    """The samples that stand for some of today's traffic."""
    return [sample for sample in samples if sample.weight > 0]


def effective_size(samples: Sequence[Paired]) -> float:
    """How many equally weighted requests say as much about today's traffic (Kish); 0 if none stands for any of it."""
    total = sum(sample.weight for sample in samples)
    return total**2 / sum(sample.weight**2 for sample in samples) if total else 0.0


def worse_kinds(samples: Sequence[Paired]) -> list[KindLoss]:
    """Kinds of traffic in which the candidate is surely worse by more than is tolerated, the worst first.

    All kinds that today's traffic does not contain are also judged together, because each has few requests. All verdicts share
    the probability of an error (Bonferroni), so that many kinds do not block a draft by chance.
    """
    kinds: dict[str, list[Paired]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, []).append(sample)
    old = [sample for sample in samples if not sample.weight]
    if len({sample.kind for sample in old}) > 1:
        kinds[ALL_OLD] = old
    kinds.pop(OUTLIERS, None)
    return _losses(kinds)


def worse_tenants(samples: Sequence[Paired]) -> list[KindLoss]:
    """Tenants with `MIN_TENANT_SHARE` of today's traffic for whom the candidate is surely worse, the worst first.

    They share the probability of an error, as kinds do.
    """
    today = weighted(samples)
    tenants: dict[str, list[Paired]] = {}
    for sample in today:
        if sample.tenant:
            tenants.setdefault(f"{_TENANT}:{sample.tenant}", []).append(sample)
    least = MIN_TENANT_SHARE * sum(sample.weight for sample in today)
    return _losses({name: own for name, own in tenants.items() if sum(one.weight for one in own) >= least})


def _losses(groups: Mapping[str, Sequence[Paired]]) -> list[KindLoss]:
    """Groups with enough requests in which the candidate is surely worse by more than is tolerated, the worst first."""
    judged = {name: members for name, members in groups.items() if len(members) >= MIN_KIND_SAMPLES}
    losses = []
    for kind, members in judged.items():
        # Of one kind: among a tenant's requests, the shares of kinds are not known.
        alike = [replace(one, weight=1.0, kind="") for one in members]
        found = gain(alike, 1.0 - (1.0 - KIND_CONFIDENCE) / len(judged))
        tolerated = MAX_LOSS_PERCENT if weighted(members) else MAX_OLD_LOSS_PERCENT
        if found.high_percent < -tolerated:
            losses.append(KindLoss(kind=kind, percent=found.percent, num_samples=len(members)))
    return sorted(losses, key=lambda loss: loss.percent)


def student_t(probability: float, degrees: float) -> float:
    """Quantile of Student's t, by its expansion about the normal (Abramowitz and Stegun 26.7.5).

    Within 1 % for five degrees of freedom or more between the 5th and the 95th percentile.
    """
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * degrees**4)
    )


def _percent(log_ratio: float) -> float:
    return 100.0 * math.expm1(log_ratio)
