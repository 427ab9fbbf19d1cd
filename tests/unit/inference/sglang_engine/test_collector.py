"""The agent's end of the socket, with a plugin that speaks, lies, overflows and goes away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.clock import ManualClock
from tests.support.wait import until

from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import CaptureLoss, CaptureParams
from updraft_inference.sglang_engine.collector import Collector
from updraft_tap import wire

HELLO = {
    "kind": "hello",
    "protocol": wire.PROTOCOL,
    "id": "one",
    "tap": "0.1.0",
    "engine": {"name": "SGLang", "version": "0.5.23"},
    "pid": 1,
    "steps": 3,
    "aux_size": 4,
    "vocab_size": 16,
    "dtype": "f32",
    "version": 7,
    "digest": "sha256:7",
    "problem": "",
}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def collector(short_tmp_path: Path, clock: ManualClock) -> AsyncIterator[Collector]:
    collector = Collector(short_tmp_path / "s", max_bytes=4096, clock=clock)
    async with collector.listening():
        yield collector


class Plugin:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def refusal(self) -> str:
        """What the agent answered; it has hung up."""
        answer = await self._reader.read()
        head, body = wire.lengths(answer[: wire.PREFIX_SIZE])
        assert len(answer) == wire.PREFIX_SIZE + head + body
        return str(wire.decode(answer[wire.PREFIX_SIZE :], b"")[0]["refusal"])

    async def say(self, header: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        for piece in wire.encode(header, tensors or {}):
            self._writer.write(bytes(piece))
        await self._writer.drain()

    async def step(self, position: int, *, rid: str = "a", num_rows: int = 1, **more: Any) -> None:
        request = {
            "rid": rid,
            "version": 7,
            "position": position,
            "accepted": num_rows - 1,
            "drafts": [5] * 3,
            "log_p": [-1.0] * 3,
            "rows": num_rows,
            "counterfactual_rows": 0,
        }
        header = {"kind": "steps", "number": 1, "dropped": 0, "batch_size": 1, "duration_us": 5}
        await self.say(header | {"requests": [request | more]}, rows(num_rows))

    def hang_up(self) -> None:
        self._writer.close()


def rows(num: int) -> dict[str, torch.Tensor]:
    return {
        "aux": torch.ones(num, 4),
        "ids": torch.ones(num, 2, dtype=torch.int32),
        "log_probs": -torch.ones(num, 2),
        "log_sum_exp": torch.ones(num),
    }


@asynccontextmanager
async def plugin(collector: Collector, **hello: Any) -> AsyncIterator[Plugin]:
    reader, writer = await asyncio.open_unix_connection(collector.path)
    one = Plugin(reader, writer)
    try:
        await one.say(HELLO | hello)
        yield one
    finally:
        writer.close()


async def test_the_plugin_says_which_draft_the_server_holds(collector: Collector) -> None:
    async with plugin(collector):
        await asyncio.wait_for(collector.greeted.wait(), 30)

        assert collector.hello is not None
        assert (collector.hello.version, collector.hello.digest) == (7, "sha256:7")
        assert collector.problem == ""
    await until(lambda: not collector.is_connected, what="the end of the connection")


async def test_a_plugin_that_never_comes_is_a_problem_after_a_while(collector: Collector, clock: ManualClock) -> None:
    assert collector.problem == ""
    clock.advance(25)

    assert "has not connected" in collector.problem
    assert "PYTHONPATH" in collector.problem


async def test_what_the_plugin_cannot_do_is_the_problem(collector: Collector) -> None:
    async with plugin(collector, problem="hooks do not fit"):
        await until(lambda: collector.problem == "hooks do not fit", what="the problem")


async def test_another_protocol_is_a_problem_and_is_not_listened_to(collector: Collector) -> None:
    async with plugin(collector, protocol=99) as one:
        assert "uses protocol 99" in await asyncio.wait_for(one.refusal(), 30)
    assert "uses protocol 99" in collector.problem

    assert not collector.is_connected
    async with plugin(collector):
        await until(lambda: collector.problem == "" and collector.is_connected, what="the right plugin")


async def test_the_plugin_of_another_engine_is_refused_with_a_sentence(collector: Collector) -> None:
    async with plugin(collector, engine={"name": "vLLM", "version": "0.32.0"}) as one:
        refusal = await asyncio.wait_for(one.refusal(), 30)
    assert refusal.startswith("a plugin in vLLM connected, but this agent is for SGLang")


async def test_a_hello_with_wrong_fields_is_a_problem_in_one_sentence(collector: Collector) -> None:
    async with plugin(collector, pid="many") as one:
        refusal = await asyncio.wait_for(one.refusal(), 30)
    assert refusal.startswith("malformed hello from the plugin: pid: ")
    assert "\n" not in refusal
    assert "http" not in refusal


async def test_a_scheduler_that_came_anew_takes_the_place_of_the_old_one(collector: Collector) -> None:
    async with plugin(collector):
        await until(lambda: collector.is_connected, what="the first")
    async with plugin(collector, version=8) as second:
        await until(lambda: collector.hello is not None and collector.hello.version == 8, what="the second")
        assembly = collector.expect("a", 4, CaptureParams())
        await second.step(4)
        await until(lambda: assembly.covers(2), what="the step")

        assert collector.is_connected


async def test_a_server_that_comes_back_before_its_end_was_seen_takes_its_own_place(collector: Collector) -> None:
    async with plugin(collector) as first:
        await until(lambda: collector.is_connected, what="the first")
        async with plugin(collector, version=8) as again:
            await until(lambda: collector.hello is not None and collector.hello.version == 8, what="the second")
            assert await asyncio.wait_for(first.refusal(), 30) == ""
            assembly = collector.expect("a", 4, CaptureParams())
            await again.step(4)
            await until(lambda: assembly.covers(2), what="the step")

            assert collector.is_connected


async def test_a_second_server_is_refused_with_a_sentence_and_the_first_one_is_heard(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    assembly = collector.expect("a", 4, CaptureParams())
    async with plugin(collector) as first:  # both have pid 1, each in its container
        await until(lambda: collector.is_connected, what="the first")
        for _ in range(2):
            async with plugin(collector, id="another", version=8) as second:
                refusal = await asyncio.wait_for(second.refusal(), 30)
                assert refusal.startswith(
                    f"another SGLang server (process 1) is already connected to {collector.path}: "
                )
                assert "UPDRAFT_SGLANG_SOCKET" in refusal
        await first.step(4)
        await until(lambda: assembly.covers(2), what="the step")

        assert collector.hello is not None
        assert (collector.hello.version, collector.problem) == (7, "")
    assert [record.message for record in caplog.records].count("Refused a second SGLang server") == 1
    async with plugin(collector, id="another", version=8):
        await until(lambda: collector.hello is not None and collector.hello.version == 8, what="its turn")


async def test_a_second_server_that_is_not_understood_is_no_trouble_of_the_first(collector: Collector) -> None:
    async with plugin(collector):
        await collector.greeted.wait()
        async with plugin(collector, id="another", protocol=0) as second:
            assert "another SGLang server" in await asyncio.wait_for(second.refusal(), 30)
        assert (collector.is_connected, collector.problem) == (True, "")


async def test_an_ended_request_waits_for_its_last_step_and_for_no_longer_than_it_may(collector: Collector) -> None:
    async with plugin(collector) as one:
        await collector.greeted.wait()
        assembly = collector.expect("a", 4, CaptureParams(payload=True))
        async with asyncio.TaskGroup() as tasks:
            complete = tasks.create_task(collector.complete("a", 3, 30))
            await one.step(4)
            await one.step(5)
        assert complete.done()
        assert [step.start for step in assembly.assembly(3).steps()] == [1, 2]

        await collector.complete("a", 9, 0.01)
    await collector.complete("a", 9, 30)


async def test_what_nobody_expects_is_counted(collector: Collector) -> None:
    async with plugin(collector) as one:
        await one.step(4, rid="gone")
        await until(lambda: collector.losses[CaptureLoss.UNKNOWN] == 1, what="the count")


async def test_what_the_plugin_drops_is_counted_from_the_connection_on(collector: Collector) -> None:
    header = {"kind": "prefill", "number": 1, "requests": []}
    for dropped, more in ((50, 3), (0, 4)):  # of the second scheduler that comes
        async with plugin(collector) as one:
            await one.say(header | {"dropped": dropped}, rows(0))
            await one.say(header | {"dropped": dropped + more}, rows(0))
            await until(lambda: collector.losses[CaptureLoss.QUEUE] in {3, 7}, what="the count")

    await until(lambda: collector.losses[CaptureLoss.QUEUE] == 7, what="the count")


async def test_rows_beyond_the_memory_are_dropped_and_the_step_is_kept(collector: Collector) -> None:
    async with plugin(collector) as one:
        assembly = collector.expect("a", 4, CaptureParams(payload=True))
        await one.step(4, num_rows=4)
        for position in range(8, 1008, 4):
            await one.step(position, num_rows=4)
        await until(lambda: assembly.covers(1000), what="all steps")

        hidden = assembly.assembly(1000).hidden()
        assert collector.nbytes <= 4096
        assert collector.losses[CaptureLoss.MEMORY] > 200
        assert len(assembly.assembly(1000).steps()) == 250
        assert hidden is not None
        assert 800 < len(hidden.missing_rows) < 995
        collector.forget("a")
        assert collector.nbytes == 0


@pytest.mark.parametrize("more", [{"rows": 9}, {"rows": "many"}, {"drafts": None}])
async def test_a_malformed_message_ends_its_connection_and_nothing_else(collector: Collector, more: Any) -> None:
    collector.expect("a", 4, CaptureParams(payload=True))
    async with plugin(collector) as one:
        await one.step(4, **more)
        await until(lambda: collector.losses[CaptureLoss.MALFORMED] == 1, what="the count")
        await until(lambda: not collector.is_connected, what="the end of the connection")

    assert "malformed" in collector.problem


async def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    collector = Collector(tmp_path / ("x" * 120), max_bytes=1)

    with pytest.raises(InvalidInput, match="too long"):
        async with collector.listening():
            pass


async def test_what_the_agent_before_left_at_the_path_is_no_hindrance(short_tmp_path: Path) -> None:
    collector = Collector(short_tmp_path / "s", max_bytes=1)
    async with collector.listening():
        collector.path.rename(short_tmp_path / "left")
    (short_tmp_path / "left").rename(collector.path)

    async with collector.listening(), plugin(collector):
        await until(lambda: collector.is_connected, what="the connection")
    assert not collector.path.exists()


async def test_a_connection_that_says_nothing_does_not_hold_up_the_end(short_tmp_path: Path) -> None:
    collector = Collector(short_tmp_path / "s", max_bytes=4096)
    async with asyncio.timeout(30):
        async with collector.listening():
            reader, writer = await asyncio.open_unix_connection(collector.path)
            async with plugin(collector):  # accepted after the silent one
                await collector.greeted.wait()
                await until(lambda: collector.is_connected, what="the plugin")
    assert await reader.read() == b""
    writer.close()


async def test_an_agent_that_ends_leaves_the_socket_of_the_one_that_came_after(short_tmp_path: Path) -> None:
    first, second = (Collector(short_tmp_path / "s", max_bytes=4096) for _ in range(2))
    async with AsyncExitStack() as ends_later:
        async with first.listening():
            await ends_later.enter_async_context(second.listening())
        async with plugin(second):
            await until(lambda: second.is_connected, what="the plugin")
    assert not second.path.exists()
