"""A trainer of several ranks on the real API server: its StatefulSet, and how its pods come, are replaced and go."""

from collections.abc import Callable

import pytest
from tests.cluster.access import Json
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names


@pytest.fixture
def ranks(operator: Running, subject: Subject) -> Subject:
    """Two ranks in two pods."""
    subject.create(trainer={"nodes": 2})
    subject.wait_until_built()
    wait_until(lambda: len(_pods(subject)) == 2, what="two pods")
    return subject


def _pods(subject: Subject) -> dict[str, str]:
    """UIDs by name, of pods that are not ending."""
    pods = (pod["metadata"] for pod in subject.pods(names.TRAINER))
    return {pod["name"]: pod["uid"] for pod in pods if "deletionTimestamp" not in pod}


def _claims(subject: Subject) -> dict[str, str]:
    found = (each["metadata"] for each in subject.all_of("PersistentVolumeClaim"))
    return {each["name"]: each["uid"] for each in found if "-trainer-" in each["name"]}


def _container(subject: Subject) -> Json:
    spec = subject.get("StatefulSet", f"{subject.name}-trainer")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return dict(container)


def _are_new(subject: Subject, before: dict[str, str]) -> Callable[[], bool]:
    def check() -> bool:
        pods = _pods(subject)
        return pods.keys() == before.keys() and not set(pods.values()) & set(before.values())

    return check


def test_both_pods_start_before_either_is_ready(ranks: Subject) -> None:
    assert set(_pods(ranks)) == {f"{ranks.name}-trainer-0", f"{ranks.name}-trainer-1"}
    assert set(_claims(ranks)) == {f"data-{ranks.name}-trainer-0", f"data-{ranks.name}-trainer-1"}
    assert ranks.wait_for("TrainerReady", "False", "WaitingForRanks").startswith("0 of 2 pods are ready")


def test_the_trainer_is_ready_once_all_its_pods_are(ranks: Subject) -> None:
    ranks.run(names.TRAINER, 2)
    ranks.wait_for("TrainerReady", "True", "Training")


def test_nothing_is_written_while_nothing_changes(operator: Running, ranks: Subject) -> None:
    operator.wait_for_listings(1)
    since = requests.now()

    operator.wait_for_listings(4)

    assert requests.writes(operator.cluster, operator.account.user, since, namespace=ranks.namespace) == []


def test_a_changed_template_replaces_both_pods_and_keeps_their_volumes(ranks: Subject) -> None:
    before, volumes = _pods(ranks), _claims(ranks)

    ranks.change(trainer={"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]})

    wait_until(_are_new(ranks, before), what="two new pods")
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in _container(ranks)["env"]
    assert _claims(ranks) == volumes
    wait_until(lambda: len(set(_revisions(ranks))) == 1, what="one revision")


def _revisions(subject: Subject) -> list[str]:
    return [pod["metadata"]["labels"]["controller-revision-hash"] for pod in subject.pods(names.TRAINER)]


def test_more_nodes_replace_all_pods(ranks: Subject) -> None:
    before = _pods(ranks)

    ranks.change(trainer={"nodes": 3})

    wait_until(lambda: len(_pods(ranks)) == 3, what="three pods")
    wait_until(lambda: not set(_pods(ranks).values()) & set(before.values()), what="new pods only")
    assert _container(ranks)["args"][1:3] == ["--nodes", "3"]


def test_one_node_is_a_deployment_again_with_the_volume_of_the_first_pod(ranks: Subject) -> None:
    volumes = _claims(ranks)

    ranks.change(trainer={"nodes": 1})

    wait_until(lambda: not ranks.exists("StatefulSet", f"{ranks.name}-trainer"), what="the end of the set")
    wait_until(lambda: not ranks.exists("Service", f"{ranks.name}-trainer"), what="the end of its Service")
    wait_until(
        lambda: (ranks.find("Deployment", f"{ranks.name}-trainer") or {"spec": {}})["spec"].get("replicas") == 1,
        what="a trainer of one rank",
    )
    pod = ranks.get("Deployment", f"{ranks.name}-trainer")["spec"]["template"]["spec"]
    used = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] == "data"]
    assert used == [f"data-{ranks.name}-trainer-0"]
    assert _claims(ranks) == volumes


def test_suspended_ranks_have_no_pod_and_come_back(ranks: Subject) -> None:
    volumes = _claims(ranks)

    ranks.change(trainer={"suspend": True})
    wait_until(lambda: not _pods(ranks), what="no pod")
    ranks.wait_for("TrainerReady", "False", "Suspended")

    ranks.change(trainer={"suspend": False})
    wait_until(lambda: len(_pods(ranks)) == 2, what="two pods again")
    assert _claims(ranks) == volumes


def test_a_deletion_takes_pods_and_volumes_along(ranks: Subject) -> None:
    ranks.delete()

    ranks.wait_until_gone()
    wait_until(lambda: not ranks.pods(names.TRAINER) and not _claims(ranks), what="the end of pods and volumes")


def test_what_somebody_did_to_the_ranks_is_set_right(ranks: Subject) -> None:
    path = ranks.path("StatefulSet", f"{ranks.name}-trainer")

    ranks.api.patch(path, {"spec": {"replicas": 5}})
    ranks.api.delete(ranks.path("Service", f"{ranks.name}-trainer"))

    wait_until(lambda: ranks.api.get(path)["spec"]["replicas"] == 2, what="two ranks again")
    wait_until(lambda: ranks.exists("Service", f"{ranks.name}-trainer"), what="the Service again")


def test_a_leader_worker_set_that_is_not_served_is_told(operator: Running, subject: Subject) -> None:
    subject.create(trainer={"nodes": 2, "workload": "LeaderWorkerSet"})

    subject.wait_for("TrainerReady", "False", "WorkloadNotServed")
    assert not subject.exists("StatefulSet", f"{subject.name}-trainer")
