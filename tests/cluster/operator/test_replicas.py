"""Two replicas: one writes at a time, whatever happens to it; and what each says of its own health."""

import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from tests.cluster.access import Api
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator import requests
from tests.cluster.operator.accounts import account
from tests.cluster.operator.leader_kills import image, kill_leaders
from tests.cluster.operator.replicas import Replicas, replicas
from tests.cluster.operator.subject import Subject
from tests.support.operator import OperatorProcess
from tests.support.wait import wait_until

from updraft_operator.api import names

pytestmark = pytest.mark.lasts(90)

KILLS = 6
"""`make bench-faults` goes on for longer."""

LEASE_S = 3.0


@pytest.fixture
def own_home(api: Api, namespace: str) -> Iterator[str]:
    """A namespace for the Lease of this test."""
    name = namespace.replace("test-", "home-")
    api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    api.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture
def pair(kubernetes: ControlPlane, api: Api, namespace: str, own_home: str, tmp_path: Path) -> Iterator[Replicas]:
    """With the Lease's usual length."""
    with replicas(kubernetes, api, tmp_path, own_home, [namespace]) as running:
        yield running


@pytest.fixture
def hasty(kubernetes: ControlPlane, api: Api, namespace: str, own_home: str, tmp_path: Path) -> Iterator[Replicas]:
    """With the shortest Lease that there is."""
    with replicas(kubernetes, api, tmp_path, own_home, [namespace], lease_seconds=LEASE_S) as running:
        yield running


def seconds(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def first_write(running: Replicas, user: str, since: str) -> str:
    """When a user wrote first since then."""
    wait_until(lambda: bool(requests.writes(running.cluster, user, since)), what=f"a write of {user}")
    return requests.writes(running.cluster, user, since)[0].time


@pytest.mark.parametrize(("how", "within_s"), [(signal.SIGKILL, 20.0), (signal.SIGTERM, 5.0)])
def test_another_replica_goes_on(pair: Replicas, subject: Subject, how: signal.Signals, within_s: float) -> None:
    leader = pair.leader()
    (other,) = [each for each in pair.members if each is not leader]
    subject.create()
    wait_until(lambda: image(subject) != "", what="the Deployment")

    since = requests.now()
    leader.process.send(how)
    subject.change(engine={"image": "next:1"})

    assert seconds(since, first_write(pair, other.account.user, since)) < within_s
    wait_until(lambda: image(subject) == "next:1", what="the change")
    assert pair.strays() == []


def test_a_leader_that_is_killed_again_and_again_leaves_one_writer_and_nothing_undone(
    hasty: Replicas, subject: Subject
) -> None:
    kill_leaders(hasty, subject, KILLS)

    assert hasty.strays() == []
    assert len(hasty.terms()) > KILLS / 2


def test_a_leader_that_was_frozen_writes_nothing_when_it_wakes(hasty: Replicas, subject: Subject) -> None:
    leader = hasty.leader()
    subject.create()
    wait_until(lambda: image(subject) != "", what="the Deployment")
    leader.process.pause()
    subject.change(engine={"image": "frozen:1"})
    hasty.leader(other_than=leader)
    wait_until(lambda: image(subject) == "frozen:1", what="the change by the other one")

    leader.process.send(signal.SIGCONT)

    since = requests.now()
    wait_until(lambda: requests.num_listings(hasty.cluster, leader.account.user, since) >= 2, what="it lists again")
    assert not leader.process.is_leader
    assert hasty.strays() == []


def test_it_is_ready_once_it_saw_everything_and_stuck_once_it_sees_nothing(
    kubernetes: ControlPlane, api: Api, namespace: str, own_home: str, tmp_path: Path
) -> None:
    who = account(kubernetes, api, tmp_path, own_home, "alone", watched=[namespace])
    binding = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings/{own_home}-alone"
    granted = {name: value for name, value in api.get(binding).items() if name != "metadata"}
    body = {**granted, "metadata": {"name": f"{own_home}-alone"}}
    api.delete(binding)
    settings = {"namespace": own_home, "watch_namespaces": namespace}
    with OperatorProcess(who.kubeconfig, tmp_path / "alone.log", **settings) as process:
        wait_until(lambda: process.status("/healthz") == 200, what="it is alive")
        assert process.status("/readyz") == 503
        api.create(binding.rpartition("/")[0], body)
        process.wait_until_ready()

        api.delete(binding)
        wait_until(lambda: process.status("/healthz") == 503, what="it is stuck")
        assert process.is_running, "Kubernetes restarts it, not it itself"

        api.create(binding.rpartition("/")[0], body)
        wait_until(lambda: process.status("/healthz") == 200, what="it sees again")


def test_some_namespaces_are_looked_after_with_rights_in_these_only(
    kubernetes: ControlPlane, api: Api, namespace: str, own_home: str, tmp_path: Path, subject: Subject
) -> None:
    elsewhere = Subject(api, own_home, "elsewhere")
    elsewhere.create()
    with replicas(kubernetes, api, tmp_path, own_home, [namespace], number=1) as running:
        (only,) = running.members
        subject.create(deletionPolicy="Delete", traces={"enabled": False})
        subject.wait_until_built()
        subject.change(deletionPolicy="Retain")
        subject.delete()
        subject.wait_until_gone()

        asked = requests.requests(kubernetes, only.account.user)
        assert {each.namespace for each in asked if each.resource not in ("", "namespaces")} == {namespace}
        assert requests.denied(kubernetes, only.account.user) == []
        assert "observedGeneration" not in elsewhere.get()["status"], "the API server's default says that nobody looked"
        assert names.FINALIZER not in elsewhere.get()["metadata"].get("finalizers", ())
