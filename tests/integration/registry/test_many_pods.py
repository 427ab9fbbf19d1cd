"""A fleet of any size can be listed: messages have a maximum size, and a list has pages."""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import rpc
from updraft_cli.backends import registry_client
from updraft_registry.api.deltas import Deltas
from updraft_registry.api.fetching import Fetching, Limits
from updraft_registry.api.servicer import RegistryServicer
from updraft_registry.control import Control
from updraft_registry.fleet import Fleet, Session
from updraft_registry.messages import reports
from updraft_registry.metrics import Metrics
from updraft_registry.storage.archive import open_archive
from updraft_rollouts.policy import RolloutPolicy

NUM_PODS = 10_000
REASON = "the weights do not fit, because " + 450 * "x"


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A registry to which all of these pods have reported that they refuse a version."""
    fleet, metrics = Fleet(), Metrics(CollectorRegistry())
    for number in range(NUM_PODS):
        refused = fleet_pb2.DirectiveStatus(outcome=fleet_pb2.OUTCOME_NACK, version=2, reason=REASON)
        identity = fleet_pb2.PodIdentity(speculator="default", pod=f"pod-{number:05}", boot_id="1")
        fleet.report(Session(), reports.read(fleet_pb2.PodReport(identity=identity, status=refused)), 0.0)
    with ExitStack() as stack:
        archive = stack.enter_context(open_archive(tmp_path, defaults=RolloutPolicy(), max_draft_bytes=10**6))
        control = Control(archive, fleet, ManualClock(), metrics)
        stack.callback(control.join)
        deltas = Deltas(tmp_path / "deltas", archive.store, max_bytes=0, metrics=metrics)
        stack.callback(deltas.close)
        fetching = Fetching(archive, control, deltas, metrics, Limits(max_fetches=1, stall_s=1.0))
        stack.callback(fetching.close)
        server = rpc.server()
        servicer = RegistryServicer(archive, control, fetching, deltas, metrics)
        registry_pb2_grpc.add_RegistryServicer_to_server(servicer, server)
        port = rpc.bind(server, host="127.0.0.1", port=0, setting="none")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            control.close()
            await server.stop(grace=None)


async def test_ten_thousand_pods_with_refusals_are_listed_in_pages(address: str) -> None:
    async with registry_client.connected(address) as stub:
        pods = await registry_client.pods(stub, "default")
    assert sum(pod.ByteSize() for pod in pods) > rpc.MAX_MESSAGE_BYTES
    assert [pod.pod for pod in pods] == [f"pod-{number:05}" for number in range(NUM_PODS)]
    assert {(pod.refused, pod.problem) for pod in pods} == {(2, REASON)}


async def test_a_list_without_a_size_is_a_page_that_says_where_the_next_one_begins(address: str) -> None:
    async with registry_client.connected(address) as stub:
        page = await stub.ListPods(pb.ListPodsRequest(speculator="default"))
        last = await stub.ListPods(pb.ListPodsRequest(speculator="default", page_token=f"pod-{NUM_PODS - 2:05}"))
        one = await stub.ListPods(pb.ListPodsRequest(speculator="default", pod="pod-00007"))
    assert (len(page.pods), page.next_page_token) == (100, "pod-00099")
    assert ([pod.pod for pod in last.pods], last.next_page_token) == (["pod-09999"], "")
    assert ([pod.pod for pod in one.pods], one.next_page_token) == (["pod-00007"], "")
