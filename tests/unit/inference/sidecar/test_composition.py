"""What the agent says of a server that is away."""

import asyncio
import logging
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.tap_plugin import hello
from tests.support.wait import until

from updraft_inference import pod
from updraft_inference.metrics import Metrics
from updraft_inference.settings import InferenceSettings
from updraft_inference.sidecar import composition
from updraft_inference.sidecar.attached import Known
from updraft_inference.sidecar.hello import Hello
from updraft_inference.tap.server_kind import VLLM


@pytest.mark.parametrize(("has_been_there", "level"), [(False, logging.WARNING), (True, logging.ERROR)])
async def test_a_server_that_is_away_is_an_error_only_if_it_has_been_there(
    short_tmp_path: Path, caplog: pytest.LogCaptureFixture, level: int, *, has_been_there: bool
) -> None:
    agent, clock = beside_a_server(short_tmp_path)
    if has_been_there:
        agent.server.hear(Hello.of(hello("worker"), VLLM))
    clock.advance(25)

    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(agent.watch())
        await until(lambda: bool(caplog.records), what="the news of it")
        watching.cancel()

    (record,) = caplog.records
    assert (record.getMessage(), record.levelno) == ("The draft does not learn from the server", level)


async def test_the_plugin_of_a_server_that_still_starts_is_not_missed(
    short_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent, clock = beside_a_server(short_tmp_path)
    clock.advance(25)
    num_looks = 0

    def is_starting() -> bool:
        nonlocal num_looks
        assert not caplog.records
        num_looks += 1
        return num_looks < 3

    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(agent.watch(is_starting))
        await until(lambda: bool(caplog.records), what="the news of it")
        watching.cancel()

    assert num_looks == 3


def beside_a_server(folder: Path) -> tuple[composition._Agent, ManualClock]:
    """An agent beside a server that has not connected, and its clock."""
    clock = ManualClock()
    settings = InferenceSettings(model=folder, engine="vllm", data_dir=folder)
    tools = pod.Tools(settings=settings, metrics=Metrics(CollectorRegistry()), clock=clock)
    return composition._Agent(tools, Known(fingerprints=("sha256:t", "sha256:k"))), clock
