"""Listens for the processes of one server, on an event loop and a thread of its own, where their messages are put together.

The agent listens and the plugin connects, so either may start first or restart. Only the processes of one server may connect,
because two servers would overwrite each other's counts and drafts. While a message is taken nothing more is read: the socket
fills, then the plugin's queue, which drops and counts. Nothing here ever waits for the agent's own event loop.
"""

import asyncio
import logging
import socket
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from updraft_chassis.clock import Clock, SystemClock
from updraft_inference.engine import CaptureLoss
from updraft_inference.sidecar.assembly import Assembler, Ended
from updraft_inference.sidecar.hello import Hello, Role, line
from updraft_inference.sidecar.listener import listening_at
from updraft_inference.tap.messages import count, speedups
from updraft_inference.tap.server_kind import ServerKind
from updraft_tap import wire
from updraft_tap.drafting.speedup import Speedup

logger = logging.getLogger(__name__)

_AWAY_S = 20.0
"""How long a process may be away before it is reported: servers restart, and start slowly."""

_HELLO_S = 10.0
_HELLO_BYTES = 1 << 16
"""Limits on who has not said hello."""

_FIRST_BYTES = 1 << 24
"""Memory for a message before any of it has arrived."""

_LOOK_S = 0.25
"""How often ended requests that wait for rows are checked."""

_LATEST = 16
"""Number of requests in a row that bypassed the middleware before this is a problem."""

_ROLES: tuple[Role, ...] = ("scheduler", "worker")


