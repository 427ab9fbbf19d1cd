"""Pods of a former operator keep their templates until it is their turn, or until somebody asks for something else."""

import base64
import json
import random
import zlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.manifests import CONFIG, IMAGES, one, speculator
from tests.support.observed import NOW_S, as_child, observed, ready_pods, settled

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Draft, Spec
from updraft_operator.manifests.manifest import OperatorConfig, digest
from updraft_operator.manifests.tls.terms import Tls, TlsMode
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.plan import Plan, make_plan, objects, ref
from updraft_operator.planning.runtime.records import Turn

NEWER = replace(
    CONFIG,
    images=replace(IMAGES, inference="inference:2", trainer="trainer:2", registry="registry:2"),
    runtime="2",
)
"""The operator after an upgrade."""

SERVING, SETTINGS = Ref("Deployment", "qwen-serving"), Ref("ConfigMap", "qwen-serving")


def _plan(observation: Observed) -> Plan:
    return make_plan(observation, now_unix_s=NOW_S, now_s=0.0)


def _applied(observation: Observed) -> set[Ref]:
    return {ref(content) for content in _plan(observation).apply}


def _seen_by(config: OperatorConfig, observation: Observed, **more: Any) -> Observed:
    return replace(observation, config=config, **more)


def _asked(observation: Observed, spec: dict[str, Any]) -> Observed:
    """The same world after a change of the spec."""
    return replace(observation, speculator=speculator(spec, status={"runtime": {"current": "dev"}}))


def _image(observation: Observed) -> str:
    deployment = one(objects(observation), "Deployment", "qwen-serving")
    return str(deployment["spec"]["template"]["spec"]["containers"][0]["image"])


@pytest.mark.parametrize("engine", ["Torch", "SGLang", "VLLM"])
def test_a_newer_operator_restarts_nothing_before_the_turn(engine: str) -> None:
    newer = _seen_by(NEWER, settled({"engine": {"type": engine}}, pods=ready_pods()))
    assert _applied(newer) == set()
    upgrade = _plan(newer).upgrade
    assert upgrade is not None
    assert {held.ref.name for held in upgrade.held} == {"qwen-serving", "qwen-trainer", "qwen-registry"}
    assert (upgrade.current, upgrade.says.reason) == ("dev", "WaitingForTurn")


def test_the_turn_brings_all_templates_of_the_newer_operator_and_is_written_down() -> None:
    newer = _seen_by(NEWER, settled(pods=ready_pods()), has_turn=True)
    plan = _plan(newer)
    workloads = {ref(content): content for content in plan.apply if "template" in content.get("spec", {})}
    assert {each.name for each in workloads} == {"qwen-serving", "qwen-trainer", "qwen-registry"}
    annotations = workloads[SERVING]["metadata"]["annotations"]
    assert annotations[names.RUNTIME] == "2"
    assert Turn.read(annotations[names.TURN]) == Turn(since_s=NOW_S, num_ready=1, trains=True)
    after = replace(newer, children={**newer.children, **{each: as_child(workloads[each]) for each in workloads}})
    assert _applied(after) == set()


def test_a_change_of_the_spec_restarts_pods_at_once_with_the_newer_operators_template() -> None:
    newer = _asked(_seen_by(NEWER, settled(pods=ready_pods())), {"serving": {"maxRunningRequests": 9}})
    assert {SERVING, SETTINGS} <= _applied(newer)
    assert _image(newer) == "inference:2"


def test_a_change_for_the_trainer_leaves_inference_pods_alone() -> None:
    newer = _asked(_seen_by(NEWER, settled(pods=ready_pods())), {"trainer": {"env": [{"name": "A", "value": "b"}]}})
    assert _applied(newer) == {Ref("Deployment", "qwen-trainer")}


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"serving": {"replicas": 5}}, id="replicas"),
        pytest.param({"serving": {"rollingUpdate": {"maxSurge": 2}}}, id="rolling update"),
        pytest.param({"suspend": True}, id="suspended"),
    ],
)
def test_a_change_that_restarts_no_pod_is_made_without_another_template(spec: dict[str, Any]) -> None:
    before = settled(pods=ready_pods())
    newer = _asked(_seen_by(NEWER, before), spec)
    former = one(objects(before), "Deployment", "qwen-serving")["spec"]
    now = one(objects(newer), "Deployment", "qwen-serving")["spec"]
    assert SERVING in _applied(newer)
    assert now["template"] == former["template"]
    assert {name: now.get(name) for name in now if name != "template"} != {
        name: former.get(name) for name in former if name != "template"
    }


