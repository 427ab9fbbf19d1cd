"""What is made of a resource: which objects, under which names, and what holds of every pod."""

from dataclasses import replace
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.manifests import (
    CONFIG,
    CONFIG_WITHOUT_REDIS,
    IMAGES,
    PARTS,
    UID,
    breaches,
    built,
    containers,
    one,
    pod_spec,
    speculator,
    templates,
)
from tests.support.observed import connected, observed, traffic, version

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.manifests import importing
from updraft_operator.planning.observed import ConnectionState, RegistryView
from updraft_operator.planning.plan import make_plan, objects

SHAPES: dict[str, dict[str, Any]] = {
    "minimal": {},
    "sglang": {"engine": {"type": "SGLang", "tensorParallelSize": 2, "args": ["--mem-fraction-static", "0.8"]}},
    "vllm": {
        "engine": {"type": "VLLM"},
        "serving": {"apiKeysSecretRef": {"name": "clients"}, "maxContextTokens": 4096},
    },
    "downloaded": {"targetModel": {"uri": "hf://org/qwen", "revision": "main", "secretRef": {"name": "hub"}}},
    "claim": {"targetModel": {"uri": "pvc://models/qwen"}},
    "image": {"targetModel": {"uri": "oci://registry.example/qwen:1"}},
    "cached": {"targetModel": {"uri": "s3://bucket/qwen"}, "serving": {"modelCache": {"pvc": {"claimName": "cache"}}}},
    "suspended": {"suspend": True},
    "bucket": {"registry": {"bucket": {"url": "s3://drafts/qwen", "secretRef": {"name": "bucket"}}}},
    "own redis": {"traces": {"redis": {"urlSecretRef": {"name": "redis"}}}},
}
each_shape = pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in SHAPES.items()])


def test_the_least_resource_makes_exactly_these_objects() -> None:
    made = {f"{each['kind']}/{each['metadata']['name']}" for each in make_plan(observed(), now_unix_s=0, now_s=0).apply}
    assert made == {
        "ServiceAccount/qwen",
        "ServiceAccount/qwen-serving",
        "ServiceAccount/qwen-trainer",
        "ServiceAccount/qwen-registry",
        "ServiceAccount/qwen-import",
        "Service/qwen",
        "Deployment/qwen-serving",
        "ConfigMap/qwen-serving",
        "PodDisruptionBudget/qwen-serving",
        "NetworkPolicy/qwen-serving",
        "Deployment/qwen-trainer",
        "ConfigMap/qwen-trainer",
        "PersistentVolumeClaim/data-qwen-trainer-0",
        "NetworkPolicy/qwen-trainer",
        "StatefulSet/qwen-registry",
        "ConfigMap/qwen-registry",
        "Service/qwen-registry",
        "NetworkPolicy/qwen-registry",
    }


@each_shape
def test_every_object_says_whose_it_is(spec: dict[str, Any]) -> None:
    for each in objects(observed(spec)):
        metadata = each["metadata"]
        assert metadata["namespace"] == "team"
        assert metadata["labels"][names.SPECULATOR] == "qwen"
        assert metadata["labels"][names.MANAGED_BY] == names.MANAGER
        (owner,) = metadata["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"], owner["controller"]) == (
            "AdaptiveSpeculator",
            "qwen",
            UID,
            True,
        )


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@each_shape
def test_every_object_is_what_kubernetes_knows(spec: dict[str, Any], version: str) -> None:
    for each in built(speculator(spec)):
        kubernetes_validate.validate(each, version, strict=True)


@each_shape
def test_every_pod_satisfies_the_restricted_standard(spec: dict[str, Any]) -> None:
    for name, template in templates(built(speculator(spec))).items():
        assert breaches(template["spec"]) == [], name


@each_shape
def test_where_the_cluster_chooses_users_pods_name_none_and_meet_the_standard_too(spec: dict[str, Any]) -> None:
    config = replace(CONFIG, images=replace(IMAGES, has_fixed_user=False))
    for name, template in templates(built(speculator(spec), config)).items():
        assert breaches(template["spec"]) == [], name
        chosen = template["spec"]["securityContext"].keys() & {
            "runAsUser",
            "runAsGroup",
            "fsGroup",
            "supplementalGroups",
        }
        assert chosen == set(), name


def test_only_a_folder_of_the_node_breaks_the_restricted_standard() -> None:
    spec = {"targetModel": {"uri": "hf://o/m"}, "serving": {"modelCache": {"hostPath": {"path": "/mnt/models"}}}}
    assert breaches(pod_spec(speculator(spec), "serving")) == ["volume model"]


@each_shape
def test_no_pod_has_all_that_kubernetes_mounts_by_itself(spec: dict[str, Any]) -> None:
    for template in templates(built(speculator(spec))).values():
        assert template["spec"]["automountServiceAccountToken"] is False
        assert template["spec"]["enableServiceLinks"] is False
    accounts = [each for each in objects(observed(spec)) if each["kind"] == "ServiceAccount"]
    assert {each["metadata"]["name"] for each in accounts} == {
        "qwen",
        "qwen-serving",
        "qwen-trainer",
        "qwen-registry",
        "qwen-import",
    }
    assert not any(each["automountServiceAccountToken"] for each in accounts)


