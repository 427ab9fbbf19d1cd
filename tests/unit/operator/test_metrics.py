"""Conditions as metrics: one sample for each, with the status and the reason that hold now."""

import itertools
from datetime import UTC, datetime
from typing import Any, Literal

from prometheus_client import CollectorRegistry
from tests.support.collecting import changing_at_collections

from updraft_operator.api.status import Condition
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.planning.pods import PodState

CREATED = "2026-11-25T12:00:00Z"
QWEN, LLAMA = Key("team", "qwen"), Key("team", "llama")


def _condition(kind: str, status: Literal["True", "False", "Unknown"], reason: str) -> Condition:
    at = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
    return Condition(type=kind, status=status, reason=reason, message="because", last_transition_time=at)


def _shown(counted: CollectorRegistry, name: str) -> set[tuple[str, str, str]]:
    (metric,) = (each for each in counted.collect() if each.name == "updraft_operator_condition")
    samples = [each for each in metric.samples if each.labels["speculator"] == name]
    assert all(each.value == 1 for each in samples)
    return {(each.labels["type"], each.labels["status"], each.labels["reason"]) for each in samples}


def test_a_condition_is_shown_with_the_reason_that_it_has_now_and_no_other() -> None:
    counted = CollectorRegistry()
    metrics = Metrics(counted)
    metrics.show(QWEN, [_condition("Ready", "False", "Suspended"), _condition("Adapting", "False", "Suspended")])
    metrics.show(LLAMA, [_condition("Ready", "True", "Ready")])
    assert _shown(counted, "qwen") == {("Ready", "False", "Suspended"), ("Adapting", "False", "Suspended")}

    metrics.show(QWEN, [_condition("Ready", "False", "ModelLoading"), _condition("Adapting", "False", "Suspended")])
    assert _shown(counted, "qwen") == {("Ready", "False", "ModelLoading"), ("Adapting", "False", "Suspended")}

    metrics.forget(QWEN)
    metrics.forget(QWEN)
    assert _shown(counted, "qwen") == set()
    assert _shown(counted, "llama") == {("Ready", "True", "Ready")}


def test_conditions_are_read_by_another_thread_while_speculators_come() -> None:
    counted, numbers = CollectorRegistry(), itertools.count()
    metrics = Metrics(counted)

    def show() -> None:
        metrics.show(Key("team", f"model-{next(numbers)}"), [_condition("Ready", "True", "Ready")])

    for _ in range(5000):
        show()
    with changing_at_collections(show):
        assert _shown(counted, "model-4999") == {("Ready", "True", "Ready")}


def test_overdue_certificates_are_counted_by_another_thread_while_registries_come() -> None:
    metrics, numbers = Metrics(CollectorRegistry()), itertools.count()

    class Now(float):
        """Each comparison with it lets another thread show one more certificate."""

        def __ge__(self, at_s: object) -> bool:
            metrics.show_certificate(Key("team", f"model-{next(numbers)}"), 1.0)
            return True

    metrics.show_certificate(QWEN, 1.0)
    assert metrics.num_overdue(Now(2.0)) == 1
    assert metrics.num_overdue(2.0) == 2


def _pod(number: int, *, ready_after_s: int | None, restarts: int = 0) -> PodState:
    """Created at noon."""
    ready: dict[str, Any] = {"type": "Ready", "status": "False"}
    if ready_after_s is not None:
        ready |= {
            "status": "True",
            "lastTransitionTime": f"2026-11-25T12:{ready_after_s // 60:02}:{ready_after_s % 60:02}Z",
        }
    metadata = {"name": f"qwen-serving-{number}", "uid": f"uid-{number}", "creationTimestamp": CREATED}
    containers = [{"name": "inference", "restartCount": restarts, "ready": ready_after_s is not None}]
    return PodState.of({"metadata": metadata, "status": {"conditions": [ready], "containerStatuses": containers}})


def test_the_start_of_a_pod_is_measured_once_and_only_if_it_was_seen_from_its_beginning() -> None:
    counted = CollectorRegistry()
    metrics = Metrics(counted)

    def measured() -> tuple[float | None, float | None]:
        name = "updraft_operator_serving_startup_seconds"
        return counted.get_sample_value(f"{name}_count"), counted.get_sample_value(f"{name}_sum")

    metrics.show_pods(QWEN, [_pod(1, ready_after_s=None), _pod(2, ready_after_s=30)])
    assert measured() == (0.0, 0.0), "nobody saw how the second one started"
    metrics.show_pods(QWEN, [_pod(1, ready_after_s=90), _pod(2, ready_after_s=None)])
    assert measured() == (1.0, 90.0)
    metrics.show_pods(QWEN, [_pod(1, ready_after_s=90), _pod(2, ready_after_s=600)])
    assert measured() == (1.0, 90.0), "a pod that is ready again did not start"

    metrics.show_pods(QWEN, [_pod(3, ready_after_s=None)])
    metrics.show_pods(QWEN, [_pod(3, ready_after_s=120, restarts=1)])
    assert measured() == (1.0, 90.0), "a restart is no start"


def test_a_condition_that_is_gone_is_shown_no_more() -> None:
    counted = CollectorRegistry()
    metrics = Metrics(counted)
    metrics.show(QWEN, [_condition("Ready", "True", "Ready"), _condition("Reconciling", "True", "RollingOut")])
    metrics.show(QWEN, [_condition("Ready", "True", "Ready")])
    assert _shown(counted, "qwen") == {("Ready", "True", "Ready")}
