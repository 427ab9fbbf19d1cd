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
from updraft_inference.sidecar.hello import VLLM, Hello


@pytest.mark.parametrize(("has_been_there", "level"), [(False, logging.WARNING), (True, logging.ERROR)])
async def test_a_server_that_is_away_is_an_error_only_if_it_has_been_there(
    short_tmp_path: Path, caplog: pytest.LogCaptureFixture, level: int, *, has_been_there: bool
) -> None:
    clock = ManualClock()
    settings = InferenceSettings(model=short_tmp_path, engine="vllm", data_dir=short_tmp_path)
    tools = pod.Tools(settings=settings, metrics=Metrics(CollectorRegistry()), clock=clock)
    agent = composition._Agent(tools, Known(fingerprints=("sha256:t", "sha256:k")))
    if has_been_there:
        agent.server.hear(Hello.of(hello("worker"), VLLM))
    clock.advance(25)

    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(agent.watch())
        await until(lambda: bool(caplog.records), what="the news of it")
        watching.cancel()

    (record,) = caplog.records
    assert (record.getMessage(), record.levelno) == ("The draft does not learn from the server", level)
