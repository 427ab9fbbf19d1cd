"""A resource from its creation to its end: what is made of it, what is kept as it is, and that all of it goes."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis
from tests.cluster.access import Json
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.redis_server import RedisServer
from tests.support.wait import wait_until

from updraft_chassis import streams
from updraft_operator.api import names

SHOUT = {"metadata": {"labels": {names.COMPONENT: "stolen"}}}
EDITS: dict[tuple[str, str], Json] = {
    ("Deployment", "-serving"): {"spec": {"template": {"spec": {"enableServiceLinks": True}}}},
    ("Deployment", "-trainer"): {"spec": {"replicas": 5}},
    ("StatefulSet", "-registry"): {"spec": {"replicas": 0}},
    ("Service", ""): {"spec": {"selector": {names.COMPONENT: "elsewhere"}}},
    ("Service", "-registry"): {"spec": {"publishNotReadyAddresses": False}},
    ("ConfigMap", "-serving"): {"data": {"UPDRAFT_INFERENCE_PORT": "1"}},
    ("ConfigMap", "-trainer"): {"data": {"UPDRAFT_TRAINER_SPECULATOR": None}},
    ("ConfigMap", "-registry"): SHOUT,
    **{
        ("ServiceAccount", end): {"automountServiceAccountToken": True}
        for end in ("", "-serving", "-trainer", "-registry", "-import")
    },
    ("PodDisruptionBudget", "-serving"): {"spec": {"maxUnavailable": 3}},
    ("NetworkPolicy", "-serving"): {"spec": {"ingress": []}},
    ("NetworkPolicy", "-trainer"): {"spec": {"policyTypes": ["Ingress", "Egress"]}},
    ("NetworkPolicy", "-registry"): {"metadata": {"ownerReferences": None}},
}
"""For each object, by kind and end of name, what somebody might do to it. A claim is made once, because people grow volumes;
the Secrets have random passwords."""


@pytest.fixture
def built(operator: Running, subject: Subject) -> Subject:
    """A minimal one with all its objects."""
    subject.create()
    subject.wait_until_built()
    wait_until(lambda: len(subject.objects()) == len(EDITS) + 3, what="all objects")
    return subject


def test_a_minimal_resource_becomes_exactly_these_objects(built: Subject) -> None:
    found, owner = built.objects(), built.get()

    once = {("Secret", f"{built.name}-redis-{role}") for role in ("writer", "reader")}
    once |= {("PersistentVolumeClaim", f"data-{built.name}-trainer-0")}
    assert set(found) == once | {(kind, built.name + end) for kind, end in EDITS}
    for each in found.values():
        (reference,) = each["metadata"]["ownerReferences"]
        assert (reference["uid"], reference["controller"]) == (owner["metadata"]["uid"], True)
        labels = each["metadata"]["labels"]
        assert (labels["app.kubernetes.io/name"], labels["app.kubernetes.io/instance"]) == ("updraft", built.name)
        managers = {entry["manager"]: entry["operation"] for entry in each["metadata"]["managedFields"]}
        assert managers[names.MANAGER] == "Apply"
    assert "finalizers" not in owner["metadata"]
    assert "annotations" not in owner["metadata"], "an operator's marks in what a person wrote are drift to GitOps"


@pytest.mark.attack(
    boundary="operator",
    attack="a serving pod that calls the Kubernetes API",
    outcome="it has no token for it",
)
def test_every_pod_has_one_token_which_is_of_its_own_account(built: Subject) -> None:
    shown = {}
    for part in (names.SERVING, names.TRAINER, names.REGISTRY):
        wait_until(lambda part=part: bool(built.pods(part)), what=f"a pod of {part}")  # type: ignore[misc] # a default
        for pod in built.pods(part):
            projected = [volume["projected"]["sources"] for volume in pod["spec"]["volumes"] if "projected" in volume]
            sources = [source for listed in projected for source in listed]
            (token,) = (source["serviceAccountToken"] for source in sources if "serviceAccountToken" in source)
            shown[part] = token.get("audience", "")
            assert pod["spec"]["serviceAccountName"] == f"{built.name}-{part}"
    audience = f"updraft-registry/{built.namespace}/{built.name}"
    assert shown == {names.SERVING: audience, names.TRAINER: audience, names.REGISTRY: ""}, "the API server's"


def test_nothing_is_written_while_nothing_changes(operator: Running, built: Subject) -> None:
    operator.wait_for_listings(1)
    since = requests.now()

    operator.wait_for_listings(4)

    assert requests.writes(operator.cluster, operator.account.user, since, namespace=built.namespace) == []


@pytest.mark.attack(
    boundary="operator",
    attack="changing the objects of a resource, its NetworkPolicy for example",
    outcome="the operator reverts it",
)
def test_what_somebody_changed_is_set_right(operator: Running, built: Subject) -> None:
    before = {key: _wished(each) for key, each in built.objects().items()}
    for (kind, end), edit in EDITS.items():
        built.api.patch(built.path(kind, built.name + end), edit)

    def changed() -> set[tuple[str, str]]:
        after = {key: _wished(each) for key, each in built.objects().items()}
        return {key for key in before if before[key] != after.get(key)}

    wait_until(lambda: changed() == set(), what="all as before")
    assert sum(operator.process.metric(f'updraft_operator_drift_total{{kind="{kind}"}}') for kind, _ in EDITS) >= len(
        EDITS
    )


def test_what_somebody_deleted_is_made_again(operator: Running, built: Subject) -> None:
    before = {key: each["metadata"]["uid"] for key, each in built.objects().items()}
    for kind, name in before:
        if kind != "PersistentVolumeClaim":  # a pod uses it: it only goes with that
            built.api.delete(built.path(kind, name))

    def are_all_new() -> bool:
        found = built.objects()
        kept = ("PersistentVolumeClaim", f"data-{built.name}-trainer-0")
        return set(found) == set(before) and all(
            key == kept or found[key]["metadata"]["uid"] != uid for key, uid in before.items()
        )

    wait_until(are_all_new, what="all objects anew")


def _url(built: Subject, role: str) -> str:
    data = built.get("Secret", f"{built.name}-redis-{role}")["data"]
    return base64.b64decode(data["url"]).decode()


def test_each_role_has_a_user_of_redis_that_is_made_again_and_goes_with_the_resource(
    built: Subject, redis_server: RedisServer
) -> None:
    with Redis.from_url(redis_server.url) as redis:
        users = {urlsplit(_url(built, role)).username for role in ("writer", "reader")}
        wait_until(lambda: users <= set(redis.acl_users()), what="the users")
        redis.acl_deluser(*users)
        wait_until(lambda: users <= set(redis.acl_users()), what="the users again")
        before = _url(built, "writer")
        built.api.delete(built.path("Secret", f"{built.name}-redis-writer"))
        wait_until(lambda: built.exists("Secret", f"{built.name}-redis-writer"), what="another Secret")
        assert _url(built, "writer") != before
        built.delete()
        wait_until(lambda: not users & set(redis.acl_users()), what="the end of the users")


def _wished(content: Json) -> Any:
    """What the operator says of an object: all fields that it applied, with their values."""
    (mark,) = [each for each in content["metadata"]["managedFields"] if each["manager"] == names.MANAGER]
    return _values(mark["fieldsV1"], content)


def _values(fields: Json, value: Any) -> Any:
    inner = {name: below for name, below in fields.items() if name.startswith("f:")}
    if not inner or not isinstance(value, dict):
        return value if not any(name.startswith(("f:", "k:")) for name in fields) else str(sorted(fields))
    return {name: _values(below, value.get(name[2:])) for name, below in inner.items()}


def test_a_changed_spec_changes_what_it_says(operator: Running, built: Subject) -> None:
    serving = {"replicas": 3, "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}]}
    built.change(
        engine={"image": "mine:1"}, serving=serving, trainer={"podTemplate": {"spec": {"priorityClassName": "low"}}}
    )

    def is_followed() -> bool:
        deployment = built.get("Deployment", f"{built.name}-serving")["spec"]
        (container,) = deployment["template"]["spec"]["containers"]
        trainer = built.get("Deployment", f"{built.name}-trainer")["spec"]["template"]["spec"]
        has_variable = {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
        named = (container["image"], deployment["replicas"], trainer.get("priorityClassName"))
        return has_variable and named == ("mine:1", 3, "low")

    wait_until(is_followed, what="the new spec is followed")
    built.change(serving={"env": []}, trainer={"podTemplate": None})
    wait_until(lambda: not is_followed(), what="what is said no more is taken away")


def test_a_suspended_one_keeps_what_it_has_and_runs_nothing(operator: Running, built: Subject) -> None:
    def replicas() -> tuple[int, ...]:
        return tuple(
            built.get("Deployment", f"{built.name}-{part}")["spec"]["replicas"] for part in ("serving", "trainer")
        )

    built.change(suspend=True)
    built.wait_for("Ready", "True", "Suspended")
    assert replicas() == (0, 0)
    assert built.get("StatefulSet", f"{built.name}-registry")["spec"]["replicas"] == 1

    built.change(suspend=False)
    wait_until(lambda: replicas() == (1, 1), what="serving again")


def test_scaling_the_resource_scales_the_pods(operator: Running, built: Subject) -> None:
    operator.cluster.kubectl("scale", f"asp/{built.name}", "--replicas=4", "-n", built.namespace)
    wait_until(lambda: built.get("Deployment", f"{built.name}-serving")["spec"]["replicas"] == 4, what="4 pods")
    built.run(names.SERVING, 4)

    wait_until(lambda: built.get()["status"]["serving"].get("readyReplicas") == 4, what="4 ready pods in the status")
    told = built.api.get(built.path(subresource="scale"))["status"]
    assert told["replicas"] == 4
    assert len(built.all_of("Pod", **dict(each.split("=") for each in told["selector"].split(",")))) == 4


def test_an_autoscaler_of_the_deployment_keeps_its_number_until_a_person_takes_it_back(
    operator: Running, built: Subject
) -> None:
    scale = built.path("Deployment", f"{built.name}-serving", "scale")
    built.api.patch(f"{scale}?fieldManager=kube-controller-manager", {"spec": {"replicas": 6}})
    built.change(engine={"image": "mine:2"})

    def image() -> str:
        spec = built.get("Deployment", f"{built.name}-serving")["spec"]
        return str(spec["template"]["spec"]["containers"][0]["image"])

    wait_until(lambda: image() == "mine:2", what="the new image")
    built.change(serving={"replicas": 2})
    operator.wait_for_listings(1)

    def replicas() -> int:
        return int(built.get("Deployment", f"{built.name}-serving")["spec"]["replicas"])

    assert replicas() == 6, "it may still run"
    operator.cluster.kubectl("scale", f"deploy/{built.name}-serving", "--replicas=3", "-n", built.namespace)
    wait_until(lambda: replicas() == 2, what="the number of the spec, after a person took it back")


def test_a_person_who_scales_the_deployment_is_undone(operator: Running, built: Subject) -> None:
    operator.cluster.kubectl("scale", f"deploy/{built.name}-serving", "--replicas=5", "-n", built.namespace)

    wait_until(lambda: built.get("Deployment", f"{built.name}-serving")["spec"]["replicas"] == 1, what="1 pod again")


def test_deletion_takes_all_objects_along_and_keeps_the_registrys_volume(operator: Running, built: Subject) -> None:
    wait_until(lambda: built.exists("PersistentVolumeClaim", f"data-{built.name}-registry-0"), what="its claim")

    built.delete()

    built.wait_until_gone()
    kept = built.all_of("PersistentVolumeClaim")
    assert [each["metadata"]["name"] for each in kept] == [f"data-{built.name}-registry-0"]


def test_with_policy_delete_traces_and_volume_go_too(
    operator: Running, subject: Subject, redis_server: RedisServer, home: str
) -> None:
    subject.create(deletionPolicy="Delete")
    subject.wait_until_built()
    wait_until(lambda: subject.get()["metadata"].get("finalizers") == [names.FINALIZER], what="the finalizer")
    claim = f"data-{subject.name}-registry-0"
    wait_until(lambda: subject.exists("PersistentVolumeClaim", claim), what="the registry's claim")
    installation = subject.api.get(f"/api/v1/namespaces/{home}")["metadata"]["uid"]
    (key,) = streams.keys(f"{installation}:{subject.namespace}", subject.name, 1)
    with Redis.from_url(redis_server.url) as redis:
        for name in (key, f"{key}:dead", f"{key}-of-another"):
            redis.xadd(name, {"t": "trace"})

        subject.delete()

        subject.wait_until_gone()
        assert [redis.exists(name) for name in (key, f"{key}:dead", f"{key}-of-another")] == [0, 0, 1]
        redis.delete(f"{key}-of-another")
    wait_until(lambda: not subject.exists("PersistentVolumeClaim", claim), what="the end of the registry's claim")


def test_a_deletion_waits_for_a_redis_that_is_away(operator: Running, subject: Subject, short_tmp_path: Path) -> None:
    redis_server = RedisServer(short_tmp_path)
    secret = {"metadata": {"name": "away"}, "stringData": {"url": redis_server.url}}
    subject.api.create(f"/api/v1/namespaces/{subject.namespace}/secrets", secret)
    subject.create(deletionPolicy="Delete", traces={"redis": {"urlSecretRef": {"name": "away"}}})
    wait_until(lambda: "finalizers" in subject.get()["metadata"], what="the finalizer")

    subject.delete()
    operator.process.wait_for_log("cannot delete the traces in Redis")
    assert subject.get()["metadata"]["finalizers"] == [names.FINALIZER]

    with redis_server:
        wait_until(lambda: not subject.exists(), what="its end")


def test_the_finalizer_goes_when_the_policy_is_to_retain(operator: Running, subject: Subject) -> None:
    subject.create(deletionPolicy="Delete")
    wait_until(lambda: "finalizers" in subject.get()["metadata"], what="the finalizer")
    subject.api.patch(subject.path(), {"metadata": {"finalizers": [names.FINALIZER, "example.test/other"]}})

    subject.change(deletionPolicy="Retain")

    wait_until(lambda: subject.get()["metadata"]["finalizers"] == ["example.test/other"], what="only the other one")
    subject.api.patch(subject.path(), {"metadata": {"finalizers": None}})
