"""Every metric of the operator. Labels have few values: a kind, a verb, a result; only conditions name the resource."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from updraft_operator.api.status import Condition
from updraft_operator.planning.objects import Key

_PREFIX = "updraft_operator"
_RECONCILE_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    reconcile: Histogram
    delay: Histogram
    errors: Counter
    queue: Gauge
    speculators: Gauge
    condition: Gauge
    writes: Counter
    leader: Gauge
    watch_age: Gauge
    connections: Gauge
    drift: Counter
    stale: Counter
    _shown: dict[Key, dict[str, tuple[str, str]]] = field(default_factory=dict)
    """Exported status and reason of every condition: one sample per condition, not one per status."""

    @classmethod
    def on(cls, registry: CollectorRegistry) -> Self:

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=_RECONCILE_S, registry=registry)

        return cls(
            reconcile=histogram(
                "reconcile_duration_seconds",
                "Duration of one reconcile of a speculator, by result (done, failed).",
                "result",
            ),
            delay=histogram("queue_delay_seconds", "Time from the first event of a speculator to its reconcile."),
            errors=counter("reconcile_errors", "Reconciles that failed and are retried, by kind of error.", "error"),
            queue=gauge("queue_depth", "Speculators waiting to be reconciled."),
            speculators=gauge("speculators", "AdaptiveSpeculators that the operator manages."),
            condition=gauge(
                "condition",
                "1 for the current status (True, False, Unknown) and reason of a condition; other combinations have no sample.",
                *("namespace", "speculator", "type", "status", "reason"),
            ),
            writes=counter("writes", "Writes to the API server.", "kind", "verb"),
            leader=gauge("leader", "1 while this replica is the leader and may write."),
            watch_age=gauge(
                "watch_age_seconds", "Time since a full listing last agreed with the cache that the watches fill."
            ),
            connections=gauge("registry_connections", "Registries that the operator is connected to."),
            drift=counter("drift", "Objects that someone else changed and the operator reverted.", "kind"),
            stale=counter("stale_objects", "Objects whose change a watch missed and a listing found.", "kind"),
        )

    def show(self, key: Key, conditions: Iterable[Condition]) -> None:
        shown = self._shown.setdefault(key, {})
        for condition in conditions:
            before, now = shown.get(condition.type), (condition.status, condition.reason)
            if now == before:
                continue
            if before is not None:
                self.condition.remove(key.namespace, key.name, condition.type, *before)
            self.condition.labels(key.namespace, key.name, condition.type, *now).set(1)
            shown[condition.type] = now

    def forget(self, key: Key) -> None:
        for kind, shown in self._shown.pop(key, {}).items():
            self.condition.remove(key.namespace, key.name, kind, *shown)
