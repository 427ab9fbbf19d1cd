"""A trainer as a LeaderWorkerSet, on an API server that serves the published definition; its controller is not here."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.access import ApiError
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import install_with
from tests.cluster.fixtures import own_control_plane
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names
from updraft_operator.watching.cluster import LEADER_WORKER_SET

_DEFINITION = Path(__file__).with_name("leaderworkersets.yaml")


@pytest.fixture(scope="module")
def kubernetes() -> Iterator[ControlPlane]:
    """A cluster of its own, because an operator looks at its start which kinds are served."""
    with own_control_plane() as running:
        yield running


@pytest.fixture(scope="module")
def crds(kubernetes: ControlPlane) -> None:
    with kubernetes.api() as api:
        install_with(api, _DEFINITION, f"/apis/{names.LWS_API_VERSION}/namespaces/default/leaderworkersets")


@pytest.fixture
def group(operator: Running, subject: Subject) -> Subject:
    subject.create(trainer={"nodes": 2, "accelerator": {"perPod": 8}})
    subject.wait_until_built()
    wait_until(lambda: subject.exists(LEADER_WORKER_SET, f"{subject.name}-ranks"), what="the group")
    return subject


def test_the_api_server_takes_the_group_as_it_is_meant(group: Subject) -> None:
    content = group.get(LEADER_WORKER_SET, f"{group.name}-ranks")["spec"]

    assert (content["replicas"], content["leaderWorkerTemplate"]["size"]) == (1, 2)
    assert content["networkConfig"] == {"subdomainPolicy": "Shared"}
    (container,) = content["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"]
    assert f"{group.name}-ranks-0.{group.name}-ranks:29400" in container["args"]
    assert not group.exists("StatefulSet", f"{group.name}-trainer")


def test_the_api_server_would_refuse_another_restart_policy(group: Subject) -> None:
    path = group.path(LEADER_WORKER_SET, f"{group.name}-ranks")

    with pytest.raises(ApiError, match="Unsupported value"):
        group.api.patch(path, {"spec": {"leaderWorkerTemplate": {"restartPolicy": "Sometimes"}}})


def test_a_group_is_kept_as_it_is_meant_and_nothing_else_is_written(operator: Running, group: Subject) -> None:
    name = f"{group.name}-ranks"
    group.api.patch(group.path(LEADER_WORKER_SET, name), {"spec": {"replicas": 3}})
    wait_until(lambda: group.get(LEADER_WORKER_SET, name)["spec"]["replicas"] == 1, what="one group again")
    operator.wait_for_listings(1)
    since = requests.now()

    operator.wait_for_listings(3)

    assert requests.writes(operator.cluster, operator.account.user, since, namespace=group.namespace) == []


def test_a_stateful_set_that_is_asked_for_takes_the_place_of_a_group(group: Subject) -> None:
    group.change(trainer={"workload": "StatefulSet"})

    wait_until(lambda: group.exists("StatefulSet", f"{group.name}-trainer"), what="the set")
    wait_until(lambda: not group.exists(LEADER_WORKER_SET, f"{group.name}-ranks"), what="the end of the group")


def test_a_group_ends_with_its_resource(group: Subject) -> None:
    name = f"{group.name}-ranks"
    group.delete()

    wait_until(lambda: not group.exists(), what="the end of the resource")
    # The garbage collector looks for new kinds every half minute.
    wait_until(lambda: not group.exists(LEADER_WORKER_SET, name), timeout_s=120, what="the end of the group")
