"""Trainer, registry, Secret and NetworkPolicies."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import CONFIG, CONFIG_WITHOUT_REDIS, built, container, named, one, pod_spec, speculator

from updraft_chassis import access
from updraft_chassis.settings import load
from updraft_operator.manifests import accounts, redis, trainer
from updraft_operator.manifests.merge import merged
from updraft_operator.manifests.redis_users import Role
from updraft_registry.identity.service_accounts import parse_accounts
from updraft_registry.settings import RegistrySettings

OWN_REDIS = {"traces": {"redis": {"urlSecretRef": {"name": "mine", "key": "address"}}}}
OWN_USERS = {"traces": {"redis": {**OWN_REDIS["traces"]["redis"], "readerUrlSecretRef": {"name": "read"}}}}


@pytest.mark.parametrize(
    ("spec", "config", "is_there"),
    [
        pytest.param({}, CONFIG, True, id="the operator's Redis"),
        pytest.param({}, CONFIG_WITHOUT_REDIS, False, id="no Redis"),
        pytest.param(OWN_REDIS, CONFIG_WITHOUT_REDIS, True, id="a Redis of its own"),
        pytest.param({"traces": {"enabled": False}}, CONFIG, False, id="no traces"),
        pytest.param({"traces": {"enabled": False, **OWN_REDIS["traces"]}}, CONFIG, False, id="no traces, own Redis"),
    ],
)
def test_there_is_a_trainer_where_there_are_traces(spec: dict[str, Any], config: Any, *, is_there: bool) -> None:
    assert bool(trainer.objects(speculator(spec), config)) is is_there
    variables = named(container(pod_spec(speculator(spec), "serving", config), "inference")["env"])
    assert ("UPDRAFT_INFERENCE_REDIS_URL" in variables) is is_there


@pytest.mark.parametrize(
    ("spec", "sources"),
    [
        pytest.param({}, [("qwen-redis-writer", "url"), ("qwen-redis-reader", "url")], id="the operator's"),
        pytest.param(OWN_REDIS, [("mine", "address"), ("mine", "address")], id="its own"),
        pytest.param(OWN_USERS, [("mine", "address"), ("read", "url")], id="its own, with two users"),
    ],
)
def test_the_address_of_redis_comes_from_a_secret(spec: dict[str, Any], sources: list[tuple[str, str]]) -> None:
    parts = (("serving", "inference"), ("trainer", "trainer"))
    for (part, name), (secret, key) in zip(parts, sources, strict=True):
        (variable,) = (
            each
            for each in container(pod_spec(speculator(spec), part), name)["env"]
            if each["name"].endswith("REDIS_URL")
        )
        assert variable["valueFrom"] == {"secretKeyRef": {"name": secret, "key": key}}


def test_streams_are_those_of_one_installation_alone() -> None:
    made = built(speculator(), config=replace(CONFIG, installation="6f1c"))
    for part, prefix in (("serving", "UPDRAFT_INFERENCE"), ("trainer", "UPDRAFT_TRAINER")):
        assert one(made, "ConfigMap", f"qwen-{part}")["data"][f"{prefix}_NAMESPACE"] == "6f1c:team"


def test_the_trainer_is_one_pod_that_goes_before_its_successor_comes() -> None:
    deployment = one(built(speculator()), "Deployment", "qwen-trainer")["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})


def test_a_trainer_can_be_suspended_alone() -> None:
    made = built(speculator({"trainer": {"suspend": True}}))
    assert one(made, "Deployment", "qwen-trainer")["spec"]["replicas"] == 0
    assert one(made, "Deployment", "qwen-serving")["spec"]["replicas"] == 1


def test_the_trainer_asks_for_a_claim() -> None:
    made = built(speculator({"trainer": {"storage": {"size": "7Gi", "storageClassName": "fast"}}}))
    claim = one(made, "PersistentVolumeClaim", "data-qwen-trainer-0")["spec"]
    assert claim["resources"]["requests"]["storage"] == "7Gi"
    assert claim["storageClassName"] == "fast"
    assert claim["accessModes"] == ["ReadWriteOnce"]


def test_an_empty_storage_class_is_said_too() -> None:
    made = built(speculator({"trainer": {"storage": {"storageClassName": ""}}}))
    assert one(made, "PersistentVolumeClaim", "data-qwen-trainer-0")["spec"]["storageClassName"] == ""


@pytest.mark.parametrize("part", ["trainer", "registry"])
def test_a_claim_that_is_there_is_used_as_it_is(part: str) -> None:
    made = built(speculator({part: {"storage": {"claimName": "old"}}}))
    volumes = named(pod_spec(speculator({part: {"storage": {"claimName": "old"}}}), part)["volumes"])
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "old"}
    kinds = {(each["kind"], each["metadata"]["name"]) for each in made}
    assert part == "registry" or ("PersistentVolumeClaim", "data-qwen-trainer-0") not in kinds
    assert part == "trainer" or "volumeClaimTemplates" not in one(made, "StatefulSet", "qwen-registry")["spec"]


@pytest.mark.parametrize(("policy", "expected"), [("Retain", "Retain"), ("Delete", "Delete")])
def test_the_registrys_volume_goes_or_stays_as_the_deletion_policy_says(policy: str, expected: str) -> None:
    content = one(built(speculator({"deletionPolicy": policy})), "StatefulSet", "qwen-registry")["spec"]
    assert content["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": expected, "whenScaled": "Retain"}


def test_the_registry_has_its_bucket_and_its_credentials() -> None:
    spec = {"registry": {"bucket": {"url": "s3://drafts/qwen", "secretRef": {"name": "bucket"}}}}
    assert {"secretRef": {"name": "bucket"}} in container(pod_spec(speculator(spec), "registry"), "registry")["envFrom"]
    data = one(built(speculator(spec)), "ConfigMap", "qwen-registry")["data"]
    assert data["UPDRAFT_REGISTRY_STORE_URL"] == "s3://drafts/qwen"


def tokens(part: str) -> list[dict[str, Any]]:
    """The tokens that the kubelet projects into a pod of a part."""
    volumes = pod_spec(speculator(), part)["volumes"]
    sources = [source for volume in volumes for source in volume.get("projected", {}).get("sources", ())]
    return [source["serviceAccountToken"] for source in sources if "serviceAccountToken" in source]


@pytest.mark.parametrize("part", ["serving", "trainer"])
def test_a_pod_gets_a_token_of_its_own_account_for_its_own_registry_and_no_other(part: str) -> None:
    (token,) = tokens(part)
    assert token["audience"] == "updraft-registry/team/qwen"
    assert token["expirationSeconds"] == 3600
    assert pod_spec(speculator(), part)["serviceAccountName"] == f"qwen-{part}"
    data = one(built(speculator()), "ConfigMap", f"qwen-{part}")["data"]
    variable = {"serving": "UPDRAFT_INFERENCE_REGISTRY_TOKEN_FILE", "trainer": "UPDRAFT_TRAINER_REGISTRY_TOKEN_FILE"}
    assert data[variable[part]] == f"/etc/updraft/access/{token['path']}"


def test_the_registry_reads_the_clusters_keys_with_a_token_for_the_api_server() -> None:
    (token,) = tokens("registry")
    assert "audience" not in token, "without one it is for the API server"
    data = one(built(speculator()), "ConfigMap", "qwen-registry")["data"]
    settings = load(RegistrySettings, data)
    assert (settings.issuer, settings.audience) == (CONFIG.issuer, "updraft-registry/team/qwen")
    assert settings.key_set == "https://kubernetes.default.svc/openid/v1/jwks"
    assert str(settings.key_set_token_file) == f"/etc/updraft/kubernetes/{token['path']}"


def test_the_registry_gives_each_account_its_role() -> None:
    data = one(built(speculator()), "ConfigMap", "qwen-registry")["data"]
    prefix = "system:serviceaccount:"
    assert parse_accounts(data["UPDRAFT_REGISTRY_ACCOUNTS"]) == {
        f"{prefix}team:qwen-serving": {access.Grant(role=access.Role.SERVE, speculator="qwen")},
        f"{prefix}team:qwen-trainer": {access.Grant(role=access.Role.PUBLISH)},
        f"{prefix}team:qwen-import": {access.Grant(role=access.Role.PUBLISH)},
        f"{prefix}team:qwen": {access.Grant(role=access.Role.OPERATE)},
        f"{prefix}updraft-system:updraft-operator": {access.Grant(role=access.Role.OPERATE)},
    }


def test_an_account_that_the_pod_template_names_has_the_parts_role() -> None:
    own = {"podTemplate": {"spec": {"serviceAccountName": "own"}}}
    owner = speculator({"serving": own, "trainer": own})
    data = one(built(owner), "ConfigMap", "qwen-registry")["data"]
    grants = parse_accounts(data["UPDRAFT_REGISTRY_ACCOUNTS"])["system:serviceaccount:team:own"]
    assert grants == {access.Grant(role=access.Role.SERVE, speculator="qwen"), access.Grant(role=access.Role.PUBLISH)}
    assert pod_spec(owner, "serving")["serviceAccountName"] == pod_spec(owner, "trainer")["serviceAccountName"] == "own"


@pytest.mark.attack(
    boundary="tenants",
    attack="a registry that uses the operator's token at another registry",
    outcome="each has an audience of its own",
)
def test_no_two_registries_accept_the_same_token() -> None:
    names = [("team", "qwen"), ("team", "llama"), ("team-qwen", "a"), ("team", "qwen-a"), ("other", "qwen")]
    assert len({accounts.audience(*each) for each in names}) == len(names)


def test_a_secret_has_one_address_and_nothing_else() -> None:
    assert redis.secret(speculator(), Role.WRITER, redis.Place.SHARED, "redis://h")["stringData"] == {
        "url": "redis://h"
    }


def test_only_the_speculators_own_pods_and_the_operator_call_its_registry() -> None:
    grpc, metrics = one(built(speculator()), "NetworkPolicy", "qwen-registry")["spec"]["ingress"]
    assert [port["port"] for port in grpc["ports"]] == [50051]
    own, operator = grpc["from"]
    assert own["podSelector"]["matchLabels"] == {"updraft.dev/speculator": "qwen"}
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "updraft-system"}
    assert "from" not in metrics


@pytest.mark.parametrize(("part", "name"), [("serving", "inference"), ("trainer", "trainer"), ("registry", "registry")])
def test_image_resources_and_variables_of_a_part_are_the_users(part: str, name: str) -> None:
    spec = {"resources": {"limits": {"memory": "3Gi"}}, "env": [{"name": "EXTRA", "value": "1"}]}
    where_image_is = "engine" if part == "serving" else part
    image = {where_image_is: {"image": "mine:3"}}
    made = container(pod_spec(speculator(merged({part: spec}, image)), part), name)
    assert made["image"] == "mine:3"
    assert made["resources"] == spec["resources"]
    assert named(made["env"])["EXTRA"] == {"name": "EXTRA", "value": "1"}


@pytest.mark.parametrize(
    ("part", "name", "variable"),
    [
        ("serving", "inference", "UPDRAFT_INFERENCE_REDIS_URL"),
        ("serving", "inference", "UPDRAFT_INFERENCE_MODEL"),
        ("trainer", "trainer", "UPDRAFT_TRAINER_REDIS_URL"),
    ],
)
@pytest.mark.parametrize(
    "said",
    [
        pytest.param({"value": "mine"}, id="a value"),
        pytest.param({"valueFrom": {"secretKeyRef": {"name": "mine", "key": "url"}}}, id="from a Secret"),
    ],
)
def test_a_variable_of_the_spec_replaces_ours_whole(part: str, name: str, variable: str, said: dict[str, Any]) -> None:
    spec = {part: {"env": [{"name": variable, **said}]}}
    env = container(pod_spec(speculator(spec), part), name)["env"]
    assert [each for each in env if each["name"] == variable] == [{"name": variable, **said}]
