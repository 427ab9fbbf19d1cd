"""A tensor-parallel rank of a real server that stands still for a while, and a swap meanwhile as an agent makes it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis.clock import SystemClock
from updraft_inference.agent.drafts import DraftFolder
from updraft_inference.agent.swap import Swapper
from updraft_inference.engine import DraftHolder
from updraft_inference.metrics import Metrics


async def check_a_hanging_swap_is_reported(server: DraftHolder, pid: int, folder: Path) -> None:
    """Go back from some version to none while the second rank hangs. `pid` is the server's main process."""
    swapper = Swapper(
        server,
        DraftFolder(folder),
        _fetch,
        metrics=Metrics(CollectorRegistry()),
        clock=SystemClock(),
        on_change=_ignore,
    )
    swapper.late.after_s, before = 0.5, server.loaded
    assert before.version
    async with asyncio.TaskGroup() as tasks:
        with _standing_still(_second_rank(pid)):
            swapper.accept(fleet_pb2.Directive(nonce="back", serve_version=0))
            running = tasks.create_task(swapper.run())
            await until(lambda: bool(swapper.late.reason), what="the report")
            assert "the swap to version 0 has not ended" in swapper.status.reason
            assert "it hangs and needs a restart" in swapper.status.reason
            assert server.loaded == before
        await until(lambda: swapper.status.outcome == fleet_pb2.OUTCOME_ACK, what="the end of the swap")
        running.cancel()
    assert (swapper.late.reason, server.loaded.version) == ("", 0)


def _second_rank(pid: int) -> psutil.Process:
    """vLLM and SGLang name the processes of their ranks."""
    children = psutil.Process(pid).children(recursive=True)
    (process,) = (child for child in children if any(word.endswith("_TP1") for word in child.cmdline()))
    return process


@contextmanager
def _standing_still(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def _fetch(version: int, digest: str | None) -> Path:
    raise AssertionError(f"version {version} is on disk")


def _ignore() -> None: ...