def test_a_template_that_waits_is_defended() -> None:
    before = settled(pods=ready_pods())
    edited = one(objects(before), "Deployment", "qwen-serving")
    edited["spec"]["template"]["spec"]["containers"][0]["image"] = "somebody/else:1"
    newer = _seen_by(NEWER, before, children={**before.children, SERVING: as_child(edited)})
    assert _applied(newer) == {SERVING}
    assert _image(newer) == "inference:1"


def test_settings_that_waiting_pods_read_at_a_restart_stay_as_they_were() -> None:
    before = settled(pods=ready_pods())
    emptied = as_child({**one(objects(before), "ConfigMap", "qwen-registry"), "data": {}})
    newer = _seen_by(replace(NEWER, account="another"), before, children={**before.children, emptied.ref: emptied})
    kept = one(objects(newer), "ConfigMap", "qwen-registry")["data"]
    assert kept == one(objects(before), "ConfigMap", "qwen-registry")["data"]
    assert _applied(newer) == {emptied.ref}


def test_fields_of_a_stateful_set_that_cannot_change_stay_as_they_are() -> None:
    before = settled(pods=ready_pods())
    registry = one(objects(before), "StatefulSet", "qwen-registry")
    claims = deepcopy(registry["spec"]["volumeClaimTemplates"])
    claims[0]["metadata"]["labels"] = {"of": "a former release"}
    kept = {"volumeClaimTemplates": claims, "podManagementPolicy": "OrderedReady"}
    former = as_child({**registry, "spec": {**registry["spec"], **kept}})
    now = replace(before, children={**before.children, former.ref: former})
    spec = one(objects(now), "StatefulSet", "qwen-registry")["spec"]
    assert {name: spec[name] for name in kept} == kept


def test_an_object_that_is_gone_is_made_by_the_newer_operator() -> None:
    before = settled(pods=ready_pods())
    newer = _seen_by(NEWER, before, children={at: child for at, child in before.children.items() if at != SERVING})
    assert _applied(newer) == {SERVING}
    assert _image(newer) == "inference:2"


def test_an_operator_that_makes_the_same_of_a_spec_only_signs_it() -> None:
    newer = _seen_by(replace(CONFIG, runtime="2"), settled(pods=ready_pods()))
    plan = _plan(newer)
    assert plan.upgrade is not None
    assert plan.upgrade.says.reason == "UpToDate"
    former = one(objects(settled()), "Deployment", "qwen-serving")
    signed = next(content for content in plan.apply if ref(content) == SERVING)
    assert signed["spec"] == former["spec"]
    assert signed["metadata"]["annotations"][names.RENDERED] == former["metadata"]["annotations"][names.RENDERED]


def test_tls_changes_at_once_because_somebody_asks_for_it() -> None:
    newer = _seen_by(replace(NEWER, tls=Tls(mode=TlsMode.SELF_SIGNED)), settled(pods=ready_pods()))
    assert one(objects(newer), "StatefulSet", "qwen-registry")["metadata"]["annotations"][names.RUNTIME] == "2"


@pytest.mark.parametrize(
    "spec",
    [
        {"suspend": True},
        {"deletionPolicy": "Delete"},
        {"rollout": {"paused": True, "strategy": "Manual", "pinnedVersion": 3}},
        {"updatePolicy": {"mode": "OnSpecChange"}},
        {"serving": {"replicas": 7, "rollingUpdate": {"maxSurge": 3}, "disruptionBudget": {"maxUnavailable": 4}}},
    ],
)
def test_a_field_that_is_not_remembered_is_in_no_template(spec: dict[str, Any]) -> None:
    before, after = (objects(settled(each)) for each in ({}, spec))
    for name in ("Deployment/qwen-serving", "Deployment/qwen-trainer", "StatefulSet/qwen-registry"):
        former, now = (one(made, *name.split("/")) for made in (before, after))
        assert now["spec"]["template"] == former["spec"]["template"]
        assert now["metadata"]["annotations"][names.RENDERED] == former["metadata"]["annotations"][names.RENDERED]


@pytest.mark.parametrize("rendered", ["", "text", "0123:45:text", "0123:45:eJwDAAAAAAE="])
def test_a_workload_whose_past_is_unknown_gets_the_template_at_once(rendered: str) -> None:
    before = settled(pods=ready_pods())
    child = replace(before.children[SERVING], rendered=rendered)
    newer = _seen_by(NEWER, before, children={**before.children, SERVING: child})
    assert _image(newer) == "inference:2"


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def _record(rendered: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(rendered.rpartition(":")[2])))
    return record


