"""A user's pod template over ours."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.manifests import CONFIG, container, containers, named, pod_spec, speculator, templates

from updraft_operator.api import names
from updraft_operator.manifests import serving
from updraft_operator.manifests.merge import merged


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        pytest.param({"a": 1}, {"b": 2}, {"a": 1, "b": 2}, id="a new field"),
        pytest.param({"a": 1}, {"a": 2}, {"a": 2}, id="theirs wins"),
        pytest.param({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}, id="in depth"),
        pytest.param({"a": 1, "b": 2}, {"a": None}, {"b": 2}, id="None removes"),
        pytest.param({"a": {"b": 1}}, {"a": {"b": None}}, {"a": {}}, id="None removes in depth"),
        pytest.param(
            {"l": [{"name": "x", "v": 1, "w": 1}, {"name": "y"}]},
            {"l": [{"name": "z"}, {"name": "x", "v": 2}]},
            {"l": [{"name": "x", "v": 2, "w": 1}, {"name": "y"}, {"name": "z"}]},
            id="named things by name",
        ),
        pytest.param(
            {"l": [{"mountPath": "/a", "name": "x"}]},
            {"l": [{"mountPath": "/b", "name": "x"}]},
            {"l": [{"mountPath": "/b", "name": "x"}]},
            id="the name comes first",
        ),
        pytest.param({"l": [1, 2]}, {"l": [3]}, {"l": [3]}, id="other lists as a whole"),
        pytest.param({"l": [{"name": "x"}]}, {"l": ["y"]}, {"l": ["y"]}, id="lists of other things as a whole"),
        pytest.param({"l": [{"name": "x"}]}, {"l": []}, {"l": [{"name": "x"}]}, id="an empty list takes nothing away"),
        pytest.param(
            {"l": [{"key": "gpu", "effect": "a"}]},
            {"l": [{"key": "gpu", "effect": "a"}, {"key": "gpu", "effect": "b"}]},
            {"l": [{"key": "gpu", "effect": "a"}, {"key": "gpu", "effect": "b"}]},
            id="what a key does not tell apart, as a whole",
        ),
        pytest.param({"a": [1]}, {"a": {"b": 1}}, {"a": {"b": 1}}, id="another kind of value"),
    ],
)
def test_theirs_is_merged_over_ours(ours: dict[str, Any], theirs: dict[str, Any], expected: dict[str, Any]) -> None:
    assert merged(ours, theirs) == expected


def _pod(template: dict[str, Any]) -> dict[str, Any]:
    return pod_spec(speculator({"serving": {"podTemplate": template}}), "serving")


def test_what_a_pod_template_can_say_is_taken() -> None:
    pod = _pod(
        {
            "spec": {
                "nodeSelector": {"gpu": "yes"},
                "tolerations": [{"key": "gpu", "effect": "NoSchedule"}, {"key": "gpu", "effect": "NoExecute"}],
                "containers": [
                    {"name": "inference", "resources": {"limits": {"cpu": "2"}}},
                    {"name": "sidecar", "image": "side:1"},
                ],
                "volumes": [{"name": "extra", "emptyDir": {}}],
            }
        }
    )
    assert pod["nodeSelector"] == {"gpu": "yes"}
    assert len(pod["tolerations"]) == 2
    assert [each["name"] for each in containers(pod)] == ["inference", "sidecar"]
    assert container(pod, "inference")["resources"] == {"limits": {"cpu": "2"}}
    assert container(pod, "inference")["image"] == "inference:1"
    assert {"extra", "data", "access", "tmp"} <= named(pod["volumes"]).keys()


def test_a_user_may_take_our_fields_away() -> None:
    pod = _pod({"spec": {"topologySpreadConstraints": None, "securityContext": {"fsGroup": None}}})
    assert "topologySpreadConstraints" not in pod
    assert "fsGroup" not in pod["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is True


json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["x", "inference", "data"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.sampled_from(["name", "key", "x"]), inside),
    max_leaves=6,
)
metadata = st.fixed_dictionaries(
    {}, optional={"labels": json | st.just({names.SPECULATOR: "another", "team": "mine"}), "annotations": json}
)
podspecs = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("containers", "volumes", "nodeSelector", "tolerations", "securityContext"), json)
)
pod_templates = st.fixed_dictionaries({}, optional={"metadata": json | metadata, "spec": json | podspecs, "x": json})


@settings(deadline=None, max_examples=50)
@given(template=pod_templates)
def test_whatever_a_template_says_the_labels_of_selectors_stay(template: dict[str, Any]) -> None:
    """The API server may refuse what comes out; building it never fails."""
    made = serving.objects(speculator({"serving": {"podTemplate": template}}), CONFIG)
    labels = templates(made)["qwen-serving"]["metadata"]["labels"]
    assert labels.items() >= names.labels("qwen", names.SERVING).items()


@settings(max_examples=50)
@given(ours=st.dictionaries(st.sampled_from("abc"), json), theirs=st.dictionaries(st.sampled_from("abc"), json))
def test_merging_twice_is_merging_once(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    once = merged(ours, theirs)
    assert merged(once, theirs) == once


@given(ours=st.dictionaries(st.sampled_from("abc"), json))
def test_an_empty_template_changes_nothing(ours: dict[str, Any]) -> None:
    assert merged(ours, {}) == ours
