"""A trainer of several ranks: its pods, how they meet, and what each of them gets."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import CONFIG, UID, breaches, built, container, named, one, speculator

from updraft_chassis import streams
from updraft_inference.settings import InferenceSettings
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import ranks, trainer
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.ranks import Kind
from updraft_trainer.__main__ import _parser
from updraft_trainer.launch import SHUTDOWN_S, Launch

TWO = {"trainer": {"nodes": 2}}
GPUS = {"trainer": {"nodes": 2, "accelerator": {"perPod": 4}}}
GROUP = replace(CONFIG, has_leader_worker_sets=True)


def workload(spec: dict[str, Any], kind: Kind = Kind.STATEFUL_SET) -> dict[str, Any]:
    """The spec of what runs the pods."""
    made = trainer.objects(speculator(spec), GROUP, kind=kind)
    (found,) = (each["spec"] for each in made if each["kind"] == kind)
    return dict(found)


def pod(spec: dict[str, Any], kind: Kind = Kind.STATEFUL_SET) -> dict[str, Any]:
    content = workload(spec, kind)
    template = (
        content["leaderWorkerTemplate"]["workerTemplate"] if kind is Kind.LEADER_WORKER_SET else content["template"]
    )
    return dict(template["spec"])


def settings(spec: dict[str, Any]) -> dict[str, str]:
    return dict(one(built(speculator(spec)), "ConfigMap", "qwen-trainer")["data"])


def claims(spec: dict[str, Any], kind: Kind = Kind.STATEFUL_SET) -> list[str]:
    made = trainer.objects(speculator(spec), GROUP, kind=kind)
    return [each["metadata"]["name"] for each in made if each["kind"] == "PersistentVolumeClaim"]


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        pytest.param({}, "Deployment", id="one rank"),
        pytest.param({"accelerator": {}}, "Deployment", id="one GPU"),
        pytest.param({"nodes": 2}, "StatefulSet", id="two pods"),
        pytest.param({"accelerator": {"perPod": 2}}, "StatefulSet", id="two GPUs of a pod"),
    ],
)
def test_one_rank_is_a_deployment_and_more_are_a_stateful_set(chosen: dict[str, Any], kind: str) -> None:
    made = built(speculator({"trainer": chosen}))

    assert [each["kind"] for each in made if "template" in each["spec" if "spec" in each else "metadata"]][1] == kind
    assert one(made, kind, "qwen-trainer")["spec"]["replicas"] == chosen.get("nodes", 1)


def test_the_pods_start_together_and_the_operator_replaces_them() -> None:
    content = workload(TWO)

    assert (content["replicas"], content["podManagementPolicy"]) == (2, "Parallel")
    assert content["updateStrategy"] == {"type": "OnDelete"}


def test_pods_find_the_first_one_before_it_is_ready() -> None:
    service = one(built(speculator(TWO)), "Service", "qwen-trainer")["spec"]

    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert service["selector"] == names.selector("qwen", "trainer")
    assert workload(TWO)["serviceName"] == "qwen-trainer"


def _launch(spec: dict[str, Any], kind: Kind = Kind.STATEFUL_SET) -> Launch:
    """As the program reads the arguments of the container."""
    given = _parser().parse_args(container(pod(spec, kind), "trainer")["args"])
    return Launch(
        num_nodes=given.nodes,
        ranks_per_node=given.ranks_per_node,
        endpoint=given.endpoint,
        id=given.id,
        address=given.address,
    )


def test_the_program_reads_the_arguments_that_its_pods_get() -> None:
    assert _launch(GPUS) == Launch(
        num_nodes=2,
        ranks_per_node=4,
        endpoint="qwen-trainer-0.qwen-trainer:29400",
        id=UID,
        address="$(UPDRAFT_TRAINER_POD_NAME).qwen-trainer",
    )


@pytest.mark.parametrize("spec", [TWO, {}])
def test_a_pod_may_save_twice_when_it_is_told_to_stop(spec: dict[str, Any]) -> None:
    kind = Kind.STATEFUL_SET if spec else Kind.DEPLOYMENT

    assert 60 < SHUTDOWN_S < pod(spec, kind)["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("kind", [Kind.STATEFUL_SET, Kind.LEADER_WORKER_SET])
def test_names_leave_room_for_the_revision_in_labels_of_pods(kind: Kind) -> None:
    longest = ranks.workload("q" * 40, kind)
    of_workers = f"{longest}-0" if kind is Kind.LEADER_WORKER_SET else longest

    assert len(f"{of_workers}-{'f' * 10}") <= 63


def test_pods_of_a_leader_worker_set_meet_at_the_leader() -> None:
    assert _launch(TWO, Kind.LEADER_WORKER_SET).endpoint == "qwen-ranks-0.qwen-ranks:29400"


def test_a_leader_worker_set_is_one_group_that_restarts_as_a_whole() -> None:
    content = workload(TWO, Kind.LEADER_WORKER_SET)

    assert content["replicas"] == 1
    assert content["leaderWorkerTemplate"]["size"] == 2
    assert content["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_every_pod_has_a_volume_that_outlives_it() -> None:
    assert claims(TWO) == ["data-qwen-trainer-0", "data-qwen-trainer-1"]
    assert claims(TWO, Kind.LEADER_WORKER_SET) == ["data-qwen-ranks-0", "data-qwen-ranks-0-1"]
    policy = {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert workload(TWO)["persistentVolumeClaimRetentionPolicy"] == policy
    (template,) = workload(TWO)["volumeClaimTemplates"]
    assert template["metadata"]["name"] == "data"
    assert template["metadata"]["labels"][names.MANAGED_BY] == names.MANAGER, "the operator sees and adopts it"


def test_the_first_of_two_pods_has_the_volume_of_the_only_one() -> None:
    assert claims({}, Kind.DEPLOYMENT) == claims(TWO)[:1]


def test_the_claims_go_with_the_resource() -> None:
    made = trainer.objects(speculator(TWO), CONFIG)
    owners = [each["metadata"]["ownerReferences"] for each in made if each["kind"] == "PersistentVolumeClaim"]

    assert [[owner["uid"] for owner in each] for each in owners] == [[UID], [UID]]
    (template,) = workload(TWO)["volumeClaimTemplates"]
    assert template["metadata"]["ownerReferences"] == owners[0], "Kubernetes may make one again during the deletion"


def test_a_claim_of_the_users_own_serves_a_pod_with_several_gpus() -> None:
    spec = {"trainer": {"accelerator": {"perPod": 2}, "storage": {"claimName": "mine"}}}

    assert claims(spec) == []
    assert named(pod(spec)["volumes"])["data"]["persistentVolumeClaim"] == {"claimName": "mine"}
    assert "volumeClaimTemplates" not in workload(spec)


def test_every_pod_is_a_consumer_of_its_own() -> None:
    variable = named(container(pod(TWO), "trainer")["env"])["UPDRAFT_TRAINER_POD_NAME"]

    assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}


@pytest.mark.parametrize(
    ("shards", "chosen", "expected"),
    [
        pytest.param(None, {}, 1, id="one rank"),
        pytest.param(None, {"nodes": 3}, 3, id="nothing asked for"),
        pytest.param(1, {"nodes": 2, "accelerator": {"perPod": 4}}, 8, id="a stream per rank"),
        pytest.param(12, {"nodes": 2}, 12, id="more streams than ranks"),
    ],
)
def test_every_rank_has_a_stream_on_both_sides(shards: int | None, chosen: dict[str, Any], expected: int) -> None:
    made = built(speculator({"traces": {"shards": shards}, "trainer": chosen}))

    assert one(made, "ConfigMap", "qwen-trainer")["data"]["UPDRAFT_TRAINER_STREAM_SHARDS"] == str(expected)
    assert one(made, "ConfigMap", "qwen-serving")["data"]["UPDRAFT_INFERENCE_STREAM_SHARDS"] == str(expected)


def test_as_many_ranks_as_the_schema_allows_have_streams() -> None:
    data = one(built(speculator({"trainer": {"nodes": streams.MAX_SHARDS}})), "ConfigMap", "qwen-serving")["data"]
    assert InferenceSettings.model_fields["stream_shards"].metadata[-1].le >= int(
        data["UPDRAFT_INFERENCE_STREAM_SHARDS"]
    )


@pytest.mark.parametrize(
    ("chosen", "devices", "device"),
    [
        pytest.param({}, None, "cpu", id="none"),
        pytest.param({"accelerator": {}}, {"nvidia.com/gpu": "1"}, "cuda", id="a GPU"),
        pytest.param(
            {"accelerator": {"resourceName": "amd.com/gpu", "perPod": 8}},
            {"amd.com/gpu": "8"},
            "cuda",
            id="eight others",
        ),
    ],
)
def test_a_pod_gets_its_accelerators_and_uses_them(
    chosen: dict[str, Any], devices: dict[str, str] | None, device: str
) -> None:
    memory = {"requests": {"memory": "17G"}}
    made = built(speculator({"trainer": {**chosen, "resources": memory}}))
    kind = "StatefulSet" if chosen.get("accelerator", {}).get("perPod", 1) > 1 else "Deployment"
    resources = container(one(made, kind, "qwen-trainer")["spec"]["template"]["spec"], "trainer")["resources"]

    assert resources["requests"] == {"memory": "17G", **(devices or {})}
    assert resources.get("limits") == devices
    assert one(made, "ConfigMap", "qwen-trainer")["data"]["UPDRAFT_TRAINER_DEVICE"] == device


@pytest.mark.parametrize(
    ("limits", "per_pod", "threads"),
    [
        pytest.param({}, 1, None, id="no limit"),
        pytest.param({"cpu": "8"}, 1, "8", id="all of them"),
        pytest.param({"cpu": 8}, 4, "2", id="a share"),
        pytest.param({"cpu": "7500m"}, 2, "3", id="whole ones"),
        pytest.param({"cpu": "500m"}, 1, None, id="less than one"),
        pytest.param({"cpu": "many"}, 1, None, id="no number"),
        pytest.param({"cpu": "1e400"}, 1, None, id="no end"),
    ],
)
def test_the_ranks_of_a_pod_share_its_cpus(limits: dict[str, Any], per_pod: int, threads: str | None) -> None:
    spec = {"trainer": {"resources": {"limits": limits}, "accelerator": {"perPod": per_pod}}}

    assert settings(spec).get("UPDRAFT_TRAINER_NUM_THREADS") == threads


def test_several_gpus_of_a_pod_share_memory() -> None:
    shared, alone = pod({"trainer": {"accelerator": {"perPod": 2}}}), pod(TWO)

    assert named(shared["volumes"])["shm"]["emptyDir"] == {"medium": "Memory"}
    assert "/dev/shm" in [mount["mountPath"] for mount in container(shared, "trainer")["volumeMounts"]]
    assert "shm" not in named(alone["volumes"])


def _ingress(spec: dict[str, Any]) -> list[Manifest]:
    return list(one(built(speculator(spec)), "NetworkPolicy", "qwen-trainer")["spec"]["ingress"])


def test_only_the_pods_of_one_trainer_may_reach_each_other() -> None:
    metrics, ranks = _ingress(TWO)

    assert ranks == {"from": [{"podSelector": {"matchLabels": names.selector("qwen", "trainer")}}]}
    assert _ingress({}) == [metrics]


def test_metrics_of_every_rank_of_a_pod_can_be_scraped() -> None:
    spec = {"trainer": {"accelerator": {"perPod": 3}}}
    ports = {"metrics": 9092, "metrics-1": 9093, "metrics-2": 9094}

    declared = container(pod(spec), "trainer")["ports"]
    assert {port["name"]: port["containerPort"] for port in declared} == ports
    (metrics,) = _ingress(spec)
    assert [port["port"] for port in metrics["ports"]] == list(ports.values())
    assert settings(spec)["UPDRAFT_TRAINER_METRICS_PORT"] == "9092", "rank N of a pod adds N"


def test_no_probe_restarts_a_pod_that_waits_for_another_one() -> None:
    trainer_container = container(pod(TWO), "trainer")

    assert trainer_container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert not {"livenessProbe", "startupProbe"} & trainer_container.keys()


@pytest.mark.parametrize("spec", [{"suspend": True}, {"trainer": {"suspend": True}}])
@pytest.mark.parametrize("kind", [Kind.STATEFUL_SET, Kind.LEADER_WORKER_SET])
def test_ranks_can_be_suspended(spec: dict[str, Any], kind: Kind) -> None:
    both = {**spec, "trainer": {**spec.get("trainer", {}), "nodes": 2}}

    assert workload(both, kind)["replicas"] == 0
    assert len(claims(both, kind)) == 2, "the volumes stay"


@pytest.mark.parametrize("spec", [TWO, GPUS])
def test_ranks_meet_the_restricted_standard(spec: dict[str, Any]) -> None:
    assert breaches(pod(spec)) == []


def test_the_template_and_the_environment_of_the_user_come_last() -> None:
    chosen = {"nodes": 2, "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}
    spec = {"trainer": {**chosen, "podTemplate": {"spec": {"hostNetwork": True}}}}

    assert {"name": "NCCL_DEBUG", "value": "INFO"} in container(pod(spec), "trainer")["env"]
    assert pod(spec)["hostNetwork"] is True


def test_one_rank_keeps_what_it_has_when_more_were_asked_for_in_vain() -> None:
    owner: AdaptiveSpeculator = speculator({"trainer": {"workload": "LeaderWorkerSet"}})

    assert one(built(owner), "Deployment", "qwen-trainer")["spec"]["replicas"] == 1
