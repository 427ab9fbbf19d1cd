"""New passwords on request, through the real reconciler, also if the operator ends after any of its writes."""

import base64

import pytest
from tests.unit.operator.test_moves import MODES, controllers, lives
from tests.unit.operator.world import KEY, OWNER, World, run_now

from updraft_chassis.errors import Forbidden
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import Place, secret_name
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, password_of
from updraft_operator.planning import plan


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


def _template(world: World, part: str = "serving") -> Manifest:
    found: Manifest = world.cluster.objects["Deployment", KEY.namespace, f"qwen-{part}"]["spec"]["template"]
    return found


def test_a_redis_that_does_not_answer_is_waited_for_with_the_passwords_that_it_has() -> None:
    world = _world()
    before, template = _passwords(world), _template(world)
    world.streams.away.add("own")
    _ask(world)
    for _ in range(2):
        lives(world)
        assert _condition(world)[1:] == (
            "Rotating",
            "request 2026-11-30T21:00:00Z: Redis has to be ready, and to have the users",
        )
        assert _passwords(world) == before
        assert _template(world) == template
        world.restart()
    world.streams.away.clear()
    lives(world)
    assert _condition(world)[:2] == ("True", "Rotated")
    assert all(before[role] != new for role, new in _passwords(world).items())


def test_a_secret_that_may_not_be_written_changes_neither_pods_nor_users() -> None:
    world = _world()
    template, users = _template(world), _users(world)
    apply = world.cluster.apply

    async def refusing(content: Manifest, *, is_status: bool = False) -> Manifest:
        if content["kind"] == "Secret":
            raise Forbidden("it is immutable")
        return await apply(content, is_status=is_status)

    _ask(world)
    for _ in range(2):
        world.cluster.apply = refusing  # type: ignore[method-assign]
        lives(world)
        assert _template(world) == template
        assert {user.password_hash for user in _users(world).values()} == {
            each.password_hash for each in users.values()
        }
        assert "it is immutable" in _condition(world)[2]
        world.restart()
    world.cluster.apply = apply  # type: ignore[method-assign]
    lives(world)
    assert _condition(world)[:2] == ("True", "Rotated")


@pytest.mark.parametrize("part", ["serving", "trainer"])
def test_the_former_password_is_valid_until_former_pods_have_ended(part: str) -> None:
    world = _world()
    world.pod(part, 1, {"phase": "Running"})
    world.pod(part, 2, {"phase": "Running"})  # it ends
    _ask(world)
    lives(world)
    assert any(user.keeps_former for user in _users(world).values())
    assert _condition(world)[:2] == ("False", "Rotating")
    assert "have to end" in _condition(world)[2]
    world.pod(part, 2, None)
    lives(world)
    assert not any(user.keeps_former for user in _users(world).values())
    assert _condition(world)[:2] == ("True", "Rotated")


def test_no_two_redis_get_the_same_password() -> None:
    world = _world()
    world.streams.unread["own"] = 3
    world.spec(traces=MODES["Dedicated"])
    lives(world)
    _ask(world)
    lives(world)
    made = [*_passwords(world).values(), *_passwords(world, Place.DEDICATED).values()]
    assert len(set(made)) == 4


@pytest.mark.parametrize("request_text", ["x\n\x1b[31mFAKE", "x" * 65])
def test_a_request_with_any_other_text_is_refused(request_text: str) -> None:
    world = _world()
    before = _passwords(world)
    _ask(world, request_text)
    lives(world)
    assert _condition(world)[:2] == ("False", "InvalidRequest")
    assert _passwords(world) == before


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


def test_what_the_new_secrets_make_possible_is_done_soon_because_no_event_follows_from_them() -> None:
    world = _world()
    _ask(world)
    first = run_now(world.reconciler.reconcile(KEY))
    assert world.plan().apply, "pods read the new Secrets"
    assert first is not None
    assert first.needs_plan
    assert first.after_s < 1
    assert run_now(world.reconciler.reconcile(KEY)) is None
    assert not world.plan().apply


def test_writes_that_never_settle_are_made_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    world = _world()
    monkeypatch.setattr(plan, "_is_done", lambda *_: False)
    waits_s = [again.after_s for _ in range(4) if (again := run_now(world.reconciler.reconcile(KEY))) is not None]
    assert waits_s == [0.1, 0.2, 0.4, 0.8]
