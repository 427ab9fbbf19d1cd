"""Peers that are silent, slow, or too fast: each is bounded, and nobody else notices."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry
from tests.support.checkpoints import draft
from tests.support.clock import ManualClock
from tests.support.registry import PodStream, Registry, publish, registry_stub
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.errors import Unavailable
from updraft_registry.api import fleet_servicer, publication
from updraft_registry.api.fleet_servicer import FleetServicer, Throttle
from updraft_registry.control import Control
from updraft_registry.fleet import Fleet
from updraft_registry.metrics import Metrics
from updraft_registry.storage.archive import Archive, open_archive
from updraft_rollouts.policy import RolloutPolicy


@dataclass
class Running:
    """A control on a folder, with the Fleet service in front of it."""

    archive: Archive
    control: Control
    channel: grpc.aio.Channel
    folder: Path

    def uploads(self) -> list[Path]:
        return list((self.folder / "uploads").iterdir())


@asynccontextmanager
async def running(folder: Path, timeouts: fleet_servicer.StreamTimeouts) -> AsyncIterator[Running]:
    metrics = Metrics(CollectorRegistry())
    with open_archive(folder, defaults=RolloutPolicy(), max_draft_bytes=10**6) as archive:
        # Its clock stands still: on a slow disk the pod would expire before its window is full.
        control = Control(archive, Fleet(), ManualClock(), metrics)
        server = rpc.server()
        fleet_pb2_grpc.add_FleetServicer_to_server(FleetServicer(control, metrics, timeouts), server)
        port = rpc.bind(server, host="127.0.0.1", port=0, setting="none")
        await server.start()
        # A window that is small and stays so, so that a few directives fill it.
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        async with (
            asyncio.TaskGroup() as tasks,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel,
        ):
            deciding = tasks.create_task(control.run())
            try:
                yield Running(archive=archive, control=control, channel=channel, folder=folder)
            finally:
                control.close()
                await server.stop(grace=None)
                deciding.cancel()
        control.join()


async def _then_silence() -> AsyncIterator[pb.PublishRequest]:
    yield pb.PublishRequest(manifest=draft(1).manifest())
    yield pb.PublishRequest(chunk=pb.Chunk(offset=0, data=draft(1).data[:10]))
    await asyncio.Event().wait()


async def _drip() -> AsyncIterator[pb.PublishRequest]:
    yield pb.PublishRequest(manifest=draft(1).manifest())
    while True:
        await asyncio.sleep(0)
        yield pb.PublishRequest(chunk=pb.Chunk(offset=0, data=b""))


@pytest.mark.attack(
    boundary="registry",
    attack="an upload that stalls, or drips for ever",
    outcome="it is ended, and its file is deleted",
)
@pytest.mark.parametrize(
    ("parts", "timeouts", "why"),
    [
        pytest.param(
            _then_silence,
            publication.UploadTimeouts(silence_s=0.1, bytes_per_s=1.0),
            "was silent for 0.1 s",
            id="silent",
        ),
        pytest.param(
            _drip,
            publication.UploadTimeouts(silence_s=0.2, bytes_per_s=1e9),
            "the upload took longer than",
            id="endless",
        ),
    ],
)
async def test_a_sender_that_does_not_come_to_its_end_is_given_up(
    tmp_path: Path, parts: object, timeouts: publication.UploadTimeouts, why: str
) -> None:
    assert callable(parts)
    async with running(tmp_path, fleet_servicer.STREAM_TIMEOUTS) as registry:
        with pytest.raises(Unavailable, match=why):
            await publication.publish(parts(), registry.archive, registry.control, timeouts)
        assert registry.uploads() == []


@pytest.mark.attack(boundary="registry", attack="a fleet stream on which nothing is sent", outcome="it is ended")
async def test_a_stream_on_which_no_pod_ever_reports_is_ended(tmp_path: Path) -> None:
    async with running(tmp_path, fleet_servicer.StreamTimeouts(first_report_s=0.1)) as registry:
        with pytest.raises(Unavailable, match=r"no report for 0.1 s"):
            await PodStream(registry.channel).receive()


@pytest.mark.attack(boundary="registry", attack="a pod that never reads its directives", outcome="it is disconnected")
async def test_a_pod_that_reads_nothing_is_hung_up_on(tmp_path: Path) -> None:
    async with running(tmp_path, fleet_servicer.StreamTimeouts(write_s=0.2)) as registry:
        registry.archive.set_policy("default", pb.RolloutPolicy(), 1)
        pod = PodStream(registry.channel)
        await pod.report()
        for i in range(5000):  # two orders in turn, of half a kibibyte, until the window is full
            pin = ("default", 0 if i % 2 else None, "x" * 480, i)
            await registry.control.change("default", registry.archive.catalogue.pin, *pin)
            if (await registry.control.state("default")).pods.connected == 0:
                break
        assert (await registry.control.state("default")).pods.connected == 0
        with pytest.raises(Unavailable, match=r"no directive was read for 0.2 s"):
            await _receive_all(pod)


async def _receive_all(pod: PodStream) -> None:
    while True:
        await pod.receive()


@pytest.mark.attack(
    boundary="registry",
    attack="a pod that floods the registry with reports",
    outcome="it is read slowly; other pods are served",
)
async def test_a_pod_that_reports_all_the_time_is_read_slowly_and_others_are_heard(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    flood, other = PodStream(channel, "flood"), PodStream(channel, "other")
    await other.report()
    await other.receive()

    async def report_on() -> None:
        while True:
            await flood.report()

    async with asyncio.TaskGroup() as tasks:
        flooding = tasks.create_task(report_on())
        await until(lambda: registry.metric("updraft_registry_reports_total") > 20, what="the flood has begun")
        await publish(registry_stub(channel), draft(1))
        await other.receive_version(1)
        await other.answer(fleet_pb2.OUTCOME_ACK, loaded=(1, draft(1).manifest().tensors_digest))
        assert registry.metric("updraft_registry_streams") == 2
        flooding.cancel()
    await other.end()
    flood.cancel()


def test_a_burst_passes_and_what_comes_after_it_comes_evenly() -> None:
    throttle = Throttle(burst=3, interval_s=0.5)
    assert [throttle.wait_s(10.0) for _ in range(6)] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.5]
    assert [throttle.wait_s(100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
