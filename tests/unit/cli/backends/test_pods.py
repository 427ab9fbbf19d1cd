"""Kubernetes pods as the console shows them."""

from typing import Any

import pytest

from updraft_cli.backends.pods import metrics_port, owner, pod


def content(status: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    labels = {"updraft.dev/speculator": "qwen", "app.kubernetes.io/component": "serving"}
    return {"metadata": {"name": "qwen-serving-1", "labels": labels, **metadata}, "status": status or {}}


def ready(status: str, **condition: str) -> dict[str, Any]:
    return {"conditions": [{"type": "Ready", "status": status, **condition}]}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {**ready("False"), "containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}


def ended(reason: str) -> dict[str, Any]:
    return {**ready("False"), "containerStatuses": [{"state": {"terminated": {"reason": reason}}}]}


@pytest.mark.parametrize(
    ("status", "state", "problem"),
    [
        (ready("True"), "ready", ""),
        (ready("False", reason="ContainersNotReady"), "not ready", "ContainersNotReady"),
        (waiting("ImagePullBackOff", "no such image"), "failed", "ImagePullBackOff: no such image"),
        (waiting("RunContainerError"), "failed", "RunContainerError"),
        (ended("OOMKilled"), "failed", "OOMKilled"),
        (waiting("ContainerCreating"), "not ready", "ContainerCreating"),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "the node has no memory"},
            "failed",
            "the node has no memory",
        ),
        ({"phase": "Pending"}, "not ready", "it is not scheduled yet"),
    ],
)
def test_a_pod_is_ready_or_has_the_reason_why_not(status: dict[str, Any], state: str, problem: str) -> None:
    shown = pod(content(status))
    assert (shown.state, shown.problem) == (state, problem)


def test_a_pod_that_is_deleted_drains() -> None:
    assert pod(content(ready("True"), deletionTimestamp="2026-11-24T12:00:00Z")).state == "draining"


@pytest.mark.parametrize(
    ("limits", "device"),
    [
        ({"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "2"}, "2 nvidia.com/gpu"),
        ({"hugepages-2Mi": "1Gi"}, ""),
        ({}, ""),
    ],
)
def test_the_device_is_what_the_pod_asks_for(limits: dict[str, str], device: str) -> None:
    shown = pod({**content(), "spec": {"containers": [{"resources": {"limits": limits}}]}})
    assert shown.requested_device == device


def test_the_port_of_the_metrics_is_found_by_its_name() -> None:
    ports = [{"name": "http", "containerPort": 8000}, {"name": "metrics", "containerPort": 9090}]
    assert metrics_port({"spec": {"containers": [{"ports": ports}]}}) == (9090, "http")
    assert metrics_port({"spec": {"containers": [{"ports": ports[:1]}, {}]}}) == (8000, "http")
    assert metrics_port(content()) is None
    for name in ("tls-metrics", "https"):
        encrypted = [{"name": name, "containerPort": 1}]
        assert metrics_port({"spec": {"containers": [{"ports": encrypted}]}}) == (1, "https")
    sidecar = {"initContainers": [{"ports": [{"name": "updraft-metrics", "containerPort": 9093}]}]}
    assert metrics_port({"spec": {**sidecar, "containers": [{"ports": ports[:1]}]}}) == (9093, "http"), (
        "an attached pod's agent"
    )


def test_a_pod_belongs_to_the_speculator_of_its_label() -> None:
    assert owner(content()) == "qwen"
    assert owner({"metadata": {"name": "x"}}) == ""


def test_an_attached_pod_belongs_to_the_speculator_that_its_label_names() -> None:
    assert owner({"metadata": {"labels": {"app": "vllm", "updraft.dev/attach": "chat"}}}) == "chat"
