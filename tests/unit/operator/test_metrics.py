"""Conditions as metrics: one sample for each, with the status and the reason that hold now."""

from datetime import UTC, datetime
from typing import Literal

from prometheus_client import CollectorRegistry

from updraft_operator.api.status import Condition
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key

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
