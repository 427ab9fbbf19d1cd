"""Receives the messages of the plugin inside SGLang, and passes each one to the trace builder of its request.

The agent listens and the plugin connects, so either may start first or restart. Only one server may connect, because
with two both would be captured in part. Messages of unexpected requests are counted and dropped. Rows beyond the memory
limit are dropped too, and the light record of their step is kept.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import Tensor

from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import CaptureLoss, CaptureParams
from updraft_inference.tap import messages
from updraft_inference.tap.trace_builder import Rows, StepPart, TraceBuilder
from updraft_tap import wire

logger = logging.getLogger(__name__)

_PATIENCE_S = 20.0
"""How long the plugin may be away before it is reported: servers restart, and schedulers start slowly."""

_ENGINE = "SGLang"
"""The only engine whose plugin this collector understands."""

_MAX_PATH = 107
"""Length limit of a Unix socket path on Linux, in bytes."""


class EngineName(BaseModel, frozen=True):
    """The engine that the plugin runs in."""

    name: str
    version: str


class Hello(BaseModel, frozen=True):
    """How the plugin introduces itself when it connects."""

    id: str
    """Unique to the scheduler's process."""
    tap: str
    """Version of the plugin."""
    engine: EngineName
    pid: int
    """Process id within its own container."""
    version: int
    digest: str
    problem: str

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> "Hello":
        """Parse the header. Raises FrameError if the plugin speaks another protocol or the header is malformed."""
        if header.get("protocol") != wire.PROTOCOL:
            raise wire.FrameError(
                f"Updraft's plugin {header.get('tap')} in the SGLang server uses protocol {header.get('protocol')}, but this"
                f" agent uses {wire.PROTOCOL}: run `updraft-inference prepare-sglang` and restart the server"
            )
        try:
            hello = cls.model_validate(header)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise wire.FrameError(f"malformed hello from the plugin: {problems}") from error
        if hello.engine.name != _ENGINE:
            raise wire.FrameError(
                f"a plugin in {hello.engine.name} connected, but this agent is for {_ENGINE}: give each server its own socket"
            )
        return hello


