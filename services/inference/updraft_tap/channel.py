"""Sends messages to the agent: a thread, a Unix socket that the agent listens on, and a bounded queue.

The engine never waits: a full queue drops and counts. The agent may send messages too, which `take` gets on the thread.
Encoding, waiting for the GPU and sending happen on the thread. While no agent is connected `is_open` is false and the hooks
do nothing. The thread is a daemon, so it never delays the server's exit. An agent that is already connected to another server
refuses this one, which then retries slowly.
"""

import logging
import select
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from updraft_tap import wire

log = logging.getLogger(__name__)

_MAX_MESSAGES = 1024
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 5.0
_IDLE_S = 0.2
"""How often an idle thread checks whether the agent has sent something or disconnected."""
_STUCK_S = 60.0
"""An agent that reads nothing for this long is considered gone."""
_FAILURES = 10
"""After this many consecutive failures, capture ends for this process."""


class PendingMessage(Protocol):
    """A message that may still be on the device."""

    @property
    def num_bytes(self) -> int: ...

    def message(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors, on the CPU; may wait for the device."""
        ...


@dataclass(frozen=True, slots=True)
class _Reply:
    header: Mapping[str, Any]
    num_bytes: int = 0

    def message(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return dict(self.header), {}


_HELLO_AGAIN = _Reply({})
"""Marks in the queue where the connection ends, because its hello is no longer true."""


class Channel:
    """Sends queued messages while an agent is connected. `hello` is called at the start of each connection."""

    def __init__(
        self,
        *,
        path: str,
        queue_bytes: int,
        hello: Callable[[], Mapping[str, Any]],
        problem: str = "",
        take: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.is_open = False
        self.problem = problem
        self.dropped = 0
        self._path = path
        self._queue_bytes = queue_bytes
        self._hello = hello
        self._take = take
        self._id = ""
        """Identifies the process that starts this channel. Process ids are reused, and two containers may have equal ones."""
        self._queue: deque[PendingMessage] = deque()
        self._held_bytes = 0
        self._number = 0
        self._failures = 0
        self._is_connected = False
        self._change = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="updraft-capture", daemon=True)

    def start(self) -> None:
        self._id = uuid.uuid4().hex
        self._thread.start()

    def stop(self) -> None:
        """End the thread; queued messages are lost."""
        self._stopping.set()
        with self._change:
            self._change.notify()
        self._thread.join()

    def offer(self, item: PendingMessage) -> None:
        """Queue the message, or drop it. Never waits for the agent."""
        with self._change:
            is_full = len(self._queue) >= _MAX_MESSAGES or self._held_bytes + item.num_bytes > self._queue_bytes
            if is_full or not self.is_open:
                self.dropped += 1
                return
            self._queue.append(item)
            self._held_bytes += item.num_bytes
            self._change.notify()

    def reply(self, header: Mapping[str, Any]) -> None:
        """Queue a message even if the queue is full. All that was offered before it comes before it, or is in its `dropped`.

        Without an agent it is lost; the next hello has its state.
        """
        with self._change:
            if self._is_connected:
                self._queue.append(_Reply(header))
                self._change.notify()

    def restate(self) -> None:
        """Say hello again, on a connection of its own, because something in it has changed; what is queued is sent before."""
        with self._change:
            if self._is_connected and _HELLO_AGAIN not in self._queue:
                self._queue.append(_HELLO_AGAIN)
                self._change.notify()

    def failed(self, error: Exception) -> None:
        """Count a failure of capture. The first of a series is logged; too many in a row end capture, which hello reports."""
        with self._change:
            self.dropped += 1
            self._failures += 1
            if self._failures == 1:
                log.error("Updraft lost a message: %s: %s", type(error).__name__, error, exc_info=error)
            if self._failures >= _FAILURES:
                self._end(f"capture ended after {_FAILURES} failures in a row, the last: {error}")

    def end(self, problem: str) -> None:
        """Capture nothing more in this process. The next hello reports the first such problem."""
        with self._change:
            self._end(problem)

    def _end(self, problem: str) -> None:
        if not self.problem:
            self.problem = problem
            self.is_open = False
            log.error("Updraft: %s", problem)
        self._change.notify()

    def _run(self) -> None:
        delay_s, logged = _FIRST_DELAY_S, ""
        while not self._stopping.wait(delay_s):
            try:
                refusal = self._connect()
                if refusal and refusal != logged:
                    log.error("Updraft's agent refuses this server, so nothing is captured: %s", refusal)
                logged = refusal
                delay_s = _LONGEST_DELAY_S if refusal else _FIRST_DELAY_S
            except OSError as error:
                log.debug("Updraft's agent is unreachable: %s", error)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            finally:
                self._close()

    def _connect(self) -> str:
        """Run one connection to its end. Returns why it was refused, or "". Raises OSError if no agent listens or it
        disconnects."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.settimeout(_STUCK_S)
            agent.connect(self._path)
            problem, self._is_connected = self.problem, True  # from here on, a change is sent in another hello
            hello = {"kind": "hello", "protocol": wire.PROTOCOL, "id": self._id, "problem": problem, **self._hello()}
            _send(agent, wire.encode(hello))
            answer = _frame(agent)
            refusal = _refusal(answer)
            if not refusal:
                self._obey(answer)  # each connection begins with it, so that nothing holds of the one before
                self._talk(agent, problem)
            return refusal

    def _talk(self, agent: socket.socket, problem: str) -> None:
        """Send and take until the agent disconnects, this channel stops, capture ends, or hello is to be said again."""
        log.info("Updraft %s", f"captures nothing: {problem}" if problem else "captures")
        self.is_open = not problem
        while not self._stopping.is_set() and self.problem == problem:
            item = self._next()
            if item is _HELLO_AGAIN:
                return
            if item is not None:
                self._pass_on(agent, item)
            if _has_input(agent):
                if self._take is None:
                    return  # an agent that sends nothing has hung up
                self._obey(_frame(agent))

    def _obey(self, message: Mapping[str, Any]) -> None:
        try:
            if self._take is not None:
                self._take(message)
        except Exception as error:  # noqa: BLE001  (no error of ours may end the thread)
            log.error("Updraft cannot obey its agent: %s: %s", type(error).__name__, error)

    def _next(self) -> PendingMessage | None:
        with self._change:
            if not self._queue:
                self._change.wait(_IDLE_S)
            return self._queue.popleft() if self._queue else None

    def _pass_on(self, agent: socket.socket, item: PendingMessage) -> None:
        try:
            header, tensors = item.message()
            frame = wire.encode({**header, "number": self._number + 1, "dropped": self.dropped}, tensors)
        except Exception as error:  # noqa: BLE001  (no error of ours may end the thread)
            self.failed(error)
            return
        finally:
            with self._change:
                self._held_bytes -= item.num_bytes
        self._failures = 0
        self._number += 1
        _send(agent, frame)

    def _close(self) -> None:
        with self._change:
            self.is_open = self._is_connected = False
            self.dropped += sum(item is not _HELLO_AGAIN for item in self._queue)
            self._queue.clear()
            self._held_bytes = 0


def _send(agent: socket.socket, frame: Iterable[bytes | memoryview]) -> None:
    """All of it in one call of the system, if the agent keeps up: each call may give the engine's thread away, and wakes the
    agent."""
    left = [memoryview(piece) for piece in frame]
    while left:
        sent = agent.sendmsg(left)
        while left and sent >= left[0].nbytes:
            sent -= left.pop(0).nbytes
        if left:
            left[0] = left[0][sent:]


def _refusal(answer: Mapping[str, Any]) -> str:
    """Why the agent refused our hello; "" if it did not. Raises OSError if the answer is none."""
    try:
        return str(answer["refusal"])
    except KeyError as error:
        raise ConnectionError(f"invalid answer: {error!r}") from error


def _frame(agent: socket.socket) -> Mapping[str, Any]:
    """The header of the next frame. Raises OSError if the agent disconnects or sends no valid frame."""
    try:
        head_size, body_size = wire.lengths(_exactly(agent, wire.PREFIX_SIZE))
        header, _ = wire.decode(_exactly(agent, head_size), _exactly(agent, body_size))
    except wire.FrameError as error:
        raise ConnectionError(f"invalid frame: {error!r}") from error
    return header


def _exactly(agent: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = agent.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise ConnectionError("the agent disconnected")
        data += piece
    return bytes(data)


def _has_input(agent: socket.socket) -> bool:
    """Data to read, or the end of the stream."""
    poll = select.poll()  # select() does not support file descriptors above 1023
    poll.register(agent, select.POLLIN)
    return bool(poll.poll(0))
