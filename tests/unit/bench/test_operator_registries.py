"""The registries of the operator's benchmark: the operator takes them for real ones, and only their numbers move."""

import asyncio

from bench.operator.registries import registries
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.clock import SystemClock
from updraft_operator.planning.objects import Key
from updraft_operator.planning.registry_calls import RegistryCall, RegistryVerb
from updraft_operator.registry_connections import RegistryAddress, RegistryConnections

POLICY = pb.RolloutPolicy(strategy=pb.STRATEGY_MANUAL)


async def _token(audience: str, seconds: int) -> tuple[str, int]:
    return "token", seconds


async def test_numbers_of_many_registries_move_and_a_policy_is_kept() -> None:
    news, measured = list[Key](), list[Key]()
    keys = [Key("team", f"model-{number}") for number in range(5)]
    with registries(0.05) as port:
        async with asyncio.TaskGroup() as tasks:
            connections = RegistryConnections(
                tasks, _token, SystemClock(), news.append, on_measurement=measured.append, measured_s=0.0
            )
            for key in keys:
                connections.set_address(key, RegistryAddress(address=f"127.0.0.1:{port}", audience="any"))
            await until(lambda: set(news) == set(keys), what="all are connected")
            await connections.call(keys[0], RegistryCall(verb=RegistryVerb.SET_POLICY), POLICY)
            await until(lambda: _has_policy(connections, keys[0]), what="the policy comes back")
            news.clear()
            measured.clear()
            await until(lambda: set(measured) == set(keys), what="all numbers have moved")
            connections.close()
    assert news == []


def _has_policy(connections: RegistryConnections, key: Key) -> bool:
    state = connections.view(key).state
    return state is not None and state.policy.strategy == POLICY.strategy
