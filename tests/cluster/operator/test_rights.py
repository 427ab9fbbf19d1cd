"""Least privilege: one life of a resource with everything in it uses every right but those that are listed, with why."""

import pytest
from tests.cluster.access import Audited, audited
from tests.cluster.operator import requests
from tests.cluster.operator.accounts import granted
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.registries import Shelf
from tests.cluster.operator.subject import Subject
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

from updraft_operator.api import names

Right = tuple[str, str, str]

_MISSED = "a listing found what a watch had missed, and the object itself is looked at"
_NO_GROUPS = "the cluster serves no LeaderWorkerSets; test_leader_worker_sets.py has one that does"
_SIGNS_ITSELF = "another right of tls.mode CertManager; test_certificates.py has cert-manager's API"
_OPENSHIFT = "OpenShift asks for it of whoever names an owner that waits for what it owns (blockOwnerDeletion)"

UNUSED: dict[Right, str] = {
    ("updraft.dev", "adaptivespeculators", "get"): _MISSED,
    ("", "pods", "get"): _MISSED,
    **{
        (names.LWS_GROUP, "leaderworkersets", verb): _NO_GROUPS
        for verb in ("get", "list", "watch", "create", "patch", "delete")
    },
    **{
        ("cert-manager.io", "certificates", verb): _SIGNS_ITSELF
        for verb in ("get", "list", "watch", "create", "patch", "delete")
    },
    ("updraft.dev", "adaptivespeculators/finalizers", "update"): _OPENSHIFT,
    ("updraft.dev", "draftimports/finalizers", "update"): _OPENSHIFT,
}


@pytest.fixture(scope="module")
def settings(registry: RegistryProcess) -> dict[str, object]:
    return {"registry_address": registry.address}


def rights(request: Audited) -> set[Right]:
    """What a request needs: to apply what is not there yet is to create it."""
    verbs = {request.verb, "create"} if (request.verb, request.code) == ("patch", 201) else {request.verb}
    return {(request.group, request.resource, verb) for verb in verbs}


@pytest.mark.attack(
    boundary="operator",
    attack="an operator that was taken over",
    outcome="it has no right that it does not need",
)
def test_every_right_is_used_or_has_a_reason(operator: Running, subject: Subject, registry: RegistryProcess) -> None:
    live(subject, Shelf(registry, subject.name))
    wait_until(lambda: has_renewed(operator), what="a renewal of the Lease")

    made = [each for each in audited(operator.cluster.audit_log) if each.user == operator.account.user]
    used = {right for request in made if request.resource for right in rights(request)}

    assert used <= granted()
    rare = {right for right, why in UNUSED.items() if why == _MISSED}
    assert (granted() - used) | rare == set(UNUSED)
    assert requests.denied(operator.cluster, operator.account.user) == []


def has_renewed(operator: Running) -> bool:
    made = (each for each in audited(operator.cluster.audit_log) if each.user == operator.account.user)
    return any((each.resource, each.verb) == ("leases", "update") for each in made)


def live(subject: Subject, shelf: Shelf) -> None:
    """A life with everything in it."""
    subject.create(deletionPolicy="Delete", rollout={"strategy": "Immediate"})
    subject.wait_until_built()
    subject.run(names.REGISTRY)
    subject.wait_for("RegistryReady", "True", "Connected")
    shelf.publish(1)
    wait_until(lambda: subject.exists("DraftVersion", f"{subject.name}-v1"), what="the version's object")
    stray = {"speculatorRef": {"name": subject.name}, "source": "Initial", "version": 77}
    collection = subject.path("DraftVersion").rpartition("/")[0]
    kind = {"apiVersion": names.API_VERSION, "kind": "DraftVersion"}
    subject.api.create(collection, {**kind, "metadata": {"name": "stray"}, "spec": stray})
    wait_until(lambda: not subject.exists("DraftVersion", "stray"), what="the end of what the registry does not know")
    subject.change(draft={"initial": {"uri": "hf://org/draft"}})
    wait_until(lambda: bool(subject.all_of("Job")), what="the import")
    (job,) = subject.all_of("Job")
    subject.change(draft={"initial": {"secretRef": {"name": "token"}}})
    wait_until(lambda: not subject.exists("Job", job["metadata"]["name"]), what="the end of the Job without the Secret")
    subject.change(trainer={"nodes": 2})
    wait_until(lambda: len(subject.pods(names.TRAINER)) == 2, what="two ranks instead of one")
    first = {pod["metadata"]["uid"] for pod in subject.pods(names.TRAINER)}
    subject.change(trainer={"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]})
    wait_until(lambda: not first & {pod["metadata"]["uid"] for pod in subject.pods(names.TRAINER)}, what="new ranks")
    subject.change(traces={"enabled": False})
    wait_until(lambda: not subject.exists("StatefulSet", f"{subject.name}-trainer"), what="the end of the trainer")
    subject.delete()
    wait_until(lambda: not subject.exists(), what="the end")
