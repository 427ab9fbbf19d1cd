"""Listens for the plugin inside SGLang, and gives each request's builder what is said of it.

The agent listens and the plugin connects, so either may start first and come back. One server at a time: two that took turns
would both be captured in part. What nobody expects is counted and dropped; rows beyond the memory that they may take are
dropped too, and the light record of the step is kept.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import CaptureLoss, CaptureParams, TopK
from updraft_inference.sglang_engine.trace_builder import Rows, StepPart, TraceBuilder
from updraft_sglang import wire

logger = logging.getLogger(__name__)

_PATIENCE_S = 20.0
"""How long the plugin may be away before that is said: a server restarts, a scheduler is slow to start."""

_MAX_PATH = 107
"""Of a Unix socket on Linux, in bytes."""

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What the plugin says of itself when it connects."""

    id: str
    """Of the scheduler's process, and of no other."""
    plugin: str
    sglang: str
    pid: int
    """Of that process, as it is called where it runs."""
    num_steps: int
    aux_size: int
    version: int
    digest: str
    problem: str

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> "Hello":
        """Read the header. FrameError if it is none of a plugin that we understand."""
        if header.get("protocol") != wire.PROTOCOL:
            raise wire.FrameError(
                f"Updraft's plugin {header.get('plugin')} in the SGLang server speaks protocol {header.get('protocol')},"
                f" this agent speaks {wire.PROTOCOL}: write its folder anew (updraft-inference prepare-sglang)"
            )
        try:
            return cls(
                id=str(header["id"]),
                plugin=str(header["plugin"]),
                sglang=str(header["sglang"]),
                pid=int(header["pid"]),
                num_steps=int(header["steps"]),
                aux_size=int(header["aux_size"]),
                version=int(header["version"]),
                digest=str(header["digest"]),
                problem=str(header["problem"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise wire.FrameError(f"the plugin's hello is malformed: {error!r}") from error


class Collector:
    """Assemblies by request id. Everything happens on the event loop."""

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
        """By the plugin, at the last message of this connection: what it dropped before is nobody's loss."""
        self._max_bytes = max_bytes
        self._expected: dict[str, TraceBuilder] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._connection: asyncio.StreamWriter | None = None
        self._misunderstood = ""
        """What was said last of a server that is not understood: it comes again."""
        self._refused: deque[str] = deque(maxlen=16)
        """Servers that this was said of last: they come again."""
        self.last_lookahead = 0
        """Drafts in the last step that was told of."""

    @property
    def is_connected(self) -> bool:
        """Whether a plugin that we understand is there."""
        return self.greeted.is_set()

    @property
    def problem(self) -> str:
        """Why nothing is captured, one sentence; empty if it is."""
        if self._problem:
            return self._problem
        if self.is_connected:
            return self.hello.problem if self.hello is not None else ""
        away_s = self._clock.monotonic() - self._away_since_s
        if away_s < _PATIENCE_S:
            return ""
        return (
            f"Updraft's plugin in the SGLang server has not connected to {self.path} for {away_s:.0f} s: its folder must be"
            " on the server's PYTHONPATH, and UPDRAFT_SGLANG_SOCKET must name this socket"
        )

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Take connections for the length of the block. InvalidInput where the socket cannot be made."""
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
                self.path.chmod(0o660)  # the server's container may run as another user of the volume's group
                ours = self.path.stat().st_ino
            except OSError as error:
                raise InvalidInput(
                    f"cannot listen at {self.path} ({error.strerror}); set UPDRAFT_INFERENCE_SGLANG_SOCKET"
                ) from error
            try:
                yield
            finally:
                server.close()
                for connection in list(connections):  # those too that said nothing yet
                    connection.cancel()
                with suppress(FileNotFoundError):
                    if self.path.stat().st_ino == ours:  # or it is of an agent that came after
                        self.path.unlink()

    def expect(self, rid: str, num_prompt: int, wish: CaptureParams) -> TraceBuilder:
        """Begin to take what is said of this request."""
        builder = self._expected[rid] = TraceBuilder(num_prompt, wish)
        self._changed[rid] = asyncio.Event()
        return builder

    def forget(self, rid: str) -> None:
        """It is over, or never began."""
        self._expected.pop(rid, None)
        self._changed.pop(rid, None)

    async def complete(self, rid: str, num_output: int, timeout_s: float) -> None:
        """Wait until all of `num_output` tokens has come, for at most `timeout_s`; not at all without a plugin."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.is_connected and not self.problem and not self._expected[rid].covers(num_output):
                    changed = self._changed[rid]
                    changed.clear()
                    await changed.wait()

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return sum(builder.nbytes for builder in self._expected.values())

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: of a server that is welcome, or is told why not."""
        try:
            header, _ = await _frame(reader)
            refusal = self._take_hello(header, writer)
            writer.write(wire.answer(refusal))  # short enough to be gone before the connection ends
            while not refusal:
                header, tensors = await _frame(reader)
                self.take(header, tensors)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except wire.FrameError as error:
            self._note_misunderstood(error, writer)
        finally:
            writer.transport.abort()
            self._part(writer)

    def _take_hello(self, header: Mapping[str, Any], writer: asyncio.StreamWriter) -> str:
        """Listen to this connection from now on, also where its server's last one is not seen to have ended; or say why not."""
        if self._connection is not None and self.hello is not None and header.get("id") != self.hello.id:
            return self._refusal(header, self.hello)
        try:
            hello = Hello.of(header)
        except wire.FrameError as error:
            self._note_misunderstood(error, writer)
            return str(error)
        if self._connection is not None:
            self._connection.transport.abort()
            self._part(self._connection)
        self._greet(hello, writer)
        return ""

    def _greet(self, hello: Hello, writer: asyncio.StreamWriter) -> None:
        self._connection, self.hello, self._num_dropped = writer, hello, None
        self._problem = self._misunderstood = ""
        self.greeted.set()
        extra = {"plugin": hello.plugin, "sglang": hello.sglang, "draft_version": hello.version}
        logger.info("SGLang's plugin is connected", extra=extra)
        if hello.problem:
            logger.error("SGLang's plugin captures nothing", extra={"reason": hello.problem})

    def _note_misunderstood(self, error: wire.FrameError, writer: asyncio.StreamWriter) -> None:
        if self._connection in (None, writer):  # else it is a second one, and no trouble of the first
            self._problem = str(error)
        if str(error) != self._misunderstood:
            logger.error("The SGLang plugin cannot be understood", extra={"reason": str(error)})
        self._misunderstood = str(error)

    def _refusal(self, second: Mapping[str, Any], first: Hello) -> str:
        reason = (
            f"another SGLang server (process {first.pid} there) is connected to {self.path} already: start each server with an"
            " UPDRAFT_SGLANG_SOCKET and an agent of its own"
        )
        identity = str(second.get("id"))[:64]
        if identity not in self._refused:
            self._refused.append(identity)
            logger.error("A second SGLang server is refused", extra={"pid": second.get("pid"), "reason": reason})
        return reason

    def _part(self, writer: asyncio.StreamWriter) -> None:
        if self._connection is not writer:
            return
        self._connection = None
        self._away_since_s = self._clock.monotonic()
        self.greeted.clear()
        for changed in self._changed.values():
            changed.set()

    def take(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Act on one message. FrameError if it is none."""
        try:
            self._count_dropped(int(header["dropped"]))
            kind = header["kind"]
            if kind == "steps":
                self._take_steps(header, tensors)
            elif kind == "prefill":
                self._take_prefill(header, tensors)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            self.losses[CaptureLoss.MALFORMED] += 1
            raise wire.FrameError(f"a message of the plugin is malformed: {error!r}") from error

    def _count_dropped(self, num: int) -> None:
        if self._num_dropped is not None:
            self.losses[CaptureLoss.QUEUE] += max(0, num - self._num_dropped)
        self._num_dropped = num

    def _take_steps(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        at = 0
        for request in header["requests"]:
            rows, rejected = int(request["rows"]), int(request["counterfactual_rows"])
            position, accepted = int(request["position"]), int(request["accepted"])
            step = StepPart(
                position=position,
                accepted=accepted,
                draft_ids=tuple(map(int, request["drafts"])),
                target_log_probs=tuple(map(float, request["log_p"])),
                batch_size=int(header["batch_size"]),
                duration_s=int(header["duration_us"]) / 1e6,
                version=int(header["version"]),
                rows=_rows(tensors, position, at, at, rows, rows) if rows else None,
                rejected=_rows(tensors, position + accepted + 1, at + rows, at + rows, rejected, rejected)
                if rejected
                else None,
            )
            self.last_lookahead = len(step.draft_ids)
            at += rows + rejected
            self._give_step(str(request["rid"]), step)

    def _take_prefill(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        at = taught = 0
        for request in header["requests"]:
            num, num_taught = int(request["rows"]), int(request["teacher_rows"])
            rows = _rows(tensors, int(request["position"]), at, taught, num, num_taught)
            at, taught = at + num, taught + num_taught
            self._give_rows(str(request["rid"]), rows)

    def _give_step(self, rid: str, step: StepPart) -> None:
        builder = self._known(rid)
        if builder is not None:
            builder.add_step(step if self._has_room(step.nbytes) else step.without_rows)
            self._changed[rid].set()

    def _give_rows(self, rid: str, rows: Rows) -> None:
        builder = self._known(rid)
        if builder is not None:
            if self._has_room(rows.nbytes):
                builder.add_rows(rows)
            self._changed[rid].set()

    def _known(self, rid: str) -> TraceBuilder | None:
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


def _rows(tensors: Mapping[str, Tensor], position: int, at: int, taught_at: int, num: int, num_taught: int) -> Rows:
    """Copies, so that a request does not keep the whole batch's message. ValueError if the message has fewer."""
    aux = tensors["aux"][at : at + num].clone()
    taught = slice(taught_at, taught_at + num_taught)
    teacher = TopK(
        ids=tensors["ids"][taught].clone(),
        log_probs=tensors["log_probs"][taught].clone(),
        log_sum_exp=tensors["log_sum_exp"][taught].clone(),
    )
    if len(aux) != num or len(teacher) != num_taught or len(teacher.log_sum_exp) != num_taught:
        raise ValueError("fewer rows than it says")
    return Rows(position=position, aux=aux, teacher=teacher)
