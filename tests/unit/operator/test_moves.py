"""A move to another Redis through the real reconciler, also if the operator ends after any of its writes."""

from itertools import count
from typing import Any

import pytest
from tests.unit.operator.memory_cluster import Where
from tests.unit.operator.world import KEY, OWNER, World

from updraft_operator.manifests.manifest import Manifest

SHARED, OWN = "own", "qwen-redis.team.svc:6379/0"
SERVER: Where = ("StatefulSet", KEY.namespace, "qwen-redis")
CLAIM: Where = ("PersistentVolumeClaim", KEY.namespace, "data-qwen-redis-0")
_REPLACED = {"replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}
MODES: dict[str, Any] = {
    "Dedicated": {"redis": {"mode": "Dedicated"}},
    "Shared": {"redis": {"mode": "Shared"}},
    "Named": {"redis": {"mode": "Shared", "urlSecretRef": {"name": "mine"}}},
}


class _KilledError(Exception):
    """The operator ended."""


def _replace_pods(workload: Manifest) -> None:
    workload["status"] = {**_REPLACED, "observedGeneration": workload["metadata"]["generation"]}


def controllers(world: World) -> None:
    """Act as Kubernetes' own controllers: they replace pods, and make, hand over and delete volumes."""
    for kind, namespace, name in list(world.cluster.objects):
        if kind == "Deployment":
            world.cluster.edit((kind, namespace, name), _replace_pods)
    server, claim = world.cluster.objects.get(SERVER), world.cluster.objects.get(CLAIM)
    if server is None:
        return
    policy = server["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"]
    owners = (
        [{"kind": "StatefulSet", "name": SERVER[2], "uid": server["metadata"]["uid"]}] if policy == "Delete" else []
    )
    if "volumeClaimTemplates" not in server["spec"]:
        return
    labels = server["spec"]["volumeClaimTemplates"][0]["metadata"]["labels"]
    metadata: Manifest = {"name": CLAIM[2], "namespace": CLAIM[1], "labels": labels, "ownerReferences": owners}
    if claim is None or claim["metadata"]["ownerReferences"] != owners:
        world.cluster.set({"kind": CLAIM[0], "metadata": {**(claim or {}).get("metadata", {}), **metadata}})


def lives(world: World, *, until_write: int | None = None) -> None:
    """Look and let Kubernetes work until nothing changes; the operator ends once, after this write."""
    apply, delete, numbers = world.cluster.apply, world.cluster.delete, count(1)

    async def killing_apply(content: Manifest, *, is_status: bool = False) -> Manifest:
        answer = await apply(content, is_status=is_status)
        if next(numbers) == until_write:
            raise _KilledError
        return answer

    async def killing_delete(kind: str, namespace: str, name: str, uid: str) -> None:
        await delete(kind, namespace, name, uid)
        if next(numbers) == until_write:
            raise _KilledError

    world.cluster.apply, world.cluster.delete = killing_apply, killing_delete  # type: ignore[method-assign]
    try:
        for _ in range(20):
            before = len(world.cluster.writes)
            try:
                world.settle()
            except _KilledError:
                world.restart()
            controllers(world)
            world.clock.advance(61.0)
            if before == len(world.cluster.writes):
                return
        raise AssertionError("it never comes to rest")
    finally:
        world.cluster.apply, world.cluster.delete = apply, delete  # type: ignore[method-assign]


def _places(world: World) -> tuple[str, str]:
    """The Secrets that the templates of serving and of the trainer name."""
    found = []
    for part in ("serving", "trainer"):
        (container,) = world.cluster.objects["Deployment", "team", f"qwen-{part}"]["spec"]["template"]["spec"][
            "containers"
        ]
        (variable,) = (each for each in container["env"] if each["name"].endswith("_REDIS_URL"))
        found.append(variable["valueFrom"]["secretKeyRef"]["name"])
    return found[0], found[1]


def _after_a_move(start: str, end: str, until_write: int | None = None) -> World:
    world = World()
    world.spec(traces=MODES[start])
    lives(world)
    world.spec(traces=MODES[end])
    lives(world, until_write=until_write)
    return world


def _normal(world: World) -> dict[Where, Any]:
    """All objects, without identities and times; passwords are random."""
    return {
        where: each.get("spec", each.get("data", "")) if where[0] in ("StatefulSet", "NetworkPolicy") else ""
        for where, each in world.cluster.objects.items()
        if where[0] not in ("Event", "AdaptiveSpeculator")
    }


@pytest.mark.parametrize(("start", "end"), [("Shared", "Dedicated"), ("Dedicated", "Shared"), ("Dedicated", "Named")])
def test_an_operator_that_ends_after_any_write_of_a_move_is_followed_by_one_that_completes_it(
    start: str, end: str
) -> None:
    undisturbed = _after_a_move(start, end)
    expected, num_writes = _normal(undisturbed), len(undisturbed.cluster.writes)
    assert num_writes > 10
    for until_write in range(1, 25):
        world = _after_a_move(start, end, until_write)
        assert _normal(world) == expected, until_write
        assert _places(world) == _places(undisturbed), until_write
    assert (SERVER in expected) is (end == "Dedicated")
    assert (CLAIM in expected) is (end == "Dedicated"), "what was written to the volume goes with it"


def test_traces_that_nobody_has_read_hold_the_trainer_back_however_often_the_operator_starts() -> None:
    world = World()
    lives(world)
    world.streams.unread[SHARED] = 3
    world.spec(traces=MODES["Dedicated"])
    for _ in range(3):
        lives(world)
        assert _places(world) == ("qwen-dedicated-writer", "qwen-redis-reader")
        assert world.streams.left == []
        world.restart()
    world.streams.unread[SHARED] = 0
    lives(world)
    assert _places(world) == ("qwen-dedicated-writer", "qwen-dedicated-reader")
    assert world.streams.left == [SHARED], "its dead letters go too"


def test_a_new_redis_that_does_not_come_up_changes_nothing_for_the_pods() -> None:
    world = World()
    lives(world)
    world.streams.away.add(OWN)
    world.spec(traces=MODES["Dedicated"])
    lives(world)
    assert _places(world) == ("qwen-redis-writer", "qwen-redis-reader")
    world.streams.away.clear()
    lives(world)
    assert _places(world) == ("qwen-dedicated-writer", "qwen-dedicated-reader")


def test_a_person_who_changes_their_mind_in_the_middle_loses_nothing() -> None:
    world = World()
    lives(world)
    world.streams.unread[SHARED] = 3
    world.spec(traces=MODES["Dedicated"])
    lives(world)
    world.streams.unread[OWN] = 5
    world.spec(traces=MODES["Shared"])
    lives(world)
    assert _places(world) == ("qwen-dedicated-writer", "qwen-redis-reader"), "the move that has begun comes first"
    world.streams.unread[SHARED] = 0
    lives(world)
    assert _places(world) == ("qwen-redis-writer", "qwen-dedicated-reader"), "what was written meanwhile is read"
    world.streams.unread[OWN] = 0
    lives(world)
    assert _places(world) == ("qwen-redis-writer", "qwen-redis-reader")
    assert SERVER not in world.cluster.objects


def test_two_speculators_have_administrators_of_their_own() -> None:
    world = _after_a_move("Shared", "Dedicated")
    config = world.cluster.objects["ConfigMap", "team", "qwen-redis"]["data"]["redis.conf"]
    dedicated = world.reconciler._wiring.dedicated
    assert dedicated is not None
    address = dedicated.url(KEY)
    assert address.partition("@")[0].rpartition(":")[2] not in str(world.cluster.objects)
    assert address.endswith(f"@{OWN}")
    assert "user default off" in config
    assert dedicated.url(KEY._replace(name="other")).partition("@")[0] != address.partition("@")[0]


@pytest.mark.parametrize("mode", ["Dedicated", "Shared"])
def test_without_the_key_of_its_administrator_a_dedicated_redis_stays_as_it_is(mode: str) -> None:
    world = World()
    world.spec(traces=MODES["Dedicated"])
    lives(world)
    before = _normal(world)
    dedicated = world.reconciler._wiring.dedicated
    assert dedicated is not None
    dedicated.key, key = b"", dedicated.key
    world.spec(traces=MODES[mode], serving={"replicas": 3})
    lives(world)
    assert _normal(world) == before
    (ready,) = (each for each in world.cluster.objects[OWNER]["status"]["conditions"] if each["type"] == "TrainerReady")
    assert (ready["status"], ready["reason"]) == ("False", "NoRedis")
    dedicated.key = key
    lives(world)
    assert (SERVER in world.cluster.objects) is (mode == "Dedicated")


def _deletes_trainer(world: World) -> None:
    world.cluster.remove(("Deployment", KEY.namespace, "qwen-trainer"))


@pytest.mark.parametrize(("start", "end", "former"), [("Shared", "Dedicated", SHARED), ("Dedicated", "Shared", OWN)])
def test_a_trainer_that_somebody_deletes_in_a_move_reads_what_is_left_first(start: str, end: str, former: str) -> None:
    world = World()
    world.spec(traces=MODES[start])
    lives(world)
    world.streams.unread[former] = 3
    world.spec(traces=MODES[end])
    for is_deleted in (False, True, True):
        if is_deleted:
            _deletes_trainer(world)
            world.restart()
        lives(world)
        assert former not in world.streams.left
        assert ("dedicated" in _places(world)[1]) is (start == "Dedicated")
        assert SERVER in world.cluster.objects
    world.streams.unread[former] = 0
    lives(world)
    assert ("dedicated" in _places(world)[1]) is (end == "Dedicated")
    assert (SERVER in world.cluster.objects) is (end == "Dedicated")


def test_traces_that_waited_while_capture_was_off_are_read_after_a_move() -> None:
    world = World()
    lives(world)
    world.streams.unread[SHARED] = 3
    world.spec(traces={"enabled": False})
    lives(world)
    world.spec(traces={"enabled": True, **MODES["Dedicated"]})
    lives(world)
    assert world.streams.left == []
    assert _places(world) == ("qwen-dedicated-writer", "qwen-redis-reader")
    world.streams.unread[SHARED] = 0
    lives(world)
    assert _places(world) == ("qwen-dedicated-writer", "qwen-dedicated-reader")
    assert world.streams.left == [SHARED]


@pytest.mark.parametrize("storage", [{"size": "50Gi"}, {"claimName": "mine"}])
def test_a_dedicated_redis_stays_as_it_was_set_up_while_it_is_being_left(storage: Manifest) -> None:
    world = World()
    world.spec(traces={"redis": {"mode": "Dedicated", "storage": storage, "maxMemory": "20Gi"}})
    lives(world)
    before = _normal(world)
    config = world.cluster.objects["ConfigMap", KEY.namespace, "qwen-redis"]["data"]
    world.streams.unread[OWN] = 3
    world.spec(traces={"redis": None})
    lives(world)
    assert world.cluster.objects["ConfigMap", KEY.namespace, "qwen-redis"]["data"] == config
    assert _normal(world)[SERVER] == before[SERVER]
    spec, apply = before[SERVER], world.cluster.apply

    async def checked(content: Manifest, *, is_status: bool = False) -> Manifest:
        if content["kind"] == "StatefulSet" and content["metadata"]["name"] == SERVER[2]:
            assert {**content["spec"], "persistentVolumeClaimRetentionPolicy": 0} == {
                **spec,
                "persistentVolumeClaimRetentionPolicy": 0,
            }
        return await apply(content, is_status=is_status)

    world.cluster.apply = checked  # type: ignore[method-assign]
    world.streams.unread[OWN] = 0
    lives(world)
    assert SERVER not in world.cluster.objects
    assert CLAIM not in world.cluster.objects
