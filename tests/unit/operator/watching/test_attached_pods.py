"""Pods of another workload are listed by their labels, often enough and no more often."""

from typing import Any

from tests.support.clock import ManualClock
from tests.support.manifests import ATTACHED, speculator
from tests.unit.operator.memory_cluster import MemoryCluster
from tests.unit.operator.world import KEY, World, run_now

from updraft_operator.manifests.merge import merged
from updraft_operator.planning.plan import ATTACHED_S
from updraft_operator.planning.pods import Selection
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

    assert [pod.state.name for pod in run_now(pods.read(KEY, speculator(ATTACHED))).pods] == ["mine"]
    assert run_now(pods.read(KEY, speculator())) == Selection()


def test_a_listing_is_used_for_some_seconds_and_not_for_another_spec() -> None:
    cluster, clock = MemoryCluster(), ManualClock()
    pods = AttachedPods(cluster, clock)
    assert run_now(pods.read(KEY, speculator(ATTACHED))).pods == ()
    cluster.set(_pod("new"))

    assert run_now(pods.read(KEY, speculator(ATTACHED))).pods == ()
    assert len(run_now(pods.read(KEY, speculator(ATTACHED, generation=2))).pods) == 1
    cluster.set(_pod("newer"))
    clock.advance(FRESH_S + 0.1)
    assert len(run_now(pods.read(KEY, speculator(ATTACHED, generation=2))).pods) == 2


def test_pods_of_updraft_itself_are_never_attached_to() -> None:
    """A label of a whole team may be on them, too."""
    world = World()
    world.spec(**ATTACHED)
    for part in ("registry", "serving"):
        world.pod(part, 0, {"phase": "Running"})
    for own in world.cluster.of("Pod"):
        world.cluster.set(merged(own, {"metadata": {"labels": {"app": "vllm"}}}))

    found = run_now(AttachedPods(world.cluster, world.clock).read(KEY, speculator(ATTACHED)))

    assert found.pods == ()
    assert [each["metadata"]["labels"]["app"] for each in world.cluster.of("Pod")] == ["vllm", "vllm"]


def test_only_the_leaders_of_a_leader_worker_set_are_servers() -> None:
    """The labels are those that its controller puts on the pods of two groups of two nodes."""
    cluster, name = MemoryCluster(), "leaderworkerset.sigs.k8s.io/name"
    for group in (0, 1):
        for index, pod_name in ((0, f"vllm-{group}"), (1, f"vllm-{group}-1")):
            labels = {
                name: "vllm",
                "leaderworkerset.sigs.k8s.io/group-index": str(group),
                "leaderworkerset.sigs.k8s.io/worker-index": str(index),
            }
            cluster.set(merged(_pod(pod_name), {"metadata": {"labels": labels}}))
    selecting = {"serving": {"attached": {"selector": {"matchLabels": {"app": None, name: "vllm"}}}}}
    owner = speculator(merged(ATTACHED, selecting))

    found = run_now(AttachedPods(cluster, ManualClock()).read(KEY, owner))

    assert [pod.state.name for pod in found.pods] == ["vllm-0", "vllm-1"], "a canary takes whole groups"


def test_pods_that_cannot_be_listed_hold_up_neither_the_other_parts_nor_a_deletion() -> None:
    world = World()
    world.spec(**ATTACHED)
    world.cluster.set(_pod("vllm-0"))
    world.settle()

    world.spec(serving={"attached": {"selector": {"matchLabels": {"a,b": "c"}}}}, traces={"evaluationPercent": 20})
    world.clock.advance(FRESH_S + 0.1)
    world.settle()

    stored = world.cluster.objects["AdaptiveSpeculator", *KEY]["status"]
    (attached,) = (each for each in stored["conditions"] if each["type"] == "Attached")
    assert (attached["status"], attached["reason"]) == ("Unknown", "PodsNotListed")
    assert "'a,b' is not the name of a label" in attached["message"]
    settings = world.cluster.objects["ConfigMap", KEY.namespace, "qwen-serving"]["data"]
    assert settings["UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION"] == "0.2"
    ending = speculator(ATTACHED, deletionTimestamp="2026-11-25T12:00:00Z")
    assert run_now(AttachedPods(world.cluster, world.clock).read(KEY, ending)) == Selection()


def test_the_last_listing_counts_while_a_new_one_fails() -> None:
    cluster, clock = MemoryCluster(), ManualClock()
    pods = AttachedPods(cluster, clock)
    cluster.set(_pod("vllm-0"))
    before = run_now(pods.read(KEY, speculator(ATTACHED)))
    bad = merged(ATTACHED, {"serving": {"attached": {"selector": {"matchLabels": {"a=b": "c"}}}}})

    after = run_now(pods.read(KEY, speculator(bad, generation=2)))

    assert (after.pods, bool(after.problem)) == (before.pods, True)


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
