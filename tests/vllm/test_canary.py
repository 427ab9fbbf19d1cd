"""A canary over two stock vLLM servers: a better draft is promoted and a worse one rolled back, by what the servers accept.

Both drafts claim to be better, so only the live comparison tells them apart. Nobody decides but the registry.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from tests.sglang.models import cycle
from tests.support.checkpoints import evaluation
from tests.support.redis_server import RedisServer
from tests.support.registry import CALL_S, RegistryProcess
from tests.support.tiny_target import DRAFT_VOCAB
from tests.support.wait import wait_until
from tests.vllm import build
from tests.vllm.agent import Agent, prepare
from tests.vllm.models import write_draft, write_target
from tests.vllm.server import START_S, Server, serving

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_artifacts import transfer
from updraft_chassis import rpc
from updraft_cli.models import importing

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * START_S + 1200), pytest.mark.lasts(150)]

WORDS = cycle()
PROMPTS = [WORDS[start : start + 3] for start in range(0, 42, 7)]
SLICE_S = 2
PLAIN, BETTER, WORSE = 0.4, 0.8, 0.1
"""The share of characters after which a draft is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Two servers with an agent each, and their registry."""

    folder: Path
    target: Path
    servers: Sequence[Server]
    agents: Sequence[Agent]
    registry: RegistryProcess

    def serves(self, version: int) -> bool:
        """Whether all servers hold this version and no other."""
        return {agent.metric("draft_version") for agent in self.agents} == {version}

    def version(self, number: int) -> pb.Version:
        with grpc.insecure_channel(self.registry.address) as channel:
            request = pb.GetRequest(speculator="default", version=number)
            return RegistryStub(channel).Get(request, timeout=CALL_S).version

    def is_over(self, number: int) -> bool:
        """Whether the canary of this version has an end."""
        return self.version(number).phase not in {pb.PHASE_PENDING, pb.PHASE_HELD, pb.PHASE_CANARY}

    def set_policy(self, policy: pb.RolloutPolicy) -> None:
        with grpc.insecure_channel(self.registry.address) as channel:
            request = pb.SetPolicyRequest(speculator="default", policy=policy)
            RegistryStub(channel).SetPolicy(request, timeout=CALL_S)

    def publish(self, quality: float, claim: pb.Evaluation | None = None) -> int:
        """A draft of this quality, with an evaluation as a trainer has one; return its version."""
        folder = write_draft(self.target, self.folder / f"draft-{quality}", quality=quality)
        manifest = importing.read(folder, "default", [importing.claim_of_model(self.target)])
        if claim is not None:
            manifest.source = pb.SOURCE_TRAINER
            manifest.evaluation.CopyFrom(claim)

        async def upload() -> int:
            async with rpc.channel(self.registry.address) as channel:
                answer = await transfer.upload(RegistryStub(channel), manifest, folder / transfer.WEIGHTS)
            return answer.version.version

        return asyncio.run(upload())

    def asked(self) -> tuple[list[list[list[int]]], float]:
        """By server what it says after each prompt; by vLLM's own counters how many tokens a verify step gave."""
        before = [server.drafted() for server in self.servers]
        answers = [_answers(server) for server in self.servers]
        drafted = [server.drafted().since(then) for server, then in zip(self.servers, before, strict=True)]
        return answers, sum(each.acceptance_length for each in drafted) / len(drafted)

    @contextmanager
    def under_load(self, expected: list[list[list[int]]]) -> Iterator[Callable[[], bool]]:
        """A client of each server that asks all prompts again and again; no answer may differ. Yields a check that raises
        what a client raised, and is true otherwise."""
        is_over = threading.Event()

        def ask(place: int) -> None:
            while not is_over.is_set():
                assert _answers(self.servers[place]) == expected[place], "no swap changes a token"

        with ThreadPoolExecutor(len(self.servers)) as threads:
            clients = [threads.submit(ask, place) for place in range(len(self.servers))]

            def goes_on() -> bool:
                return all(each.result() is None for each in clients if each.done())

            try:
                yield goes_on
            finally:
                is_over.set()
        assert goes_on()


def _answers(server: Server) -> list[list[int]]:
    return [server.greedy(prompt, 48) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path, redis_server: RedisServer) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("canary")
    target = write_target(folder / "target")
    prepare(target, plugin=folder / "plugin", seed=folder / "seed", draft_vocab=DRAFT_VOCAB)
    servers, agents = list[Server](), list[Agent]()
    with ExitStack() as stack:
        registry = stack.enter_context(RegistryProcess(folder, settle_seconds=0))
        for name in ("pod-0", "pod-1"):
            socket = tap_socket.with_name(name)
            agent = Agent(folder, target, socket, redis_server, registry, seed=folder / "seed", name=name)
            agents.append(stack.enter_context(agent))
            variables = {
                "PYTHONPATH": str(folder / "plugin"),
                "UPDRAFT_VLLM_SOCKET": str(socket),
                "UPDRAFT_VLLM_DRAFTING": "trained",  # a step of so small a target is too cheap for drafts to pay
            }
            opened = serving(target, folder / "seed", folder / f"server-{name}", variables=variables)
            servers.append(stack.enter_context(opened))
        wait_until(
            lambda: all(agent.metric("registry_connected") for agent in agents), what="both agents are in the fleet"
        )
        yield Fleet(folder=folder, target=target, servers=servers, agents=agents, registry=registry)


def test_a_better_draft_is_promoted_and_a_worse_one_rolled_back_by_what_two_servers_accept(fleet: Fleet) -> None:
    said, _ = fleet.asked()
    plain = fleet.publish(PLAIN)
    wait_until(lambda: fleet.serves(plain), what="the first draft on both servers")
    fleet.set_policy(by_canary())
    again, before = fleet.asked()
    assert again == said

    with fleet.under_load(said) as goes_on:
        better = fleet.publish(BETTER, evaluation(baseline=plain))
        wait_until(
            lambda: goes_on() and fleet.is_over(better), timeout_s=600, what="the end of the better draft's canary"
        )
        assert fleet.version(better).phase == pb.PHASE_STABLE, fleet.version(better).reason
        wait_until(lambda: fleet.serves(better), what="the better draft on both servers")
    _, promoted = fleet.asked()
    assert promoted > before + 0.5

    with fleet.under_load(said) as goes_on:
        worse = fleet.publish(WORSE, evaluation(baseline=better))
        wait_until(
            lambda: goes_on() and fleet.is_over(worse), timeout_s=600, what="the end of the worse draft's canary"
        )
        assert fleet.version(worse).phase == pb.PHASE_ROLLED_BACK, fleet.version(worse).reason
        assert "acceptance is significantly lower" in fleet.version(worse).reason
        wait_until(lambda: fleet.serves(better), what="the draft before on both servers")
    again, kept = fleet.asked()
    assert again == said
    assert kept > before + 0.5, "the draft before serves again"


def by_canary() -> pb.RolloutPolicy:
    """Short slices, and a limit of latency that two servers on two cores keep."""
    return pb.RolloutPolicy(
        strategy=pb.STRATEGY_CANARY,
        steps=[pb.RolloutStep(pods_percent=50, hold_seconds=2), pb.RolloutStep(pods_percent=100, hold_seconds=2)],
        analysis=pb.Analysis(
            interval_seconds=2 * SLICE_S,
            min_samples=20,
            switchback_seconds=SLICE_S,
            max_acceptance_regression_percent=2,
            max_latency_regression_percent=100,
        ),
        auto_rollback=True,
        progress_deadline_seconds=900,
    )
