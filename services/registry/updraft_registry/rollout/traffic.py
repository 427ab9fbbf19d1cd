"""The traffic of pods, and what several pods say together: none of them decides alone.

A pod may count wrongly, and one that was taken over may lie. So of three pods or more, those with the highest and the lowest
value are left out, and no other one counts more than twice the median. Of two pods, the one counts that says less of a change,
and neither if they contradict each other. A single pod is believed. Refused: the value of the median pod, which takes half as
much evidence again. Pure.
"""

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Self

_MOST_SHARE = 2.0
"""The most that a pod counts, relative to the median of the pods."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Traffic of one version since a pod's process started, or a sum over pods. No field decreases."""

    requests: int = 0
    """Finished requests in which the version had a verify step."""
    verify_steps: int = 0
    tokens: int = 0
    latency_s: float = 0.0
    """Sum of the seconds between tokens, over `latency_tokens` of them."""
    latency_tokens: int = 0
    errors: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(operator.add, _counts(self), _counts(other)))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*map(operator.sub, _counts(self), _counts(other)))

    @property
    def is_sum(self) -> bool:
        """No field is negative. A difference has negative fields if the counters were reset."""
        return all(count >= 0 for count in _counts(self))

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per verify step."""
        return self.tokens / self.verify_steps if self.verify_steps and self.tokens else None

    @property
    def inter_token_latency_s(self) -> float | None:
        """Mean seconds between tokens."""
        return self.latency_s / self.latency_tokens if self.latency_tokens and self.latency_s > 0 else None


_counts = operator.attrgetter(*Traffic.__dataclass_fields__)
"""All fields, in order."""

NOTHING = Traffic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """Traffic of candidate and baseline in the same time."""

    candidate: Traffic = NOTHING
    baseline: Traffic = NOTHING

    def __add__(self, other: Self) -> Self:
        return type(self)(candidate=self.candidate + other.candidate, baseline=self.baseline + other.baseline)

    @property
    def fewest_requests(self) -> int:
        return min(self.candidate.requests, self.baseline.requests)


@dataclass(frozen=True, slots=True)
class _Reading:
    """One pod's or several pods' reading of a quantity: the mean `amount / count`, with the weight `count`."""

    amount: float
    count: float

    @property
    def value(self) -> float:
        return self.amount / self.count

    def scaled(self, factor: float) -> "_Reading":
        return _Reading(self.amount * factor, self.count * factor)


_NONE = _Reading(0.0, 0.0)

_Pair = tuple[_Reading, _Reading]
"""Candidate and baseline."""


def together(pods: Collection[Both], *, is_paired: bool = False) -> Both:
    """The traffic that these pods report together. `is_paired`: each serves both versions, so it is compared with itself."""
    acceptance = _combined([(_acceptance(pod.candidate), _acceptance(pod.baseline)) for pod in pods], is_paired)
    latency = _combined([(_latency(pod.candidate), _latency(pod.baseline)) for pod in pods], is_paired)
    candidate, baseline = (
        Traffic(
            requests=_requests(traffic.requests for traffic in version),
            verify_steps=round(steps.count),
            tokens=round(steps.amount),
            latency_s=times.amount,
            latency_tokens=round(times.count),
        )
        for version, steps, times in zip(
            ([pod.candidate for pod in pods], [pod.baseline for pod in pods]), acceptance, latency, strict=True
        )
    )
    return Both(candidate=candidate, baseline=baseline)


def _acceptance(traffic: Traffic) -> _Reading:
    return _NONE if traffic.acceptance_length is None else _Reading(traffic.tokens, traffic.verify_steps)


def _latency(traffic: Traffic) -> _Reading:
    return _NONE if traffic.inter_token_latency_s is None else _Reading(traffic.latency_s, traffic.latency_tokens)


def _requests(of_pods: Iterable[int]) -> int:
    counts = [count for count in of_pods if count]
    return round(sum(min(count, _most(counts)) for count in counts))


def _combined(pairs: Sequence[_Pair], is_paired: bool) -> _Pair:  # noqa: FBT001 - passed on
    complete = [pair for pair in pairs if pair[0].count and pair[1].count]
    if is_paired and len(complete) > 1:
        return _of_pairs(complete)
    return _of_versions([pair[0] for pair in pairs if pair[0].count], [pair[1] for pair in pairs if pair[1].count])


def _of_pairs(pairs: Sequence[_Pair]) -> _Pair:
    """Each pod is compared with itself."""
    ordered = sorted(pairs, key=lambda pair: pair[0].value / pair[1].value)
    if len(ordered) == 2:
        (low, high) = ordered
        return _nearest(low, high)
    kept = ordered[1:-1]
    most = _most([candidate.count for candidate, _ in kept])
    shares = [min(1.0, most / candidate.count) for candidate, _ in kept]
    return (
        _sum(pair[0].scaled(share) for pair, share in zip(kept, shares, strict=True)),
        _sum(pair[1].scaled(share) for pair, share in zip(kept, shares, strict=True)),
    )


def _of_versions(candidates: Sequence[_Reading], baselines: Sequence[_Reading]) -> _Pair:
    """Some pods serve the candidate, and others the baseline."""
    (low, high), (base_low, base_high) = _span(candidates), _span(baselines)
    if not baselines or not candidates:  # without a baseline, a draft is compared with none, which accepts less
        return low, base_low
    return _nearest((low, base_high), (high, base_low))


def _nearest(low: _Pair, high: _Pair) -> _Pair:
    """That of the lowest and the highest possible change which is nearer to none; none if it may be either."""
    if low[0].value >= low[1].value:
        return low
    if high[0].value <= high[1].value:
        return high
    baseline = _sum({low[1], high[1]})
    count = sum(reading.count for reading in {low[0], high[0]})
    return _Reading(baseline.value * count, count), baseline


def _span(readings: Sequence[_Reading]) -> _Pair:
    """The lowest and the highest value that these pods leave possible."""
    ordered = sorted(readings, key=lambda reading: reading.value)
    if len(ordered) <= 2:
        return (ordered[0], ordered[-1]) if ordered else (_NONE, _NONE)
    kept = ordered[1:-1]
    most = _most([reading.count for reading in kept])
    whole = _sum(reading.scaled(min(1.0, most / reading.count)) for reading in kept)
    return whole, whole


def _most(counts: Sequence[float]) -> float:
    return _MOST_SHARE * median_low(counts) if counts else 0.0


def _sum(readings: Iterable[_Reading]) -> _Reading:
    parts = list(readings)
    return _Reading(sum(part.amount for part in parts), sum(part.count for part in parts))
