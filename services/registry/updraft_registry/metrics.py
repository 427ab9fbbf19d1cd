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
"""What a canary comes to, by the phase that follows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTraffic:
    """What the pods of a speculator say now: the connected ones, draining or not, and the sums of all."""

    pods: Collection[Pod]
    traffic: Collection[VersionTraffic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Built once, passed to whoever counts."""

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
        """Register all of them."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=buckets, registry=registry)

        return cls(
            denied=counter("denied_calls", "Calls refused for who made them, by gRPC status.", "status"),
            published=counter(
                "published_versions",
                "Uploads that ended well, by whether their content was known (new, existed).",
                *("speculator", "result"),
            ),
            refused=counter(
                "refused_uploads",
                "Uploads that were refused, by the gRPC status of the reason; CANCELLED: the sender went away.",
                "reason",
            ),
            published_bytes=counter("published_bytes", "Bytes of weights that became versions."),
            fetched_bytes=counter(
                "fetched_bytes", "Bytes sent to readers of weights, by their encoding (identity, delta).", "encoding"
            ),
            fetches=counter(
                "fetches",
                "Readers of weights, by what they were given (identity, delta, redirect to the bucket).",
                "answer",
            ),
            waiting_fetches=gauge("waiting_fetches", "Readers of weights that wait for their turn."),
            deltas=counter(
                "deltas",
                "Deltas between versions, by result: made, useless (no smaller than the weights), failed.",
                "result",
            ),
            transitions=counter(
                "transitions",
                "Versions that changed their phase, by the phase they came to and by who caused it.",
                *("speculator", "phase", "actor"),
            ),
            version=gauge(
                "version",
                "Version in a role (stable, candidate, previous, latest); 0 = no draft.",
                *("speculator", "role"),
            ),
            versions=gauge("versions", "Versions whose weights are kept, by phase.", "speculator", "phase"),
            rollouts=counter(
                "rollouts",
                "Canaries that ended, by what they came to (promoted, rolled_back, ...).",
                "speculator",
                "outcome",
            ),
            rollout_duration=histogram(
                "rollout_duration_seconds",
                "From the first step of a canary to its end, without pauses.",
                _ROLLOUT_S,
                *("speculator", "outcome"),
            ),
            rollout_pause=histogram(
                "rollout_pause_seconds", "Time that a canary was paused.", _ROLLOUT_S, "speculator", "outcome"
            ),
            verdict=gauge(
                "verdict", "1 for what the live gate says of the canary (pass, fail, hold).", "speculator", "verdict"
            ),
            acceptance_length=gauge(
                "acceptance_length_tokens",
                "Tokens a verify step, over all that the pods that are here served with a version; NaN: nothing.",
                *("speculator", "role"),
            ),
            streams=gauge("streams", "Open streams of pods."),
            pods=gauge(
                "pods",
                "Connected pods that do not drain, by the role of the version that they hold "
                "(stable, candidate, other, none).",
                *("speculator", "role"),
            ),
            refusing_pods=gauge("refusing_pods", "Connected pods that refuse a version.", "speculator"),
            draining_pods=gauge("draining_pods", "Pods that take no new requests and will go away.", "speculator"),
            reports=counter("reports", "Reports of pods."),
            report_lag=histogram(
                "report_lag_seconds", "From a report's time of sending to its arrival, as far as clocks agree.", _LAG_S
            ),
            swaps=counter("swaps", "Changes of draft that the pods reported, by result (swapped, refused).", "result"),
            swap_pause=counter("swap_pause_seconds", "Time that decoding stood still in the pods to change drafts."),
            deleted_blobs=counter("deleted_blobs", "Weights deleted by retention."),
            failed_decisions=counter(
                "failed_decisions",
                "Decisions that could not be written (a full disk); the old state holds, and they are tried again.",
            ),
        )

    def count_report(self, effect: ReportEffect, *, lag_s: float | None) -> None:
        """Count a report; one whose clock is ahead has no lag, and one that does not say has None."""
        self.reports.inc()
        if lag_s is not None:
            self.report_lag.observe(max(0.0, lag_s))
        self.swaps.labels("swapped").inc(effect.swaps.swapped)
        self.swaps.labels("refused").inc(effect.swaps.refused)
        self.swap_pause.inc(effect.swaps.pause_s)

    def update(self, speculator: Speculator, seen: FleetTraffic, *, candidate: int = NO_DRAFT) -> None:
        """Show the versions of a speculator, who holds them, and how they do."""
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
        """Show what the live gate says of the canary; None: there is none."""
        for each in Verdict:
            self.verdict.labels(name, each).set(each is verdict)

    def count_rollout(self, name: str, rollout: Rollout, phase: Phase) -> None:
        """Count a canary that ended with its version in this phase."""
        outcome = OUTCOMES.get(phase, "held")
        self.rollouts.labels(name, outcome).inc()
        self.rollout_duration.labels(name, outcome).observe(rollout.run_ms / 1000)
        self.rollout_pause.labels(name, outcome).observe(rollout.paused_ms / 1000)

    def count_transition(self, name: str, transition: Transition) -> None:
        """Count a version that changed its phase; an operator's name is no label."""
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
    """What a pod that holds this version counts as."""
    if number == NO_DRAFT:
        return "none"
    return next((role for role in ("stable", "candidate") if roles[role] == number), "other")
