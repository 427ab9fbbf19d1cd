"""Every metric of the operator, on one page. Labels are few: a kind, a verb, a result, and of conditions the resource."""

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
    """Built once, passed to whoever counts."""

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
    """Status and reason that each condition is shown with; one sample for each, not one for each status."""

    @classmethod
    def on(cls, registry: CollectorRegistry) -> Self:
        """Register all of them."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=_RECONCILE_S, registry=registry)

        return cls(
            reconcile=histogram(
                "reconcile_duration_seconds",
                "One look at a speculator and what it led to, by result (done, failed).",
                "result",
            ),
            delay=histogram("queue_delay_seconds", "From the first event about a speculator to the look at it."),
            errors=counter("reconcile_errors", "Looks that failed and are repeated, by kind of error.", "error"),
            queue=gauge("queue_depth", "Speculators that wait to be looked at."),
            speculators=gauge("speculators", "AdaptiveSpeculators that are looked after."),
            condition=gauge(
                "condition",
                "1 for the status (True, False, Unknown) and the reason that a condition has; others have no sample.",
                *("namespace", "speculator", "type", "status", "reason"),
            ),
            writes=counter("writes", "Writes to the API server.", "kind", "verb"),
            leader=gauge("leader", "1 while this process may write."),
            watch_age=gauge("watch_age_seconds", "Since a whole listing last agreed with what the watches had said."),
            connections=gauge("registry_connections", "Registries that are listened to."),
            drift=counter("drift", "Objects that somebody else had changed, and that were set right.", "kind"),
            stale=counter("stale_objects", "Objects whose change a watch had missed and a listing found.", "kind"),
        )

    def show(self, key: Key, conditions: Iterable[Condition]) -> None:
        """Show the conditions of a speculator."""
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
        """No longer show a speculator that is gone."""
        for kind, shown in self._shown.pop(key, {}).items():
            self.condition.remove(key.namespace, key.name, kind, *shown)
