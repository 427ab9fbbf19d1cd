"""Moves of traces to another Redis: who goes when, and what is left last."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import CONFIG
from tests.support.observed import FRESH, PASSWORDS, as_child, observed, pod, redis_urls

from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.redis import Place
from updraft_operator.manifests.redis_users import Role
from updraft_operator.planning.conditions import conditions
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed, UsersProblem
from updraft_operator.planning.plan import Plan, make_plan, objects
from updraft_operator.planning.traces.places import places

DEDICATED = {"traces": {"redis": {"mode": "Dedicated"}}}
NAMED = {"traces": {"redis": {"urlSecretRef": {"name": "mine"}}}}
OWN_URL = f"redis://updraft-administrator:{64 * 'a'}@qwen-redis.team.svc:6379/0"
BOTH = frozenset({Place.SHARED, Place.DEDICATED})
WITH_DEDICATED: OperatorConfig = replace(CONFIG, has_dedicated_redis=True)
SERVING, TRAINER = Ref("Deployment", "qwen-serving"), Ref("Deployment", "qwen-trainer")


def _observed(spec: dict[str, Any] | None = None, **more: Any) -> Observed:
    given = {"config": WITH_DEDICATED, "dedicated_url": OWN_URL, "dedicated_urls": redis_urls(OWN_URL, PASSWORDS)}
    return observed(spec, **{**given, **more})


def _applied(seen: Observed) -> dict[Ref, Child]:
    """Its objects as applied, after all pods were replaced."""
    return {child.ref: child for child in map(as_child, objects(seen))}


def _moving(spec: dict[str, Any], children: dict[Ref, Child], **more: Any) -> tuple[dict[Ref, Child], Observed]:
    """The objects after one more plan was applied, and what the next one sees."""
    seen = _observed(spec, children=children, **more)
    later = {**children, **_applied(seen)}
    return later, _observed(spec, children=later, **more)


def _plan(seen: Observed) -> Plan:
    return make_plan(seen, now_unix_s=0.0, now_s=0.0)


def test_pods_stay_where_they_are_until_the_new_redis_has_their_users() -> None:
    at_shared = _applied(_observed())
    for ready in (frozenset[Place](), frozenset({Place.SHARED})):
        _, seen = _moving(DEDICATED, at_shared, ready_places=ready)
        assert places(seen).targets == dict.fromkeys(Role, Place.SHARED)
        assert "the new Redis" in places(seen).waits
        assert Ref("StatefulSet", "qwen-redis") in seen.children
        plan = _plan(seen)
        assert [len(plan.users or ()), len(plan.dedicated_users)] == [2, 2]
        assert all(user.password_hash for user in (*(plan.users or ()), *plan.dedicated_users))


def test_pods_that_write_go_first_and_the_trainer_when_it_has_read_everything() -> None:
    children, seen = _moving(DEDICATED, _applied(_observed()), ready_places=BOTH)
    assert places(seen).targets == {Role.WRITER: Place.DEDICATED, Role.READER: Place.SHARED}
    assert places(seen).drains is Place.SHARED
    assert "has to say" in places(seen).waits
    _, seen = _moving(DEDICATED, children, ready_places=BOTH, unread=7)
    assert places(seen).targets[Role.READER] is Place.SHARED
    assert "7 traces" in places(seen).waits
    _, seen = _moving(DEDICATED, children, ready_places=BOTH, unread=0)
    assert places(seen).targets[Role.READER] is Place.DEDICATED
    assert places(seen).is_settled
    assert not places(seen).waits
    assert (_plan(seen).users, _plan(seen).leaves_shared) == ((), True)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"status": {"observedGeneration": 1, "replicas": 2, "updatedReplicas": 1}}, id="not replaced"),
        pytest.param({"status": {"observedGeneration": 0, "replicas": 1, "updatedReplicas": 1}}, id="not seen"),
    ],
)
def test_traces_are_not_counted_while_an_old_pod_may_write(more: dict[str, Any]) -> None:
    children, _ = _moving(DEDICATED, _applied(_observed()), ready_places=BOTH)
    rolling = {**children, SERVING: replace(children[SERVING], generation=1, **more)}
    seen = _observed(DEDICATED, children=rolling, ready_places=BOTH, unread=0)
    assert places(seen).drains is None
    assert places(seen).targets[Role.READER] is Place.SHARED
    assert "replaced" in places(seen).waits


def test_a_pod_that_ends_may_still_write() -> None:
    children, _ = _moving(DEDICATED, _applied(_observed()), ready_places=BOTH)
    children[SERVING] = replace(children[SERVING], status={"replicas": 1, "updatedReplicas": 1})
    pods = (pod("qwen-serving-1", is_ready=True), pod("qwen-serving-2", is_ending=True))
    seen = _observed(DEDICATED, children=children, ready_places=BOTH, unread=0, pods=pods)
    assert places(seen).drains is None
    assert places(replace(seen, pods=pods[:1])).drains is Place.SHARED


def test_users_of_the_former_redis_stay_until_the_last_pod_there_has_ended() -> None:
    children, _ = _moving(DEDICATED, _applied(_observed()), ready_places=BOTH)
    children, seen = _moving(DEDICATED, children, ready_places=BOTH, unread=0)
    ending = replace(seen, pods=(pod("qwen-trainer-1", "trainer", is_ending=True),))
    users = _plan(ending).users or ()
    assert [user.password_hash for user in users] == ["", ""], "they stay, and none is made"
    assert not _plan(ending).leaves_shared


@pytest.mark.parametrize("target", [{}, NAMED])
def test_a_dedicated_redis_goes_last_and_takes_its_volume_along(target: dict[str, Any]) -> None:
    claim = as_child(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "data-qwen-redis-0", "namespace": "team"},
        }
    )
    children = {**_applied(_observed(DEDICATED, ready_places=BOTH)), claim.ref: claim}
    server = Ref("StatefulSet", "qwen-redis")
    children, seen = _moving(target, children, ready_places=BOTH)
    assert places(seen).drains is Place.DEDICATED
    assert server not in _plan(seen).delete
    children, seen = _moving(target, children, ready_places=BOTH, unread=0)
    children, seen = _moving(target, children, ready_places=BOTH)
    assert server not in _plan(seen).delete, "an operator that has just started does not know what is left there"
    children, seen = _moving(target, children, ready_places=BOTH, unread=0)
    policy = children[server].live()["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert policy["whenDeleted"] == "Delete"
    assert server not in _plan(seen).delete, "its volume would stay, with everything that was written to it"
    owned = as_child(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {
                "name": "data-qwen-redis-0",
                "namespace": "team",
                "ownerReferences": [{"kind": "StatefulSet", "name": "qwen-redis", "uid": "1"}],
            },
        }
    )
    seen = replace(seen, children={**children, claim.ref: owned})
    plan = _plan(seen)
    gone = {Ref(kind, "qwen-redis") for kind in ("StatefulSet", "Service", "ConfigMap", "NetworkPolicy")}
    assert gone <= set(plan.delete)
    left = {ref: child for ref, child in seen.children.items() if ref not in gone}
    assert _plan(replace(seen, children=left)).dedicated_users == ()


def test_a_new_redis_that_does_not_start_says_why() -> None:
    ill = pod("qwen-redis-0", "redis", problem=("ImagePullBackOff", "cannot pull redis:9"))
    _, seen = _moving(DEDICATED, _applied(_observed()), pods=(ill,))
    assert places(seen).waits.endswith("its pod: cannot pull redis:9")
    problem = UsersProblem(reason="RedisUnreachable", message="no answer")
    first = _observed(DEDICATED, pods=(ill,), users_problem=problem)
    assert conditions(first)["TrainerReady"].message == "no answer; its pod: cannot pull redis:9"


def test_a_redis_that_the_spec_named_is_left_at_once() -> None:
    _, seen = _moving({}, _applied(_observed(NAMED)))
    assert places(seen).targets == dict.fromkeys(Role, Place.SHARED)


def test_a_redis_that_the_operator_has_no_more_is_left_at_once() -> None:
    gone = {"config": replace(WITH_DEDICATED, has_redis=False), "redis_url": ""}
    seen = _observed(DEDICATED, children=_applied(_observed()), **gone)
    assert places(seen).targets == dict.fromkeys(Role, Place.DEDICATED)


def test_without_a_move_nothing_is_said_and_there_is_no_other_redis() -> None:
    seen = _observed(children=_applied(_observed()))
    assert places(seen).is_settled
    assert not places(seen).waits
    assert Ref("StatefulSet", "qwen-redis") not in {
        Ref(each["kind"], each["metadata"]["name"]) for each in objects(seen)
    }


def test_an_operator_that_offers_none_makes_none() -> None:
    seen = observed(DEDICATED)
    assert places(seen).wanted is None
    conditions = _plan(seen).status or {}
    trainer = next(each for each in conditions["conditions"] if each["type"] == "TrainerReady")
    assert trainer["reason"] == "NoRedis"
    assert "Dedicated" in trainer["message"]


def test_passwords_of_the_two_redis_differ_and_the_administrators_is_nowhere() -> None:
    seen = _observed(DEDICATED, dedicated_urls={}, ready_places=BOTH)
    plan = _plan(seen)
    secrets = {each["metadata"]["name"]: each["stringData"]["url"] for each in plan.apply if each["kind"] == "Secret"}
    assert secrets == {f"qwen-dedicated-{role}": url for role, url in redis_urls(OWN_URL, FRESH).items()}
    assert 64 * "a" not in str(plan.apply)