class Collector:
    """Trace builders by request id. Everything happens on the event loop."""

    def __init__(self, path: Path, *, max_bytes: int, clock: Clock | None = None) -> None:
        self.path = path
        self.losses: Counter[CaptureLoss] = Counter()
        self.hello: Hello | None = None
        self.greeted = asyncio.Event()
        """Set while a plugin is connected."""
        self._clock = clock or SystemClock()
        self._away_since_s = self._clock.monotonic()
        self._problem = ""
        self._num_dropped: int | None = None
        """Dropped by the plugin, as of the last message of this connection. Earlier drops are not counted as losses."""
        self._max_bytes = max_bytes
        self._expected: dict[str, TraceBuilder] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._connection: asyncio.StreamWriter | None = None
        self._misunderstood = ""
        """The last protocol error that was logged; the server reconnects and repeats it."""
        self._refused: deque[str] = deque(maxlen=16)
        """Ids of the servers whose refusal was logged last; they reconnect."""
        self.last_lookahead = 0
        """Draft tokens in the last reported step."""

    @property
    def is_connected(self) -> bool:
        return self.greeted.is_set()

    @property
    def problem(self) -> str:
        """Why nothing is captured, in one sentence; empty if capture works."""
        if self._problem:
            return self._problem
        if self.is_connected:
            return self.hello.problem if self.hello is not None else ""
        away_s = self._clock.monotonic() - self._away_since_s
        if away_s < _PATIENCE_S:
            return ""
        return (
            f"Updraft's plugin in the SGLang server has not connected to {self.path} for {away_s:.0f} s. Check that its"
            " folder is on the server's PYTHONPATH and that UPDRAFT_SGLANG_SOCKET names this socket"
        )

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Accept connections for the duration of the block. Raises InvalidInput if the socket cannot be created."""
        if len(str(self.path).encode()) > _MAX_PATH:
            raise InvalidInput(
                f"{self.path} is too long for a Unix socket ({_MAX_PATH} bytes): set UPDRAFT_INFERENCE_SGLANG_SOCKET"
            )
        async with asyncio.TaskGroup() as readers:
            connections: set[asyncio.Task[None]] = set()

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                connections.add(task := readers.create_task(self._read(reader, writer)))
                task.add_done_callback(connections.discard)

            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                server = await asyncio.start_unix_server(accept, self.path)
                self.path.chmod(0o660)  # the server may run as another user of the volume's group
                ours = self.path.stat().st_ino
            except OSError as error:
                raise InvalidInput(
                    f"cannot listen at {self.path} ({error.strerror}); set UPDRAFT_INFERENCE_SGLANG_SOCKET"
                ) from error
            try:
                yield
            finally:
                server.close()
                for connection in list(connections):  # including those without a hello
                    connection.cancel()
                with suppress(FileNotFoundError):
                    if self.path.stat().st_ino == ours:  # else it belongs to a newer agent
                        self.path.unlink()

    def expect(self, rid: str, num_prompt: int, params: CaptureParams) -> TraceBuilder:
        builder = self._expected[rid] = TraceBuilder(num_prompt, params)
        self._changed[rid] = asyncio.Event()
        return builder

    def forget(self, rid: str) -> None:
        self._expected.pop(rid, None)
        self._changed.pop(rid, None)

    async def complete(self, rid: str, num_output: int, timeout_s: float) -> None:
        """Wait at most `timeout_s` until all of `num_output` tokens are covered; return at once without a plugin."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.is_connected and not self.problem and not self._expected[rid].covers(num_output):
                    changed = self._changed[rid]
                    changed.clear()
                    await changed.wait()

    @property
    def nbytes(self) -> int:
        return sum(builder.nbytes for builder in self._expected.values())

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection: of the only server, or of one that is refused."""
        try:
            header, _ = await _frame(reader)
            refusal = self._take_hello(header, writer)
            writer.write(wire.answer(refusal))  # short enough to be sent before the connection closes
            while not refusal:
                header, tensors = await _frame(reader)
                self.take(header, tensors)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except wire.FrameError as error:
            self._note_misunderstood(error, writer)
        finally:
            writer.transport.abort()
            self._disconnect(writer)

    def _take_hello(self, header: Mapping[str, Any], writer: asyncio.StreamWriter) -> str:
        """Accept this connection, replacing an earlier one of the same server; or return why it is refused."""
        if self._connection is not None and self.hello is not None and header.get("id") != self.hello.id:
            return self._refusal(header, self.hello)
        try:
            hello = Hello.of(header)
        except wire.FrameError as error:
            self._note_misunderstood(error, writer)
            return str(error)
        if self._connection is not None:
            self._connection.transport.abort()
            self._disconnect(self._connection)
        self._greet(hello, writer)
        return ""

    def _greet(self, hello: Hello, writer: asyncio.StreamWriter) -> None:
        self._connection, self.hello, self._num_dropped = writer, hello, None
        self._problem = self._misunderstood = ""
        self.greeted.set()
        extra = {"plugin": hello.tap, "sglang": hello.engine.version, "draft_version": hello.version}
        logger.info("The SGLang plugin is connected", extra=extra)
        if hello.problem:
            logger.error("The SGLang plugin captures nothing", extra={"reason": hello.problem})

    def _note_misunderstood(self, error: wire.FrameError, writer: asyncio.StreamWriter) -> None:
        if self._connection in (None, writer):  # a second server must not affect the first one
            self._problem = str(error)
        if str(error) != self._misunderstood:
            logger.error("The SGLang plugin is incompatible", extra={"reason": str(error)})
        self._misunderstood = str(error)

    def _refusal(self, second: Mapping[str, Any], first: Hello) -> str:
        reason = (
            f"another SGLang server (process {first.pid}) is already connected to {self.path}: give each server its own"
            " UPDRAFT_SGLANG_SOCKET and agent"
        )
        identity = str(second.get("id"))[:64]
        if identity not in self._refused:
            self._refused.append(identity)
            logger.error("Refused a second SGLang server", extra={"pid": second.get("pid"), "reason": reason})
        return reason

    def _disconnect(self, writer: asyncio.StreamWriter) -> None:
        if self._connection is not writer:
            return
        self._connection = None
        self._away_since_s = self._clock.monotonic()
        self.greeted.clear()
        for changed in self._changed.values():
            changed.set()

    def take(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Process one message. Raises FrameError if it is malformed."""
        try:
            self._count_dropped(int(header["dropped"]))
            kind = header["kind"]
            if kind == "steps":
                self._take_steps(header, tensors)
            elif kind == "prefill":
                self._take_prefill(header, tensors)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            self.losses[CaptureLoss.MALFORMED] += 1
            raise wire.FrameError(f"malformed message from the plugin: {error!r}") from error

    def _count_dropped(self, num: int) -> None:
        if self._num_dropped is not None:
            self.losses[CaptureLoss.QUEUE] += max(0, num - self._num_dropped)
        self._num_dropped = num

    def _take_steps(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for rid, step in messages.steps(header, tensors):
            self.last_lookahead = len(step.draft_ids)
            self._give_step(rid, step)

    def _take_prefill(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for rid, rows in messages.prefills(header, tensors):
            self._give_rows(rid, rows)

    def _give_step(self, rid: str, step: StepPart) -> None:
        builder = self._builder(rid)
        if builder is not None:
            builder.add_step(step if self._has_room(step.nbytes) else step.without_rows)
            self._changed[rid].set()

    def _give_rows(self, rid: str, rows: Rows) -> None:
        builder = self._builder(rid)
        if builder is not None:
            if self._has_room(rows.nbytes):
                builder.add_rows(rows)
            self._changed[rid].set()

    def _builder(self, rid: str) -> TraceBuilder | None:
        builder = self._expected.get(rid)
        self.losses[CaptureLoss.UNKNOWN] += builder is None
        return builder

    def _has_room(self, num_bytes: int) -> bool:
        has_room = not num_bytes or self.nbytes + num_bytes <= self._max_bytes
        self.losses[CaptureLoss.MEMORY] += not has_room
        return has_room


async def _frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], dict[str, Tensor]]:
    head_size, body_size = wire.lengths(await reader.readexactly(wire.PREFIX_SIZE))
    head = await reader.readexactly(head_size)
    return wire.decode(head, await reader.readexactly(body_size))
