"""What the operator cannot do is said in a condition, in the words of who refused it, and is not tried without end."""

from collections.abc import Callable
from typing import Any

import pytest
from tests.cluster.access import Json
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names

PORT = {"name": "a-name-that-is-too-long-for-a-port", "containerPort": 81}
BROKEN: list[tuple[Json, str]] = [
    ({"spec": {"containers": [{"name": "inference", "ports": [PORT]}]}}, "must be no more than 15 characters"),
    ({"spec": {"terminationGracePeriodSeconds": "soon"}}, "terminationGracePeriodSeconds: expected numeric"),
    ({"spec": {"nodeSelector": ["gpu"]}}, "nodeSelector: expected map"),
    ({"spec": {"gpus": 8}}, "gpus: field not declared in schema"),
]
"""Refused when the object is checked, or before, when what is applied is read; and what the API server says of it."""


@pytest.fixture
def foreign(subject: Subject) -> Json:
    """A Service of somebody else's, with the name that the operator would take."""
    body = {"metadata": {"name": subject.name}, "spec": {"ports": [{"name": "web", "port": 8080}]}}
    return subject.api.create(subject.path("Service").rpartition("/")[0], body)


@pytest.mark.attack(
    boundary="operator",
    attack="a resource named like somebody's object, to have that replaced",
    outcome="the object is left alone; a condition says so",
)
def test_an_object_of_somebody_else_is_left_alone(operator: Running, subject: Subject, foreign: Json) -> None:
    subject.create()

    message = subject.wait_for("Accepted", "False", "NameConflict")

    assert message.startswith(f"Service {subject.name} already exists and does not belong to it")
    assert f"{names.SPECULATOR}={subject.name}" in message, "how to hand it over"
    operator.wait_for_listings(1)
    assert subject.get("Service") == foreign
    assert subject.exists("Deployment", f"{subject.name}-serving"), "the others are made"


def test_an_object_that_is_handed_over_is_taken(operator: Running, subject: Subject, foreign: Json) -> None:
    subject.create()
    subject.wait_for("Accepted", "False", "NameConflict")

    subject.api.patch(subject.path("Service"), {"metadata": {"labels": {names.SPECULATOR: subject.name}}})

    subject.wait_for("Accepted", "True", "SpecAccepted")
    taken = subject.get("Service")
    assert taken["metadata"]["uid"] == foreign["metadata"]["uid"]
    assert [each["uid"] for each in taken["metadata"]["ownerReferences"]] == [subject.get()["metadata"]["uid"]]
    assert 80 in [port["port"] for port in taken["spec"]["ports"]]


@pytest.mark.attack(
    boundary="operator",
    attack="an object of another controller with our label",
    outcome="it is never taken",
)
def test_an_object_that_another_controller_owns_is_never_taken(operator: Running, subject: Subject) -> None:
    owner = subject.api.create(f"/api/v1/namespaces/{subject.namespace}/configmaps", {"metadata": {"name": "other"}})
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "other", "uid": owner["metadata"]["uid"]}
    metadata = {
        "name": subject.name,
        "labels": {names.SPECULATOR: subject.name},
        "ownerReferences": [{**reference, "controller": True}],
    }
    subject.api.create(f"/api/v1/namespaces/{subject.namespace}/serviceaccounts", {"metadata": metadata})
    subject.create()

    assert "belongs to ConfigMap other" in subject.wait_for("Accepted", "False", "NameConflict")

    subject.api.delete(subject.path("ServiceAccount"))
    subject.wait_for("Accepted", "True", "SpecAccepted")


