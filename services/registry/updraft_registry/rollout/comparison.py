"""Candidate against stable on the same live traffic, as independent observations.

The unit is the slice: a stretch of time in which both versions served, whose traffic is summed over the pods
and becomes one observation, log(candidate / stable). Tokens of a request, requests of a conversation and pods
in a burst hang together as they like: all that is inside a slice. Both versions serve at the same time, so
what the traffic does to both of them cancels. Counters never fall, so a lost report costs nothing; what is
not known, such as a pod met for the first time, is left out rather than guessed. Pure.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Self

from updraft_registry.rollout.gate.sequence import NONE, Moments

MIN_REQUESTS = 8
"""Of each version in a slice; it stays open until then. The mean of a few requests is far from normal."""

MAX_AWAY_MS = 600_000
"""A pod that is back later than this was not restarted but replaced; until then it is remembered for its crash. Longer
than Kubernetes lets a container that crashes wait (5 minutes), and an engine needs to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one version served in one life of one pod, or the sum over several; every field only grows."""

    requests: int = 0
    """Ended requests that it had a part in."""
    verify_steps: int = 0
    tokens: int = 0
    latency_s: float = 0.0
    """Sum of the seconds between tokens, over `latency_tokens` of them."""
    latency_tokens: int = 0
    errors: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            requests=self.requests + other.requests,
            verify_steps=self.verify_steps + other.verify_steps,
            tokens=self.tokens + other.tokens,
            latency_s=self.latency_s + other.latency_s,
            latency_tokens=self.latency_tokens + other.latency_tokens,
            errors=self.errors + other.errors,
        )

    def __sub__(self, other: Self) -> Self:
        return type(self)(
            requests=self.requests - other.requests,
            verify_steps=self.verify_steps - other.verify_steps,
            tokens=self.tokens - other.tokens,
            latency_s=self.latency_s - other.latency_s,
            latency_tokens=self.latency_tokens - other.latency_tokens,
            errors=self.errors - other.errors,
        )

    @property
    def is_sum(self) -> bool:
        """No field is negative: what a difference shows when counters began anew."""
        counts = (self.requests, self.verify_steps, self.tokens, self.latency_s, self.latency_tokens, self.errors)
        return min(counts) >= 0

    @property
    def acceptance_length(self) -> float | None:
        """Tokens a verify step."""
        return self.tokens / self.verify_steps if self.verify_steps and self.tokens else None

    @property
    def inter_token_latency_s(self) -> float | None:
        """Mean seconds between tokens."""
        return self.latency_s / self.latency_tokens if self.latency_tokens and self.latency_s > 0 else None


NOTHING = Traffic()


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTraffic:
    """A pod's last report: its life, its version, and its traffic by version."""

    pod: str
    boot: str
    version: int
    """The one that it holds or, in a switchback, whose turn it is: to blame for a crash."""
    traffic: Mapping[int, Traffic]
    is_draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The slice that is open."""

    since_ms: int
    candidate: Traffic = NOTHING
    baseline: Traffic = NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One quantity over the closed slices, each of which counts the same.

    Levels are geometric means over slices, never sums over all traffic: when the traffic shifts while the share
    of the candidate grows, sums tell of a change that is none (Simpson's paradox).
    """

    change: Moments = NONE
    """Of log(candidate / baseline)."""
    baseline: Moments = NONE
    """Of log(baseline)."""

    def plus(self, candidate: float | None, baseline: float | None) -> Self:
        """With one slice more, unless the quantity is not known in it."""
        if candidate is None or baseline is None:
            return self
        level = math.log(baseline)
        return type(self)(change=self.change.plus(math.log(candidate) - level), baseline=self.baseline.plus(level))


UNKNOWN = Ratio()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was seen of a candidate beside its baseline. Kept over a restart but for the open slice."""

    acceptance: Ratio = UNKNOWN
    """Of acceptance lengths, tokens a verify step."""
    latency: Ratio = UNKNOWN
    """Of inter-token latencies, seconds."""
    slices: int = 0
    """Closed ones."""
    candidate_requests: int = 0
    """In closed slices; so are `baseline_requests`."""
    baseline_requests: int = 0
    failures: int = 0
    """Errors of the candidate, and crashes of pods that held it or were directed to."""
    baseline_failures: int = 0
    """The same of the baseline."""
    crashes: Mapping[str, int] = field(default_factory=dict)
    """How often which pods crashed with the candidate."""
    open: Slice
    last_reports: Mapping[str, PodTraffic] = field(default_factory=dict)
    """Pods as they were seen last."""
    away: Mapping[str, int] = field(default_factory=dict)
    """Those of them that were missing the last time, and since when, milliseconds since 1970."""

    @classmethod
    def begin(cls, now_ms: int) -> Self:
        """Nothing seen yet."""
        return cls(open=Slice(since_ms=now_ms))

    def may_return(self, pod: str) -> bool:
        """Whether one that is away may only have crashed: it did not drain, and it is not too long ago."""
        seen = self.last_reports.get(pod)
        return seen is not None and not seen.is_draining

    def to_json(self) -> str:
        """What outlives a restart; equal texts mean that nothing worth writing changed."""
        return json.dumps(
            {
                "acceptance": asdict(self.acceptance),
                "latency": asdict(self.latency),
                "slices": self.slices,
                "candidate_requests": self.candidate_requests,
                "baseline_requests": self.baseline_requests,
                "failures": self.failures,
                "baseline_failures": self.baseline_failures,
                "crashes": self.crashes,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """As it was written, with a slice that opens at the next look."""
        kept = json.loads(text)
        return cls(
            acceptance=_ratio(kept["acceptance"]),
            latency=_ratio(kept["latency"]),
            slices=kept["slices"],
            candidate_requests=kept["candidate_requests"],
            baseline_requests=kept.get("baseline_requests", 0),  # not counted by older registries, as the failures
            failures=kept["failures"],
            baseline_failures=kept.get("baseline_failures", 0),
            crashes=kept.get("crashes", {}),
            open=Slice(since_ms=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is compared."""

    candidate: int
    baseline: int
    directed: Collection[str] = ()
    """Pods that had been ordered to serve the candidate and nothing else: whatever one of them said last, it may have
    crashed in loading it."""


