"""Every metric of the registry, on one page.

Labels are few and bounded: a speculator, a phase, a role, a reason, one of 17 domains. A version is the value of a gauge, never
a label.
"""

import math
from collections import Counter as Tally
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry

from updraft.registry.v1.registry_pb2 import DomainTraffic, VersionTraffic
from updraft_chassis.metrics import MetricFactory
from updraft_registry.fleet import ReportEffect
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.placement import Pod
from updraft_registry.rollout.version import NO_DRAFT, Rollout, Speculator, Transition, roles_of
from updraft_rollouts.terms import Phase

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


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        new = MetricFactory(registry, "updraft_registry")
        self.denied = new.counter(
            "denied_calls", "Calls refused because of their credentials, by gRPC status.", "status"
        )
        self.key_fetches = new.counter(
            "key_fetches",
            "Fetches of the keys that verify tokens of ServiceAccounts, by result (ok, failed).",
            "result",
        )
        self.published = new.counter(
            "published_versions",
            "Successful uploads, by whether the registry had the content already (new, existed).",
            *("speculator", "result"),
        )
        self.refused = new.counter(
            "refused_uploads", "Refused uploads, by gRPC status. CANCELLED: the sender disconnected.", "status"
        )
        self.published_bytes = new.counter("published_bytes", "Bytes of published weights.")
        self.fetched_bytes = new.counter(
            "fetched_bytes", "Bytes of weights sent, by encoding (identity, delta).", "encoding"
        )
        self.fetches = new.counter(
            "fetches", "Fetches of weights, by answer (identity, delta, redirect to the bucket).", "answer"
        )
        self.waiting_fetches = new.gauge("waiting_fetches", "Fetches of weights that wait in the queue.")
        self.deltas = new.counter(
            "deltas",
            "Deltas between versions, by result (made, useless: no smaller than the weights, failed).",
            "result",
        )
        self.transitions = new.counter(
            "transitions",
            "Phase changes of versions, by new phase and by who caused them.",
            *("speculator", "phase", "actor"),
        )
        self.version = new.gauge(
            "version", "Version in a role (stable, candidate, previous, latest); 0: no draft.", *("speculator", "role")
        )
        self.versions = new.gauge("versions", "Versions whose weights are kept, by phase.", "speculator", "phase")
        self.rollouts = new.counter(
            "rollouts", "Canaries that ended, by outcome (promoted, rolled_back, ...).", "speculator", "outcome"
        )
        self.rollout_duration = new.histogram(
            "rollout_duration_seconds",
            "Time from the first step of a canary to its end, without pauses.",
            _ROLLOUT_S,
            *("speculator", "outcome"),
        )
        self.rollout_pause = new.histogram(
            "rollout_pause_seconds", "Time for which a canary was paused.", _ROLLOUT_S, "speculator", "outcome"
        )
        self.verdict = new.gauge(
            "verdict",
            "1 for the live gate's current verdict on the canary (pass, fail, hold).",
            "speculator",
            "verdict",
        )
        self.acceptance_length = new.gauge(
            "acceptance_length_tokens",
            "Tokens per verify step over all traffic of the version on the current pods; NaN: no traffic.",
            *("speculator", "role"),
        )
        self.domain_acceptance_length = new.gauge(
            "domain_acceptance_length_tokens",
            "The same in the requests of one domain, as callers name it: the 16 largest, and `other` for the rest.",
            *("speculator", "role", "domain"),
        )
        self._domains: dict[str, set[tuple[str, str, str]]] = {}
        self.streams = new.gauge("streams", "Open fleet streams of pods.")
        self.pods = new.gauge(
            "pods",
            "Connected pods that are not draining, by the role of the version they hold "
            "(stable, candidate, other, none).",
            *("speculator", "role"),
        )
        self.refusing_pods = new.gauge("refusing_pods", "Connected pods that refuse a version.", "speculator")
        self.draining_pods = new.gauge(
            "draining_pods", "Pods that are draining: they take no new requests and will stop.", "speculator"
        )
        self.reports = new.counter("reports", "Reports received from pods.")
        self.ended_streams = new.counter(
            "ended_streams",
            "Fleet streams that the registry ended, by gRPC status. INVALID_ARGUMENT: the pod has another target, or its report"
            " makes no sense.",
            "status",
        )
        self.report_lag = new.histogram(
            "report_lag_seconds",
            "Time from sending a report to its arrival, by the clocks of pod and registry.",
            _LAG_S,
        )
        self.swaps = new.counter("swaps", "Draft swaps reported by pods, by result (swapped, refused).", "result")
        self.swap_pause = new.counter("swap_pause_seconds", "Time for which decoding paused in pods to swap drafts.")
        self.demand = new.gauge(
            "demand_tokens_per_second",
            "Captured tokens per second that the trainer can use; 0 if no trainer reports.",
            "speculator",
        )
        self.granted = new.gauge(
            "granted_tokens_per_second",
            "Captured tokens per second that the connected pods were granted.",
            "speculator",
        )
        self.deleted_blobs = new.counter("deleted_blobs", "Weights files deleted by retention.")
        self.evicted_versions = new.counter(
            "evicted_versions", "Versions whose weights were deleted for an upload, because the volume was full."
        )
        self.failed_decisions = new.counter(
            "failed_decisions", "Decisions that could not be written, for example on a full disk. They are retried."
        )

    def count_report(self, effect: ReportEffect, *, lag_s: float | None) -> None:
        """Count a report. `lag_s` is None if the report has no time of sending, and negative if the pod's clock is ahead."""
        self.reports.inc()
        if lag_s is not None:
            self.report_lag.observe(max(0.0, lag_s))
        self.swaps.labels("swapped").inc(effect.swaps.swapped)
        self.swaps.labels("refused").inc(effect.swaps.refused)
        self.swap_pause.inc(effect.swaps.pause_s)

    def update(self, speculator: Speculator, pods: Collection[Pod], traffic: Iterable[VersionTraffic]) -> None:
        """Set the gauges. `pods` are the connected ones, draining ones included; `traffic` is that of all pods."""
        name, roles = speculator.name, asdict(roles_of(speculator))
        for role, number in roles.items():
            self.version.labels(name, role).set(number)
        phases = Tally(version.phase for version in speculator.versions)
        for phase in Phase:
            self.versions.labels(name, phase).set(phases[phase])
        staying = [pod for pod in pods if not pod.is_draining]
        held = Tally(_role(pod.loaded, roles) for pod in staying)
        for role in ("stable", "candidate", "other", "none"):
            self.pods.labels(name, role).set(held[role])
        self.refusing_pods.labels(name).set(sum(pod.refused != NO_DRAFT for pod in staying))
        self.draining_pods.labels(name).set(len(pods) - len(staying))
        served = {counted.version: counted for counted in traffic if counted.version and counted.verify_steps}
        before, self._domains[name] = self._domains.get(name, set()), set()
        for role in ("stable", "candidate"):
            counted = served.get(roles[role], VersionTraffic())
            self.acceptance_length.labels(name, role).set(_length(counted))
            for domain in counted.domains:
                self.domain_acceptance_length.labels(name, role, domain.domain).set(_length(domain))
                self._domains[name].add((name, role, domain.domain))
        for labels in before - self._domains[name]:
            self.domain_acceptance_length.remove(*labels)

    def set_credits(self, name: str, *, demand: float, granted: float) -> None:
        self.demand.labels(name).set(demand)
        self.granted.labels(name).set(granted)

    def set_verdict(self, name: str, verdict: Verdict | None) -> None:
        """Set the live gate's verdict; None: no canary runs."""
        for possible in Verdict:
            self.verdict.labels(name, possible).set(possible is verdict)

    def count_rollout(self, name: str, rollout: Rollout, phase: Phase) -> None:
        """Count a canary that ended with its version in this phase."""
        outcome = OUTCOMES.get(phase, "held")
        self.rollouts.labels(name, outcome).inc()
        self.rollout_duration.labels(name, outcome).observe(rollout.run_ms / 1000)
        self.rollout_pause.labels(name, outcome).observe(rollout.paused_ms / 1000)

    def count_transition(self, name: str, transition: Transition) -> None:
        """Count a phase change. The name after `operator:` is dropped, because labels must stay few."""
        self.transitions.labels(name, transition.after, transition.actor.partition(":")[0]).inc()


def _length(counted: VersionTraffic | DomainTraffic) -> float:
    return counted.tokens / counted.verify_steps if counted.verify_steps else math.nan


def _role(number: int, roles: Mapping[str, int]) -> str:
    if number == NO_DRAFT:
        return "none"
    return next((role for role in ("stable", "candidate") if roles[role] == number), "other")
