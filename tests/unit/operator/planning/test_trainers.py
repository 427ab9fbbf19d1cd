"""Which object runs the trainer, when its pods go, and what is told about them."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import CONFIG
from tests.support.observed import NOW, as_child, connected, observed, pod, settled

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.manifests.ranks import Kind
from updraft_operator.planning.assessment import Assessment
from updraft_operator.planning.conditions import conditions
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.plan import Plan, make_plan, objects, ref
from updraft_operator.planning.pods import PodState
from updraft_operator.planning.status import status
from updraft_operator.planning.trainers import kind

TWO: dict[str, Any] = {"trainer": {"nodes": 2}}
GROUP = replace(CONFIG, has_leader_worker_sets=True)
SET = Ref("StatefulSet", "qwen-trainer")


def rank(number: int, **more: Any) -> PodState:
    return pod(f"qwen-trainer-{number}", "trainer", **more)


def plan(observation: Observed) -> Plan:
    return make_plan(observation, now_unix_s=NOW.timestamp(), now_s=0.0)


def ready(observation: Observed) -> Assessment:
    return conditions(observation)["TrainerReady"]


def with_set(update_revision: str, observed_generation: int = 2, **more: Any) -> Observed:
    """Two ranks, whose StatefulSet has this newest revision, and generation 2."""
    seen = settled(TWO, **more)
    content = next(each for each in objects(seen) if ref(each) == SET)
    told = {"updateRevision": update_revision, "observedGeneration": observed_generation}
    child = as_child(content, status=told, metadata={"generation": 2})
    return replace(seen, children={**seen.children, SET: child})


@pytest.mark.parametrize(
    ("chosen", "is_served", "expected"),
    [
        pytest.param({}, True, Kind.DEPLOYMENT, id="one rank"),
        pytest.param({"workload": "LeaderWorkerSet"}, True, Kind.DEPLOYMENT, id="one rank needs no group"),
        pytest.param({"nodes": 2}, False, Kind.STATEFUL_SET, id="not served"),
        pytest.param({"nodes": 2}, True, Kind.LEADER_WORKER_SET, id="served"),
        pytest.param({"accelerator": {"perPod": 2}}, True, Kind.STATEFUL_SET, id="one pod needs no group"),
        pytest.param({"nodes": 2, "workload": "StatefulSet"}, True, Kind.STATEFUL_SET, id="asked for"),
        pytest.param({"nodes": 2, "workload": "LeaderWorkerSet"}, False, Kind.LEADER_WORKER_SET, id="asked in vain"),
    ],
)
def test_the_kind_follows_from_the_spec_and_the_cluster(
    chosen: dict[str, Any], expected: Kind, *, is_served: bool
) -> None:
    config = replace(CONFIG, has_leader_worker_sets=is_served)

    assert kind(observed({"trainer": chosen}, config=config)) is expected


def test_a_stateful_set_stays_when_leader_worker_sets_come() -> None:
    seen = settled(TWO)

    assert kind(replace(seen, config=GROUP)) is Kind.STATEFUL_SET
    assert plan(replace(seen, config=GROUP)).apply == ()


def test_volumes_of_a_stateful_set_that_somebody_deleted_are_used_again() -> None:
    left = {target: child for target, child in settled(TWO).children.items() if target != SET}

    assert kind(observed(TWO, children=left, config=GROUP)) is Kind.STATEFUL_SET


def test_a_leader_worker_set_stays_although_volumes_of_a_stateful_set_are_there() -> None:
    group = {"trainer": {"nodes": 2, "workload": "LeaderWorkerSet"}}
    seen = settled(group, config=GROUP)
    claims = {target: child for target, child in settled(TWO).children.items() if target.kind != "StatefulSet"}

    assert kind(observed(TWO, children=claims | dict(seen.children), config=GROUP)) is Kind.LEADER_WORKER_SET


@pytest.mark.parametrize(
    ("before", "running"), [(TWO, SET), ({}, Ref("Deployment", "qwen-trainer"))], ids=["several ranks", "one rank"]
)
def test_a_kind_that_is_not_served_is_told_and_keeps_what_runs(before: dict[str, Any], running: Ref) -> None:
    seen = settled(before)
    asked = observed({"trainer": {"nodes": 2, "workload": "LeaderWorkerSet"}}, children=seen.children)

    assert running in seen.children
    assert ready(asked)[:2] == ("False", "WorkloadNotServed")
    assert plan(asked).delete == ()
    assert "LeaderWorkerSet" not in {content["kind"] for content in plan(asked).apply}


@pytest.mark.parametrize(
    ("before", "after", "gone"),
    [
        pytest.param({}, TWO, {Ref("Deployment", "qwen-trainer")}, id="more ranks"),
        pytest.param(TWO, {}, {SET, Ref("Service", "qwen-trainer")}, id="one rank again"),
    ],
)
def test_another_number_of_ranks_replaces_the_object_and_keeps_the_volumes(
    before: dict[str, Any], after: dict[str, Any], gone: set[Ref]
) -> None:
    seen = observed(after, children=settled(before).children)

    assert set(plan(seen).delete) == gone


def test_no_pod_starts_on_a_volume_while_another_one_ends() -> None:
    last = pod("qwen-trainer-7f9c8d5b6-x2x4z", "trainer", is_ending=True)
    replicas = {}
    for name, pods in {"while": (last,), "after": ()}.items():
        made = plan(observed(TWO, children=settled().children, pods=pods)).apply
        (replicas[name],) = (each["spec"]["replicas"] for each in made if ref(each) == SET)

    assert replicas == {"while": 0, "after": 2}


def test_a_changed_template_replaces_all_pods_at_once() -> None:
    seen = with_set("new", pods=(rank(0, revision="old"), rank(1, revision="old")))

    assert plan(seen).delete == (Ref("Pod", "qwen-trainer-0"), Ref("Pod", "qwen-trainer-1"))


@pytest.mark.parametrize(
    "pods",
    [
        pytest.param((rank(0, revision="new"), rank(1, revision="new")), id="new ones"),
        pytest.param((rank(0, revision="old", is_ending=True), rank(1, revision="new")), id="one that ends already"),
        pytest.param((rank(0), rank(1)), id="ones without a revision"),
        pytest.param((pod("qwen-registry-0", "registry", revision="old"),), id="those of another part"),
    ],
)
def test_no_other_pod_is_deleted(pods: tuple[PodState, ...]) -> None:
    assert plan(with_set("new", pods=pods)).delete == ()


def test_nothing_is_deleted_for_the_revision_of_an_earlier_template() -> None:
    seen = with_set("old", observed_generation=1, pods=(rank(0, revision="new"), rank(1, revision="old")))

    assert plan(seen).delete == ()


def test_a_condition_names_the_pod_of_another_kind_that_still_ends() -> None:
    last = pod("qwen-trainer-7f9c8d5b6-x2x4z", "trainer", is_ending=True)

    told = ready(observed(TWO, children=settled().children, pods=(last,)))

    assert told[:2] == ("False", "Starting")
    assert "qwen-trainer-7f9c8d5b6-x2x4z" in told.message


def _streams(seen: Observed) -> set[str]:
    """What the plan says on both sides."""
    wanted = {ref(content): content.get("data", {}) for content in objects(seen)}
    data = wanted[Ref("ConfigMap", "qwen-trainer")] | wanted[Ref("ConfigMap", "qwen-serving")]
    return {value for name, value in data.items() if name.endswith("_STREAM_SHARDS")}


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        pytest.param({}, "2", id="one rank reads both"),
        pytest.param({"trainer": {"nodes": 3}}, "3", id="more ranks"),
        pytest.param({"traces": {"shards": 4}}, "4", id="asked for"),
        pytest.param({"traces": {"shards": 1}}, "1", id="one asked for"),
        pytest.param({"traces": {"shards": 1}, "trainer": {"nodes": 3}}, "3", id="one asked for, and more ranks"),
    ],
)
def test_streams_stay_when_there_are_fewer_ranks_unless_the_spec_has_a_number(
    after: dict[str, Any], expected: str
) -> None:
    assert _streams(observed(after, children=settled(TWO).children)) == {expected}


@pytest.mark.parametrize("value", ["60", "many", "9" * 5000, ""])
def test_an_edit_of_one_config_map_makes_no_streams(value: str) -> None:
    seen = settled()
    where = Ref("ConfigMap", "qwen-trainer")
    content = next(each for each in objects(seen) if ref(each) == where)
    edited = {**content, "data": {**content["data"], "UPDRAFT_TRAINER_STREAM_SHARDS": value}}

    assert _streams(replace(seen, children={**seen.children, where: as_child(edited)})) == {"1"}


def test_nothing_is_deleted_before_the_revision_is_known() -> None:
    assert plan(with_set("", pods=(rank(0, revision="old"),))).delete == ()


@pytest.mark.parametrize(
    ("pods", "message"),
    [
        pytest.param((), "0 of 2 pods are ready; training goes on once qwen-trainer-0, qwen-trainer-1", id="none"),
        pytest.param(
            (rank(0, is_ready=True),), "1 of 2 pods are ready; training goes on once qwen-trainer-1", id="one"
        ),
        pytest.param(
            (rank(0, is_ready=True), rank(1, is_ready=True, is_ending=True)),
            "1 of 2 pods are ready; training goes on once qwen-trainer-1",
            id="one that ends",
        ),
    ],
)
def test_ranks_that_wait_name_the_pods_that_they_wait_for(pods: tuple[PodState, ...], message: str) -> None:
    told = ready(observed(TWO, pods=pods))

    assert told[:2] == ("False", "WaitingForRanks")
    assert told.message.startswith(message)
    assert status(observed(TWO, pods=pods), NOW).trainer.state == "Starting"  # type: ignore[union-attr]


def test_a_pod_that_cannot_be_placed_is_the_reason_why_the_others_wait() -> None:
    waiting = rank(1, problem=("InsufficientGPU", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu"))

    told = ready(observed(TWO, pods=(rank(0), waiting)))

    assert told == ("False", "InsufficientGPU", f"qwen-trainer-1: {waiting.problem.message}")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            "trainer exited with status 1: updraft-trainer: the rendezvous of 2 pods at x:29400 failed",
            "RendezvousFailed",
        ),
        ("trainer exited with status 1: rank 1 of 2 has lost another rank, and ends", "CommunicationFailed"),
        ("trainer exited with status 1: NCCL error in: init.cc, unhandled system error", "CommunicationFailed"),
        ("trainer exited with status 1: rank 0 was killed by SIGKILL", "CrashLoopBackOff"),
    ],
)
def test_last_words_of_ranks_say_what_failed(words: str, reason: str) -> None:
    told = ready(observed(TWO, pods=(rank(0, problem=("CrashLoopBackOff", words)), rank(1))))

    assert told == ("False", reason, f"qwen-trainer-0: {words}")


def test_the_rank_that_failed_first_is_told_before_those_that_lost_it() -> None:
    victim = rank(0, problem=("CrashLoopBackOff", "rank 0 of 2 has lost another rank"))
    culprit = rank(1, problem=("OOMKilled", "trainer exceeded its memory limit"))

    assert ready(observed(TWO, pods=(victim, culprit)))[1:] == (
        "OOMKilled",
        "qwen-trainer-1: trainer exceeded its memory limit",
    )


@pytest.mark.parametrize(
    ("spec", "device", "size", "expected"),
    [
        pytest.param({}, "", 0, ("Training", "the trainer is running"), id="an older trainer"),
        pytest.param({}, "cpu (2 threads)", 1, ("Training", "the trainer is running on cpu (2 threads)"), id="a CPU"),
        pytest.param(
            {"accelerator": {}}, "NVIDIA H100", 1, ("Training", "the trainer is running on NVIDIA H100"), id="a GPU"
        ),
        pytest.param(
            {"nodes": 2},
            "NVIDIA H100",
            8,
            ("Training", "the trainer is running with 8 ranks on NVIDIA H100"),
            id="eight",
        ),
    ],
)
def test_the_device_is_the_one_that_the_trainer_reports(
    spec: dict[str, Any], device: str, size: int, expected: tuple[str, str]
) -> None:
    view = connected(learning=pb.Learning(device=device, world_size=size))
    only = pod("qwen-trainer-7f9c8d5b6-x2x4z", "trainer", is_ready=True)
    pods = (rank(0, is_ready=True), rank(1, is_ready=True)) if "nodes" in spec else (only,)
    seen = observed({"trainer": spec}, registry=view, pods=pods)

    assert ready(seen) == ("True", *expected)
    told = status(seen, NOW).trainer
    assert told is not None
    assert told.progress is not None
    assert (told.state, told.progress.device, told.progress.ranks) == ("Training", device or None, size or None)


def test_a_deletion_ends_the_ranks_before_it_deletes_their_traces() -> None:
    seen = settled({**TWO, "deletionPolicy": "Delete"})
    metadata = seen.speculator.metadata.model_copy(
        update={"deletion_timestamp": NOW, "finalizers": ["updraft.dev/external-data"]}
    )
    ending = replace(seen, speculator=seen.speculator.model_copy(update={"metadata": metadata}))

    assert SET in plan(ending).delete
    assert not plan(ending).cleans_up
