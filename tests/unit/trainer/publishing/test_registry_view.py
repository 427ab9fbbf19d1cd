"""When the registry would not try a new version, so that none is uploaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from updraft.registry.v1 import registry_pb2 as pb
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
