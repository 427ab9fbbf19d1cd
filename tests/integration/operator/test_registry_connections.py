"""The operator's connection to a registry that knows ServiceAccounts: tokens that are requested, and renewed unseen."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.checkpoints import TARGET, draft
from tests.support.clock import ManualClock
from tests.support.registry import client, publish, running
from tests.support.service_accounts import ACCOUNTS, AUDIENCE, ISSUER, OPERATOR, TRAINER, SigningKey, write_key_set
from tests.support.sim_pods import Behaviour, pods
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Forbidden
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import ConnectionState
from updraft_operator.planning.registry_calls import RegistryCall, RegistryVerb
from updraft_operator.planning.serving.attached import REPORTED_S
from updraft_operator.registry_connections import RegistryAddress, RegistryConnections

POLICY = pb.RolloutPolicy(strategy=pb.STRATEGY_MANUAL)
KEY, QWEN = SigningKey("signing-key"), Key("team", "default")


class ApiServer:
    """Gives tokens of one account, or none, and limits their lifetime."""

    def __init__(self, account: str, most_s: int = 3600) -> None:
        self.account = account
        self.most_s = most_s
        self.num_requests = 0
        self.is_forbidden = False

    async def token(self, audience: str, seconds: int) -> tuple[str, int]:
        self.num_requests += 1
        if self.is_forbidden:
            raise Forbidden("serviceaccounts/token is forbidden")
        life_s = min(seconds, self.most_s)
        return KEY.token(self.account, aud=[audience], expires_s=life_s), life_s


async def states(
    folder: Path, api: ApiServer, *, audience: str = AUDIENCE, num_requests: int = 1
) -> list[tuple[ConnectionState, str]]:
    """The states of the registry that the operator sees until so many tokens were requested, and it has an answer."""
    seen: list[tuple[ConnectionState, str]] = []
    keys = write_key_set(folder / "jwks", KEY)
    settings = {"issuer": ISSUER, "audience": AUDIENCE, "accounts": ACCOUNTS, "key_set": str(keys)}
    async with running(folder, **settings) as registry, asyncio.TaskGroup() as tasks:

        def note(key: Key) -> None:
            view = connections.view(key)
            seen.append((view.connection, view.problem))

        connections = RegistryConnections(tasks, api.token, SystemClock(), note, on_measurement=note, measured_s=5.0)
        connections.set_address(QWEN, RegistryAddress(address=registry.address, audience=audience))
        await until(lambda: bool(seen) and api.num_requests >= num_requests, what="an answer")
        if seen[-1][0] is ConnectionState.CONNECTED:
            await connections.call(QWEN, RegistryCall(verb=RegistryVerb.SET_POLICY), POLICY)
            await until(lambda: has_policy(connections), what="the registry has the policy")
        connections.close()
    return seen


async def test_numbers_that_move_are_told_at_their_own_pace_and_are_no_news(tmp_path: Path) -> None:
    news, measured, clock = list[Key](), list[Key](), ManualClock()
    busy = Behaviour(target=TARGET, requests_per_s=200.0, report_s=0.05)
    async with (
        running(tmp_path, settle_seconds=0.0) as registry,
        client(registry.address) as stub,
        pods(registry.address, 1, busy) as fleet,
        asyncio.TaskGroup() as tasks,
    ):
        await publish(stub, draft(1))
        await until(lambda: fleet[0].loaded.version == 1, what="the pod serves version 1")
        connections = RegistryConnections(
            tasks, ApiServer(OPERATOR).token, clock, news.append, on_measurement=measured.append, measured_s=30.0
        )
        connections.set_address(QWEN, RegistryAddress(address=registry.address, audience=AUDIENCE))
        await until(lambda: num_steps(connections) > 0, what="traffic")
        num_news, first = len(news), num_steps(connections)
        await until(lambda: num_steps(connections) > first + 1000, what="more traffic")
        assert len(measured) == 1
        clock.advance(30.0)
        await until(lambda: len(measured) == 2, what="the next time that it is told")
        assert len(news) == num_news
        connections.close()


async def test_a_connection_goes_on_when_other_cas_are_trusted(tmp_path: Path) -> None:
    async with running(tmp_path) as registry, asyncio.TaskGroup() as tasks:
        connections = RegistryConnections(
            *(tasks, ApiServer(OPERATOR).token, SystemClock(), lambda _: None),
            on_measurement=lambda _: None,
            measured_s=30.0,
        )
        address = RegistryAddress(address=registry.address, audience=AUDIENCE)
        connections.set_address(QWEN, address)
        await until(lambda: connections.view(QWEN).is_connected, what="an answer")
        connections.set_address(QWEN, replace(address, authorities="another CA"))
        assert connections.view(QWEN).is_connected
        connections.set_address(QWEN, replace(address, host="another.team.svc"))
        assert connections.view(QWEN).connection is ConnectionState.CONNECTING
        connections.close()


def num_steps(connections: RegistryConnections) -> int:
    """Verify steps in the registry's last state."""
    state = connections.view(QWEN).state
    return sum(traffic.verify_steps for traffic in state.traffic) if state is not None else 0


