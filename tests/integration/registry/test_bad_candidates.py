"""Candidates that are no good, in a fleet of 16 over real gRPC: the fleet is rid of them, and few pods ever saw them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.checkpoints import TARGET, draft, evaluation
from tests.support.registry import CALL_S, client, publish, running, state
from tests.support.sim_pods import Behaviour, Quality, SimPod, pods
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

PODS = 16
ONE_CANARY = 2
"""Ten percent of the pods."""
GOOD, BAD = 1, 2
FIRST_BAD, FIRST_GOOD = 1, 2

# The default policy in a hurry: slices of one second, holds of five.
POLICY = pb.RolloutPolicy(
    strategy=pb.STRATEGY_CANARY,
    steps=[pb.RolloutStep(pods_percent=10, hold_seconds=5), pb.RolloutStep(pods_percent=50, hold_seconds=5)],
    progress_deadline_seconds=50,
    analysis=pb.Analysis(interval_seconds=1, comparison=pb.COMPARISON_PODS),
)


@pytest.mark.attack(
    boundary="evidence",
    attack="a trainer that publishes a worse draft with an excellent evaluation",
    outcome="the canary rolls it back; no request fails",
)
async def test_a_draft_ten_percent_worse_is_rolled_back_with_no_request_failed(tmp_path: Path) -> None:
    worse = Behaviour(
        target=TARGET,
        report_s=0.3,
        requests_per_s=20.0,
        quality=lambda version: Quality(acceptance_length=2.7 if version == BAD else 3.0),
    )
    async with (
        running(tmp_path) as registry,
        client(registry.address) as stub,
        pods(registry.address, PODS, worse) as fleet,
    ):
        states = await _try(stub, fleet)
        ended = await _version(stub, BAD)
        assert ended.reason.startswith("acceptance is significantly lower by more than 2 %")
        assert max(now.rollout.failures for now in states) == 0
        assert sum(pod.num_failed for pod in fleet) == 0
        assert len(_touched(fleet)) <= ONE_CANARY
        await until(lambda: all(pod.loaded.version == GOOD for pod in fleet), what="all pods serve the good one again")


@pytest.mark.attack(
    boundary="evidence",
    attack="a draft that crashes the engine",
    outcome="rolled back after three crashes on the pods of one canary step",
)
async def test_a_draft_that_kills_the_engine_that_loads_it_is_rolled_back_after_few_crashes(tmp_path: Path) -> None:
    deadly = Behaviour(target=TARGET, report_s=0.3, requests_per_s=5.0, kills=lambda version: version == BAD)
    async with (
        running(tmp_path) as registry,
        client(registry.address) as stub,
        pods(registry.address, PODS, deadly) as fleet,
    ):
        await _try(stub, fleet)
        ended = await _version(stub, BAD)
        assert ended.reason.startswith("3 errors or crashes with the candidate, limit 2")
        assert sum(pod.num_crashes for pod in fleet) == 3
        assert len(_touched(fleet)) <= ONE_CANARY


async def test_a_first_version_serves_the_pods_of_a_canary_and_one_that_crashes_them_leaves_no_draft(
    tmp_path: Path,
) -> None:
    behaviour = Behaviour(
        target=TARGET,
        report_s=0.3,
        requests_per_s=20.0,
        quality=lambda _: Quality(acceptance_length=3.0),
        kills=lambda version: version == FIRST_BAD,
    )
    async with (
        running(tmp_path, settle_seconds=0.0) as registry,
        client(registry.address) as stub,
        pods(registry.address, PODS, behaviour) as fleet,
    ):
        await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=POLICY), timeout=CALL_S)
        await publish(stub, draft(FIRST_BAD))
        await until(lambda: _is(stub, FIRST_BAD, pb.PHASE_ROLLED_BACK), what="the first version is rolled back")
        assert (
            len({pod.name for pod in fleet if any(order.version == FIRST_BAD for order in pod.directives)})
            <= ONE_CANARY
        )
        await until(lambda: not any(pod.loaded.version for pod in fleet), what="no pod has a draft")
        await publish(stub, draft(FIRST_GOOD))
        await until(lambda: _is(stub, FIRST_GOOD, pb.PHASE_STABLE), what="the next one serves all")
        ended = await _version(stub, FIRST_GOOD)
        assert ended.reason.startswith("draft tokens are accepted: ")
        assert "against 1.00 tokens per step" in ended.reason


async def _is(stub: "RegistryAsyncStub", number: int, phase: "pb.Phase.ValueType") -> bool:
    return (await _version(stub, number)).phase == phase


async def _try(stub: "RegistryAsyncStub", fleet: Sequence[SimPod]) -> list[pb.SpeculatorState]:
    """Serve the good draft everywhere, publish the bad one, and wait for its end; what was the case meanwhile."""
    await publish(stub, draft(GOOD))
    await until(lambda: all(pod.loaded.version == GOOD for pod in fleet), what="all pods serve the good one")
    await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=POLICY), timeout=CALL_S)
    await publish(stub, draft(BAD), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=GOOD))
    states: list[pb.SpeculatorState] = []

    async def is_over() -> bool:
        states.append(await state(stub))
        return not states[-1].candidate

    await until(is_over, what="the canary is over")
    assert (await _version(stub, BAD)).phase == pb.PHASE_ROLLED_BACK
    return states


async def _version(stub: "RegistryAsyncStub", number: int) -> pb.Version:
    return (await stub.Get(pb.GetRequest(speculator="default", version=number), timeout=CALL_S)).version


def _touched(fleet: Sequence[SimPod]) -> set[str]:
    """Pods that were ever ordered to serve the bad one."""
    return {pod.name for pod in fleet if any(order.version == BAD for order in pod.directives)}