@each_shape
def test_every_mount_has_its_volume_and_every_probe_its_port(spec: dict[str, Any]) -> None:
    for made in built(speculator(spec)):
        if "template" not in made.get("spec", {}):
            continue
        pod, claims = made["spec"]["template"]["spec"], made["spec"].get("volumeClaimTemplates", ())
        volumes = [*(each["name"] for each in pod["volumes"]), *(each["metadata"]["name"] for each in claims)]
        assert len(set(volumes)) == len(volumes)
        for each in containers(pod):
            assert {mount["name"] for mount in each["volumeMounts"]} <= set(volumes), each["name"]
            ports = {port["name"] for port in each.get("ports", ())}
            probes = [each[name] for name in each if name.endswith("Probe")]
            assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= ports, each["name"]


@each_shape
def test_selectors_find_the_pods_of_their_part(spec: dict[str, Any]) -> None:
    made = built(speculator(spec))
    for name, template in templates(made).items():
        labels = template["metadata"]["labels"].items()
        kind = "StatefulSet" if name.endswith("registry") else "Deployment"
        assert one(made, kind, name)["spec"]["selector"]["matchLabels"].items() <= labels
        assert one(made, "NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"].items() <= labels
    for service, part in (("qwen", "serving"), ("qwen-registry", "registry")):
        selector = one(made, "Service", service)["spec"]["selector"].items()
        assert selector <= templates(made)[f"qwen-{part}"]["metadata"]["labels"].items()


@pytest.mark.parametrize("part", PARTS)
def test_other_settings_restart_the_pods_of_their_part(part: str) -> None:
    changed: dict[str, dict[str, Any]] = {
        "serving": {"serving": {"maxRunningRequests": 99}},
        "trainer": {"draft": {"lookahead": 5}},
        "registry": {"registry": {"bucket": {"url": "s3://drafts/other"}}},
    }
    before, after = (templates(built(speculator(spec)))[f"qwen-{part}"] for spec in ({}, changed[part]))
    marks = [each["metadata"]["annotations"][names.SETTINGS] for each in (before, after)]
    assert marks[0] != marks[1]


def test_pull_secrets_and_policy_reach_every_pod() -> None:
    from dataclasses import replace

    images = replace(CONFIG.images, pull_policy="Always", pull_secrets=("mine",))
    owner = speculator(uri="hf://org/qwen")
    for template in templates(built(owner, replace(CONFIG, images=images))).values():
        assert template["spec"]["imagePullSecrets"] == [{"name": "mine"}]
        assert {each["imagePullPolicy"] for each in containers(template["spec"])} == {"Always"}


def test_the_pod_of_an_import_is_as_hardened_as_the_others() -> None:
    from tests.support.observed import draft_import

    brought = draft_import(uri="pvc://drafts/eagle")
    job = importing.job(speculator(), brought, "mine-import", CONFIG_WITHOUT_REDIS, is_first=False)
    pod = job["spec"]["template"]["spec"]
    assert breaches(pod) == []
    assert pod["automountServiceAccountToken"] is False
    assert pod["restartPolicy"] == "Never"
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("DraftImport", brought.metadata.uid)
    assert "/drafts/eagle" in pod["containers"][0]["command"]


@pytest.mark.parametrize("is_first", [True, False])
def test_every_import_is_checked_against_the_head_of_the_target(*, is_first: bool) -> None:
    """A draft of another trainer cannot be converted without it, also as a later version."""
    from tests.support.observed import draft_import

    job = importing.job(speculator(uri="hf://org/qwen"), draft_import(), "mine-import", CONFIG, is_first=is_first)
    pod = job["spec"]["template"]["spec"]
    assert "--head-only" in pod["initContainers"][0]["command"]
    args = pod["containers"][0]["args"]
    folder = args[args.index("--target") + 1]
    assert any(folder.startswith(mount["mountPath"]) for mount in pod["containers"][0]["volumeMounts"])
    assert folder in pod["initContainers"][0]["command"]


@pytest.mark.parametrize("engine", ["Torch", "SGLang", "VLLM"])
def test_an_import_is_checked_against_the_engine_of_the_pods(engine: str) -> None:
    from tests.support.observed import draft_import

    job = importing.job(speculator({"engine": {"type": engine}}), draft_import(), "mine-import", CONFIG, is_first=True)
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[args.index("--engine") + 1] == engine.lower()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_target_in_the_image_of_the_inference_pods_is_named_for_the_first_version_only(*, is_first: bool) -> None:
    from tests.support.observed import draft_import

    job = importing.job(speculator(uri="/models/qwen"), draft_import(), "mine-import", CONFIG, is_first=is_first)
    assert ("--target" in job["spec"]["template"]["spec"]["containers"][0]["args"]) is is_first


views = st.one_of(
    st.builds(RegistryView, connection=st.sampled_from(list(ConnectionState))),
    st.builds(
        lambda numbers, phases, pinned, paused: connected(
            [version(number, phases[number % len(phases)]) for number in sorted(numbers)],
            traffic=[traffic(number, 2.5) for number in sorted(numbers)],
            paused=paused,
            **({} if pinned is None else {"pinned": pinned}),
        ),
        st.sets(st.integers(1, 99), max_size=5),
        st.lists(st.sampled_from(pb.Phase.values()[1:]), min_size=1, max_size=4),
        st.none() | st.integers(0, 99),
        st.booleans(),
    ),
)


@settings(deadline=None)
@given(view=views, shape=st.sampled_from(sorted(SHAPES)))
def test_no_draft_ever_changes_an_object_that_runs(view: RegistryView, shape: str) -> None:
    spec = SHAPES[shape]
    assert objects(observed(spec, registry=view)) == objects(observed(spec))
