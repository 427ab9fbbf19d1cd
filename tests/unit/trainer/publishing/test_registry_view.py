"""The trainer's view of the registry: where to start, and whether a new version would be tried."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.registry_view import RegistryView


@pytest.mark.parametrize(
    ("state", "why"),
    [
        pytest.param({"stable": 1}, "", id="free"),
        pytest.param({"stable": 1, "candidate": 2}, "", id="a canary of another version, which a newer one may follow"),
        pytest.param({"candidate": 1}, "version 1 is in canary, and is the first", id="a canary of the first"),
        pytest.param({"stable": 1, "pinned": 1}, "version 1 is pinned", id="pinned"),
        pytest.param({"candidate": 1, "paused": True}, "the rollout is paused", id="paused"),
    ],
)
async def test_nothing_is_published_while_it_would_not_be_tried_or_judged(
    state: dict[str, Any], why: str, tmp_path: Path
) -> None:
    async def answer(*_: object, **__: object) -> pb.ListResponse:
        return pb.ListResponse(speculators=[pb.SpeculatorState(speculator="default", **state)])

    stub: Any = SimpleNamespace(List=answer)
    view = RegistryView(stub, "default", tmp_path, Metrics(CollectorRegistry()), learning=pb.Learning)
    assert (await view.refresh()).hold_reason == why


@pytest.mark.parametrize(
    ("state", "phase", "start"),
    [
        pytest.param({"latest": 2}, pb.PHASE_REJECTED, 0, id="rejected"),
        pytest.param({"latest": 2}, pb.PHASE_FAILED, 0, id="cannot be loaded"),
        pytest.param({"latest": 2}, pb.PHASE_ROLLED_BACK, 0, id="taken back"),
        pytest.param({"latest": 2}, pb.PHASE_PENDING, 2, id="not tried yet"),
        pytest.param({"latest": 2, "stable": 1}, pb.PHASE_REJECTED, 1, id="rejected, while another serves"),
        pytest.param({"latest": 3, "previous": 1}, pb.PHASE_ROLLED_BACK, 1, id="taken back, after another has served"),
    ],
)
async def test_training_starts_from_what_serves_and_never_from_a_draft_that_was_turned_down(
    state: dict[str, Any], phase: pb.Phase.ValueType, start: int, tmp_path: Path
) -> None:
    async def answer(*_: object, **__: object) -> pb.ListResponse:
        speculator = pb.SpeculatorState(speculator="default", target_fingerprint="sha256:t", **state)
        return pb.ListResponse(speculators=[speculator], versions=[pb.Version(version=state["latest"], phase=phase)])

    stub: Any = SimpleNamespace(List=answer)
    view = RegistryView(stub, "default", tmp_path, Metrics(CollectorRegistry()), learning=pb.Learning)
    assert (await view.refresh()).start_version == start


async def test_orders_to_forget_are_read_when_there_are_new_ones(tmp_path: Path) -> None:
    times, orders = iter([0, 5, 5, 9]), iter([[(7, 5)], [(7, 5), (8, 9)]])

    async def answer(*_: object, **__: object) -> pb.ListResponse:
        speculator = pb.SpeculatorState(speculator="default", forgotten_unix_ms=next(times))
        return pb.ListResponse(speculators=[speculator])

    async def list_forgotten(*_: object, **__: object) -> pb.ListForgottenResponse:
        tenants = [pb.ForgottenTenant(hash=tenant, unix_ms=at_ms) for tenant, at_ms in next(orders)]
        return pb.ListForgottenResponse(tenants=tenants)

    stub: Any = SimpleNamespace(List=answer, ListForgotten=list_forgotten)
    view = RegistryView(stub, "default", tmp_path, Metrics(CollectorRegistry()), learning=pb.Learning)
    found = []
    for _ in range(4):
        await view.refresh()
        found.append(dict(view.forgotten))

    assert found == [{}, {"0" * 15 + "7": 5}, {"0" * 15 + "7": 5}, {"0" * 15 + "7": 5, "0" * 15 + "8": 9}]


async def test_demand_arrives_without_the_figures_that_a_registry_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = []

    async def report(request: pb.ReportTrainingRequest, **_: object) -> None:
        if request.HasField("learning"):
            raise InvalidInput("a name of 99 characters")
        taken.append(request.demand_tokens_per_second)

    stub: Any = SimpleNamespace(ReportTraining=report)
    view = RegistryView(stub, "default", tmp_path, Metrics(CollectorRegistry()), learning=lambda: pb.Learning(steps=1))
    for demand in (100.0, 200.0):
        view.set_demand(demand)
        await view.report()
    assert taken == [100.0, 200.0]
    assert [record.reason for record in caplog.records] == ["a name of 99 characters"], "once"  # type: ignore[attr-defined]
