"""Candidate against stable version on the same live traffic, as independent observations.

The unit is the slice: an interval in which both versions served. What its pods say together (`traffic`) becomes one
observation, log(candidate / stable). Tokens of a request, requests of a conversation and pods in a burst are correlated,
but only within a slice. Both versions serve at the same time, so effects of the traffic on both cancel. Counters never
decrease, so a lost report costs nothing. Unknown traffic, such as that of a new pod, is left out. Pure.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Self

from updraft_registry.rollout.gate.sequence import Moments
from updraft_registry.rollout.traffic import NOTHING, Both, Traffic, alone, together

MIN_REQUESTS = 8
"""Minimum per version in a slice, which stays open until then: the mean of a few requests is far from normal."""

MAX_DOMAINS = 32
"""Domains that are compared; of more, those with most requests. Each pod counts 16."""

OTHER = "other"
"""The requests of all domains that a pod does not count. Together they are no kind of traffic, so they are not compared."""

MAX_AWAY_MS = 600_000
"""How long a missing pod is expected back. It is longer than the longest crash back-off of Kubernetes (5 minutes) and the
start of an engine together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTraffic:
    """A pod's last report: its boot, its version, and its traffic by version."""

    pod: str
    boot: str
    version: int
    """Version that it holds or, in a switchback, whose turn it is. A crash counts against it."""
    traffic: Mapping[int, Traffic]
    domains: Mapping[int, Mapping[str, Traffic]] = field(default_factory=dict)
    """By version and domain. Latency and errors are not counted by domain."""
    is_draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The traffic of one pod in a slice."""

    both: Both = field(default_factory=Both)
    domains: Mapping[str, Both] = field(default_factory=dict)

    def plus(self, both: Both, domains: Mapping[str, Both]) -> Self:
        merged = {**self.domains, **{name: self.domains.get(name, Both()) + more for name, more in domains.items()}}
        return replace(self, both=self.both + both, domains=merged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    since_ms: int
    pods: Mapping[str, Served] = field(default_factory=dict)

    @property
    def both(self) -> Both:
        """The sum over the pods."""
        return sum((pod.both for pod in self.pods.values()), Both())

    @property
    def domains(self) -> frozenset[str]:
        return frozenset(name for pod in self.pods.values() for name in pod.domains)

    def of_domain(self, name: str) -> list[Both]:
        """The traffic of each pod in a domain."""
        return [pod.domains[name] for pod in self.pods.values() if name in pod.domains]


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

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        return cls(**{part: Moments(**moments) for part, moments in stored.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEvidence:
    """Acceptance length in one domain. A domain with few requests has fewer and longer slices."""

    acceptance: Ratio = field(default_factory=Ratio)
    requests: int = 0
    """Requests that candidate and baseline served."""
    open: Both = field(default_factory=Both)
    """Sum over closed slices that had too few requests for an observation."""

    def plus(self, served: Both) -> Self:
        """Add the domain's traffic of a closed slice."""
        requests = self.requests + served.candidate.requests + served.baseline.requests
        both = self.open + served
        if both.fewest_requests < MIN_REQUESTS:
            return replace(self, requests=requests, open=both)
        return type(self)(
            acceptance=self.acceptance.plus(both.candidate.acceptance_length, both.baseline.acceptance_length),
            requests=requests,
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        both = Both(**{version: Traffic(**counts) for version, counts in stored["open"].items()})
        return cls(acceptance=Ratio.from_json(stored["acceptance"]), requests=stored["requests"], open=both)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything observed of a candidate and its baseline. A restart loses only the open slice."""

    acceptance: Ratio = field(default_factory=Ratio)
    """Acceptance length, in tokens per verify step."""
    latency: Ratio = field(default_factory=Ratio)
    """Inter-token latency, in seconds."""
    domains: Mapping[str, DomainEvidence] = field(default_factory=dict)
    slices: int = 0
    """Number of closed slices."""
    candidate_requests: int = 0
    """In closed slices, like `baseline_requests`."""
    baseline_requests: int = 0
    failures: int = 0
    """Errors of the candidate, and crashes of pods that held it or were directed to load it. Of each pod, all crashes count,
    and errors up to `Trial.most_failures`."""
    baseline_failures: int = 0
    """The same for the baseline."""
    failures_by_pod: Mapping[str, int] = field(default_factory=dict)
    baseline_failures_by_pod: Mapping[str, int] = field(default_factory=dict)
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
        """Restore it. A new slice opens at the next observation."""
        stored = {name: value for name, value in json.loads(text).items() if name in cls.__dataclass_fields__}
        ratios = {name: Ratio.from_json(stored[name]) for name in ("acceptance", "latency")}
        domains = {name: DomainEvidence.from_json(domain) for name, domain in stored["domains"].items()}
        return cls(**stored | ratios | {"domains": domains}, open=Slice(since_ms=0))


_TRANSIENT = ("open", "last_reports", "away")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    candidate: int
    baseline: int
    """0: no draft."""
    directed: Collection[str] = ()
    """Pods that were directed to serve only the candidate. One of them may have crashed while loading it, whatever it
    reported last."""
    canary: Collection[str] | None = None
    """Pods that are heard about the candidate; None: all. No other pod should serve it, so its counters may be forged."""
    trying: Collection[str] | None = None
    """Those that should serve it now; None: all of these. One that crashed gets it again only when all have crashed, so no pod
    can claim more crashes by itself."""
    is_paired: bool = False
    """Each pod serves both versions in turn."""
    failure_limit: int | None = None
    """Failures that are tolerated; None: any."""

    @property
    def most_failures(self) -> float:
        """Errors of one pod that count. Of several pods, none decides alone, but two do; a single pod is believed."""
        if self.failure_limit is None or self.canary is None or len(self.canary) <= 1:
            return math.inf
        return self.failure_limit // 2 + 1

    def hears(self, pod: str) -> bool:
        return self.canary is None or pod in self.canary


def add_reports(
    evidence: Evidence, pods: Sequence[PodTraffic], trial: Trial, *, slice_ms: float, now_ms: int
) -> Evidence:
    """Add the traffic since the last observation, and close the slice if it is over.

    A pod counts from its second report on, also after an absence. `slice_ms` is the minimum length of a slice. Adding the
    same reports twice changes nothing.
    """
    met = [(evidence.last_reports[pod.pod], pod) for pod in pods if pod.pod in evidence.last_reports]
    served, failed, failed_before = dict(evidence.open.pods), Counter[str](), Counter[str]()
    for before, pod in met:
        if before.boot == pod.boot and before.traffic is not pod.traffic and pod.pod not in evidence.away:
            both = _heard(_since(before.traffic, pod.traffic, trial), pod, trial)
            domains = {name: _heard(one, pod, trial) for name, one in _domains_since(before, pod, trial).items()}
            served[pod.pod] = served.get(pod.pod, Served()).plus(both, domains)
            failed[pod.pod] += both.candidate.errors
            failed_before[pod.pod] += both.baseline.errors
    crashed = [before for before, pod in met if before.boot != pod.boot and not before.is_draining]
    killed = [pod.pod for pod in crashed if _died_of_candidate(pod, trial)]
    failed.update(killed)
    failed_before.update(pod.pod for pod in crashed if pod.version == trial.baseline and pod.pod not in trial.directed)
    crashes = _plus(evidence.crashes, Counter(killed))
    failures = _plus(evidence.failures_by_pod, failed)
    baseline_failures = _plus(evidence.baseline_failures_by_pod, failed_before)
    present = {pod.pod: pod for pod in pods}
    since_ms = min(evidence.open.since_ms, now_ms) if evidence.last_reports else now_ms
    away = {name: evidence.away.get(name, now_ms) for name in evidence.last_reports.keys() - present.keys()}
    away = {name: missed_ms for name, missed_ms in away.items() if now_ms - missed_ms < MAX_AWAY_MS}
    updated = replace(
        evidence,
        failures=evidence.failures
        + _counted(failures, trial, crashes)
        - _counted(evidence.failures_by_pod, trial, evidence.crashes),
        baseline_failures=evidence.baseline_failures
        + _counted(baseline_failures, trial)
        - _counted(evidence.baseline_failures_by_pod, trial),
        failures_by_pod=failures,
        baseline_failures_by_pod=baseline_failures,
        crashes=crashes,
        open=Slice(since_ms=since_ms, pods=served),
        last_reports={name: evidence.last_reports[name] for name in away} | present,
        away=away,
    )
    if now_ms - since_ms < slice_ms:
        return updated
    return _close(updated, trial, now_ms) if trial.baseline else _close_without_baseline(updated, now_ms)


def _plus(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    return {**counts, **{pod: counts.get(pod, 0) + count for pod, count in more.items() if count}}


def _counted(failures: Mapping[str, int], trial: Trial, crashes: Mapping[str, int] = MappingProxyType({})) -> int:
    return sum(max(int(min(count, trial.most_failures)), crashes.get(pod, 0)) for pod, count in failures.items())


def _since(before: Mapping[int, Traffic], now: Mapping[int, Traffic], trial: Trial) -> Both:
    """Traffic of candidate and baseline on a pod since its last report."""

    def grown(version: int) -> Traffic:
        served = now.get(version, NOTHING) - before.get(version, NOTHING)
        return served if served.is_sum else NOTHING

    return Both(candidate=grown(trial.candidate), baseline=grown(trial.baseline))


def _heard(served: Both, pod: PodTraffic, trial: Trial) -> Both:
    return served if trial.hears(pod.pod) else replace(served, candidate=NOTHING)


def _died_of_candidate(pod: PodTraffic, trial: Trial) -> bool:
    is_trying = trial.hears(pod.pod) if trial.trying is None else pod.pod in trial.trying
    return pod.pod in trial.directed or (pod.version == trial.candidate and is_trying)


def _domains_since(before: PodTraffic, pod: PodTraffic, trial: Trial) -> dict[str, Both]:
    """The same by domain."""
    versions = (trial.candidate, trial.baseline)
    names = {name for version in versions for name in pod.domains.get(version, {})} - {OTHER}

    def of(domain: str, report: PodTraffic) -> dict[int, Traffic]:
        return {version: report.domains.get(version, {}).get(domain, NOTHING) for version in versions}

    return {name: _since(of(name, before), of(name, pod), trial) for name in names}


def _close(evidence: Evidence, trial: Trial, now_ms: int) -> Evidence:
    """End a slice. It becomes an observation of each quantity that is known, unless one version had no traffic."""
    served = together([pod.both for pod in evidence.open.pods.values()], is_paired=trial.is_paired)
    candidate, baseline = served.candidate, served.baseline
    fewest = min(candidate.requests, baseline.requests)
    if 0 < fewest < MIN_REQUESTS:
        return evidence
    if fewest == 0:
        return replace(evidence, open=Slice(since_ms=now_ms))
    return replace(
        evidence,
        acceptance=evidence.acceptance.plus(candidate.acceptance_length, baseline.acceptance_length),
        latency=evidence.latency.plus(candidate.inter_token_latency_s, baseline.inter_token_latency_s),
        domains=_largest(_with_slice(evidence.domains, evidence.open, trial)),
        slices=evidence.slices + 1,
        candidate_requests=evidence.candidate_requests + candidate.requests,
        baseline_requests=evidence.baseline_requests + baseline.requests,
        open=Slice(since_ms=now_ms),
    )


def _close_without_baseline(evidence: Evidence, now_ms: int) -> Evidence:
    """End a slice of a candidate that is compared with no draft, where every verify step gives one token.

    What speculation costs is measured on the pods, within a request; latencies of other pods say less.
    """
    candidate = alone([pod.both.candidate for pod in evidence.open.pods.values()])
    if candidate.requests < MIN_REQUESTS:
        return evidence
    return replace(
        evidence,
        acceptance=evidence.acceptance.plus(candidate.acceptance_length, 1.0),
        slices=evidence.slices + 1,
        candidate_requests=evidence.candidate_requests + candidate.requests,
        baseline_requests=evidence.baseline_requests + evidence.open.both.baseline.requests,
        open=Slice(since_ms=now_ms),
    )


def _with_slice(domains: Mapping[str, DomainEvidence], closed: Slice, trial: Trial) -> dict[str, DomainEvidence]:
    served = {name: together(closed.of_domain(name), is_paired=trial.is_paired) for name in closed.domains}
    return {**domains, **{name: domains.get(name, DomainEvidence()).plus(both) for name, both in served.items()}}


def _largest(domains: dict[str, DomainEvidence]) -> dict[str, DomainEvidence]:
    names = sorted(domains, key=lambda name: (-domains[name].requests, name))
    return {name: domains[name] for name in names[:MAX_DOMAINS]}
