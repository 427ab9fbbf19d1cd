"""New passwords on request, through the real reconciler, also if the operator ends after any of its writes."""

import base64

import pytest
from tests.unit.operator.test_moves import MODES, controllers, lives
from tests.unit.operator.world import KEY, OWNER, World

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import Place, secret_name
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, password_of


def _world(mode: str = "Shared") -> World:
    world = World()
    world.spec(traces=MODES[mode])
    lives(world)
    return world


def _ask(world: World, request: str = "2026-11-30T21:00:00Z") -> None:
    def annotate(body: Manifest) -> None:
        body["metadata"]["annotations"] = {names.ROTATE: request, "mine": "x"}

    world.cluster.edit(OWNER, annotate)


def _passwords(world: World, place: Place = Place.SHARED) -> dict[Role, str]:
    found = {}
    for role in Role:
        content = world.cluster.objects["Secret", KEY.namespace, secret_name(KEY.name, role, place)]["data"]
        found[role] = password_of(base64.b64decode(content["url"]).decode())
    return found


def _users(world: World) -> dict[str, RedisUser]:
    return {user.name.rpartition(".")[2]: user for user in world.plan().users or ()}


def _condition(world: World) -> tuple[str, str, str]:
    (found,) = (
        each for each in world.cluster.objects[OWNER]["status"]["conditions"] if each["type"] == "PasswordsRotated"
    )
    return found["status"], found["reason"], found["message"]


@pytest.mark.parametrize(("mode", "place"), [("Shared", Place.SHARED), ("Dedicated", Place.DEDICATED)])
def test_a_request_replaces_both_passwords_once(mode: str, place: Place) -> None:
    world = _world(mode)
    before = _passwords(world, place)
    _ask(world)
    lives(world)
    after = _passwords(world, place)
    assert all(before[role] != after[role] for role in Role)
    lives(world)
    world.restart()
    lives(world)
    assert _passwords(world, place) == after, "each request is done once"
    _ask(world, "another")
    lives(world)
    assert all(after[role] != new for role, new in _passwords(world, place).items())


def test_the_former_password_is_valid_until_the_last_pod_is_replaced_and_the_status_says_what_is_missing() -> None:
    world = _world()
    _ask(world)
    world.settle()
    assert all(user.keeps_former for user in _users(world).values())
    assert _condition(world)[:2] == ("False", "Rotating")
    assert "2026-11-30T21:00:00Z: pods of qwen-serving have to be replaced" in _condition(world)[2]
    controllers(world)
    lives(world)
    assert not any(user.keeps_former for user in _users(world).values())
    assert {role: hashed(new) for role, new in _passwords(world).items()} == {
        Role(role): user.password_hash for role, user in _users(world).items()
    }
    assert _condition(world)[:2] == ("True", "Rotated")


def test_a_redis_that_does_not_answer_is_waited_for() -> None:
    world = _world()
    world.streams.away.add("own")
    _ask(world)
    lives(world)
    assert _condition(world)[1:] == (
        "Rotating",
        "request 2026-11-30T21:00:00Z: Redis has to forget the former passwords",
    )


def test_a_resource_without_such_users_has_nothing_to_replace() -> None:
    world = _world("Named")
    _ask(world)
    lives(world)
    assert _condition(world)[:2] == ("True", "NothingToRotate")


def test_an_operator_that_ends_after_any_write_is_followed_by_one_that_completes_the_request() -> None:
    for until_write in range(1, 10):
        world = _world()
        before = _passwords(world)
        _ask(world)
        lives(world, until_write=until_write)
        after = _passwords(world)
        assert all(before[role] != after[role] for role in Role), until_write
        assert not any(user.keeps_former for user in _users(world).values()), until_write
        assert _condition(world)[:2] == ("True", "Rotated"), until_write
