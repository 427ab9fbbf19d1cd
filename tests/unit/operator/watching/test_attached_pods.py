"""Pods of another workload are listed by their labels, often enough and no more often."""

from typing import Any

from tests.support.clock import ManualClock
from tests.support.manifests import ATTACHED, speculator
from tests.unit.operator.memory_cluster import MemoryCluster
from tests.unit.operator.world import KEY, World, run_now

from updraft_operator.planning.plan import ATTACHED_S
from updraft_operator.watching.attached_pods import FRESH_S, AttachedPods


def _pod(name: str, namespace: str = KEY.namespace, app: str = "vllm") -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "uid": name, "labels": {"app": app}}
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    return {"kind": "Pod", "metadata": metadata, "spec": {"containers": [{"name": "vllm"}]}, "status": ready}


def test_only_selected_pods_of_the_namespace_are_listed_and_only_if_pods_are_attached() -> None:
    cluster = MemoryCluster()
    for body in (_pod("mine"), _pod("other", app="web"), _pod("foreign", namespace="elsewhere")):
        cluster.set(body)
    pods = AttachedPods(cluster, ManualClock())

    assert [pod.state.name for pod in run_now(pods.read(KEY, speculator(ATTACHED)))] == ["mine"]
    assert run_now(pods.read(KEY, speculator())) == ()


def test_a_listing_is_used_for_some_seconds_and_not_for_another_spec() -> None:
    cluster, clock = MemoryCluster(), ManualClock()
    pods = AttachedPods(cluster, clock)
    assert run_now(pods.read(KEY, speculator(ATTACHED))) == ()
    cluster.set(_pod("new"))

    assert run_now(pods.read(KEY, speculator(ATTACHED))) == ()
    assert len(run_now(pods.read(KEY, speculator(ATTACHED, generation=2)))) == 1
    cluster.set(_pod("newer"))
    clock.advance(FRESH_S + 0.1)
    assert len(run_now(pods.read(KEY, speculator(ATTACHED, generation=2)))) == 2


def test_the_operator_looks_again_by_itself_and_writes_what_changed_without_a_plan() -> None:
    world = World()
    world.spec(**ATTACHED)
    world.settle()
    again = run_now(world.reconciler.reconcile(KEY))
    assert again is not None
    assert (again.after_s, again.needs_plan) == (ATTACHED_S, False)
    num_plans = world.num_plans
    world.cluster.set(_pod("vllm-0"))
    world.clock.advance(ATTACHED_S)

    assert run_now(world.reconciler.refresh(KEY)) is not None

    stored = world.cluster.objects["AdaptiveSpeculator", *KEY]["status"]
    (attached,) = (each for each in stored["conditions"] if each["type"] == "Attached")
    assert (attached["status"], attached["reason"]) == ("False", "NotInjected")
    assert "vllm-0" in attached["message"]
    assert world.num_plans == num_plans


def test_pods_of_another_workload_are_never_written_or_deleted() -> None:
    world = World()
    world.spec(**ATTACHED)
    world.cluster.set(_pod("vllm-0"))
    world.settle()
    world.spec(traces={"enabled": False})
    world.settle()

    assert not [write for write in world.cluster.writes if write[1] == "Pod"]
    kinds = {(kind, name) for _, kind, name in world.cluster.writes}
    assert ("Deployment", "qwen-serving") not in kinds
    assert not {kind for kind, _ in kinds} & {"PodDisruptionBudget", "HorizontalPodAutoscaler"}
