"""Whether an object still is what was applied."""

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.manifests import one
from tests.support.observed import as_child, observed

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.planning.compare import difference, is_current
from updraft_operator.planning.plan import objects

SPEC: dict[str, Any] = {"serving": {"resources": {"requests": {"cpu": "1000m", "memory": "1024Mi"}}}}


def _wished(spec: Any) -> Manifest:
    return {"kind": "X", "metadata": {"name": "x"}, "spec": spec}


@pytest.mark.parametrize(
    ("desired", "live", "path"),
    [
        pytest.param({"a": 1}, {"a": 1, "b": 2}, "", id="what others add is theirs"),
        pytest.param({"a": 1}, {"a": 2}, "spec.a", id="another value"),
        pytest.param({"a": 1}, {}, "spec.a", id="a value that is gone"),
        pytest.param({"a": {"b": 1}}, {"a": None}, "spec.a", id="a part that is gone"),
        pytest.param({"a": {"b": 1}}, {"a": 1}, "spec.a", id="a part that is a value"),
        pytest.param({"a": {}}, {}, "", id="an empty part and none are the same"),
        pytest.param({"a": []}, {}, "", id="an empty list and none are the same"),
        pytest.param({"a": None}, {"a": 1}, "", id="None says nothing"),
        pytest.param({"readOnly": False}, {}, "", id="false and absence are the same"),
        pytest.param({"readOnly": False}, {"readOnly": True}, "spec.readOnly", id="false and true are not"),
        pytest.param(
            {"automountServiceAccountToken": False},
            {},
            "spec.automountServiceAccountToken",
            id="absence of some fields means true",
        ),
        pytest.param({"a": [1, 2]}, {"a": [1, 2]}, "", id="a list"),
        pytest.param({"a": [1, 2]}, {"a": [2, 1]}, "spec.a[0]", id="order counts in a list of values"),
        pytest.param({"a": [1]}, {"a": [1, 2]}, "spec.a", id="a longer list of values"),
        pytest.param({"a": [1]}, {"a": "x"}, "spec.a", id="no list"),
        pytest.param(
            {"a": [{"name": "x", "v": 1}, {"name": "y"}]},
            {"a": [{"name": "z"}, {"name": "y"}, {"name": "x", "v": 1, "w": 1}]},
            "",
            id="named things in any order, and others beside them",
        ),
        pytest.param({"a": [{"name": "x", "v": 1}]}, {"a": [{"name": "x"}]}, "spec.a[x].v", id="a named thing"),
        pytest.param({"a": [{"name": "x", "v": 1}]}, {"a": []}, "spec.a[x]", id="a named thing that is gone"),
        pytest.param({"a": [{"name": "x"}]}, {"a": ["y"]}, "spec.a[x]", id="something without a name"),
        pytest.param(
            {"a": [{"key": "gpu", "effect": "a"}, {"key": "gpu", "effect": "b"}]},
            {"a": [{"key": "gpu", "effect": "a"}, {"key": "gpu", "effect": "b"}]},
            "",
            id="a key that tells nothing apart",
        ),
        pytest.param(
            {"a": [{"key": "gpu", "effect": "a"}, {"key": "gpu", "effect": "b"}]},
            {"a": [{"key": "gpu", "effect": "a"}, {"key": "gpu", "effect": "c"}]},
            "spec.a[1].effect",
            id="a difference below such a key",
        ),
        pytest.param({"cpu": "1000m"}, {"cpu": "1"}, "", id="a thousandth part"),
        pytest.param({"memory": "1024Mi"}, {"memory": "1Gi"}, "", id="binary amounts"),
        pytest.param({"cpu": 1}, {"cpu": "1"}, "", id="a number and its text"),
        pytest.param({"cpu": "500m"}, {"cpu": "1"}, "spec.cpu", id="another amount"),
        pytest.param({"a": "true"}, {"a": True}, "spec.a", id="a word is no truth"),
        pytest.param({"a": "x"}, {"a": "y"}, "spec.a", id="words are no amounts"),
    ],
)
def test_all_that_we_say_must_be_there(desired: Any, live: Any, path: str) -> None:
    assert difference(_wished(desired), {"spec": live}) == path


def _objects() -> list[Manifest]:
    return list(objects(observed(SPEC)))


def _deployment() -> Manifest:
    return one(_objects(), "Deployment", "qwen-serving")


def _as_the_api_server_holds_it(content: Manifest) -> Manifest:
    live = deepcopy(content)
    live["spec"] |= {"paused": False, "revisionHistoryLimit": 10}
    pod = live["spec"]["template"]["spec"]
    pod |= {"restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler"}
    for container in pod["containers"]:
        container["terminationMessagePath"] = "/dev/termination-log"
        container["resources"] = {"requests": {"cpu": "1", "memory": "1Gi"}}
    pod["volumes"].append({"name": "injected", "emptyDir": {}})
    pod["containers"].append({"name": "mesh", "image": "mesh:1"})
    live["metadata"]["labels"]["team"] = "mine"
    live["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "1"
    return live


def test_defaults_and_what_others_inject_cause_no_write() -> None:
    assert is_current(_deployment(), as_child(_as_the_api_server_holds_it(_deployment())))


@pytest.mark.parametrize("number", range(14))
def test_every_object_is_current_as_it_was_applied(number: int) -> None:
    content = _objects()[number]
    assert is_current(content, as_child(content))


def test_a_field_that_is_no_longer_wished_shows_in_the_hash() -> None:
    spec = {"serving": {"podTemplate": {"spec": {"hostname": "x"}}}}
    before = as_child(one(objects(observed(spec)), "Deployment", "qwen-serving"))
    desired = one(objects(observed()), "Deployment", "qwen-serving")
    assert difference(desired, before.live()) == ""
    assert not is_current(desired, before)


def test_the_mark_alone_does_not_make_an_object_current() -> None:
    content = _deployment()
    live = deepcopy(content)
    del live["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
    assert not is_current(content, as_child(live))


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param({"labels": {}}, id="labels"),
        pytest.param({"ownerReferences": []}, id="owner"),
        pytest.param({"annotations": {}}, id="the mark itself"),
    ],
)
def test_who_takes_our_metadata_away_is_noticed(metadata: dict[str, Any]) -> None:
    content = _deployment()
    assert not is_current(content, as_child(content, metadata=metadata))


def test_another_owner_of_the_same_name_hides_nothing() -> None:
    content = _deployment()
    (ours,) = content["metadata"]["ownerReferences"]
    theirs = {**ours, "kind": "Team", "uid": "another", "controller": False}
    assert is_current(content, as_child(content, metadata={"ownerReferences": [ours, theirs]}))


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for name, part in value.items() for leaf in _leaves(part, (*path, name))]
    if isinstance(value, list):
        return [leaf for number, part in enumerate(value) for leaf in _leaves(part, (*path, number))]
    return [path]


@settings(deadline=None)
@given(data=st.data())
def test_a_turned_value_is_always_noticed(data: st.DataObject) -> None:
    content = data.draw(st.sampled_from([each for each in _objects() if "spec" in each]))
    path = data.draw(st.sampled_from(_leaves(content["spec"])))
    live = deepcopy(content)
    inside: Any = live["spec"]
    for step in path[:-1]:
        inside = inside[step]
    value = inside[path[-1]]
    inside[path[-1]] = not value if isinstance(value, bool) else "turned"
    assert difference(content, live) != ""
    assert names.APPLIED in live["metadata"]["annotations"]
