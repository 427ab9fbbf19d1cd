"""Every metric of the registry, on one page.

Labels are few and bounded: a speculator, a phase, a role, a reason. A version is the value of a gauge, never a
label.
"""

import math
from collections import Counter as Tally
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from updraft.registry.v1.registry_pb2 import VersionTraffic
from updraft_registry.fleet import ReportEffect
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.placement import Pod
from updraft_registry.rollout.version import NO_DRAFT, Rollout, Speculator, Transition, newest_proven, stable
from updraft_rollouts.terms import Phase

_PREFIX = "updraft_registry"

_LAG_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
_ROLLOUT_S = (1.0, 10.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0)

OUTCOMES = {
    Phase.STABLE: "promoted",
    Phase.ROLLED_BACK: "rolled_back",
    Phase.REJECTED: "rejected",
    Phase.FAILED: "failed",
    Phase.HELD: "held",
    Phase.SUPERSEDED: "superseded",
}
"""Outcome of a canary, by the phase that follows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTraffic:
    """Connected pods of a speculator, draining ones included, and the traffic of all its pods."""

    pods: Collection[Pod]
    traffic: Collection[VersionTraffic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """All metrics of one process."""

    denied: Counter
    published: Counter
    refused: Counter
    published_bytes: Counter
    fetched_bytes: Counter
    fetches: Counter
    waiting_fetches: Gauge
    deltas: Counter
    transitions: Counter
    version: Gauge
    versions: Gauge
    rollouts: Counter
    rollout_duration: Histogram
    rollout_pause: Histogram
    verdict: Gauge
    acceptance_length: Gauge
    streams: Gauge
    pods: Gauge
    refusing_pods: Gauge
    draining_pods: Gauge
    reports: Counter
    report_lag: Histogram
    swaps: Counter
    swap_pause: Counter
    deleted_blobs: Counter
    failed_decisions: Counter

    @classmethod
    def on(cls, registry: CollectorRegistry) -> Self:

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=buckets, registry=registry)

        return cls(
            denied=counter("denied_calls", "Calls refused because of their credentials, by gRPC status.", "status"),
            published=counter(
                "published_versions",
                "Successful uploads, by whether the registry had the content already (new, existed).",
                *("speculator", "result"),
            ),
            refused=counter(
                "refused_uploads",
                "Refused uploads, by gRPC status. CANCELLED: the sender disconnected.",
                "reason",
            ),
            published_bytes=counter("published_bytes", "Bytes of published weights."),
            fetched_bytes=counter("fetched_bytes", "Bytes of weights sent, by encoding (identity, delta).", "encoding"),
            fetches=counter(
                "fetches",
                "Fetches of weights, by answer (identity, delta, redirect to the bucket).",
                "answer",
            ),
            waiting_fetches=gauge("waiting_fetches", "Fetches of weights that wait in the queue."),
            deltas=counter(
                "deltas",
                "Deltas between versions, by result (made, useless: no smaller than the weights, failed).",
                "result",
            ),
            transitions=counter(
                "transitions",
                "Phase changes of versions, by new phase and by who caused them.",
                *("speculator", "phase", "actor"),
            ),
            version=gauge(
                "version",
                "Version in a role (stable, candidate, previous, latest); 0: no draft.",
                *("speculator", "role"),
            ),
            versions=gauge("versions", "Versions whose weights are kept, by phase.", "speculator", "phase"),
            rollouts=counter(
                "rollouts",
                "Canaries that ended, by outcome (promoted, rolled_back, ...).",
                "speculator",
                "outcome",
            ),
            rollout_duration=histogram(
                "rollout_duration_seconds",
                "Time from the first step of a canary to its end, without pauses.",
                _ROLLOUT_S,
                *("speculator", "outcome"),
            ),
            rollout_pause=histogram(
                "rollout_pause_seconds", "Time for which a canary was paused.", _ROLLOUT_S, "speculator", "outcome"
            ),
            verdict=gauge(
                "verdict",
                "1 for the live gate's current verdict on the canary (pass, fail, hold).",
                "speculator",
                "verdict",
            ),
            acceptance_length=gauge(
                "acceptance_length_tokens",
                "Tokens per verify step over all traffic of the version on the current pods; NaN: no traffic.",
                *("speculator", "role"),
            ),
            streams=gauge("streams", "Open fleet streams of pods."),
            pods=gauge(
                "pods",
                "Connected pods that are not draining, by the role of the version they hold "
                "(stable, candidate, other, none).",
                *("speculator", "role"),
            ),
            refusing_pods=gauge("refusing_pods", "Connected pods that refuse a version.", "speculator"),
            draining_pods=gauge(
                "draining_pods", "Pods that are draining: they take no new requests and will stop.", "speculator"
            ),
            reports=counter("reports", "Reports received from pods."),
            report_lag=histogram(
                "report_lag_seconds",
                "Time from sending a report to its arrival, by the clocks of pod and registry.",
                _LAG_S,
            ),
            swaps=counter("swaps", "Draft swaps reported by pods, by result (swapped, refused).", "result"),
            swap_pause=counter("swap_pause_seconds", "Time for which decoding paused in pods to swap drafts."),
            deleted_blobs=counter("deleted_blobs", "Weights files deleted by retention."),
            failed_decisions=counter(
                "failed_decisions",
                "Decisions that could not be written, for example on a full disk. They are retried.",
            ),
        )

    def count_report(self, effect: ReportEffect, *, lag_s: float | None) -> None:
        """Count a report. `lag_s` is None if the report has no time of sending, and negative if the pod's clock is ahead."""
        self.reports.inc()
        if lag_s is not None:
            self.report_lag.observe(max(0.0, lag_s))
        self.swaps.labels("swapped").inc(effect.swaps.swapped)
        self.swaps.labels("refused").inc(effect.swaps.refused)
        self.swap_pause.inc(effect.swaps.pause_s)

    def update(self, speculator: Speculator, seen: FleetTraffic, *, candidate: int = NO_DRAFT) -> None:
        name, roles = speculator.name, roles_of(speculator, candidate)
        for role, number in roles.items():
            self.version.labels(name, role).set(number)
        phases = Tally(version.phase for version in speculator.versions)
        for phase in Phase:
            self.versions.labels(name, phase).set(phases[phase])
        staying = [pod for pod in seen.pods if not pod.is_draining]
        held = Tally(_role(pod.loaded, roles) for pod in staying)
        for role in ("stable", "candidate", "other", "none"):
            self.pods.labels(name, role).set(held[role])
        self.refusing_pods.labels(name).set(sum(pod.refused != NO_DRAFT for pod in staying))
        self.draining_pods.labels(name).set(len(seen.pods) - len(staying))
        lengths = {
            each.version: each.tokens / each.verify_steps for each in seen.traffic if each.version and each.verify_steps
        }
        for role in ("stable", "candidate"):
            self.acceptance_length.labels(name, role).set(lengths.get(roles[role], math.nan))

    def set_verdict(self, name: str, verdict: Verdict | None) -> None:
        """Set the live gate's verdict; None: no canary runs."""
        for each in Verdict:
            self.verdict.labels(name, each).set(each is verdict)

    def count_rollout(self, name: str, rollout: Rollout, phase: Phase) -> None:
        """Count a canary that ended with its version in this phase."""
        outcome = OUTCOMES.get(phase, "held")
        self.rollouts.labels(name, outcome).inc()
        self.rollout_duration.labels(name, outcome).observe(rollout.run_ms / 1000)
        self.rollout_pause.labels(name, outcome).observe(rollout.paused_ms / 1000)

    def count_transition(self, name: str, transition: Transition) -> None:
        """Count a phase change. The name after `operator:` is dropped, because labels must stay few."""
        self.transitions.labels(name, transition.after, transition.actor.partition(":")[0]).inc()


def roles_of(speculator: Speculator, candidate: int = NO_DRAFT) -> Mapping[str, int]:
    """The version in each role; 0 = none."""
    serving = stable(speculator.versions)
    number = serving.number if serving else NO_DRAFT
    previous = newest_proven(speculator.versions, other_than=number)
    return {
        "stable": number,
        "candidate": candidate,
        "previous": previous.number if previous else NO_DRAFT,
        "latest": speculator.latest,
    }


def _role(number: int, roles: Mapping[str, int]) -> str:
    """Role of a pod that holds this version."""
    if number == NO_DRAFT:
        return "none"
    return next((role for role in ("stable", "candidate") if roles[role] == number), "other")
