"""What follows from one look: as little as possible, and nothing twice."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import CONFIG, CONFIG_WITHOUT_REDIS, speculator, templates
from tests.support.observed import (
    FRESH,
    NOW,
    NOW_S,
    PASSWORDS,
    as_child,
    connected,
    draft,
    draft_import,
    imported,
    is_empty,
    observed,
    redis_urls,
    settled,
    version,
    workload,
)

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, rules
from updraft_operator.planning import imports
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import ConnectionState, Observed, Refusal, RegistryView
from updraft_operator.planning.plan import Plan, hash_of, make_plan, objects, ref
from updraft_operator.planning.registry_calls import RegistryCall, RegistryVerb
from updraft_operator.planning.status import status

UNTOLD = 500.0
"""A moment of the clock that only runs forward."""


def _plan(observation: Observed, *, now_s: float = UNTOLD) -> Plan:
    return make_plan(observation, now_unix_s=NOW_S, now_s=now_s)


def _told(observation: Observed) -> Observed:
    """The same world, once its status was written."""
    new = status(observation, NOW, _plan(observation).upgrade)
    owner = observation.speculator.model_copy(update={"status": new})
    return replace(observation, speculator=owner)


def _applied(observation: Observed) -> set[Ref]:
    return {ref(each) for each in _plan(observation).apply}


# Objects


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({}, id="minimal"),
        pytest.param({"engine": {"type": "SGLang"}}, id="sglang"),
        pytest.param({"engine": {"type": "VLLM"}}, id="vllm"),
        pytest.param({"suspend": True}, id="suspended"),
        pytest.param({"traces": {"enabled": False}}, id="no traces"),
    ],
)
def test_in_a_settled_world_there_is_nothing_to_do(spec: dict[str, Any]) -> None:
    assert is_empty(_plan(_told(settled(spec))))


def test_only_what_differs_is_applied() -> None:
    observation = settled()
    lost = {where: child for where, child in observation.children.items() if where != ("Service", "qwen")}
    assert _applied(replace(observation, children=lost)) == {("Service", "qwen")}


def test_an_object_that_somebody_turned_is_set_right() -> None:
    observation = settled()
    where = Ref("PodDisruptionBudget", "qwen-serving")
    content = next(each for each in objects(observation) if ref(each) == where)
    turned = as_child({**content, "spec": {**content["spec"], "maxUnavailable": 0}})
    assert _applied(replace(observation, children={**observation.children, where: turned})) == {where}


def test_what_the_api_server_made_of_it_is_what_it_is() -> None:
    """Even if it looks different: it was applied as it is, and nobody has changed it since."""
    observation = settled()
    where = Ref("Service", "qwen")
    content = next(each for each in objects(observation) if ref(each) == where)
    other = as_child({**content, "spec": {}}, version="77")
    observation = replace(observation, children={**observation.children, where: other})
    assert _applied(replace(observation, settled={where: (hash_of(content), "77")})) == set()
    assert _applied(replace(observation, settled={where: (hash_of(content), "76")})) == {where}


def test_an_object_that_is_going_is_made_again_once_it_is_gone() -> None:
    observation = settled()
    where = Ref("Service", "qwen")
    content = next(each for each in objects(observation) if ref(each) == where)
    going = as_child({**content, "spec": {}}, metadata={"deletionTimestamp": "2026-11-25T12:00:00Z"})
    assert _applied(replace(observation, children={**observation.children, where: going})) == set()


def test_what_is_wished_no_longer_is_deleted_but_for_data() -> None:
    observation = settled()
    later = replace(observation, config=CONFIG_WITHOUT_REDIS, redis_url="")
    assert _plan(later).delete == (
        ("ConfigMap", "qwen-trainer"),
        ("Deployment", "qwen-trainer"),
        ("NetworkPolicy", "qwen-trainer"),
    )


def test_what_belongs_to_somebody_else_is_never_deleted() -> None:
    theirs = {where: replace(child, owner_uid="another") for where, child in workload("Deployment", "old", {}).items()}
    assert _plan(settled(children=theirs)).delete == ()


def test_a_claim_that_somebody_grew_stays_grown() -> None:
    observation = settled()
    where = Ref("PersistentVolumeClaim", "data-qwen-trainer-0")
    content = next(each for each in objects(observation) if ref(each) == where)
    spec = {**content["spec"], "resources": {"requests": {"storage": "50Gi"}}}
    grown = as_child({**content, "spec": spec})
    assert _applied(replace(observation, children={**observation.children, where: grown})) == set()


def test_the_job_of_an_import_runs_once_even_if_a_new_operator_would_write_another() -> None:
    observation = settled(registry=connected(), imports=(draft_import(),))
    (job,) = (each for each in _plan(observation).apply if each["kind"] == "Job")
    child = as_child(job)
    newer = replace(observation.config, images=replace(observation.config.images, operator="operator:2"))
    kept = replace(observation, children={**observation.children, child.ref: child}, config=newer)
    assert not any(each["kind"] == "Job" for each in _plan(kept).apply)


def test_an_import_is_done_once() -> None:
    observation = settled(registry=connected([version(4)]), imports=(draft_import(),), drafts=(draft(4),))
    assert _applied(observation) == {Ref("Job", imports.job_name(speculator(), draft_import()))}
    done = replace(observation, imports=(draft_import(status=imported(4)),))
    assert _applied(done) == set()


def test_an_import_waits_for_the_registry() -> None:
    assert _applied(settled(imports=(draft_import(),))) == set()


def test_the_number_of_pods_is_left_to_an_autoscaler() -> None:
    observation = settled()
    where = Ref("Deployment", "qwen-serving")
    scaled = replace(
        observation,
        children={**observation.children, where: replace(observation.children[where], is_scaled_by_others=True)},
    )
    (applied,) = _plan(scaled).apply
    assert "replicas" not in applied["spec"]


# What was refused


def _refusal(where: Ref, digest: str = "", reason: str = "NameConflict") -> Refusal:
    return Refusal(ref=where, digest=digest, reason=reason, message="x")


def test_what_was_refused_is_not_asked_for_again_until_it_is_another() -> None:
    observation = settled()
    where = Ref("Service", "qwen")
    content = next(each for each in objects(observation) if ref(each) == where)
    lost = replace(observation, children={each: child for each, child in observation.children.items() if each != where})
    assert _applied(replace(lost, refusals=(_refusal(where, hash_of(content)),))) == set()
    assert _applied(replace(lost, refusals=(_refusal(where, "another"),))) == {where}


@pytest.mark.parametrize(
    ("observation", "where"),
    [
        pytest.param(
            settled(redis_urls={**redis_urls(), Role.READER: ""}), Ref("Secret", "qwen-redis-reader"), id="Secret"
        ),
        pytest.param(settled(registry=connected([version(4)])), Ref("DraftVersion", "qwen-v4"), id="mirror"),
    ],
)
def test_what_has_no_mark_is_not_asked_for_again_either(observation: Observed, where: Ref) -> None:
    assert _applied(observation) == {where}
    assert _applied(replace(observation, refusals=(_refusal(where),))) == set()


def test_a_call_that_the_registry_refused_is_not_repeated_until_it_is_another() -> None:
    view = connected([version(3)], policy=pb.RolloutPolicy())
    (call,) = _plan(settled(registry=view)).calls
    refusals = (_refusal(call.ref, call.digest, "InvalidRollout"),)
    assert _plan(settled(registry=view, refusals=refusals)).calls == ()
    changed = {"rollout": {"revisionHistoryLimit": 3}}
    assert [each.verb for each in _plan(settled(changed, registry=view, refusals=refusals)).calls] == [
        RegistryVerb.SET_POLICY
    ]


def test_a_refused_pin_does_not_hinder_another() -> None:
    refusals = (_refusal(RegistryCall(verb=RegistryVerb.PIN, version=3).ref, "", "InvalidRollout"),)
    kept = connected([version(3), version(2, pb.PHASE_SUPERSEDED)])
    for number, calls in ((3, ()), (2, (RegistryCall(verb=RegistryVerb.PIN, version=2),))):
        spec = {"rollout": {"pinnedVersion": number}}
        assert _plan(settled(spec, registry=kept, refusals=refusals)).calls == calls


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        pytest.param("bad", "InvalidPodTemplate", id="the same spec"),
        pytest.param("good", "SpecAccepted", id="another spec"),
    ],
)
def test_a_refusal_is_over_once_something_else_is_wished(image: str, reason: str) -> None:
    where, children = Ref("Deployment", "qwen-serving"), settled().children
    bad = next(each for each in objects(observed({"engine": {"image": "bad"}})) if ref(each) == where)
    refusals = (_refusal(where, hash_of(bad), "InvalidPodTemplate"),)
    new_status = _plan(observed({"engine": {"image": image}}, children=children, refusals=refusals)).status
    assert new_status is not None
    (accepted,) = (each for each in new_status["conditions"] if each["type"] == "Accepted")
    assert accepted["reason"] == reason


MISMATCH = {
    "engine": {"type": "SGLang", "tensorParallelSize": 4},
    "serving": {"resources": {"limits": {"nvidia.com/gpu": 2}}},
}


KEY = {"engine": {"type": "VLLM", "args": ["--api-key=secret"]}}


@pytest.mark.parametrize(
    ("spec", "reason", "field"),
    [
        pytest.param(MISMATCH, "GPUMismatch", "spec.engine.tensorParallelSize is 4", id="another number of GPUs"),
        pytest.param(KEY, "KeyInArguments", "spec.serving.apiKeysSecretRef", id="a key in the arguments"),
    ],
)
def test_serving_pods_that_could_not_serve_well_are_not_made(spec: dict[str, Any], reason: str, field: str) -> None:
    plan = _plan(observed(spec))
    made = {ref(each) for each in plan.apply}
    assert not {name for _, name in made} & {"qwen-serving"}
    assert {Ref("StatefulSet", "qwen-registry"), Ref("Deployment", "qwen-trainer")} <= made
    assert plan.status is not None
    accepted = next(each for each in plan.status["conditions"] if each["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", reason)
    assert field in accepted["message"]


@pytest.mark.parametrize("engine", ["Torch", "SGLang"])
def test_serving_pods_keep_their_settings_until_the_number_of_gpus_is_right(engine: str) -> None:
    children = settled({"engine": {"type": engine}}).children
    plan = _plan(observed(MISMATCH, children=children))
    assert (plan.delete, {name for _, name in map(ref, plan.apply)} & {"qwen-serving"}) == ((), set())
    right = {
        "engine": {"type": "SGLang", "tensorParallelSize": 2},
        "serving": {"resources": {"limits": {"nvidia.com/gpu": 2}}},
    }
    assert Ref("Deployment", "qwen-serving") in _applied(observed(right, children=children))


# The operator's Redis: Secrets and users


def _secrets(observation: Observed) -> dict[str, str]:
    made = [each for each in _plan(observation).apply if each["kind"] == "Secret"]
    return {each["metadata"]["name"]: each["stringData"]["url"] for each in made}


def _users(observation: Observed) -> dict[str, RedisUser]:
    return {user.name.rpartition(".")[2]: user for user in _plan(observation).users or ()}


def test_each_role_gets_a_secret_with_its_user_and_a_new_password() -> None:
    expected = redis_urls(passwords=FRESH)
    observation = settled(redis_urls={})
    assert _secrets(observation) == {f"qwen-redis-{role}": expected[role] for role in Role}
    assert not any(user.password_hash for user in _users(observation).values()), "before it is kept in a Secret"
    assert _applied(settled()) == set()


def test_a_user_has_the_password_of_its_secret_and_the_keys_of_its_speculator() -> None:
    users = _users(settled())
    assert {role: user.password_hash for role, user in users.items()} == {
        role.value: hashed(PASSWORDS[role]) for role in Role
    }
    namespace = f"{CONFIG.installation}:team"
    assert {role: user.rules for role, user in users.items()} == {
        role.value: rules(role, namespace, "qwen") for role in Role
    }


@pytest.mark.parametrize("content", ["", "redis://:secret@own", "redis://own", f"redis://:{64 * 'x'}@own"])
def test_a_secret_without_a_password_of_its_own_gets_one(content: str) -> None:
    made = settled(redis_urls={**redis_urls(), Role.WRITER: content})
    assert _secrets(made) == {"qwen-redis-writer": redis_urls(passwords=FRESH)[Role.WRITER]}
    assert {role: bool(user.password_hash) for role, user in _users(made).items()} == {"writer": False, "reader": True}


@pytest.mark.parametrize(
    "spec", [{"traces": {"redis": {"urlSecretRef": {"name": "mine"}}}}, {"traces": {"enabled": False}}]
)
def test_without_the_operators_redis_there_is_no_secret_and_no_user(spec: Any) -> None:
    observation = settled(spec, redis_urls={})
    assert _applied(observation) == set()
    assert _plan(observation).users == ()


def test_another_redis_of_the_operator_keeps_the_passwords() -> None:
    new = redis_urls("redis://:other@new")
    assert _secrets(settled(redis_url="redis://:other@new")) == {f"qwen-redis-{role}": new[role] for role in Role}


@pytest.mark.parametrize("part", ["serving", "trainer"])
def test_a_former_password_stays_valid_until_all_pods_have_the_new_one(part: str) -> None:
    role = "writer" if part == "serving" else "reader"
    where, before = Ref("Deployment", f"qwen-{part}"), settled()
    assert not any(user.keeps_former for user in _users(before).values())
    changed = redis_urls(passwords=FRESH)
    assert _users(settled(children=before.children, redis_urls=changed))[role].keeps_former, (
        "its template is not applied"
    )
    child = settled(redis_urls=changed).children[where]
    for seen, is_kept in (
        ({"observedGeneration": 1, "replicas": 2, "updatedReplicas": 1}, True),
        ({"observedGeneration": 0, "replicas": 2, "updatedReplicas": 2}, True),
        ({"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2}, False),
    ):
        rolling = replace(child, generation=1, status=seen)
        users = _users(settled(children={where: rolling}, redis_urls=changed))
        assert users[role].keeps_former is is_kept


def test_users_stay_until_pods_have_ended() -> None:
    at = "2026-11-25T12:00:00Z"
    owner = speculator({"deletionPolicy": "Delete"}, finalizers=[names.FINALIZER], deletionTimestamp=at)
    assert _plan(observed(speculator=owner)).users is None


def _changed(before: Observed, after: Observed) -> set[str]:
    old, new = templates(objects(before)), templates(objects(after))
    return {name for name in old if old[name] != new[name]}


def test_another_redis_of_the_operator_restarts_the_pods_that_read_it() -> None:
    assert _changed(observed(), observed(redis_url="redis://new")) == {"qwen-serving", "qwen-trainer"}
    own: dict[str, Any] = {"traces": {"redis": {"urlSecretRef": {"name": "mine"}}}}
    assert _changed(observed(own), observed(own, redis_url="redis://new")) == set()
    off: dict[str, Any] = {"traces": {"enabled": False}}
    assert _changed(observed(off), observed(off, redis_url="redis://new")) == set()


def test_another_administrator_restarts_nothing() -> None:
    assert _changed(observed(), observed(redis_url="redis://admin:another@own")) == set()


def test_a_password_restarts_the_pods_of_its_role_and_shows_in_no_template() -> None:
    changed = redis_urls(passwords={**PASSWORDS, Role.WRITER: FRESH[Role.WRITER]})
    assert _changed(observed(), observed(redis_urls=changed)) == {"qwen-serving"}
    shown = str(templates(objects(observed())))
    assert not any(secret in shown for secret in (":secret@", *PASSWORDS.values(), *map(hashed, PASSWORDS.values())))


def test_a_password_that_is_on_its_way_into_the_secret_is_the_one_that_templates_are_marked_with() -> None:
    assert _changed(observed(redis_urls={}), observed(redis_urls=redis_urls(passwords=FRESH))) == set()


# The registry


@pytest.mark.parametrize(
    ("rollout", "view", "calls"),
    [
        pytest.param({}, connected([version(3)]), [], id="nothing differs"),
        pytest.param(
            {}, connected(policy=pb.RolloutPolicy()), [RegistryCall(verb=RegistryVerb.SET_POLICY)], id="policy"
        ),
        pytest.param(
            {"pinnedVersion": 3}, connected([version(3)]), [RegistryCall(verb=RegistryVerb.PIN, version=3)], id="pin"
        ),
        pytest.param({"pinnedVersion": 3}, connected([version(3)], pinned=3), [], id="pinned already"),
        pytest.param(
            {"pinnedVersion": 3},
            connected([version(3)], pinned=2),
            [RegistryCall(verb=RegistryVerb.PIN, version=3)],
            id="other",
        ),
        pytest.param(
            {"pinnedVersion": "NoDraft"},
            connected([version(3)]),
            [RegistryCall(verb=RegistryVerb.PIN)],
            id="pin to no draft",
        ),
        pytest.param(
            {"pinnedVersion": "NoDraft"}, connected([version(3)], pinned=0), [], id="pinned to no draft already"
        ),
        pytest.param({"pinnedVersion": "NoDraft"}, connected(), [], id="nothing to pin away from"),
        pytest.param({"pinnedVersion": 9}, connected([version(3)]), [], id="no such version"),
        pytest.param({"pinnedVersion": 3}, connected([version(3, pb.PHASE_REJECTED)]), [], id="a rejected version"),
        pytest.param({}, connected([version(3)], pinned=3), [RegistryCall(verb=RegistryVerb.UNPIN)], id="unpin"),
        pytest.param(
            {}, connected([version(3)], pinned=0), [RegistryCall(verb=RegistryVerb.UNPIN)], id="unpin from no draft"
        ),
        pytest.param({"paused": True}, connected([version(3)]), [RegistryCall(verb=RegistryVerb.PAUSE)], id="pause"),
        pytest.param({"paused": True}, connected([version(3)], paused=True), [], id="paused already"),
        pytest.param({"paused": True}, connected(), [], id="nothing to pause yet"),
        pytest.param({}, connected([version(3)], paused=True), [RegistryCall(verb=RegistryVerb.RESUME)], id="resume"),
        pytest.param(
            {"promotedVersion": 4},
            connected([version(3), version(4, pb.PHASE_HELD)]),
            [RegistryCall(verb=RegistryVerb.PROMOTE, version=4)],
            id="promote what waits",
        ),
        pytest.param(
            {"promotedVersion": 4},
            connected([version(3), version(4, pb.PHASE_CANARY)]),
            [RegistryCall(verb=RegistryVerb.PROMOTE, version=4)],
            id="promote what is tried",
        ),
        pytest.param({"promotedVersion": 3}, connected([version(3)]), [], id="promoted already"),
        pytest.param({"promotedVersion": 2}, connected([version(2, pb.PHASE_SUPERSEDED)]), [], id="promoted long ago"),
        pytest.param(
            {"promotedVersion": 4, "pinnedVersion": 3},
            connected([version(3), version(4, pb.PHASE_HELD)], pinned=3),
            [],
            id="a pin comes before a promotion",
        ),
    ],
)
def test_the_registry_is_told_what_it_does_not_do_yet(
    rollout: Any, view: RegistryView, calls: list[RegistryCall]
) -> None:
    made = _plan(settled({"rollout": rollout}, registry=view)).calls
    assert [(each.verb, each.version) for each in made] == [(each.verb, each.version) for each in calls]


@pytest.mark.parametrize("link", [ConnectionState.STARTING, ConnectionState.UNREACHABLE, ConnectionState.DENIED])
def test_a_registry_that_is_away_is_told_nothing_and_nothing_is_deleted(link: ConnectionState) -> None:
    view = connected([version(3)], paused=True, policy=pb.RolloutPolicy())
    away = RegistryView(connection=link, state=view.state, versions=view.versions)
    made = _plan(settled({"rollout": {"pinnedVersion": 3}}, registry=away, drafts=(draft(2),)))
    assert (made.calls, made.delete, made.draft_statuses) == ((), (), ())


@pytest.mark.parametrize(
    ("drafts", "is_retained", "calls"),
    [
        pytest.param((draft(3, retain=True),), False, [RegistryVerb.RETAIN], id="retain"),
        pytest.param((draft(3),), True, [RegistryVerb.RELEASE], id="release"),
        pytest.param((draft(3, retain=True),), True, [], id="retained"),
        pytest.param((), True, [], id="no object"),
    ],
)
def test_retention_is_what_the_objects_say(drafts: Any, *, is_retained: bool, calls: list[RegistryVerb]) -> None:
    view = connected([version(3, retain=is_retained)])
    assert [each.verb for each in _plan(settled(registry=view, drafts=drafts)).calls] == calls
