"""What the watches said last: whose it is, and that older news are not believed."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.collecting import changing_at_collections

from updraft_chassis.errors import InvalidInput
from updraft_operator.api import names
from updraft_operator.planning.objects import Key, Ref, pack, unpack
from updraft_operator.watching.cluster import OURS
from updraft_operator.watching.store import Store, is_older, key_of

QWEN = Key("team", "qwen")


def _body(kind: str, name: str, version: int, *, owner: str = "qwen", **more: Any) -> dict[str, Any]:
    labels = {} if kind in OURS else {names.SPECULATOR: owner}
    metadata = {
        "name": name,
        "namespace": "team",
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
        "labels": labels,
    }
    spec: dict[str, Any] = {}
    if kind == "AdaptiveSpeculator":
        spec = {"targetModel": {"uri": "/m"}}
    elif kind == "DraftVersion":
        spec = {"speculatorRef": {"name": owner}, "source": "Trainer", "version": 1}
    elif kind == "DraftImport":
        spec = {"speculatorRef": {"name": owner}, "uri": "hf://org/draft"}
    return {"kind": kind, "metadata": {**metadata, **more.pop("metadata", {})}, "spec": spec, **more}


def test_speculators_are_counted_by_another_thread_while_they_come() -> None:
    store, numbers = Store(), itertools.count()

    def put() -> None:
        store.put("AdaptiveSpeculator", _body("AdaptiveSpeculator", f"model-{next(numbers)}", 1))

    for _ in range(5000):
        put()
    with changing_at_collections(put):
        assert len(store.speculators()) >= 5000
    assert len(store.speculators()) == next(numbers)


EACH = pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("AdaptiveSpeculator", "qwen"), ("DraftVersion", "qwen-v1"), ("DraftImport", "mine")),
        *(("Pod", "qwen-1"), ("ConfigMap", "qwen-serving")),
    ],
)


@EACH
def test_an_object_is_known_until_it_is_dropped(kind: str, name: str) -> None:
    store = Store()
    assert store.put(kind, _body(kind, name, 5)) == QWEN
    assert store.versions(kind) == {("team", name): "5"}
    assert store.owner(kind, "team", name) == QWEN
    store.drop(kind, QWEN, name, "6")
    assert store.versions(kind) == {}
    assert store.all_keys() == []


@EACH
def test_older_news_of_an_object_are_not_believed(kind: str, name: str) -> None:
    store = Store()
    store.put(kind, _body(kind, name, 9))
    assert store.put(kind, _body(kind, name, 10 - 2)) == QWEN
    assert store.versions(kind) == {("team", name): "9"}
    store.put(kind, _body(kind, name, 10))
    assert store.versions(kind) == {("team", name): "10"}


@EACH
def test_the_end_of_an_older_object_of_the_same_name_is_not_believed(kind: str, name: str) -> None:
    store = Store()
    store.put(kind, _body(kind, name, 9))
    store.drop(kind, QWEN, name, "8")
    assert store.versions(kind) == {("team", name): "9"}


@EACH
def test_without_a_version_the_end_is_believed(kind: str, name: str) -> None:
    store = Store()
    store.put(kind, _body(kind, name, 9))
    store.drop(kind, QWEN, name)
    assert store.versions(kind) == {}


def test_what_is_known_around_a_key_is_all_together() -> None:
    store = Store()
    ours = (("AdaptiveSpeculator", "qwen"), ("DraftVersion", "d"), ("DraftImport", "i"))
    for kind, name in (*ours, ("Pod", "p"), ("ConfigMap", "c")):
        store.put(kind, _body(kind, name, 1))
    store.put("ConfigMap", _body("ConfigMap", "another", 1, owner="other"))
    cached = store.cached(QWEN)
    assert cached.speculator is not None
    assert cached.speculator.metadata.name == "qwen"
    assert [each.metadata.name for each in cached.drafts] == ["d"]
    assert [each.metadata.name for each in cached.imports] == ["i"]
    assert [each.name for each in cached.pods] == ["p"]
    assert cached.children.keys() == {Ref("ConfigMap", "c")}
    assert store.speculators() == [QWEN]
    assert store.all_keys() == [Key("team", "other"), QWEN]


@pytest.mark.parametrize("kind", ["AdaptiveSpeculator", "DraftVersion"])
def test_what_only_a_newer_operator_can_read_is_one_resources_trouble(kind: str) -> None:
    store = Store()
    body = _body(kind, "qwen", 1)
    body["spec"] |= {"engine": {"type": "Another"}, "source": "Another"}
    store.put(kind, body)
    with pytest.raises(InvalidInput, match=f"{kind} qwen cannot be read: spec"):
        store.cached(QWEN)
    assert store.all_keys() == [QWEN]


def test_nothing_is_known_around_an_unknown_key() -> None:
    cached = Store().cached(QWEN)
    assert (cached.speculator, cached.children, cached.pods, (*cached.drafts, *cached.imports)) == (None, {}, (), ())


@pytest.mark.parametrize(
    ("kind", "metadata", "key"),
    [
        pytest.param("AdaptiveSpeculator", {}, QWEN, id="a speculator by its name"),
        pytest.param("ConfigMap", {"labels": {names.SPECULATOR: "other"}}, Key("team", "other"), id="by its label"),
        pytest.param("ConfigMap", {"labels": {}}, None, id="nobody's"),
        pytest.param("ConfigMap", {"labels": None}, None, id="without labels"),
    ],
)
def test_whose_an_object_is(kind: str, metadata: dict[str, Any], key: Key | None) -> None:
    assert key_of(kind, _body(kind, "qwen", 1, metadata=metadata)) == key


def test_who_takes_the_label_off_an_object_takes_it_from_its_speculator() -> None:
    store = Store()
    store.put("ConfigMap", _body("ConfigMap", "c", 1))
    assert store.put("ConfigMap", _body("ConfigMap", "c", 2, metadata={"labels": {}})) == QWEN
    assert store.cached(QWEN).children == {}
    assert store.put("ConfigMap", _body("ConfigMap", "c", 3, metadata={"labels": {}})) is None


def test_what_nobody_reads_is_not_kept() -> None:
    store = Store()
    body = _body("Deployment", "d", 1, status={"replicas": 1, "junk": 2}, metadata={"managedFields": [{"x": 1}]})
    store.put("Deployment", body)
    child = store.cached(QWEN).children[Ref("Deployment", "d")]
    assert child.status == {"replicas": 1}
    assert child.live().keys() == {"metadata", "spec"}
    assert child.live()["metadata"].keys() == {"labels", "annotations", "ownerReferences"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param([{"manager": "kube-controller-manager", "subresource": "scale"}], True, id="autoscaler"),
        pytest.param([{"manager": "keda-operator", "subresource": "scale"}], True, id="keda"),
        pytest.param([{"manager": "kubectl", "subresource": "scale"}], False, id="a person"),
        pytest.param([{"manager": "kube-controller-manager", "subresource": "status"}], False, id="status"),
        pytest.param([], False, id="nobody"),
    ],
)
def test_an_autoscaler_is_told_from_a_person(fields: list[dict[str, str]], *, expected: bool) -> None:
    store = Store()
    store.put("Deployment", _body("Deployment", "d", 1, metadata={"managedFields": fields}))
    assert store.cached(QWEN).children[Ref("Deployment", "d")].is_scaled_by_others is expected


@pytest.mark.parametrize(
    ("version", "cached", "expected"),
    [("9", "10", True), ("10", "9", False), ("9", "9", False), ("", "9", False), ("x", "9", False), ("9", "x", False)],
)
def test_versions_are_numbers_or_cannot_be_compared(version: str, cached: str, *, expected: bool) -> None:
    assert is_older(version, cached) is expected


events = st.lists(st.tuples(st.sampled_from(["put", "drop"]), st.integers(1, 9)), max_size=12)


@given(before=events, last=st.sampled_from(["put", "drop"]), late=events)
def test_news_that_come_late_change_nothing_once_the_newest_object_was_seen(
    before: list[tuple[str, int]], last: str, late: list[tuple[str, int]]
) -> None:
    store = Store()
    for event, number in [*before, ("put", 10), *late]:
        if event == "put":
            store.put("Pod", _body("Pod", "p", number))
        else:
            store.drop("Pod", QWEN, "p", str(number))
    assert store.versions("Pod") == {("team", "p"): "10"}
    if last == "drop":
        store.drop("Pod", QWEN, "p", "11")
        assert store.versions("Pod") == {}


@settings(max_examples=30)
@given(content=st.dictionaries(st.text(), st.recursive(st.text() | st.integers(), st.lists, max_leaves=5)))
def test_what_is_packed_is_unpacked_as_it_was(content: dict[str, Any]) -> None:
    assert unpack(pack(content)) == content
