"""The agent's end of the socket, with processes of a server that come, lie, overflow and go away."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.support.clock import ManualClock
from tests.support.tap_plugin import Process, finished, hello, prefill, process, step
from tests.support.wait import until

from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import CaptureLoss
from updraft_inference.sidecar.assembly import Assembler, Ended
from updraft_inference.sidecar.hello import Hello
from updraft_inference.sidecar.link import Answer, Event, Gone, Link, Measured
from updraft_inference.tap.server_kind import VLLM
from updraft_tap import wire

POLICY = {"payload": 0.5, "prompt_rows": 8, "counterfactual_rows": 0}


class Heard(list[Event]):
    """All that the agent is told."""

    @property
    def ended(self) -> list[Ended]:
        return [event for event in self if isinstance(event, Ended)]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def link(short_tmp_path: Path, heard: Heard, clock: ManualClock) -> AsyncIterator[Link]:
    link = Link(short_tmp_path / "s", VLLM, Assembler(max_bytes=1 << 20), heard.append, clock=clock)
    async with link.listening():
        yield link


async def server(stack: AsyncExitStack, link: Link, **changed: Any) -> tuple[Process, Process]:
    """Both processes of a server that was accepted."""
    both = [await stack.enter_async_context(process(link.path, role, **changed)) for role in ("scheduler", "worker")]
    assert [(await one.hear())["refusal"] for one in both] == ["", ""]
    return both[0], both[1]


async def test_both_processes_of_a_server_make_one_trace(link: Link, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        scheduler, worker = await server(stack, link)
        await worker.say(*prefill("a", 4))
        await worker.say(*step("a", 4, 1))
        await scheduler.say(*finished("a", 4, 3))
        await until(lambda: bool(heard.ended), what="its end")

    (ended,) = heard.ended
    assert ended.finished is not None
    assert ended.finished.num_missing_rows == 0
    assert [event.role for event in heard if isinstance(event, Hello)] == ["scheduler", "worker"]
    assert link.problem == ""


async def test_the_policy_reaches_who_is_there_and_who_comes_later(link: Link) -> None:
    async with process(link.path, "scheduler") as scheduler, process(link.path, "worker") as worker:
        assert ((await scheduler.hear())["refusal"], (await worker.hear())["refusal"]) == ("", "")
        link.set_policy(POLICY)
        expected = {"kind": "policy", "tensors": [], **POLICY}
        assert [await scheduler.hear(), await worker.hear()] == [expected, expected]
        worker.hang_up()
        async with process(link.path, "worker") as again:
            assert (await again.hear())["kind"] == "answer", "first the answer, which resets the policy"
            assert await again.hear() == expected


async def test_while_the_worker_gives_no_rows_the_scheduler_is_asked_for_no_text(link: Link) -> None:
    link.set_policy(POLICY)
    whole = {"kind": "policy", "tensors": [], **POLICY}
    async with process(link.path, "scheduler") as scheduler:
        assert [(await scheduler.hear())["kind"], await scheduler.hear()] == ["answer", whole]
        async with process(link.path, "worker", problem="it has two ranks") as worker:
            assert [(await worker.hear())["kind"], await worker.hear()] == ["answer", whole]
            assert await scheduler.hear() == {**whole, "payload": 0}
            link.set_policy(POLICY)
            assert await scheduler.hear() == {**whole, "payload": 0}
        async with process(link.path, "worker") as again:
            assert [(await again.hear())["kind"], await again.hear()] == ["answer", whole]
            assert await scheduler.hear() == whole


async def test_a_chosen_request_has_the_probability_that_the_server_says(link: Link, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        scheduler, worker = await server(stack, link)
        await worker.say({"kind": "policy", "number": 1, "dropped": 0, **POLICY})
        await worker.say(*prefill("a", 4, probability=0.5))
        await worker.say(*step("a", 4, 1))
        await scheduler.say(*finished("a", 4, 3))
        await until(lambda: bool(heard.ended), what="its end")

    assert heard.ended[0].probability == 0.5


async def test_it_is_a_problem_if_nobody_was_asked_and_none_if_somebody_was(link: Link, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        scheduler, _ = await server(stack, link)
        for number in range(16):
            assert link.problem == ""
            await scheduler.say(*finished(str(number), 4, 3, captured=False, permitted=False, asked=False))
        await until(lambda: len(heard.ended) == 16, what="their ends")
        assert "bypassed Updraft's middleware" in link.problem
        await scheduler.say(*finished("asked", 4, 3, captured=False, permitted=False, asked=True))
        await until(lambda: len(heard.ended) == 17, what="the end of one that was asked")
        assert link.problem == ""


async def test_a_server_that_went_away_is_the_problem_also_if_nobody_was_asked_before(
    link: Link, heard: Heard, clock: ManualClock
) -> None:
    async with AsyncExitStack() as stack:
        scheduler, worker = await server(stack, link)
        for number in range(16):
            await scheduler.say(*finished(str(number), 4, 3, captured=False, permitted=False, asked=False))
        await until(
            lambda: "bypassed Updraft's middleware" in link.problem, what="the problem of requests that bypass it"
        )
        worker.hang_up()
        scheduler.hang_up()
        await until(lambda: Gone("scheduler") in heard and Gone("worker") in heard, what="its end")
    clock.advance(25)
    assert "has not connected" in link.problem


async def test_why_requests_are_counted_and_not_captured_is_a_problem(link: Link) -> None:
    async with AsyncExitStack() as stack:
        await server(stack, link, unasked="hooks do not fit")
        assert link.problem == "hooks do not fit"


async def test_a_plugin_of_another_version_is_refused_with_what_to_do(link: Link) -> None:
    async with process(link.path, "worker", protocol=99) as worker:
        refusal = (await worker.hear())["refusal"]
    assert "uses protocol 99" in refusal
    assert "updraft-inference prepare-vllm" in refusal
    await until(lambda: link.problem == refusal, what="the problem")
    async with AsyncExitStack() as stack:
        await server(stack, link)
        assert link.problem == ""


async def test_the_plugin_of_another_engine_is_refused_with_a_sentence(link: Link) -> None:
    async with process(link.path, "worker", engine={"name": "SGLang", "version": "1"}) as worker:
        assert (await worker.hear())["refusal"].startswith("a plugin in SGLang connected, but this agent is for vLLM")


@pytest.mark.parametrize("role", ["scheduler", "worker"])
async def test_a_process_of_a_second_server_is_refused_with_a_sentence(link: Link, role: str, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        scheduler, worker = await server(stack, link)
        async with process(link.path, role, id="other", server="two") as other:
            refusal = (await other.hear())["refusal"]
            with pytest.raises(asyncio.IncompleteReadError):
                await other.hear()
        assert refusal.startswith("another vLLM server (process 7) is already connected")
        await worker.say(*prefill("a", 4))
        await worker.say(*step("a", 4, 1))
        await scheduler.say(*finished("a", 4, 3))
        await until(lambda: bool(heard.ended), what="the first one's end")
        assert link.problem == ""


async def test_the_second_process_of_another_server_does_not_complete_the_first(link: Link) -> None:
    async with process(link.path, "worker") as worker:
        assert (await worker.hear())["refusal"] == ""
        async with process(link.path, "scheduler", server="two") as scheduler:
            assert "another vLLM server" in (await scheduler.hear())["refusal"]


async def test_a_process_that_comes_again_takes_the_place_of_its_old_connection(link: Link, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        _, old = await server(stack, link)
        async with process(link.path, "worker", version=3) as new:
            assert (await new.hear())["refusal"] == ""
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await old.hear()
            link.send("worker", {"kind": "load"})
            assert (await new.hear())["kind"] == "load"
    hellos = [event.version for event in heard if isinstance(event, Hello) and event.role == "worker"]
    assert hellos == [0, 3]


async def test_garbage_ends_its_connection_and_nothing_else(link: Link, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        scheduler, _ = await server(stack, link)
        nested = b"[" * 50_000
        prefix = len(nested).to_bytes(4, "little") + bytes(8)
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 100,
            b"\x02\0\0\0" + bytes(8) + b"[]",
            b"",
            prefix + nested,
        ):
            reader, writer = await asyncio.open_unix_connection(link.path)
            writer.write(garbage)
            writer.write_eof()
            with suppress(ConnectionError):  # by which it ends if it was not read
                await reader.read()
            writer.close()
        await scheduler.say(*finished("a", 4, 3, captured=False))
        await until(lambda: bool(heard.ended), what="the end of a request")
        assert link.failure == ""


async def test_a_malformed_message_ends_the_connection_and_is_counted(link: Link, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        scheduler, _ = await server(stack, link)
        await scheduler.say({"kind": "finished", "number": 1, "dropped": 0})
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await scheduler.hear()
    assert link.losses[CaptureLoss.MALFORMED] == 1


@pytest.mark.parametrize(
    "changed",
    [
        *({"version": None}, {"version": -1}, {"loads": 3}, {"loads": [[1, 1.0]]}, {"loads": [["one", 1.0, 1.0, 1.0]]}),
        *(
            {"loads": [[1, "fast", 1.0, 1.0]]},
            {"loads": [[1, float("nan"), 1.0, 1.0]]},
            {"loads": [[1, 10**400, 1, 1]]},
        ),
    ],
    ids=str,
)
async def test_a_speedup_that_is_none_ends_the_connection_and_not_the_agent(
    link: Link, heard: Heard, changed: dict[str, Any]
) -> None:
    async with AsyncExitStack() as stack:
        scheduler, _ = await server(stack, link)
        said = {"kind": "speedup", "number": 1, "dropped": 0, "version": 1, "loads": [[0, 1.0, 0.9, 1.1]], **changed}
        await scheduler.say(said)
        await until(lambda: Gone("scheduler") in heard, what="the end of the connection")
    assert link.failure == ""
    assert not any(isinstance(event, Measured) for event in heard)


@pytest.mark.parametrize("dropped", [float("inf"), float("nan"), "many", None, [1], 1 << 63, -1])
async def test_a_number_of_drops_that_is_none_ends_the_connection_and_not_the_agent(
    link: Link, heard: Heard, dropped: object
) -> None:
    async with AsyncExitStack() as stack:
        scheduler, worker = await server(stack, link)
        await worker.say({"kind": "policy", "number": 1, "dropped": dropped})
        await until(lambda: Gone("worker") in heard, what="the end of the connection")
        await scheduler.say(*finished("a", 4, 3, captured=False))
        await until(lambda: bool(heard.ended), what="the end of a request")
    assert link.failure == ""


async def test_what_a_message_completed_before_its_defect_is_told(link: Link, heard: Heard) -> None:
    header, tensors = step("a", 4, 1)
    header["requests"].append({"rid": "b"})
    async with AsyncExitStack() as stack:
        scheduler, worker = await server(stack, link)
        await worker.say(*prefill("a", 4))
        await scheduler.say(*finished("a", 4, 3))
        await until(lambda: len(link._assembler) == 1 and not link._assembler._running, what="its end")
        await worker.say(header, tensors)
        await until(lambda: Gone("worker") in heard, what="the end of the connection")

    (ended,) = heard.ended
    assert ended.finished is not None
    assert ended.finished.num_missing_rows == 0
    assert (link.losses[CaptureLoss.MALFORMED], link.failure) == (1, "")


async def test_what_the_plugin_dropped_since_it_is_connected_is_counted(link: Link, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        scheduler, worker = await server(stack, link)
        await worker.say(*prefill("a", 4, dropped=5))
        await worker.say(*step("a", 4, 1, dropped=8))
        await scheduler.say(*finished("a", 4, 3))
        await until(lambda: bool(heard.ended), what="its end")
    assert link.losses[CaptureLoss.QUEUE] == 3


async def test_a_plugin_that_never_comes_is_a_problem_after_a_while(link: Link, clock: ManualClock) -> None:
    assert link.problem == ""
    clock.advance(25)
    assert "has not connected" in link.problem
    assert "UPDRAFT_VLLM_SOCKET" in link.problem


async def test_a_problem_that_goes_on_stays_the_same_sentence(link: Link, clock: ManualClock) -> None:
    clock.advance(25)
    before = link.problem
    clock.advance(3600)
    assert link.problem == before


@pytest.mark.attack(
    boundary="text",
    attack="a server's problem with control characters or of any length",
    outcome="it becomes one short printable line",
)
async def test_a_problem_is_one_printable_line_of_limited_length(link: Link) -> None:
    async with process(link.path, "worker", problem="a path\ud800\n" + 1000 * "x"):
        await until(lambda: link.problem.startswith("a path??xxx"), what="the problem")
    assert len(link.problem.encode()) == 500


async def test_a_process_that_reads_nothing_does_not_keep_the_agent_from_ending(
    short_tmp_path: Path, heard: Heard
) -> None:
    link = Link(short_tmp_path / "s", VLLM, Assembler(max_bytes=1 << 20), heard.append)
    with socket.socket(socket.AF_UNIX) as deaf:
        async with asyncio.timeout(60), link.listening():
            deaf.connect(str(link.path))
            for piece in wire.encode(hello("worker")):
                deaf.sendall(piece)
            await until(lambda: any(isinstance(event, Hello) for event in heard), what="its hello")
            for _ in range(200):
                link.send("worker", {"kind": "policy", "text": 8192 * "x"})
    assert link.failure == ""


async def test_what_the_plugin_cannot_do_is_the_problem(link: Link) -> None:
    async with process(link.path, "worker", problem="hooks do not fit"):
        await until(lambda: link.problem == "hooks do not fit", what="the problem")


async def test_the_end_of_a_process_is_told_and_what_waited_is_completed(link: Link, heard: Heard) -> None:
    async with AsyncExitStack() as stack:
        scheduler, worker = await server(stack, link)
        await scheduler.say(*finished("a", 4, 3))
        await worker.say({"kind": "loaded", "number": 1, "dropped": 0, "version": 3})
        await until(lambda: any(isinstance(event, Answer) for event in heard), what="the answer to a load")
        worker.hang_up()
        await until(lambda: Gone("worker") in heard, what="its end")
        assert len(heard.ended) == 1


async def test_a_socket_file_that_was_left_over_is_replaced(short_tmp_path: Path, heard: Heard) -> None:
    path = short_tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()

    async with (
        Link(path, VLLM, Assembler(max_bytes=1), heard.append).listening(),
        process(path, "worker") as worker,
    ):
        assert (await worker.hear())["refusal"] == ""
        await until(lambda: any(isinstance(event, Hello) for event in heard), what="its hello")
    assert not path.exists()


async def test_an_agent_does_not_take_the_socket_of_another_that_lives(link: Link, heard: Heard) -> None:
    second = Link(link.path, VLLM, Assembler(max_bytes=1), heard.append)
    with pytest.raises(InvalidInput, match=r"another program listens there.* UPDRAFT_INFERENCE_VLLM_SOCKET"):
        async with second.listening():
            pass

    async with process(link.path, "worker") as worker:
        assert (await worker.hear())["refusal"] == "", "the first one goes on"


async def test_a_path_where_no_socket_can_be_is_refused_with_the_setting(short_tmp_path: Path, heard: Heard) -> None:
    for path in (short_tmp_path / ("x" * 120), Path("/proc/nowhere/s")):
        link = Link(path, VLLM, Assembler(max_bytes=1), heard.append)
        with pytest.raises(InvalidInput, match="UPDRAFT_INFERENCE_VLLM_SOCKET"):
            async with link.listening():
                pass


@pytest.mark.parametrize(("field", "value"), [("pid", "many"), ("version", -1), ("version", 1 << 32)])
async def test_a_hello_with_wrong_fields_is_refused_in_one_sentence(link: Link, field: str, value: object) -> None:
    async with process(link.path, "worker", **{field: value}) as worker:
        refusal = (await worker.hear())["refusal"]
    assert refusal.startswith(f"malformed hello from the plugin: {field}: ")
    assert "\n" not in refusal


def test_hellos_of_the_wire_are_what_the_agent_reads() -> None:
    assert Hello.of(hello("worker"), VLLM).role == "worker"
    with pytest.raises(wire.FrameError, match="role"):
        Hello.of(hello("cook"), VLLM)
