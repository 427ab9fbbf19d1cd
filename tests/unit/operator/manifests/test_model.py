"""How a pod comes to its target model."""

from typing import Any

import pytest
from tests.support.manifests import container, named, pod_spec, speculator

from updraft_operator.api.speculator import TargetModel
from updraft_operator.manifests.model import served_name

_PARTS = ("serving", "trainer")
BOTH = pytest.mark.parametrize("part", _PARTS)


def _environment(pod: dict[str, Any], name: str) -> dict[str, Any]:
    return {each["name"]: each.get("value") for each in container(pod, name)["env"]}


def _model(pod: dict[str, Any], part: str) -> str:
    name = {"serving": "inference", "trainer": "trainer"}[part]
    variable = {"serving": "UPDRAFT_INFERENCE_MODEL", "trainer": "UPDRAFT_TRAINER_MODEL"}[part]
    return str(_environment(pod, name)[variable])


@BOTH
def test_a_folder_of_the_image_needs_nothing(part: str) -> None:
    pod = pod_spec(speculator(uri="/models/tiny"), part)
    assert _model(pod, part) == "/models/tiny"
    assert "initContainers" not in pod
    assert "model" not in named(pod["volumes"])


@BOTH
@pytest.mark.parametrize(
    ("uri", "path"),
    [
        pytest.param("pvc://models/qwen/7b", "/models/qwen/7b", id="a folder"),
        pytest.param("pvc://models", "/models", id="the whole claim"),
    ],
)
def test_a_claim_is_mounted_and_only_read(part: str, uri: str, path: str) -> None:
    pod = pod_spec(speculator(uri=uri), part)
    assert _model(pod, part) == path
    assert named(pod["volumes"])["model"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert "initContainers" not in pod


@BOTH
def test_an_image_is_mounted_as_a_volume(part: str) -> None:
    pod = pod_spec(speculator(uri="oci://registry.example/qwen:1"), part)
    assert _model(pod, part) == "/models"
    assert named(pod["volumes"])["model"]["image"]["reference"] == "registry.example/qwen:1"


@BOTH
@pytest.mark.parametrize("uri", ["hf://org/qwen", "s3://bucket/qwen", "gs://bucket/qwen", "az://bucket/qwen"])
def test_other_places_are_downloaded_before_the_pod_starts(part: str, uri: str) -> None:
    pod = pod_spec(speculator(uri=uri), part)
    download = container(pod, "model")
    assert download["image"] == "operator:1"
    options = [] if part == "serving" else ["--head-only"]
    assert download["command"] == ["updraft", "model", "pull", uri, _model(pod, part), *options]
    assert named(pod["volumes"])["model"] == {"name": "model", "emptyDir": {}}
    name = "inference" if part == "serving" else "trainer"
    (mount,) = (each for each in container(pod, name)["volumeMounts"] if each["name"] == "model")
    assert mount["readOnly"] is True
    assert _model(pod, part).startswith(f"{mount['mountPath']}/")


def test_who_does_not_run_the_model_has_a_folder_of_its_own_in_a_shared_cache() -> None:
    shared = {"serving": {"modelCache": {"pvc": {"claimName": "models"}}}}
    folders = {part: _model(pod_spec(speculator(shared, uri="hf://org/qwen"), part), part) for part in _PARTS}
    assert folders["trainer"] == f"{folders['serving']}--head"


def test_a_revision_is_part_of_the_download_and_of_its_folder() -> None:
    plain = pod_spec(speculator(uri="hf://org/qwen"), "serving")
    tagged = pod_spec(speculator({"targetModel": {"revision": "v2"}}, uri="hf://org/qwen"), "serving")
    assert container(tagged, "model")["command"][-2:] == ["--revision", "v2"]
    assert _model(plain, "serving") != _model(tagged, "serving")


@pytest.mark.attack(
    boundary="operator",
    attack="a serving container that reads the token of a download",
    outcome="only the init container has it",
)
def test_the_secret_of_a_download_becomes_its_variables_and_nobody_elses() -> None:
    pod = pod_spec(speculator({"targetModel": {"secretRef": {"name": "hub"}}}, uri="hf://org/qwen"), "serving")
    secret = {"secretRef": {"name": "hub"}}
    assert container(pod, "model")["envFrom"] == [secret]
    assert secret not in container(pod, "inference")["envFrom"]


@pytest.mark.parametrize(
    ("cache", "source"),
    [
        pytest.param(
            {"pvc": {"claimName": "cache"}}, {"persistentVolumeClaim": {"claimName": "cache"}}, id="shared claim"
        ),
        pytest.param(
            {"hostPath": {"path": "/mnt/models"}},
            {"hostPath": {"path": "/mnt/models", "type": "Directory"}},
            id="folder of the node",
        ),
    ],
)
def test_a_cache_keeps_downloads(cache: dict[str, Any], source: dict[str, Any]) -> None:
    pod = pod_spec(speculator({"serving": {"modelCache": cache}}, uri="hf://org/qwen"), "serving")
    assert named(pod["volumes"])["model"] == {"name": "model", **source}


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param({"uri": "hf://org/qwen"}, "qwen", id="last part"),
        pytest.param({"uri": "/models/tiny/"}, "tiny", id="folder with a slash at its end"),
        pytest.param({"uri": "oci://registry.example/models/qwen@sha256:abc"}, "qwen", id="digest of an image"),
        pytest.param({"uri": "/"}, "model", id="nothing to take"),
        pytest.param({"uri": "hf://org/qwen", "servedName": "mine"}, "mine", id="said"),
    ],
)
def test_clients_ask_for_the_last_part_of_the_address_unless_told_otherwise(target: dict[str, Any], name: str) -> None:
    assert served_name(TargetModel.model_validate(target)) == name
