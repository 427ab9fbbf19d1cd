"""Redis moves and new passwords while Updraft is attached to pods of others, which follow when people restart them."""

import json
import re
from typing import Any

from tests.support.manifests import ATTACHED
from tests.unit.operator.test_moves import MODES, OWN, SHARED, controllers, lives
from tests.unit.operator.world import KEY, OWNER, World

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.merge import merged
from updraft_operator.manifests.redis_users import RedisUser

_RUNNING = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


def _restart(world: World, name: str) -> None:
    """Act as a person with `kubectl updraft attach`: the pod is replaced by one with the present additions."""
    described = world.cluster.objects["ConfigMap", KEY.namespace, f"{KEY.name}-attach"]["data"]
    metadata = {"name": name, "namespace": KEY.namespace, "labels": {"app": "vllm"}}
    body = {
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": [{"name": "server", "image": "vllm"}]},
        "status": _RUNNING,
    }
    whole = merged(body, json.loads(described["pod"]))
    assert isinstance(whole, dict)
    world.cluster.set(whole)
    _passes(world)


def _passes(world: World) -> None:
    world.clock.advance(301.0)
    lives(world)


def _world() -> World:
    world = World()
    world.spec(**ATTACHED)
    lives(world)
    for name in ("vllm-0", "vllm-1"):
        _restart(world, name)
    return world


def _secrets(content: Any) -> set[str]:
    """The Secrets with the address of Redis in a manifest."""
    return set(re.findall(r"qwen-(?:redis|dedicated)-(?:writer|reader)", json.dumps(content)))


def _trainer(world: World) -> set[str]:
    return _secrets(world.cluster.objects["Deployment", KEY.namespace, f"{KEY.name}-trainer"]["spec"])


def _writer(world: World) -> RedisUser:
    (found,) = (user for user in world.plan().users or () if user.name.endswith(".writer"))
    return found


def _reason(world: World, kind: str) -> str:
    found = world.cluster.objects[OWNER]["status"]["conditions"]
    return next((f"{each['reason']}: {each['message']}" for each in found if each["type"] == kind), "")


def test_the_trainer_follows_attached_pods_when_the_last_of_them_was_restarted() -> None:
    world = _world()
    world.streams.unread[SHARED] = 3
    world.spec(traces=MODES["Dedicated"])
    _passes(world)
    described = world.cluster.objects["ConfigMap", KEY.namespace, f"{KEY.name}-attach"]["data"]
    assert _secrets(described) == {"qwen-dedicated-writer"}
    assert "attached pods that write to the former Redis" in _reason(world, "Reconciling")
    _restart(world, "vllm-0")
    assert _trainer(world) == {"qwen-redis-reader"}, "vllm-1 writes there"
    assert len(world.plan().users or ()) == 2
    _restart(world, "vllm-1")
    assert _trainer(world) == {"qwen-redis-reader"}
    assert "3 traces" in _reason(world, "Reconciling")
    world.streams.unread[SHARED] = 0
    _passes(world)
    assert _trainer(world) == {"qwen-dedicated-reader"}
    assert world.plan().users == ()
    assert OWN not in world.streams.left


def test_without_attached_pods_a_move_waits_for_none() -> None:
    world = _world()
    for name in ("vllm-0", "vllm-1"):
        del world.cluster.objects["Pod", KEY.namespace, name]
    world.spec(traces=MODES["Dedicated"])
    _passes(world)
    assert _trainer(world) == {"qwen-dedicated-reader"}


def test_the_former_password_stays_valid_until_attached_pods_were_restarted() -> None:
    world = _world()
    assert not _writer(world).keeps_former

    def ask(body: Manifest) -> None:
        body["metadata"]["annotations"] = {names.ROTATE: "now"}

    world.cluster.edit(OWNER, ask)
    _passes(world)
    controllers(world)
    assert _writer(world).keeps_former
    assert "attached pods have to be restarted" in _reason(world, "PasswordsRotated")
    _restart(world, "vllm-0")
    assert _writer(world).keeps_former
    _restart(world, "vllm-1")
    assert not _writer(world).keeps_former
    assert _reason(world, "PasswordsRotated").startswith("Rotated")