def _rendered(record: Any, *, mark: str = "") -> str:
    """As an operator writes it, of whatever template it is."""
    body = base64.b64encode(zlib.compress(json.dumps(record).encode())).decode()
    return f"0123:{mark or digest(record)}:{body}"


def _with_rendered(observation: Observed, rendered: str) -> Observed:
    child = replace(observation.children[SERVING], rendered=rendered)
    return replace(observation, children={**observation.children, SERVING: child})


@given(
    part=st.sampled_from(["template", "settings", "inputs", "spec", "marks", "places", "draft", "tls", ""]), value=JSON
)
def test_no_annotation_ends_a_plan(part: str, value: Any) -> None:
    before = settled(pods=ready_pods())
    record = _record(before.children[SERVING].rendered)
    changed = value if not part else {**record, part: value}
    if part in record["inputs"]:
        changed = {**record, "inputs": {**record["inputs"], part: value}}
    for config in (CONFIG, NEWER):
        assert _plan(_with_rendered(_seen_by(config, before), _rendered(changed))).upgrade is not None


@pytest.mark.parametrize("part", ["template", "settings", "inputs"])
def test_a_record_without_a_part_is_none(part: str) -> None:
    before = settled(pods=ready_pods())
    record = _record(before.children[SERVING].rendered)
    del record[part]
    assert _image(_with_rendered(_seen_by(NEWER, before), _rendered(record))) == "inference:2"


def test_a_record_that_somebody_edited_is_not_taken_for_the_operators() -> None:
    before = settled(pods=ready_pods())
    rendered = before.children[SERVING].rendered
    first, mark, _ = rendered.split(":")
    edited = {**_record(rendered), "template": {"spec": {"containers": []}}}
    body = _rendered(edited, mark=mark).rpartition(":")[2]
    tampered = _with_rendered(before, f"{first}:{mark}:{body}")
    written = one(objects(tampered), "Deployment", "qwen-serving")
    assert written["metadata"]["annotations"][names.RENDERED] == rendered
    assert _image(_seen_by(NEWER, tampered)) == "inference:2"


def test_a_record_is_not_inflated_beyond_what_one_has() -> None:
    before = settled(pods=ready_pods())
    record = _record(before.children[SERVING].rendered)
    record["settings"] = {"of": {"another": 2_000_000 * "x"}}
    assert len(_rendered(record)) < 100_000
    assert _image(_with_rendered(_seen_by(NEWER, before), _rendered(record))) == "inference:2"


def test_a_record_that_would_not_fit_into_an_annotation_is_not_written() -> None:
    text = base64.b64encode(random.Random(0).randbytes(300_000)).decode()
    before = settled({"trainer": {"env": [{"name": "A", "value": text}]}}, pods=ready_pods())
    annotations = one(objects(before), "Deployment", "qwen-trainer")["metadata"]["annotations"]
    assert names.RENDERED not in annotations
    assert annotations[names.RUNTIME] == "dev"
    assert names.RENDERED in one(objects(settled()), "Deployment", "qwen-trainer")["metadata"]["annotations"]
    assert Ref("Deployment", "qwen-trainer") in _applied(_seen_by(NEWER, before))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[1]", '["a", 1, true]', "no", "[1, 1e999, true]", "[1e999, 1, true]", "[NaN, 1, true]", "null"],
)
def test_a_turn_that_somebody_else_wrote_is_none(text: str) -> None:
    assert Turn.read(text) is None


@pytest.fixture
def another_default() -> Iterator[None]:
    """As in a release that chooses another number of draft tokens."""
    field = Draft.model_fields["lookahead"]
    former = field.default

    def choose(lookahead: int) -> None:
        field.default = lookahead
        for model in (Draft, Spec, AdaptiveSpeculator):
            model.model_rebuild(force=True)

    choose(former + 1)
    yield
    choose(former)


@pytest.fixture(params=[{}, {"lookahead": 3}], ids=["left out", "spelled out"])
def with_former_default(request: pytest.FixtureRequest) -> Observed:
    """The API server writes a default into an object when it is made."""
    return settled({"draft": {"intermediateSize": 1024, **request.param}}, pods=ready_pods())


def test_a_release_with_another_default_restarts_nothing_at_once(
    with_former_default: Observed, another_default: None
) -> None:
    spec = with_former_default.speculator.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    newer = _asked(_seen_by(NEWER, with_former_default), spec)
    plan = _plan(newer)
    assert {ref(content) for content in plan.apply} == set()
    assert plan.upgrade is not None
    assert len(plan.upgrade.held) == 3


def test_a_record_is_small() -> None:
    small = one(objects(observed()), "Deployment", "qwen-serving")["metadata"]["annotations"][names.RENDERED]
    assert len(small) < 6_000
