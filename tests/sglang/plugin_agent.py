"""The agent's end of the plugin's socket, for tests: it reads the wire, and keeps what comes by request."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.wait import until
from torch import Tensor

from updraft_tap import wire


@dataclass(frozen=True, slots=True)
class Teacher:
    ids: Tensor
    log_probs: Tensor
    log_sum_exp: Tensor


@dataclass(slots=True)
class Seen:
    """All that came of one request: rows by position, steps in order."""

    rows: list[tuple[int, Tensor]] = field(default_factory=list)
    teachers: list[tuple[int, Teacher]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[list[tuple[Tensor, Teacher]]] = field(default_factory=list)
    prefills: list[dict[str, Any]] = field(default_factory=list)


class Agent:
    """Takes one connection after the other, and keeps what comes."""

    def __init__(self) -> None:
        self.hellos: list[dict[str, Any]] = []
        self.seen: dict[str, Seen] = {}
        self.numbers: list[int] = []
        self._dropped: list[int] = []
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def dropped(self) -> int:
        """Messages that were dropped between the first one that came and the last."""
        return self._dropped[-1] - self._dropped[0] if self._dropped else 0

    def hang_up(self) -> None:
        self.may_read.set()
        for writer in self._writers:
            writer.transport.abort()

    async def read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            while True:
                await self.may_read.wait()
                head, body = wire.lengths(await reader.readexactly(wire.PREFIX_SIZE))
                header, tensors = wire.decode(await reader.readexactly(head), await reader.readexactly(body))
                if header["kind"] == "hello":
                    self.hellos.append(header)
                    writer.write(wire.answer())
                else:
                    self.take(header, tensors)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    def take(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.numbers.append(header["number"])
        self._dropped.append(header["dropped"])
        rows, teachers = iter(tensors.get("aux", ())), _teachers(tensors)
        for request in header["requests"]:
            seen = self.seen.setdefault(request["rid"], Seen())
            position = request["position"]
            taught_from = request["rows"] - request.get("teacher_rows", request["rows"])
            for i in range(request["rows"]):
                seen.rows.append((position + i, next(rows)))
                if i >= taught_from:
                    seen.teachers.append((position + i, next(teachers)))
            if header["kind"] == "steps":
                seen.steps.append({**request, "batch_size": header["batch_size"]})
                seen.rejected.append([(next(rows), next(teachers)) for _ in range(request["counterfactual_rows"])])
            else:
                seen.prefills.append(request)
        assert next(rows, None) is None
        assert next(teachers, None) is None


def _teachers(tensors: dict[str, Tensor]) -> Iterator[Teacher]:
    if tensors:
        yield from map(Teacher, tensors["ids"], tensors["log_probs"], tensors["log_sum_exp"])


@asynccontextmanager
async def listening(socket: Path) -> AsyncIterator[Agent]:
    agent = Agent()
    await asyncio.to_thread(socket.unlink, missing_ok=True)
    async with asyncio.TaskGroup() as readers:

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            readers.create_task(agent.read(reader, writer))

        listener = await asyncio.start_unix_server(accept, socket)
        try:
            await until(lambda: bool(agent.hellos), what="the plugin's hello")
            yield agent
        finally:
            listener.close()
            agent.hang_up()