def has_policy(connections: RegistryConnections) -> bool:
    state = connections.view(QWEN).state
    return state is not None and state.policy.strategy == POLICY.strategy


async def test_pods_have_time_to_come_back_before_one_counts_as_missing(tmp_path: Path) -> None:
    clock, news = ManualClock(), list[Key]()
    async with running(tmp_path) as registry, asyncio.TaskGroup() as tasks:
        connections = RegistryConnections(
            tasks, ApiServer(OPERATOR).token, clock, news.append, on_measurement=news.append, measured_s=5.0
        )
        connections.set_address(QWEN, RegistryAddress(address=registry.address, audience=AUDIENCE))
        await until(lambda: bool(news), what="the first state")

        assert not connections.view(QWEN).has_all_pods
        clock.advance(REPORTED_S)
        assert connections.view(QWEN).has_all_pods
        connections.close()


async def test_the_operator_calls_with_a_token_for_this_registry(tmp_path: Path) -> None:
    assert {state for state, _ in await states(tmp_path, ApiServer(OPERATOR))} == {ConnectionState.CONNECTED}


async def test_a_token_is_renewed_without_a_moment_of_disconnection(tmp_path: Path) -> None:
    seen = await states(tmp_path, ApiServer(OPERATOR, most_s=1), num_requests=4)
    assert {state for state, _ in seen} == {ConnectionState.CONNECTED}


async def test_a_stream_with_a_new_token_that_tells_what_is_known_is_no_news(tmp_path: Path) -> None:
    news, api = list[Key](), ApiServer(OPERATOR, most_s=1)
    keys = write_key_set(tmp_path / "jwks", KEY)
    settings = {"issuer": ISSUER, "audience": AUDIENCE, "accounts": ACCOUNTS, "key_set": str(keys)}
    async with running(tmp_path, **settings) as registry, asyncio.TaskGroup() as tasks:
        connections = RegistryConnections(
            tasks, api.token, SystemClock(), news.append, on_measurement=lambda _: None, measured_s=0.0
        )
        assert connections.num_connected == 0
        connections.set_address(QWEN, RegistryAddress(address=registry.address, audience=AUDIENCE))
        await until(lambda: api.num_requests >= 4, what="three renewals")
        assert connections.num_connected == 1
        assert news == [QWEN], "the first stream alone"
        await connections.call(QWEN, RegistryCall(verb=RegistryVerb.SET_POLICY), POLICY)
        await until(lambda: len(news) == 2, what="the policy is news")
        connections.close()


@pytest.mark.parametrize(
    ("account", "audience", "reason"),
    [
        pytest.param(OPERATOR, "updraft-registry/team/other", "another audience", id="token for another registry"),
        pytest.param("team:operator", AUDIENCE, "has no role", id="another account"),
    ],
)
async def test_another_token_is_denied_with_the_reason(
    account: str, audience: str, reason: str, tmp_path: Path
) -> None:
    ((state, problem), *_) = await states(tmp_path, ApiServer(account), audience=audience)
    assert state is ConnectionState.DENIED
    assert reason in problem


async def test_an_api_server_that_gives_no_token_is_named(tmp_path: Path) -> None:
    api = ApiServer(TRAINER)
    api.is_forbidden = True
    ((state, problem), *_) = await states(tmp_path, api)
    assert state is ConnectionState.UNREACHABLE
    assert "the operator gets no token for" in problem
