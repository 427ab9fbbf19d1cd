import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.wait import wait_until
from torch import Tensor

from updraft_tap import channel as channels
from updraft_tap import wire
from updraft_tap.channel import Channel

Message = tuple[dict[str, Any], dict[str, Tensor]]


class Agent:
    """Listens as the agent does; reads when it is told to."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(30)
        self.connection: socket.socket | None = None

    def accept(self, answer: bytes | None = None) -> dict[str, Any]:
        """Wait for a connection and answer it; return its hello."""
        self.hang_up()
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(30)
        hello, _ = self.read()
        self.connection.sendall(wire.answer() if answer is None else answer)
        return hello

    def read(self) -> Message:
        head, body = wire.lengths(self._exactly(wire.PREFIX_SIZE))
        return wire.decode(self._exactly(head), self._exactly(body))

    def hang_up(self) -> None:
        if self.connection is not None:
            self.connection.close()

    def close(self) -> None:
        self.hang_up()
        self._listener.close()

    def _exactly(self, count: int) -> bytes:
        assert self.connection is not None
        data = bytearray()
        while len(data) < count:
            piece = self.connection.recv(count - len(data))
            assert piece, "the plugin hung up"
            data += piece
        return bytes(data)


class PendingMessage:
    def __init__(self, name: str, *, size: int = 4, until: threading.Event | None = None) -> None:
        self.num_bytes = size
        self._name = name
        self._until = until

    def message(self) -> Message:
        if self._until is not None:
            assert self._until.wait(30)
        return {"kind": self._name}, {"aux": torch.zeros(self.num_bytes // 4)}


class Unspeakable(PendingMessage):
    def message(self) -> Message:
        return {"kind": self._name}, {"aux": torch.zeros(1, dtype=torch.complex64)}


class Broken(PendingMessage):
    def message(self) -> Message:
        raise ZeroDivisionError(self._name)


@pytest.fixture
def path(short_tmp_path: Path) -> Path:
    return short_tmp_path / "capture.sock"


@pytest.fixture
def agent(path: Path) -> Iterator[Agent]:
    agent = Agent(path)
    yield agent
    agent.close()


@pytest.fixture
def channel(path: Path) -> Iterator[Channel]:
    channel = Channel(path=str(path), queue_bytes=100, hello=lambda: {"plugin": "0"})
    channel.start()
    yield channel
    channel.stop()


def open_to(agent: Agent, channel: Channel) -> dict[str, Any]:
    hello = agent.accept()
    wait_until(lambda: channel.is_open)
    return hello


def test_hello_comes_first_and_then_numbered_messages_in_order(agent: Agent, channel: Channel) -> None:
    hello = open_to(agent, channel)
    for name in ("a", "b"):
        channel.offer(PendingMessage(name))

    first, second = agent.read()[0], agent.read()[0]

    assert (hello["kind"], hello["protocol"], hello["problem"], hello["plugin"]) == ("hello", wire.PROTOCOL, "", "0")
    assert [(m["kind"], m["number"], m["dropped"]) for m in (first, second)] == [("a", 1, 0), ("b", 2, 0)]


def test_messages_larger_than_the_sockets_buffer_arrive_whole(path: Path, agent: Agent) -> None:
    class Large(PendingMessage):
        def message(self) -> Message:
            return {"kind": self._name}, {"aux": torch.arange(1_000_000), "ids": torch.arange(3)}

    channel = Channel(path=str(path), queue_bytes=100, hello=dict)
    channel.start()
    open_to(agent, channel)
    for name in ("a", "b"):
        channel.offer(Large(name))

    for name in ("a", "b"):
        header, tensors = agent.read()
        assert header["kind"] == name
        assert torch.equal(tensors["aux"], torch.arange(1_000_000))
        assert torch.equal(tensors["ids"], torch.arange(3))
    channel.stop()


def test_while_nobody_listens_it_is_closed_and_drops(path: Path, channel: Channel) -> None:
    assert not channel.is_open
    channel.offer(PendingMessage("early"))
    agent = Agent(path)
    open_to(agent, channel)
    channel.offer(PendingMessage("later"))

    header, _ = agent.read()

    assert (header["kind"], header["number"], header["dropped"]) == ("later", 1, 1)
    agent.close()


def test_it_connects_again_and_says_hello_again(agent: Agent, channel: Channel) -> None:
    open_to(agent, channel)
    agent.hang_up()
    wait_until(lambda: not channel.is_open)

    assert open_to(agent, channel)["kind"] == "hello"


def test_a_refusal_is_logged_once_and_tried_again_slowly_and_nothing_is_captured_meanwhile(
    agent: Agent, channel: Channel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_LONGEST_DELAY_S", 0.2)
    caplog.set_level("INFO")
    for _ in range(2):
        agent.accept(wire.answer("another server is connected"))
        assert not channel.is_open

    open_to(agent, channel)
    reasons = [record.message.rpartition(": ")[2] for record in caplog.records]
    assert reasons == ["another server is connected", "Updraft captures"]


def test_nothing_is_captured_before_the_agent_answers(agent: Agent, channel: Channel) -> None:
    agent.accept(b"")
    channel.offer(PendingMessage("early"))
    assert not channel.is_open
    assert agent.connection is not None
    agent.connection.sendall(wire.answer())
    wait_until(lambda: channel.is_open)

    channel.offer(PendingMessage("later"))
    assert agent.read()[0]["kind"] == "later"


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x01", b"no frame of this protocol", b"".join(wire.encode({"kind": "answer"})), wire.answer()[:-1]],
)
def test_an_agent_that_hangs_up_or_answers_in_another_tongue_is_tried_again(
    agent: Agent, channel: Channel, answer: bytes
) -> None:
    first = agent.accept(answer)
    agent.hang_up()
    assert not channel.is_open

    assert open_to(agent, channel)["id"] == first["id"]


def test_a_full_queue_drops_what_is_new_counts_it_and_never_waits(agent: Agent, channel: Channel) -> None:
    open_to(agent, channel)
    slow = threading.Event()
    for name in ("slow", "kept", "dropped"):  # 100 bytes fit
        channel.offer(PendingMessage(name, size=40, until=slow if name == "slow" else None))
    slow.set()

    first, second = agent.read()[0], agent.read()[0]
    channel.offer(PendingMessage("after", size=100))

    assert [m["kind"] for m in (first, second, agent.read()[0])] == ["slow", "kept", "after"]
    assert channel.dropped == 1


def test_a_reader_that_takes_nothing_costs_messages_and_no_time(agent: Agent, channel: Channel) -> None:
    open_to(agent, channel)
    channel.offer(PendingMessage("big", size=100))
    for _ in range(20_000):
        channel.offer(PendingMessage("more", size=100))

    assert channel.dropped > 0
    assert agent.read()[0]["kind"] == "big"


@pytest.mark.parametrize("kind", [Broken, Unspeakable])
def test_a_message_that_fails_is_counted_and_the_next_one_comes(
    agent: Agent, channel: Channel, kind: type[PendingMessage]
) -> None:
    open_to(agent, channel)
    channel.offer(kind("bad"))
    channel.offer(PendingMessage("good"))

    assert (agent.read()[0]["dropped"], channel.problem) == (1, "")


def test_after_many_failures_in_a_row_capture_ends_and_hello_says_why(agent: Agent, channel: Channel) -> None:
    open_to(agent, channel)
    for _ in range(10):
        channel.failed(ZeroDivisionError("by nothing"))

    assert not channel.is_open
    hello = agent.accept()
    assert hello["problem"] == "capture ended after 10 failures in a row, the last: by nothing"
    assert not channel.is_open


def test_a_problem_is_told_and_nothing_is_captured(agent: Agent, path: Path) -> None:
    channel = Channel(path=str(path), queue_bytes=100, hello=dict, problem="no hook fits")
    channel.start()

    assert agent.accept()["problem"] == "no hook fits"
    assert not channel.is_open
    channel.stop()


@pytest.fixture
def heard() -> list[Any]:
    return []


@pytest.fixture
def two_way(path: Path, heard: list[Any]) -> Iterator[Channel]:
    channel = Channel(path=str(path), queue_bytes=100, hello=dict, take=heard.append)
    channel.start()
    yield channel
    channel.stop()


def send(agent: Agent, *frames: bytes) -> None:
    assert agent.connection is not None
    agent.connection.sendall(b"".join(frames))


def test_messages_of_the_agent_are_taken_in_order_also_in_the_answers_packet(
    agent: Agent, two_way: Channel, heard: list[Any]
) -> None:
    kinds = [b"".join(wire.encode({"kind": kind})) for kind in ("policy", "load")]
    agent.accept(wire.answer() + kinds[0])
    wait_until(lambda: len(heard) == 2)
    send(agent, kinds[1][:5])
    send(agent, kinds[1][5:])
    wait_until(lambda: len(heard) == 3)

    assert [message["kind"] for message in heard] == ["answer", "policy", "load"]
    assert two_way.is_open


def test_a_reply_is_sent_also_when_the_queue_is_full(agent: Agent, two_way: Channel) -> None:
    open_to(agent, two_way)
    two_way.offer(PendingMessage("too much", size=104))
    two_way.reply({"kind": "loaded"})

    header, _ = agent.read()

    assert (header["kind"], header["dropped"]) == ("loaded", 1)


def test_a_reply_comes_after_all_that_was_offered_before_it(agent: Agent, two_way: Channel) -> None:
    open_to(agent, two_way)
    ready = threading.Event()
    for name in ("slow", "rows"):
        two_way.offer(PendingMessage(name, until=ready))
    two_way.reply({"kind": "policy"})
    ready.set()

    assert [agent.read()[0]["kind"] for _ in range(3)] == ["slow", "rows", "policy"]


def test_a_message_larger_than_the_sockets_buffers_comes_whole(agent: Agent, path: Path) -> None:
    channel = Channel(path=str(path), queue_bytes=1 << 24, hello=dict)
    channel.start()
    open_to(agent, channel)
    channel.offer(PendingMessage("large", size=1 << 23))
    channel.offer(PendingMessage("after"))

    header, tensors = agent.read()

    assert (header["kind"], tensors["aux"].nbytes) == ("large", 1 << 23)
    assert agent.read()[0]["kind"] == "after"
    channel.stop()


@pytest.mark.parametrize("noise", [b"no frame of this protocol", b"\xff" * 12])
def test_an_agent_that_sends_nonsense_is_left_and_connected_to_again(
    agent: Agent, two_way: Channel, heard: list[Any], noise: bytes
) -> None:
    open_to(agent, two_way)
    send(agent, noise)
    wait_until(lambda: not two_way.is_open)

    open_to(agent, two_way)
    assert [message["kind"] for message in heard] == ["answer", "answer"]


def test_a_message_that_cannot_be_obeyed_does_not_end_the_thread(agent: Agent, path: Path) -> None:
    def take(_: object) -> None:
        raise KeyError("payload")

    channel = Channel(path=str(path), queue_bytes=100, hello=dict, take=take)
    channel.start()
    open_to(agent, channel)
    send(agent, *wire.encode({"kind": "policy"}))  # type: ignore[arg-type]  # no tensors, so all are bytes
    channel.offer(PendingMessage("later"))

    assert agent.read()[0]["kind"] == "later"
    channel.stop()


def test_what_has_changed_is_said_by_another_hello_after_what_was_queued(agent: Agent, path: Path) -> None:
    hellos = iter(({"version": 7}, {"version": 0}))
    channel = Channel(path=str(path), queue_bytes=100, hello=lambda: next(hellos))
    channel.start()
    assert open_to(agent, channel)["version"] == 7
    channel.offer(PendingMessage("before"))
    channel.restate()

    assert agent.read()[0]["kind"] == "before"
    assert open_to(agent, channel)["version"] == 0
    channel.offer(PendingMessage("after"))
    assert agent.read()[0]["kind"] == "after"
    channel.stop()


def test_what_has_changed_is_said_however_much_is_queued(agent: Agent, path: Path) -> None:
    hellos = iter(({"version": 7}, {"version": 0}))
    channel = Channel(path=str(path), queue_bytes=100, hello=lambda: next(hellos))
    channel.start()
    open_to(agent, channel)
    ready = threading.Event()
    channel.offer(PendingMessage("before", until=ready))
    channel.restate()
    channel.offer(PendingMessage("after"))
    ready.set()

    assert agent.read()[0]["kind"] == "before"
    assert open_to(agent, channel)["version"] == 0
    assert channel.dropped == 1
    channel.stop()


def test_a_reply_to_an_agent_that_has_gone_does_not_reach_the_next(agent: Agent, path: Path) -> None:
    channel = Channel(path=str(path), queue_bytes=100, hello=dict, take=lambda _: None)
    channel.reply({"kind": "loaded"})
    channel.start()
    open_to(agent, channel)
    channel.offer(PendingMessage("new"))

    assert agent.read()[0]["kind"] == "new"
    channel.stop()


def test_a_header_nested_too_deep_ends_the_connection_and_not_the_thread(agent: Agent, two_way: Channel) -> None:
    open_to(agent, two_way)
    head = b"[" * 200_000
    send(agent, len(head).to_bytes(4, "little") + (0).to_bytes(8, "little") + head)

    open_to(agent, two_way)