def test_pod_templates_that_the_api_server_refuses(operator: Running, subject: Subject) -> None:
    refused = [
        (Subject(subject.api, subject.namespace, f"{subject.name}-{number}"), template, words)
        for number, (template, words) in enumerate(BROKEN)
    ]
    for each, template, _ in refused:
        each.create(serving={"podTemplate": template})
    for each, _, words in refused:
        assert words in each.wait_for("Accepted", "False", "InvalidPodTemplate")
        assert not each.exists("Deployment", f"{each.name}-serving")

    since = requests.now()
    operator.wait_for_listings(2)
    tries = requests.writes(operator.cluster, operator.account.user, since, namespace=subject.namespace)
    assert {entry.resource for entry in tries} == {"deployments"}
    num_looks = 1 + requests.num_listings(operator.cluster, operator.account.user, since)
    assert len(tries) <= num_looks * len(refused), f"it tries when everything is looked at, and not more often: {tries}"

    for each, _, _ in refused:
        each.change(serving={"podTemplate": {"spec": None}})
    for each, _, _ in refused:
        each.wait_for("Accepted", "True", "SpecAccepted")
        each.wait_until_built()


def test_a_refused_change_leaves_the_pods_that_serve(operator: Running, subject: Subject) -> None:
    subject.create()
    subject.wait_until_built()
    before = subject.get("Deployment", f"{subject.name}-serving")

    subject.change(serving={"podTemplate": BROKEN[0][0]})
    subject.wait_for("Accepted", "False", "InvalidPodTemplate")

    after = subject.get("Deployment", f"{subject.name}-serving")
    assert after["metadata"]["generation"] == before["metadata"]["generation"]


def test_a_secret_that_is_missing_is_named_until_it_is_there(operator: Running, subject: Subject) -> None:
    subject.create(
        targetModel={"uri": "hf://org/model", "secretRef": {"name": "hub"}},
        traces={"redis": {"urlSecretRef": {"name": "redis", "key": "url"}}},
    )
    path = f"/api/v1/namespaces/{subject.namespace}/secrets"

    message = subject.wait_for("Accepted", "False", "SecretNotFound")
    assert message == "the spec names Secrets that do not exist, lack an entry or are not valid: hub, redis"

    subject.api.create(path, {"metadata": {"name": "hub"}, "stringData": {"HF_TOKEN": "x"}})
    subject.api.create(path, {"metadata": {"name": "redis"}, "stringData": {"another-key": "x"}})
    wait_until(
        lambda: subject.conditions()["Accepted"]["message"].endswith(": redis"), what="the entry is still missing"
    )
    subject.api.patch(f"{path}/redis", {"stringData": {"url": "redis://here"}})
    subject.wait_for("Accepted", "True", "SpecAccepted")


@pytest.fixture
def quota(subject: Subject) -> Callable[[dict[str, str]], Any]:
    """Allow so much and no more, from when Kubernetes counts it."""
    path = f"/api/v1/namespaces/{subject.namespace}/resourcequotas"

    def allow(hard: dict[str, str]) -> None:
        subject.api.create(path, {"metadata": {"name": "little"}, "spec": {"hard": hard}})
        wait_until(lambda: "hard" in subject.api.get(f"{path}/little").get("status", {}), what="the quota is counted")

    return allow


def test_pods_beyond_a_quota(operator: Running, subject: Subject, quota: Callable[[dict[str, str]], Any]) -> None:
    quota({"pods": "0"})
    subject.create()

    assert "exceeded quota: little" in subject.wait_for("Available", "False", "QuotaExceeded")


@pytest.mark.attack(
    boundary="operator",
    attack="a resource that needs more than its namespace's quota",
    outcome="a condition with the quota's name; no storm of requests",
)
def test_objects_beyond_a_quota(operator: Running, subject: Subject, quota: Callable[[dict[str, str]], Any]) -> None:
    quota({"count/services": "1"})
    subject.create()

    message = subject.wait_for("Available", "False", "QuotaExceeded")
    assert message.startswith(f"Service/{subject.name}: ")
    assert "exceeded quota: little" in message

    subject.api.patch(
        f"/api/v1/namespaces/{subject.namespace}/resourcequotas/little", {"spec": {"hard": {"count/services": "9"}}}
    )
    wait_until(lambda: subject.exists("Service"), what="the Service")
    subject.wait_for("Available", "False", "ModelLoading")
