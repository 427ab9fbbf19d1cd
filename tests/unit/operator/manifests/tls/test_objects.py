"""Mounts of pods do not depend on who signs, and nothing restarts when a CA changes."""

from dataclasses import replace

import pytest
from tests.support.manifests import CONFIG, built, container, one, pod_spec, speculator, templates

from updraft_operator.manifests.manifest import Manifest, OperatorConfig
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import Issuer, Tls, TlsMode

SELF_SIGNED = replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, authorities="a CA\n"))
CERT_MANAGER = replace(
    CONFIG, tls=Tls(mode=TlsMode.CERT_MANAGER, issuer=Issuer(name="corporate"), authorities="a CA\n")
)


def _pods(config: OperatorConfig) -> dict[str, Manifest]:
    return templates(built(speculator(), config))


def test_pods_do_not_differ_by_who_signs_or_by_the_ca() -> None:
    assert _pods(SELF_SIGNED) == _pods(CERT_MANAGER)
    renewed = replace(SELF_SIGNED, tls=replace(SELF_SIGNED.tls, authorities="another CA\n"))
    assert _pods(SELF_SIGNED) == _pods(renewed)


@pytest.mark.attack(
    boundary="registry",
    attack="a serving pod or trainer that wants the registry's private key",
    outcome="only the registry's pod mounts it; others mount the CAs",
)
def test_only_the_registry_mounts_its_key() -> None:
    volumes = {part: str(pod_spec(speculator(), part, SELF_SIGNED)["volumes"]) for part in ("serving", "trainer")}
    assert all("tls.key" not in mounted and "qwen-registry-tls" not in mounted for mounted in volumes.values())
    assert all("'configMap': {'name': 'qwen-ca'" in mounted for mounted in volumes.values())
    registry = {each["name"]: each for each in pod_spec(speculator(), "registry", SELF_SIGNED)["volumes"]}
    assert registry["updraft-tls"]["secret"]["secretName"] == "qwen-registry-tls"
    assert [item["key"] for item in registry["updraft-tls"]["secret"]["items"]] == ["tls.crt", "tls.key"]


def test_every_client_of_the_registry_trusts_the_mounted_cas() -> None:
    objects = built(speculator(), SELF_SIGNED)
    for part, prefix in (("serving", "UPDRAFT_INFERENCE"), ("trainer", "UPDRAFT_TRAINER")):
        data = one(objects, "ConfigMap", f"qwen-{part}")["data"]
        assert data[f"{prefix}_REGISTRY_CA_FILE"] == tls.CA_FILE
        assert data[f"{prefix}_REGISTRY_ADDRESS"] == "qwen-registry.team.svc:50051", "the name in the certificate"
    sidecar = container(pod_spec(speculator({"engine": {"type": "VLLM"}}), "serving", SELF_SIGNED), "inference")
    assert tls.CA_FOLDER in [mount["mountPath"] for mount in sidecar["volumeMounts"]]


def test_disabled_leaves_no_trace_of_tls() -> None:
    assert "tls" not in str(_pods(CONFIG)).lower()
    assert list(tls.objects(speculator(), CONFIG)) == []
    assert tls.orders(speculator(), CONFIG, {}, ("registry",), 0.0) == ()


def test_the_cas_are_in_a_config_map_as_soon_as_they_are_known() -> None:
    (config_map,) = tls.objects(speculator(), SELF_SIGNED)
    assert (config_map["metadata"]["name"], config_map["data"]) == ("qwen-ca", {"ca.crt": "a CA\n"})
    unknown = replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED))
    assert list(tls.objects(speculator(), unknown)) == []
    assert tls.orders(speculator(), unknown, {}, ("registry",), 0.0) == ()


def test_a_certificate_is_ordered_only_from_an_operator_with_a_ca() -> None:
    assert tls.orders(speculator(), SELF_SIGNED, {}, ("registry",), 0.0) == (), "it knows only what clients trust"
    signing = replace(SELF_SIGNED, tls=replace(SELF_SIGNED.tls, can_sign=True))
    (order,) = tls.orders(speculator(), signing, {}, ("registry",), 0.0)
    assert (order.secret, order.name) == ("qwen-registry-tls", "qwen-registry.team.svc")


def test_cert_manager_is_asked_for_the_same_secret() -> None:
    request, _ = tls.objects(speculator(), CERT_MANAGER)
    assert (request["kind"], request["apiVersion"]) == ("Certificate", "cert-manager.io/v1")
    assert request["spec"]["secretName"] == "qwen-registry-tls"
    assert request["spec"]["dnsNames"] == ["qwen-registry.team.svc"]
    assert request["spec"]["issuerRef"] == {"name": "corporate", "kind": "ClusterIssuer", "group": "cert-manager.io"}
    assert tls.orders(speculator(), CERT_MANAGER, {}, ("registry",), 0.0) == (), "the operator signs nothing"


def test_a_secret_of_cert_manager_is_labelled_as_ours() -> None:
    request, _ = tls.objects(speculator(), CERT_MANAGER)
    assert request["spec"]["secretTemplate"]["labels"] == request["metadata"]["labels"]


@pytest.mark.parametrize("part", ["serving", "trainer", "registry"])
def test_a_volume_of_a_corporate_ca_does_not_collide_with_ours(part: str) -> None:
    volumes = [{"name": name, "secret": {"secretName": "corporate"}} for name in ("ca", "tls")]
    spec = {part: {"podTemplate": {"spec": {"volumes": volumes}}}}
    mounted = {each["name"]: each for each in pod_spec(speculator(spec), part, SELF_SIGNED)["volumes"]}
    assert [mounted[each["name"]] for each in volumes] == volumes
    assert {"updraft-ca", "updraft-tls"} & mounted.keys()
