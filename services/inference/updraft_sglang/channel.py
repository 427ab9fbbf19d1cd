"""The way to the agent: a thread, a Unix socket that the agent listens on, and a bounded queue.

The scheduler offers and goes on: a full queue drops and counts. Encoding, waiting for the GPU and sending happen on the
thread. While nobody is connected `is_open` is false, and the hooks do nothing at all. The thread is a daemon: nothing is
worth delaying the server's end. An agent that another server is connected to refuses our hello; then we come again slowly.
"""

import logging
import select
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from updraft_sglang import wire

log = logging.getLogger(__name__)

_MAX_MESSAGES = 1024
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 5.0
_IDLE_S = 1.0
"""How often an idle thread looks whether the agent has hung up."""
_STUCK_S = 60.0
"""A reader that takes nothing for so long is gone."""
_FAILURES = 10
"""So many failures of ours in a row, and capture ends for this process."""


class PendingMessage(Protocol):
    """Something to send."""

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        ...

    def message(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors, on the CPU; may wait for the device."""
        ...


class Channel:
    """Sends what it is offered, if somebody listens. `hello` is called at the start of each connection."""

    def __init__(
        self, *, path: str, queue_bytes: int, hello: Callable[[], Mapping[str, Any]], problem: str = ""
    ) -> None:
        self.is_open = False
        self.problem = problem
        self.dropped = 0
        self._path = path
        self._queue_bytes = queue_bytes
        self._hello = hello
        self._id = ""
        """Tells the process that starts this from every other: pids are given again, and two containers have the same ones."""
        self._queue: deque[PendingMessage] = deque()
        self._held_bytes = 0
        self._number = 0
        self._failures = 0
        self._change = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="updraft-capture", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._id = uuid.uuid4().hex
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is queued is lost."""
        self._stopping.set()
        with self._change:
            self._change.notify()
        self._thread.join()

    def offer(self, item: PendingMessage) -> None:
        """Queue it, or drop it. Never waits for the agent."""
        with self._change:
            is_full = len(self._queue) >= _MAX_MESSAGES or self._held_bytes + item.num_bytes > self._queue_bytes
            if is_full or not self.is_open:
                self.dropped += 1
                return
            self._queue.append(item)
            self._held_bytes += item.num_bytes
            self._change.notify()

    def failed(self, error: Exception) -> None:
        """Count a failure of capture. The first one of a row is logged; too many in a row end capture, and hello says so."""
        with self._change:
            self.dropped += 1
            self._failures += 1
            if self._failures == 1:
                log.error("Updraft lost a message: %s: %s", type(error).__name__, error, exc_info=error)
            if self._failures >= _FAILURES and not self.problem:
                self.problem = f"capture ended after {_FAILURES} failures in a row, the last: {error}"
                self.is_open = False
                log.error("Updraft: %s", self.problem)
            self._change.notify()

    def _run(self) -> None:
        delay_s, told = _FIRST_DELAY_S, ""
        while not self._stopping.wait(delay_s):
            try:
                refusal = self._connect()
                if refusal and refusal != told:
                    log.error("Updraft's agent refuses this server, which captures nothing: %s", refusal)
                told = refusal
                delay_s = _LONGEST_DELAY_S if refusal else _FIRST_DELAY_S
            except OSError as error:
                log.debug("Updraft's agent is not there: %s", error)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            finally:
                self._close()

    def _connect(self) -> str:
        """One connection, to its end: why it was refused, or "". OSError where nobody listens, or one who broke off."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.settimeout(_STUCK_S)
            agent.connect(self._path)
            problem = self.problem
            hello = {"kind": "hello", "protocol": wire.PROTOCOL, "id": self._id, "problem": problem, **self._hello()}
            agent.sendall(b"".join(wire.encode(hello)))
            refusal = _answer(agent)
            if not refusal:
                self._talk(agent, problem)
            return refusal

    def _talk(self, agent: socket.socket, problem: str) -> None:
        """Until the agent hangs up (OSError, or it is seen), we stop, or capture comes to an end."""
        log.info("Updraft %s", f"captures nothing: {problem}" if problem else "captures")
        self.is_open = not problem
        while not self._stopping.is_set() and self.problem == problem:
            item = self._next()
            if item is not None:
                self._pass_on(agent, item)
            elif _has_hung_up(agent):
                return

    def _next(self) -> PendingMessage | None:
        with self._change:
            if not self._queue:
                self._change.wait(_IDLE_S)
            return self._queue.popleft() if self._queue else None

    def _pass_on(self, agent: socket.socket, item: PendingMessage) -> None:
        try:
            header, tensors = item.message()
            frame = wire.encode({**header, "number": self._number + 1, "dropped": self.dropped}, tensors)
        except Exception as error:  # noqa: BLE001  (ours, whatever it is, must not end the thread)
            self.failed(error)
            return
        finally:
            with self._change:
                self._held_bytes -= item.num_bytes
        self._number += 1
        self._failures = 0
        for piece in frame:
            agent.sendall(piece)

    def _close(self) -> None:
        with self._change:
            self.is_open = False
            self.dropped += len(self._queue)
            self._queue.clear()
            self._held_bytes = 0


def _answer(agent: socket.socket) -> str:
    """Why our hello is refused; "" if it is not. OSError if the agent hangs up, or says what is no answer."""
    with agent.makefile("rb") as said:
        try:
            head_size, body_size = wire.lengths(said.read(wire.PREFIX_SIZE))
            answer, _ = wire.decode(said.read(head_size), said.read(body_size))
            return str(answer["refusal"])
        except (wire.FrameError, KeyError) as error:
            raise ConnectionError(f"no answer: {error!r}") from error


def _has_hung_up(agent: socket.socket) -> bool:
    """It has nothing more to say, so what can be read is the end."""
    poll = select.poll()  # select() knows no file descriptor above 1023
    poll.register(agent, select.POLLIN)
    return bool(poll.poll(0))
