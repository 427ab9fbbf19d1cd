"""The engine's thread and the threads that torch keeps for it."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import make_tiny_target

from updraft_chassis.errors import Unavailable
from updraft_inference.engine import Drafter, GenerationRequest, SamplingParams
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.model.target import Target
from updraft_inference.torch_engine.scheduler.scheduler import Scheduler
from updraft_inference.torch_engine.sequence import Sequence
from updraft_inference.torch_engine.worker import Worker


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scheduler(tmp_path: Path) -> Scheduler:
    target = Target.open(make_tiny_target(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    return Scheduler(target, Limits(num_slots=1, max_context=32, max_lookahead=2), default=Drafter.NONE)


@pytest.mark.usefixtures("_two_threads")
async def test_while_it_runs_it_alone_computes_with_several_threads(scheduler: Scheduler) -> None:
    num_threads: list[int] = []
    worker = Worker(scheduler, on_failure=lambda: None)
    await worker.start()
    await worker.between_steps(lambda: num_threads.append(torch.get_num_threads()))
    assert (num_threads, torch.get_num_threads()) == ([2], 1)
    await worker.stop()
    assert torch.get_num_threads() == 2


async def test_what_an_effect_raises_is_its_callers_and_the_next_one_runs(scheduler: Scheduler) -> None:
    worker = Worker(scheduler, on_failure=lambda: None)
    await worker.start()

    def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await worker.between_steps(fail)
    assert await worker.between_steps(lambda: None) >= 0
    await worker.stop()


async def test_what_was_sent_too_late_is_refused(scheduler: Scheduler) -> None:
    worker = Worker(scheduler, on_failure=lambda: None)
    await worker.start()
    may_end = threading.Event()

    def wait() -> None:
        assert may_end.wait(10)

    worker.send(wait)

    async def send_late() -> None:
        with pytest.raises(Unavailable):
            await worker.between_steps(lambda: None)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.stop())
        await asyncio.sleep(0)
        tasks.create_task(send_late())
        await asyncio.sleep(0)
        may_end.set()


async def test_a_step_that_fails_ends_it_and_who_waits_is_told(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(scheduler, "step", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    has_failed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(has_failed.set)

    worker = Worker(scheduler, on_failure=tell)
    await worker.start()
    request = GenerationRequest(request_id="r", prompt_ids=(1, 2), max_tokens=4, sampling=SamplingParams(temperature=0))
    worker.send(lambda: scheduler.add(Sequence(request=request, emit=lambda _: None, ids=[1, 2])))
    await has_failed.wait()
    with pytest.raises(Unavailable):
        await worker.between_steps(lambda: None)
    assert not worker.is_running
    assert "no memory left" in str(worker.failure)
    await worker.stop()


async def test_after_the_end_nothing_waits_for_what_will_not_be_done(scheduler: Scheduler) -> None:
    worker = Worker(scheduler, on_failure=lambda: None)
    await worker.start()
    await worker.stop()
    assert not worker.is_running
    with pytest.raises(Unavailable):
        await worker.between_steps(lambda: None)
