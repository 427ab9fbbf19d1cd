"""Candidate against stable version on the same live traffic, as independent observations.

The unit is the slice: an interval in which both versions served. Its traffic is summed over the pods and becomes one
observation, log(candidate / stable). Tokens of a request, requests of a conversation and pods in a burst are correlated,
but only within a slice. Both versions serve at the same time, so effects of the traffic on both cancel. Counters never
decrease, so a lost report costs nothing. Unknown traffic, such as that of a new pod, is left out. Pure.
"""

import json
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Self

from updraft_registry.rollout.gate.sequence import Moments

MIN_REQUESTS = 8
"""Minimum per version in a slice, which stays open until then: the mean of a few requests is far from normal."""

MAX_AWAY_MS = 600_000
"""How long a missing pod is expected back. It is longer than the longest crash back-off of Kubernetes (5 minutes) and the
start of an engine together."""


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
class PodTraffic:
    """A pod's last report: its boot, its version, and its traffic by version."""

    pod: str
    boot: str
    version: int
    """Version that it holds or, in a switchback, whose turn it is. A crash counts against it."""
    traffic: Mapping[int, Traffic]
    is_draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    since_ms: int
    candidate: Traffic = NOTHING
    baseline: Traffic = NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One quantity over the closed slices, which all have the same weight.

    Levels are geometric means over slices, never sums over all traffic. If traffic shifts while the share of the candidate
    grows, sums show a change where there is none (Simpson's paradox).
    """

    change: Moments = field(default_factory=Moments)
    """Moments of log(candidate / baseline)."""
    baseline: Moments = field(default_factory=Moments)
    """Moments of log(baseline)."""

    def plus(self, candidate: float | None, baseline: float | None) -> Self:
        """Add a slice, unless the quantity is unknown in it."""
        if candidate is None or baseline is None:
            return self
        level = math.log(baseline)
        return type(self)(change=self.change.plus(math.log(candidate) - level), baseline=self.baseline.plus(level))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything observed of a candidate and its baseline. A restart loses only the open slice."""

    acceptance: Ratio = field(default_factory=Ratio)
    """Acceptance length, in tokens per verify step."""
    latency: Ratio = field(default_factory=Ratio)
    """Inter-token latency, in seconds."""
    slices: int = 0
    """Number of closed slices."""
    candidate_requests: int = 0
    """In closed slices, like `baseline_requests`."""
    baseline_requests: int = 0
    failures: int = 0
    """Errors of the candidate, and crashes of pods that held it or were directed to load it."""
    baseline_failures: int = 0
    """The same for the baseline."""
    crashes: Mapping[str, int] = field(default_factory=dict)
    """Crashes with the candidate, by pod."""
    open: Slice
    last_reports: Mapping[str, PodTraffic] = field(default_factory=dict)
    """Last report by pod."""
    away: Mapping[str, int] = field(default_factory=dict)
    """Missing pods, and since when in milliseconds since 1970."""

    @classmethod
    def begin(cls, now_ms: int) -> Self:
        return cls(open=Slice(since_ms=now_ms))

    def may_return(self, pod: str) -> bool:
        """Whether a missing pod may have crashed only: it was not draining, and it has not been away too long."""
        last = self.last_reports.get(pod)
        return last is not None and not last.is_draining

    def to_json(self) -> str:
        """State to restore after a restart. Equal texts mean that nothing needs to be written."""
        stored = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _TRANSIENT}
        return json.dumps(stored, default=asdict)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Restore it, also from older and newer registries. A new slice opens at the next observation."""
        stored = {name: value for name, value in json.loads(text).items() if name in cls.__dataclass_fields__}
        ratios = {
            name: Ratio(**{part: Moments(**moments) for part, moments in stored[name].items()})
            for name in ("acceptance", "latency")
        }
        return cls(**stored | ratios, open=Slice(since_ms=0))


_TRANSIENT = ("open", "last_reports", "away")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    candidate: int
    baseline: int
    directed: Collection[str] = ()
    """Pods that were directed to serve only the candidate. One of them may have crashed while loading it, whatever it
    reported last."""


def add_reports(
    evidence: Evidence, pods: Sequence[PodTraffic], trial: Trial, *, slice_ms: float, now_ms: int
) -> Evidence:
    """Add the traffic since the last observation, and close the slice if it is over.

    A pod counts from its second report on, also after an absence. `slice_ms` is the minimum length of a slice. Adding the
    same reports twice changes nothing.
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
    updated = replace(
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
    return _close(updated, now_ms) if now_ms - since_ms >= slice_ms else updated


def _since(before: PodTraffic, pod: PodTraffic, version: int) -> Traffic:
    """Traffic of a version on a pod since its last report."""
    served = pod.traffic.get(version, NOTHING) - before.traffic.get(version, NOTHING)
    return served if served.is_sum else NOTHING


def _close(evidence: Evidence, now_ms: int) -> Evidence:
    """End a slice. It becomes an observation unless one version had no traffic."""
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