@dataclass(frozen=True, slots=True)
class Gone:
    """A process is not connected any more."""

    role: Role


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a load."""

    header: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """The speedups with a version of the draft, by the smallest batch size of the load; 0: of all steps."""

    version: int
    speedups: Mapping[int, Speedup]


Event = Hello | Gone | Answer | Measured | Ended
"""Events for the agent, on its own event loop and in order."""


@dataclass(eq=False, slots=True, kw_only=True)
class _Connection:
    socket: socket.socket
    hello: Hello
    num_dropped: int | None = None
    """Dropped by the plugin, as of the last message of this connection. Earlier drops are no losses of ours."""
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    posts: set[asyncio.Task[None]] = field(default_factory=set)
    """Messages that are not sent yet: a process that reads nothing must not keep the agent from ending."""


class Link:
    """Connections by role. `tell` is called on the agent's event loop. Attributes may be read from any thread."""

    def __init__(
        self,
        path: Path,
        kind: ServerKind,
        assembler: Assembler,
        tell: Callable[[Event], None],
        *,
        clock: Clock | None = None,
    ) -> None:
        self.path = path
        self.drops: Counter[CaptureLoss] = Counter()
        self.kind = kind
        self._assembler = assembler
        self._tell = tell
        self._clock = clock or SystemClock()
        self._agent_loop = asyncio.get_running_loop()
        self.failure = ""
        """Why the thread has ended by itself; only a new process helps."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks = asyncio.TaskGroup()
        self._serving: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._connections: dict[Role, _Connection] = {}
        self._away_since_s = dict.fromkeys(_ROLES, self._clock.monotonic())
        self._misunderstood = ""
        """Why the last process without a connection was refused."""
        self._refused: deque[str] = deque(maxlen=16)
        """Ids of the processes whose refusal was logged last; they come again."""
        self._policy: Mapping[str, Any] | None = None
        self._asked: deque[bool] = deque(maxlen=_LATEST)
        """Whether the last requests passed the middleware."""

    @property
    def losses(self) -> Mapping[CaptureLoss, int]:
        assembled = self._assembler.losses
        return {loss: assembled[loss] + self.drops[loss] for loss in CaptureLoss}

    @property
    def problem(self) -> str:
        """Why not everything is captured, in one sentence; empty if it is."""
        connections = list(self._connections.values())
        if problem := next((one.hello.problem for one in connections if one.hello.problem), ""):
            return problem
        if not connections and self._misunderstood:
            return self._misunderstood
        if unasked := next((one.hello.unasked for one in connections if one.hello.unasked), ""):
            return unasked
        if len(self._asked) == _LATEST and True not in self._asked:
            return (
                f"the last {_LATEST} requests to {self.kind.engine} bypassed Updraft's middleware, so they are counted"
                " but not captured: send requests to the HTTP port of a server that was started with the plugin"
            )
        now_s = self._clock.monotonic()
        away = {role: now_s - self._away_since_s[role] for role in _ROLES if role not in self._connections}
        role = max(away, key=lambda role: away[role], default=None)
        if role is None or away[role] < _AWAY_S:
            return ""
        return (
            f"Updraft's plugin in the {self.kind.engine} server's {role} has not connected to {self.path} for at"
            f" least {_AWAY_S:.0f} s. Check that its folder is on the server's PYTHONPATH and that"
            f" {self.kind.socket_variable} names this socket"
        )

    def send(self, role: Role, header: Mapping[str, Any]) -> None:
        """Send a message to a process, or nothing if it is not connected. From the agent's event loop."""
        self._call(self._start_sending, role, header)

    def set_policy(self, policy: Mapping[str, Any]) -> None:
        """Send it to every process, also to one that connects later. From the agent's event loop."""
        self._policy = {"kind": "policy", **policy}
        self._call(self._send_policy, *_ROLES)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Accept connections for the duration of the block. Raises InvalidInput if the socket cannot be created."""
        with listening_at(self.path, setting=self.kind.setting("SOCKET")) as listener:
            started: asyncio.Future[None] = self._agent_loop.create_future()
            thread = threading.Thread(target=self._live, args=(listener, started), name="updraft-tap", daemon=True)
            thread.start()
            try:
                await started
                yield
            finally:
                self._call(self._stopping.set)
                await asyncio.to_thread(thread.join)

    def _live(self, listener: socket.socket, started: "asyncio.Future[None]") -> None:
        """The life of the thread."""
        try:
            asyncio.run(self._run(listener, started))
        except Exception as error:  # the agent asks for it, and ends
            logger.critical("The link to the server has failed", exc_info=error)
            self.failure = f"the link to the server has failed: {error!r}"

    async def _run(self, listener: socket.socket, started: "asyncio.Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as self._tasks:
            running = [self._tasks.create_task(job) for job in (self._accept(listener), self._look())]
            self._agent_loop.call_soon_threadsafe(started.set_result, None)
            await self._stopping.wait()
            for task in (*running, *self._serving):
                task.cancel()
        self._emit(self._assembler.cut_off())

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                logger.warning("A connection of the plugin cannot be accepted", extra={"reason": str(error)})
                await asyncio.sleep(1.0)
                continue
            task = self._tasks.create_task(self._serve(accepted))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            self._emit(self._assembler.due(self._clock.monotonic()))

    async def _serve(self, accepted: socket.socket) -> None:
        """Serve one connection: of a process of the server, or of one that is refused."""
        connection: _Connection | None = None
        with accepted:
            try:
                async with asyncio.timeout(_HELLO_S):
                    header, _ = await _frame(accepted, most=_HELLO_BYTES)
                    refusal, hello = self._met(header)
                    if hello is not None:
                        connection = self._greet(accepted, hello)
                    await _send(accepted, wire.answer(refusal))  # before the policy, which a task sends
                if connection is None:
                    return
                while True:
                    header, tensors = await _frame(accepted)
                    self._take(connection, header, tensors)
                    await asyncio.sleep(0)  # a busy process may not keep the others waiting
            except (EOFError, OSError):  # also a timeout
                pass
            except wire.FrameError as error:
                self._note_misunderstood(str(error))
            finally:
                if connection is not None:
                    self._disconnect(connection)

    def _met(self, header: Mapping[str, Any]) -> tuple[str, Hello | None]:
        """The process of this hello; or why it is refused."""
        try:
            hello = Hello.of(header, self.kind)
        except wire.FrameError as error:
            self._note_misunderstood(str(error))
            return str(error), None
        others = [one.hello for one in self._connections.values()]
        stranger = next((other for other in others if not hello.is_beside(other)), None)
        if stranger is None:
            return "", hello
        refusal = (
            f"another {self.kind.engine} server (process {stranger.pid}) is already connected to {self.path}: give each server"
            f" its own {self.kind.socket_variable} and agent, and run one for each data-parallel rank"
        )
        if hello.id not in self._refused:
            self._refused.append(hello.id)
            logger.error("Refused a second server", extra={"pid": hello.pid, "reason": refusal})
        return refusal, None

    def _greet(self, accepted: socket.socket, hello: Hello) -> _Connection:
        """Take the place of an earlier connection of the same process."""
        if (before := self._connections.get(hello.role)) is not None:
            with suppress(OSError):
                before.socket.shutdown(socket.SHUT_RDWR)
            self._disconnect(before)
        connection = self._connections[hello.role] = _Connection(socket=accepted, hello=hello)
        self._misunderstood = ""
        extra = {"role": hello.role, "plugin": hello.tap, "version": hello.engine.version, "draft": hello.version}
        logger.info("The plugin is connected", extra=extra)
        if hello.problem:
            logger.error("The plugin captures nothing", extra={"role": hello.role, "reason": hello.problem})
        self._event(hello)
        self._send_policy(*(_ROLES if hello.role == "worker" else (hello.role,)))
        return connection

    def _send_policy(self, *roles: Role) -> None:
        """Where the worker gives no rows, the scheduler gives no text: a trace without rows teaches nothing."""
        if self._policy is None:
            return
        worker = self._connections.get("worker")
        nothing = {"payload": 0} if worker is not None and worker.hello.problem else {}
        for role in roles:
            self._start_sending(role, {**self._policy, **(nothing if role == "scheduler" else {})})

    def _disconnect(self, connection: _Connection) -> None:
        role = connection.hello.role
        if self._connections.get(role) is not connection:
            return
        del self._connections[role]
        for post in connection.posts:
            post.cancel()
        self._away_since_s[role] = self._clock.monotonic()
        self._emit(self._assembler.cut_off())
        if role == "scheduler":
            self._asked.clear()
        logger.warning("The plugin is disconnected", extra={"role": role})
        self._event(Gone(role))

    def _take(self, connection: _Connection, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        try:
            dropped, kind = count(header["dropped"]), header["kind"]
        except (KeyError, ValueError) as error:
            raise wire.FrameError(f"malformed message from the plugin: {error!r}") from error
        if connection.num_dropped is not None:
            self.drops[CaptureLoss.QUEUE] += max(0, dropped - connection.num_dropped)
        connection.num_dropped = dropped
        if kind == "loaded":
            self._event(Answer(header))
        elif kind == "speedup":
            self._event(_measured(header))
        else:
            self._emit(self._assembler.take(header, tensors, self._clock.monotonic()))

    def _note_misunderstood(self, reason: str) -> None:
        reason = line(reason)
        if reason != self._misunderstood:
            logger.error("The plugin is incompatible", extra={"reason": reason})
        self._misunderstood = reason

    def _start_sending(self, role: Role, header: Mapping[str, Any]) -> None:
        if (connection := self._connections.get(role)) is not None:
            post = self._tasks.create_task(_post(connection, b"".join(wire.encode(header))))
            connection.posts.add(post)
            post.add_done_callback(connection.posts.discard)

    def _emit(self, ended: Iterable[Ended]) -> None:
        for one in ended:
            self._asked.append(not one.terms.is_unasked)
            self._event(one)

    def _event(self, event: Event) -> None:
        with suppress(RuntimeError):  # the agent's loop is closed because the process is ending
            self._agent_loop.call_soon_threadsafe(self._tell, event)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(function, *arguments)


def _measured(header: Mapping[str, Any]) -> Measured:
    """Raises FrameError if the message is malformed."""
    try:
        return Measured(version=count(header["version"]), speedups=speedups(header))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise wire.FrameError(f"malformed message from the plugin: {error!r}") from error


async def _post(connection: _Connection, data: bytes) -> None:
    with suppress(OSError, ValueError):  # it is closed meanwhile
        async with connection.sending:
            await _send(connection.socket, data)


async def _send(to: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(to, data)


async def _frame(source: socket.socket, *, most: int = wire.MAX_FRAME) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The next message. Raises EOFError at the end, FrameError if it is none."""
    head_size, body_size = wire.lengths(bytes(await _exactly(source, wire.PREFIX_SIZE)))
    if head_size + body_size > most:
        raise wire.FrameError(f"the frame is too large: {head_size + body_size} bytes")
    head, body = await _exactly(source, head_size), await _exactly(source, body_size)
    try:
        header, tensors = wire.decode(head, body)
    except (RuntimeError, OverflowError, AttributeError) as error:  # also of JSON that nests too deep
        raise wire.FrameError(f"malformed message: {error!r}") from error
    if not isinstance(header, dict):
        raise wire.FrameError("malformed message: it is no object")
    return header, tensors


async def _exactly(source: socket.socket, size: int) -> bytearray:
    """This number of bytes, received in place, which lets other threads run meanwhile. Memory grows with the bytes
    received, not with those announced."""
    data, at = bytearray(min(size, _FIRST_BYTES)), 0
    while at < size:
        if at == len(data):
            data.extend(bytes(min(size - at, at)))
        with memoryview(data) as rest:
            received = await asyncio.get_running_loop().sock_recv_into(source, rest[at:])
        if not received:
            raise EOFError
        at += received
    return data
