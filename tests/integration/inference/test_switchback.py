"""One pod with the torch engine, and a registry process that compares two drafts on it."""

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.checkpoints import evaluation
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.publishing import publish
from tests.support.registry import CALL_S, RegistryProcess, client
from tests.support.tiny_target import make_tiny_target
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_inference.process import open_engine

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

A, B = 1, 2
SLICE_S = 2


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_tiny_target(tmp_path / MODEL)


async def test_two_drafts_take_turns_while_requests_run_and_change_nothing_that_they_say(
    target: Path, tmp_path: Path
) -> None:
    with RegistryProcess(tmp_path) as process:
        async with (
            client(process.address) as stub,
            running_pod(
                tmp_path,
                open_engine=open_engine,
                registry_address=process.address,
                dtype="float32",
                num_slots=2,
                max_context=256,
                num_threads=1,
                lookahead=2,
            ) as pod,
        ):
            plain = await greedy(pod)
            assert await publish(target, process.address, seed=A) == A
            await until(lambda: serves(pod, A), what="the first draft")
            await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=by_switchback()), timeout=CALL_S)
            won = evaluation(baseline=A)
            assert await publish(target, process.address, seed=B, evaluation=won) == B

            turns = await taking_turns(pod, plain, num_turns=4)
            assert turns in ([A, B, A, B], [B, A, B, A])
            state = await state_of(stub)

            assert (state.stable, state.candidate) == (A, B)
            assert state.rollout.comparison == pb.COMPARISON_SWITCHBACK
            assert state.rollout.failures == 0
            assert await pod.metric('updraft_inference_swaps_total{outcome="refused"}') == 0
            await attributed(stub, pod)


def by_switchback() -> pb.RolloutPolicy:
    """A canary that never ends, in short slices."""
    return pb.RolloutPolicy(
        strategy=pb.STRATEGY_CANARY,
        steps=[pb.RolloutStep(pods_percent=100, hold_seconds=600)],
        analysis=pb.Analysis(
            interval_seconds=2 * SLICE_S,
            min_samples=10**6,
            comparison=pb.COMPARISON_SWITCHBACK,
            switchback_seconds=SLICE_S,
            max_acceptance_regression_percent=100,
            max_latency_regression_percent=100,
        ),
        progress_deadline_seconds=900,
    )


async def greedy(pod: RunningPod) -> str:
    """Of the model's drafts: left to itself the engine may well draft nothing, a step of so small a model is cheap."""
    updraft = {"drafter": "eagle3", "lookahead": 3}
    answer = await pod.complete("hello", max_tokens=48, temperature=0, ignore_eos=True, updraft=updraft)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def serves(pod: RunningPod, version: int) -> bool:
    return await pod.metric("updraft_inference_draft_version") == version


async def state_of(stub: "RegistryAsyncStub") -> pb.SpeculatorState:
    return (await stub.List(pb.ListRequest(speculator="default"), timeout=CALL_S)).speculators[0]


async def taking_turns(pod: RunningPod, plain: str, *, num_turns: int) -> list[int]:
    """The versions that served one after the other, from the second draft's first slice on, under requests all the time."""
    turns: list[int] = []
    is_over = asyncio.Event()

    async def load() -> None:
        while not is_over.is_set():
            assert await greedy(pod) == plain

    async def look() -> bool:
        version = int(await pod.metric("updraft_inference_draft_version"))
        if turns[-1:] != [version]:
            turns.append(version)
        return len(turns) > num_turns

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(load())
        await until(look, what=f"{num_turns} changes of the draft")
        is_over.set()
    return turns[1:]


async def attributed(stub: "RegistryAsyncStub", pod: RunningPod) -> None:
    """Wait until the registry knows of every step that was drafted, by its version."""

    async def are_all_known() -> bool:
        drafted = await pod.metric('updraft_inference_verify_steps_total{drafter="eagle3"}')
        known: dict[int, int] = defaultdict(int)
        for traffic in (await state_of(stub)).traffic:
            known[traffic.version] = traffic.verify_steps
        return known[A] > 0 and known[B] > 0 and known[A] + known[B] == drafted

    await until(are_all_known, what="the steps of both versions in the registry")
