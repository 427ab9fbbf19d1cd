"""A registry that dies under a connected fleet: no truth is lost, and no pod moves."""

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import pytest
from tests.support.checkpoints import TARGET, draft, evaluation
from tests.support.registry import CALL_S, RegistryProcess, found_again, publish, registry_stub, state
from tests.support.sim_pods import Behaviour, Quality, SimPod, pods
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

NUM_PODS = 50

# A canary on a tenth of the pods that stays there: nothing is decided while the test looks.
POLICY = pb.RolloutPolicy(
    strategy=pb.STRATEGY_CANARY,
    steps=[pb.RolloutStep(pods_percent=10, hold_seconds=3600)],
    progress_deadline_seconds=7200,
    analysis=pb.Analysis(interval_seconds=1, min_samples=10**6),
)

BEHAVIOUR = Behaviour(
    target=TARGET,
    report_s=1.0,
    requests_per_s=20.0,
    quality=lambda version: Quality(acceptance_length=2.0 + 0.01 * version),
)


@pytest.fixture
async def fleet(process: RegistryProcess) -> AsyncIterator[list[SimPod]]:
    async with pods(process.address, NUM_PODS, BEHAVIOUR) as made:
        yield made


async def test_a_registry_that_is_killed_in_the_middle_of_a_canary_goes_on_with_it_and_no_pod_moves(
    process: RegistryProcess, fleet: list[SimPod]
) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        await publish(stub, draft(1))
        await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=POLICY), timeout=CALL_S)
        await until(lambda: loaded(fleet, 1) == NUM_PODS, what="all pods serve version 1")
        await publish(stub, draft(2), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=1))
        await until(lambda: loaded(fleet, 2) == NUM_PODS // 10, what="the canary's pods serve version 2")
        await until(lambda: _slices(stub, 3), what="there is evidence")
        before, moves = await state(stub), [len(pod.served) for pod in fleet]
        process.kill()
        await until(lambda: not any(pod.is_connected for pod in fleet), what="all pods notice")
        process.start()
        await found_again(channel)
        after = await state(stub)
        assert after.rollout.slices >= before.rollout.slices, "evidence outlives the registry"
        assert (after.stable, after.candidate, after.rollout.step) == (1, 2, before.rollout.step)
        await until(lambda: _connected(stub), what="all pods are back")
        await until(lambda: _slices(stub, after.rollout.slices + 2), what="the canary goes on")
        assert [len(pod.served) for pod in fleet] == moves, "nobody swapped"
        now = await state(stub)
        assert now.pods.serving_candidate == NUM_PODS // 10
        assert steps(now) > steps(before), "counters are the pods' own"
        history = await stub.History(pb.HistoryRequest(speculator="default"), timeout=CALL_S)
        assert [event.to_phase for event in history.transitions][:2] == [pb.PHASE_CANARY, pb.PHASE_PENDING]


async def test_a_fleet_that_lost_its_registry_comes_back_spread_over_seconds(
    process: RegistryProcess, fleet: list[SimPod]
) -> None:
    await until(lambda: all(pod.is_connected for pod in fleet), what="all pods are connected")
    process.kill()
    await until(lambda: all(pod.num_connects > 2 for pod in fleet), what="all pods try again and again")
    process.start()
    await until(lambda: all(pod.is_connected for pod in fleet), what="all pods are back")
    tries = [pod.num_connects for pod in fleet]
    assert max(tries) < 100, "nobody hammers a registry that is away"


async def test_draining_pods_are_not_counted_and_take_no_part_in_a_canary(
    process: RegistryProcess, fleet: list[SimPod]
) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        await publish(stub, draft(1))
        await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=POLICY), timeout=CALL_S)
        await until(lambda: loaded(fleet, 1) == NUM_PODS, what="all pods serve version 1")
        leaving = fleet[::2]
        for pod in leaving:
            pod.drain()
        await until(lambda: _connected(stub, NUM_PODS - len(leaving)), what="pods that drain are not counted")
        await publish(stub, draft(2), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=1))
        await until(lambda: loaded(fleet, 2) > 0, what="the canary has begun")
        assert loaded(leaving, 2) == 0
        await until(lambda: _on_candidate(stub, 3), what="a tenth of those that stay serve version 2")
        assert loaded(fleet, 2) == 3


def loaded(fleet: Sequence[SimPod], version: int) -> int:
    return sum(pod.loaded.version == version for pod in fleet)


def steps(seen: pb.SpeculatorState) -> int:
    return sum(traffic.verify_steps for traffic in seen.traffic)


async def _connected(stub: "RegistryAsyncStub", count: int = NUM_PODS) -> bool:
    return (await state(stub)).pods.connected == count


async def _on_candidate(stub: "RegistryAsyncStub", count: int) -> bool:
    return (await state(stub)).pods.serving_candidate == count


async def _slices(stub: "RegistryAsyncStub", count: int) -> bool:
    return (await state(stub)).rollout.slices >= count
