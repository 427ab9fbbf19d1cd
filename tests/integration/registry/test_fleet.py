"""`Fleet.Connect`: reports in, directives out, over a real connection."""

import asyncio
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from tests.support.checkpoints import OTHER_TARGET, Checkpoint, draft, evaluation
from tests.support.registry import CALL_S, PodStream, Registry, publish, state
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.errors import InvalidInput, NotFound, Unavailable
from updraft_registry.credits import FLOOR

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

ACK, NACK = fleet_pb2.OUTCOME_ACK, fleet_pb2.OUTCOME_NACK


def held(number: int, weights: Checkpoint) -> tuple[int, str]:
    return number, weights.manifest().tensors_digest


async def test_a_pod_is_told_what_to_serve_when_it_connects(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    pod = PodStream(channel)
    await pod.report()
    nothing = await pod.receive()
    assert (nothing.serve_version, nothing.reason) == (0, "no version serves yet")
    await publish(stub, draft(1))
    directive = await pod.receive()
    assert (directive.serve_version, list(directive.prefetch_versions)) == (1, [1])
    assert directive.serve_digest == draft(1).digest
    assert directive.serve_phase == pb.PHASE_STABLE
    assert not directive.HasField("capture"), "no trainer has said what it can use"
    await pod.end()


async def test_what_a_trainer_can_use_is_granted_to_the_pods_and_a_floor_without_it(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    async def granted(pod: PodStream) -> float:
        return (await pod.receive()).capture.payload_tokens_per_second

    await publish(stub, draft(1))
    pods = [PodStream(channel, f"pod-{i}") for i in range(2)]
    for pod in pods:
        await pod.report()
        await pod.receive()
    request = pb.ReportTrainingRequest(speculator="default", message="waits", demand_tokens_per_second=5000.0)
    await stub.ReportTraining(request, timeout=CALL_S)
    assert [await granted(pod) for pod in pods] == [2500.0, 2500.0]
    (state,) = (await stub.List(pb.ListRequest(), timeout=CALL_S)).speculators
    assert (state.demand_tokens_per_second, state.granted_tokens_per_second) == (5000.0, 5000.0)
    await pods[1].end()
    assert await granted(pods[0]) == 5000.0
    request.demand_tokens_per_second = 0.0
    await stub.ReportTraining(request, timeout=CALL_S)
    assert await granted(pods[0]) == FLOOR
    await pods[0].end()


@pytest.mark.parametrize("demand", [-1.0, float("nan"), float("inf")])
async def test_a_demand_that_cannot_be_is_refused(stub: "RegistryAsyncStub", demand: float) -> None:
    request = pb.ReportTrainingRequest(speculator="default", message="waits", demand_tokens_per_second=demand)
    with pytest.raises(InvalidInput, match=r"a demand of .+ tokens per second"), rpc.errors():
        await stub.ReportTraining(request, timeout=CALL_S)


async def test_a_pod_that_knows_its_directive_hears_nothing_more(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    await publish(stub, draft(1))
    pod = PodStream(channel)
    await pod.report()
    await pod.receive()
    await pod.answer(ACK, loaded=held(1, draft(1)))
    await publish(stub, draft(2), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=1))
    assert (await pod.receive()).serve_version == 2
    assert pod.num_directives == 2
    await pod.end()


async def test_a_pod_that_missed_a_directive_is_told_again(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    await publish(stub, draft(1))
    pod = PodStream(channel)
    await pod.report()
    first = await pod.receive()
    await pod.report(status=fleet_pb2.DirectiveStatus(nonce="older", outcome=ACK))
    assert await pod.receive() == first
    await pod.end()


async def test_the_state_tells_who_serves_what(channel: grpc.aio.Channel, stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1))
    pods = [PodStream(channel, f"pod-{i}") for i in range(3)]
    for pod in pods:
        await pod.report()
        await pod.receive()
    assert (await state(stub)).message == "version 1 is stable; waiting for 3 of 3 pods to load it"
    counters = fleet_pb2.VersionCounters(
        version=1, verify_steps=10, tokens=25, proposed=18, proposed_by_position=[10, 8], accepted_by_position=[8, 7]
    )
    for pod in pods:
        await pod.report(loaded=held(1, draft(1)), versions=[counters])
    await until(lambda: _serving(stub, 3), what="three pods serve")
    now = await state(stub)
    assert now.message == "version 1 is stable"
    assert (now.pods.connected, now.pods.failed) == (3, 0)
    assert (now.traffic[0].verify_steps, now.traffic[0].tokens) == (30, 75)
    assert list(now.traffic[0].proposed_by_position) == [30, 24]
    assert list(now.traffic[0].accepted_by_position) == [24, 21]
    for pod in pods:
        await pod.end()
    await until(lambda: _connected(stub, 0), what="all are gone")


async def test_a_version_that_a_pod_refuses_fails_and_the_one_before_serves(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    await publish(stub, draft(1))
    pod = PodStream(channel)
    await pod.report()
    await pod.receive()
    await pod.answer(ACK, loaded=held(1, draft(1)))
    await publish(stub, draft(2), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=1))
    await pod.receive_version(2)
    await pod.answer(NACK, loaded=held(1, draft(1)), reason="tensors_digest differs")
    assert (await pod.receive()).serve_version == 1
    await pod.answer(ACK, loaded=held(1, draft(1)))
    failed = await stub.Get(pb.GetRequest(speculator="default", version=2), timeout=CALL_S)
    assert failed.version.phase == pb.PHASE_FAILED
    assert failed.version.reason == "pod pod-0 could not load it: tensors_digest differs"
    again = await publish(stub, draft(2), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=1))
    assert (again.existed, again.version.phase) == (True, pb.PHASE_FAILED)
    assert (await state(stub)).stable == 1
    await pod.end()


async def test_a_pod_of_another_target_is_refused_with_both_and_counted(
    registry: Registry, channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    await publish(stub, draft(1))
    good = PodStream(channel, "good")
    await good.report()
    await good.receive_version(1)
    pod = PodStream(channel, target=OTHER_TARGET)
    await pod.report()
    with pytest.raises(InvalidInput, match=f"pod pod-0 cannot serve default: its target is {OTHER_TARGET}"):
        await pod.receive()
    assert registry.metric(f'updraft_registry_ended_streams_total{{status="{InvalidInput.status}"}}') == 1
    assert (await state(stub)).pods.connected == 1, "the other pod stays"
    await good.end()


async def test_a_newer_stream_of_the_same_pod_takes_over(channel: grpc.aio.Channel, stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1))
    old, new = PodStream(channel), PodStream(channel)
    await old.report()
    await old.receive()
    await new.report()
    await new.receive()
    with pytest.raises(Unavailable, match="a newer stream of the same pod took over"):
        await old.receive()
    assert (await state(stub)).pods.connected == 1
    await new.end()


async def test_a_report_that_cannot_be_ends_its_stream_only(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    good, bad = PodStream(channel, "good"), PodStream(channel, "bad")
    await good.report()
    await good.receive()
    await bad.report(prefetched_versions=range(1, 100))
    with pytest.raises(InvalidInput, match="a report on more than 64 versions"):
        await bad.receive()
    await publish(stub, draft(1))
    assert (await good.receive()).serve_version == 1
    await good.end()


async def test_a_hundred_pods_are_told_of_a_new_version(channel: grpc.aio.Channel, stub: "RegistryAsyncStub") -> None:
    pods = [PodStream(channel, f"pod-{i}") for i in range(100)]
    await asyncio.gather(*(pod.report() for pod in pods))
    await publish(stub, draft(1))
    await asyncio.gather(*(pod.receive_version(1) for pod in pods))
    await asyncio.gather(*(pod.answer(ACK, loaded=held(1, draft(1))) for pod in pods))
    await until(lambda: _serving(stub, 100), what="all serve version 1")
    for pod in pods:
        pod.cancel()
    await until(lambda: _connected(stub, 0), what="all are gone")


async def test_pods_are_a_metric(registry: Registry, channel: grpc.aio.Channel, stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1))
    pod = PodStream(channel)
    await pod.report()
    await pod.receive()
    await pod.answer(ACK, loaded=held(1, draft(1)))
    name = 'updraft_registry_pods{role="stable",speculator="default"}'
    await until(lambda: registry.metric(name) == 1.0, what="the metric counts the pod")
    await pod.end()


async def _serving(stub: "RegistryAsyncStub", count: int) -> bool:
    return (await state(stub)).pods.serving_stable == count


async def _connected(stub: "RegistryAsyncStub", count: int) -> bool:
    return (await state(stub)).pods.connected == count


async def test_pods_are_listed_as_they_reported_last_and_one_with_its_traffic(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    await publish(stub, draft(1))
    pods = [PodStream(channel, f"pod-{i}") for i in range(2)]
    served = fleet_pb2.VersionCounters(version=1, verify_steps=10, tokens=25)
    for number, pod in enumerate(pods):
        await pod.report(loaded=held(1, draft(1)), versions=[served], running_requests=number, device=f"cuda:{number}")
        await pod.receive()
    await pods[0].answer(NACK, loaded=held(1, draft(1)), reason="not finite")
    request = pb.ListPodsRequest(speculator="default")

    async def listed() -> list[pb.PodState]:
        return list((await stub.ListPods(request, timeout=CALL_S)).pods)

    async with asyncio.timeout(CALL_S):
        while not (refusing := await listed())[0].refused:
            pass  # each look is a call
    assert [(pod.pod, pod.loaded, pod.running_requests, pod.connected) for pod in refusing] == [
        ("pod-0", 1, 0, True),
        ("pod-1", 1, 1, True),
    ]
    assert (refusing[0].refused, refusing[0].problem, refusing[0].engine) == (1, "not finite", "test/1")
    assert [pod.device for pod in refusing] == ["", "cuda:1"], "the last report of pod-0 names none"
    assert not refusing[1].traffic
    one = (await stub.ListPods(pb.ListPodsRequest(speculator="default", pod="pod-1"), timeout=CALL_S)).pods[0]
    assert [(counted.version, counted.tokens) for counted in one.traffic] == [(1, 25)]
    with pytest.raises(NotFound, match="default has no pod pod-9"), rpc.errors():
        await stub.ListPods(pb.ListPodsRequest(speculator="default", pod="pod-9"), timeout=CALL_S)
    for pod in pods:
        await pod.end()
