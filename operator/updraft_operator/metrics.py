"""Every metric of the operator. Labels have few values: a kind, a verb, a result; only conditions name the resource."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from updraft_chassis.metrics import MetricFactory
from updraft_operator.api.status import Condition
from updraft_operator.planning.objects import Key
from updraft_operator.planning.pods import PodState

_STARTUP_S = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0)
_RECONCILE_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class _Conditions(Collector):
    """Writes its samples when it is read: a gauge object for each of ten conditions would take 14 kB per speculator."""

    _NAME = "updraft_operator_condition"
    _TEXT = (
        "1 for the current status (True, False, Unknown) and reason of a condition; other combinations have no sample."
    )
    _LABELS = ("namespace", "speculator", "type", "status", "reason")

    def __init__(self) -> None:
        self._shown: dict[Key, tuple[tuple[str, str, str], ...]] = {}
        """Type, status and reason of every condition."""
        self._distinct: dict[tuple[str, str, str], tuple[str, str, str]] = {}

    def show(self, key: Key, conditions: Iterable[Condition]) -> None:
        current = ((condition.type, condition.status, condition.reason) for condition in conditions)
        self._shown[key] = tuple(self._distinct.setdefault(each, each) for each in current)

    def forget(self, key: Key) -> None:
        self._shown.pop(key, None)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily(self._NAME, self._TEXT, labels=self._LABELS)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The server's thread calls it, so it copies the keys first. `Store.speculators` says why not the pairs."""
        (family,) = self.describe()
        for key in list(self._shown):
            for each in self._shown.get(key, ()):
                family.add_metric((*key, *each), 1.0)
        yield family


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        new = MetricFactory(registry, "updraft_operator")
        self.reconcile = new.histogram(
            "reconcile_duration_seconds",
            "Duration of one reconcile of a speculator, by result (done; measured: of its status alone; failed).",
            _RECONCILE_S,
            "result",
        )
        self.plans = new.counter(
            "plans",
            "Plans made: comparisons of a speculator with all its objects. Measurements of registries need none.",
        )
        self.startup = new.histogram(
            "serving_startup_seconds",
            "Time from the creation of an inference pod until it was ready for the first time, if it never restarted.",
            _STARTUP_S,
        )
        self.delay = new.histogram(
            "queue_delay_seconds", "Time from the first event of a speculator to its reconcile.", _RECONCILE_S
        )
        self.errors = new.counter(
            "reconcile_errors", "Reconciles that failed and are retried, by kind of error.", "error"
        )
        self.queue = new.gauge("queue_depth", "Speculators waiting to be reconciled.")
        self.speculators = new.gauge("speculators", "AdaptiveSpeculators that the operator manages.")
        self._conditions = _Conditions()
        registry.register(self._conditions)
        self.writes = new.counter("writes", "Writes to the API server.", "kind", "verb")
        self.leader = new.gauge("leader", "1 while this replica is the leader and may write.")
        self.watch_age = new.gauge(
            "watch_age_seconds", "Time since a full listing last agreed with the cache that the watches fill."
        )
        self.connections = new.gauge("registry_connections", "Registries that the operator is connected to.")
        self.drift = new.counter("drift", "Objects that someone else changed and the operator reverted.", "kind")
        self.stale = new.counter("stale_objects", "Objects whose change a watch missed and a listing found.", "kind")
        self.upgrades = new.gauge(
            "upgrades",
            "AdaptiveSpeculators by how far they are with the runtime: current, waiting, ready, updating, failed, skipped.",
            "stage",
        )
        self.redis_users = new.counter(
            "redis_users", "Users that the operator set on a node of its Redis, or deleted there.", "change"
        )
        self.overdue = new.gauge(
            "overdue_certificates",
            "Certificates of registries and of the chart's Redis that are missing, or past five sixths of their life: they are"
            " renewed after two thirds.",
        )
        self._overdue_s: dict[Key, float] = {}
        """The Unix time at which the certificate of a registry is overdue."""
        self._started: dict[Key, dict[str, bool]] = {}
        """By UID, whether a pod was ever seen ready."""

    def show(self, key: Key, conditions: Iterable[Condition]) -> None:
        self._conditions.show(key, conditions)

    def show_certificate(self, key: Key, overdue_s: float) -> None:
        self._overdue_s[key] = overdue_s

    def num_overdue(self, now_s: float) -> int:
        """The server's thread calls it, so it copies the times first."""
        return sum(at_s <= now_s for at_s in list(self._overdue_s.values()))

    def show_pods(self, key: Key, pods: Iterable[PodState]) -> None:
        """Measure how long inference pods took that were first seen before they were ready."""
        before, now = self._started.get(key, {}), {pod.uid: pod for pod in pods}
        for uid, pod in now.items():
            if pod.is_ready and before.get(uid) is False and pod.startup_s is not None:
                self.startup.observe(pod.startup_s)
        self._started[key] = {uid: pod.is_ready or before.get(uid, False) for uid, pod in now.items()}

    def forget(self, key: Key) -> None:
        self._started.pop(key, None)
        self._overdue_s.pop(key, None)
        self._conditions.forget(key)
