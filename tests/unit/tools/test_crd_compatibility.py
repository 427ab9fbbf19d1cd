"""Changes of the CRDs since the last release: none breaks an object, and each kind of break is found."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from tools import crd_compatibility
from tools.crd_compatibility import incompatible

from updraft_operator.api import crd

Schema = dict[str, Any]


def test_nothing_that_worked_with_the_last_release_breaks() -> None:
    assert crd_compatibility.problems() == []


def _changed(change: Callable[[Schema], object]) -> list[str]:
    """What is found after a change of the AdaptiveSpeculator's CRD."""
    released = crd.definitions()[0]
    current = deepcopy(released)
    change(current["spec"])
    return list(incompatible(released, current))


def _root(spec: Schema) -> Schema:
    root: Schema = spec["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    return root


def _at(spec: Schema, path: str) -> Schema:
    """The node of a field such as spec.serving.replicas."""
    first, *rest = path.split(".")
    node: Schema = _root(spec)[first]
    for name in rest:
        node = node["properties"][name]
    return node


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda spec: _at(spec, "spec.engine")["properties"].pop("args"), "v1alpha1.spec.engine.args: removed"),
        (lambda spec: _at(spec, "status")["properties"].pop("versions"), "v1alpha1.status.versions: removed"),
        (lambda spec: _at(spec, "spec")["required"].append("engine"), "v1alpha1.spec.engine: now required"),
        (
            lambda spec: _at(spec, "spec.serving.replicas").update(type="string"),
            "v1alpha1.spec.serving.replicas: type changed from integer to string",
        ),
        (
            lambda spec: _at(spec, "spec.serving.replicas").update(default=2),
            "v1alpha1.spec.serving.replicas: default changed from 1 to 2",
        ),
        (
            lambda spec: _at(spec, "spec.serving.replicas").update(maximum=10),
            "v1alpha1.spec.serving.replicas: maximum is now 10, was 1000000",
        ),
        (
            lambda spec: _at(spec, "spec.serving.replicas").update(minimum=1),
            "v1alpha1.spec.serving.replicas: minimum is now 1, was 0",
        ),
        (
            lambda spec: _at(spec, "spec.targetModel.uri").update(pattern="^x$"),
            "v1alpha1.spec.targetModel.uri: pattern changed from",
        ),
        (
            lambda spec: _at(spec, "spec.engine.type")["enum"].remove("VLLM"),
            "v1alpha1.spec.engine.type: values removed: VLLM",
        ),
        (
            lambda spec: _at(spec, "spec.targetModel.servedName").update(enum=["a"]),
            "v1alpha1.spec.targetModel.servedName: now an enum",
        ),
        (
            lambda spec: _at(spec, "spec.rollout.steps")["items"]["properties"].pop("holdSeconds"),
            "v1alpha1.spec.rollout.steps[].holdSeconds: removed",
        ),
        (
            lambda spec: _at(spec, "spec.draft")["x-kubernetes-validations"].append({"rule": "false", "message": "no"}),
            "v1alpha1.spec.draft: new rule: no",
        ),
        (
            lambda spec: _at(spec, "status.conditions").update({"x-kubernetes-list-map-keys": ["reason"]}),
            "v1alpha1.status.conditions: x-kubernetes-list-map-keys changed",
        ),
        (lambda spec: spec["versions"][0].update(served=False), "v1alpha1: no longer served"),
        (lambda spec: spec["versions"][0]["subresources"].pop("scale"), "v1alpha1: subresource scale changed"),
        (lambda spec: spec.update(scope="Cluster"), "scope: changed from Namespaced to Cluster"),
    ],
)
def test_a_change_that_breaks_objects_or_clients_is_found(change: Callable[[Schema], object], said: str) -> None:
    (found,) = _changed(change)
    assert found.startswith(said)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: _at(spec, "spec.serving")["properties"].update(more={"type": "string"}),
        lambda spec: _at(spec, "spec.engine.type")["enum"].append("TRT"),
        lambda spec: _at(spec, "spec.serving.replicas").update(maximum=2_000_000, description="More of them."),
        lambda spec: _at(spec, "spec.draft")["x-kubernetes-validations"].pop(),
        lambda spec: _at(spec, "spec.draft")["x-kubernetes-validations"][0].update(message="in other words"),
    ],
    ids=["a new field", "a new value", "a wider limit", "a rule less", "another message"],
)
def test_a_change_that_breaks_nothing_is_allowed(change: Callable[[Schema], object]) -> None:
    assert _changed(change) == []
