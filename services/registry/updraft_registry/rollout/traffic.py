"""The traffic of pods, and what several pods say together: none of them decides alone.

A pod may count wrongly, and one that was taken over may lie. So of three pods or more, those with the highest and the lowest
value are left out, and no other one counts more than twice the median. Where one version has more pods, each of these counts by
the chance that it would be kept if they were as few: with equal drafts, no side then looks better because more of it was left
out. Of two pods, the one counts that says less of a change, and neither if they contradict each other. A single pod is
believed. Refused: the value of the median pod, which takes half as much evidence again. Pure.
"""

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low
from typing import Self

_MOST_SHARE = 2.0
"""The most that a pod counts, relative to the median of the pods."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Traffic of one version since a pod's process started, or a sum over pods. No field decreases."""

    requests: int = 0
    """Finished requests in which the version had a verify step."""
    verify_steps: float = 0
    """Whole numbers as a pod counts them, like all tokens; not in what several pods say together."""
    tokens: float = 0
    latency_s: float = 0.0
    """Sum of the seconds between tokens, over `latency_tokens` of them."""
    latency_tokens: float = 0
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
    """The traffic that these pods report together. `is_paired`: each serves both versions, so it is compared with itself.

    A quantity in which two pods contradict each other is unknown. If only one version served, it is for a later comparison.
    """
    acceptance = _combined([(_acceptance(pod.candidate), _acceptance(pod.baseline)) for pod in pods], is_paired)
    latency = _combined([(_latency(pod.candidate), _latency(pod.baseline)) for pod in pods], is_paired)
    candidate, baseline = (
        _traffic(version, steps, times)
        for version, steps, times in zip(
            ([pod.candidate for pod in pods], [pod.baseline for pod in pods]), acceptance, latency, strict=True
        )
    )
    return Both(candidate=candidate, baseline=baseline)


def alone(pods: Collection[Traffic]) -> Traffic:
    """The traffic that these pods report together of a version that is compared with no draft. Of two, the lower counts."""
    return _traffic(pods, _lowest(map(_acceptance, pods)), _lowest(map(_latency, pods)))


def _traffic(pods: Collection[Traffic], steps: _Reading, times: _Reading) -> Traffic:
    return Traffic(
        requests=_requests(traffic.requests for traffic in pods),
        verify_steps=steps.count,
        tokens=steps.amount,
        latency_s=times.amount,
        latency_tokens=times.count,
    )


def _acceptance(traffic: Traffic) -> _Reading:
    return _NONE if traffic.acceptance_length is None else _Reading(traffic.tokens, traffic.verify_steps)


def _latency(traffic: Traffic) -> _Reading:
    return _NONE if traffic.inter_token_latency_s is None else _Reading(traffic.latency_s, traffic.latency_tokens)


def _requests(of_pods: Iterable[int]) -> int:
    """One idle pod of two must not hide the requests of the other, so the larger number sets the limit."""
    counts = [count for count in of_pods if count]
    return round(sum(min(count, _MOST_SHARE * median_high(counts)) for count in counts))


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
    size = min(len(candidates), len(baselines))
    if not size:
        return _whole(candidates), _whole(baselines)
    (low, high), (base_low, base_high) = _span(candidates, size), _span(baselines, size)
    return _nearest((low, base_high), (high, base_low))


def _nearest(low: _Pair, high: _Pair) -> _Pair:
    """That of the lowest and the highest possible change which is nearer to none; nothing if one is up and the other down."""
    if low[0].value >= low[1].value:
        return low
    if high[0].value <= high[1].value:
        return high
    return _NONE, _NONE


def _span(readings: Sequence[_Reading], size: int) -> _Pair:
    """The lowest and the highest value that these pods leave possible; `size` are those of the version with fewer pods."""
    if len(readings) > 2:
        inner = _inner(readings, size)
        return inner, inner
    ordered = sorted(readings, key=lambda reading: reading.value)
    return ordered[0], ordered[-1]


def _whole(readings: Sequence[_Reading]) -> _Reading:
    return _inner(readings, len(readings)) if len(readings) > 2 else _sum(readings)


def _lowest(of_pods: Iterable[_Reading]) -> _Reading:
    readings = [reading for reading in of_pods if reading.count]
    return _span(readings, len(readings))[0] if readings else _NONE


def _inner(readings: Sequence[_Reading], size: int) -> _Reading:
    """Without the highest and the lowest, and weighted as if there were only `size` of them."""
    ordered = sorted(readings, key=lambda reading: reading.value)
    chances = _chances_to_stay(len(ordered), size if size > 2 else len(ordered))
    kept = [(reading, chance / max(chances)) for reading, chance in zip(ordered, chances, strict=True) if chance > 0]
    most = _most([reading.count for reading, _ in kept])
    return _sum(reading.scaled(share * min(1.0, most / reading.count)) for reading, share in kept)


def _chances_to_stay(num: int, size: int) -> list[float]:
    """For each of `num` in order: the chance to be among `size` that are drawn, and there neither the first nor the last.

    One is drawn with the chance size / num. With m more before it, it is the last with C(m, size - 1) / C(num, size).
    """
    drawn = size / num
    last = [drawn]
    for more in range(num - 1, 0, -1):
        last.append(last[-1] * max(0, more - size + 1) / more)
    return [drawn - first - final for first, final in zip(last, reversed(last), strict=True)]


def _most(counts: Sequence[float]) -> float:
    return _MOST_SHARE * median_low(counts) if counts else 0.0


def _sum(readings: Iterable[_Reading]) -> _Reading:
    parts = list(readings)
    return _Reading(sum(part.amount for part in parts), sum(part.count for part in parts))