def add_reports(
    evidence: Evidence, pods: Sequence[PodTraffic], trial: Trial, *, slice_ms: float, now_ms: int
) -> Evidence:
    """Add what the pods served since the last look, and close the slice if it is over.

    A pod counts from the second look on, and again so after it was away. `slice_ms` is the least length of a
    slice; a switchback needs whole cycles. Looking twice at the same reports adds nothing.
    """
    served_candidate = served_baseline = NOTHING
    met = [(evidence.last_reports[pod.pod], pod) for pod in pods if pod.pod in evidence.last_reports]
    for before, pod in met:
        if before.boot == pod.boot and before.traffic is not pod.traffic and pod.pod not in evidence.away:
            served_candidate += _since(before, pod, trial.candidate)
            served_baseline += _since(before, pod, trial.baseline)
    crashed = [before for before, pod in met if before.boot != pod.boot and not before.is_draining]
    killed = [pod.pod for pod in crashed if pod.version == trial.candidate or pod.pod in trial.directed]
    others = [pod.pod for pod in crashed if pod.version == trial.baseline and pod.pod not in trial.directed]
    present = {pod.pod: pod for pod in pods}
    since_ms = min(evidence.open.since_ms, now_ms) if evidence.last_reports else now_ms
    away = {name: evidence.away.get(name, now_ms) for name in evidence.last_reports.keys() - present.keys()}
    away = {name: missed_ms for name, missed_ms in away.items() if now_ms - missed_ms < MAX_AWAY_MS}
    looked = replace(
        evidence,
        failures=evidence.failures + served_candidate.errors + len(killed),
        baseline_failures=evidence.baseline_failures + served_baseline.errors + len(others),
        crashes={**evidence.crashes, **{name: 1 + evidence.crashes.get(name, 0) for name in killed}},
        open=Slice(
            since_ms=since_ms,
            candidate=evidence.open.candidate + served_candidate,
            baseline=evidence.open.baseline + served_baseline,
        ),
        last_reports={name: evidence.last_reports[name] for name in away} | present,
        away=away,
    )
    return _close(looked, now_ms) if now_ms - since_ms >= slice_ms else looked


def _since(before: PodTraffic, pod: PodTraffic, version: int) -> Traffic:
    """What a pod served with a version since the last look."""
    served = pod.traffic.get(version, NOTHING) - before.traffic.get(version, NOTHING)
    return served if served.is_sum else NOTHING


def _close(evidence: Evidence, now_ms: int) -> Evidence:
    """End a slice that has lasted: an observation, or nothing if a version was silent all along."""
    candidate, baseline = evidence.open.candidate, evidence.open.baseline
    fewest = min(candidate.requests, baseline.requests)
    if 0 < fewest < MIN_REQUESTS:
        return evidence
    if fewest == 0 or candidate.acceptance_length is None or baseline.acceptance_length is None:
        return replace(evidence, open=Slice(since_ms=now_ms))
    return replace(
        evidence,
        acceptance=evidence.acceptance.plus(candidate.acceptance_length, baseline.acceptance_length),
        latency=evidence.latency.plus(candidate.inter_token_latency_s, baseline.inter_token_latency_s),
        slices=evidence.slices + 1,
        candidate_requests=evidence.candidate_requests + candidate.requests,
        baseline_requests=evidence.baseline_requests + baseline.requests,
        open=Slice(since_ms=now_ms),
    )


def _ratio(kept: Mapping[str, Mapping[str, float]]) -> Ratio:
    return Ratio(change=_moments(kept["change"]), baseline=_moments(kept["baseline"]))


def _moments(kept: Mapping[str, float]) -> Moments:
    return Moments(count=int(kept["count"]), mean=kept["mean"], squares=kept["squares"])
