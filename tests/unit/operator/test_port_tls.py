"""TLS of the clients' port is turned on and off while pods serve."""

import base64
from typing import Any

import pytest
from tests.unit.operator.test_moves import controllers, lives
from tests.unit.operator.world import KEY, OWNER, World

from updraft_operator.planning.serving.tls_port import secret_problem
from updraft_operator.watching.x509 import new_authority, sign

SERVING = ("Deployment", KEY.namespace, "qwen-serving")


def pair(world: World, life_s: float = 86_400.0) -> dict[str, str]:
    now_s = world.clock.now()
    certificate, key = sign(new_authority(life_s, now_s), "qwen.team.svc", life_s, now_s)
    return {"tls.crt": certificate, "tls.key": key}


def give(world: World, data: dict[str, str]) -> None:
    encoded = {entry: base64.b64encode(text.encode()).decode() for entry, text in data.items()}
    metadata = {"name": "chat-tls", "namespace": KEY.namespace}
    world.cluster.set({"kind": "Secret", "metadata": metadata, "data": encoded})


def ports(world: World) -> set[str]:
    return {each["name"] for each in world.cluster.objects["Service", KEY.namespace, "qwen"]["spec"]["ports"]}


def template(world: World) -> str:
    return str(world.cluster.objects[SERVING]["spec"]["template"])


def accepted(world: World) -> Any:
    conditions = world.cluster.objects[OWNER]["status"]["conditions"]
    return next(each for each in conditions if each["type"] == "Accepted")


@pytest.fixture
def world() -> World:
    made = World()
    lives(made)
    return made


def test_the_former_port_stays_until_no_pod_has_it(world: World) -> None:
    give(world, pair(world))
    for serving, new in (({"tlsSecretRef": {"name": "chat-tls"}}, "https"), ({"tlsSecretRef": None}, "http")):
        world.spec(serving=serving)
        world.settle()
        assert f"'name': '{new}'" in template(world)
        assert ports(world) == {"http", "https"}
        controllers(world)
        world.settle()
        assert ports(world) == {new}


def test_pods_that_serve_stay_as_they_are_until_there_is_a_valid_pair(world: World) -> None:
    before, good = template(world), pair(world)
    world.spec(serving={"tlsSecretRef": {"name": "chat-tls"}})
    broken: list[dict[str, str]] = [
        {},
        {"tls.crt": good["tls.crt"]},
        {**good, "tls.key": pair(world)["tls.key"]},
        {"tls.crt": "none", "tls.key": "none"},
        pair(world, life_s=30.0),
    ]
    for data in broken:
        give(world, data)
        world.clock.advance(61.0)
        lives(world)
        assert template(world) == before, data.keys()
        assert "http" in ports(world)
        assert (accepted(world)["status"], accepted(world)["reason"]) == ("False", "SecretNotFound")
        assert "chat-tls" in accepted(world)["message"]
    give(world, pair(world))
    world.clock.advance(61.0)
    lives(world)
    assert "chat-tls" in template(world)
    assert ports(world) == {"https"}
    assert accepted(world)["status"] == "True"


@pytest.mark.parametrize(
    ("life_s", "says"),
    [
        pytest.param(30.0, "Secret chat-tls: its certificate has expired", id="expired"),
        pytest.param(None, "Secret chat-tls: it does not exist, or lacks an entry", id="missing"),
    ],
)
def test_the_refusal_of_a_secret_says_its_own_problem(world: World, life_s: float | None, says: str) -> None:
    if life_s is not None:
        give(world, pair(world, life_s=life_s))
        world.clock.advance(61.0)
    world.spec(serving={"tlsSecretRef": {"name": "chat-tls"}})
    seen = world.observe()
    assert seen is not None
    assert secret_problem(seen) == says
