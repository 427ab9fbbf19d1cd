"""The agent's end of the plugin's socket, for tests: it reads the wire, and keeps what comes by request."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.wait import until
from torch import Tensor

from updraft_tap import wire

NOTHING = {"payload": 0, "prompt_rows": 0, "counterfactual_rows": 0}
"""The policy that no request gives rows."""


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
        self._dropped: dict[str, list[int]] = {}
        """By role of the process."""
        self.policies: list[dict[str, Any]] = []
        """What the processes said is in effect."""
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.finished: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
        """Requests that ended: the header, and the tensors of those with payload."""
        self.loaded: list[dict[str, Any]] = []
        """Answers to loads."""
        self.speedups: list[dict[str, Any]] = []
        self.policy: dict[str, Any] | None = None
        """Sent after each hello."""
        self._writers: list[asyncio.StreamWriter] = []
        self._roles: dict[str, asyncio.StreamWriter] = {}

    @property
    def dropped(self) -> int:
        """Messages that were dropped between the first one that came and the last."""
        return sum(counts[-1] - counts[0] for counts in self._dropped.values())

    @property
    def roles(self) -> set[str]:
        """Processes of the server that said hello on a connection that is still there."""
        return {role for role, writer in self._roles.items() if not writer.transport.is_closing()}

    def send(self, role: str, header: dict[str, Any]) -> None:
        """A message to the process with this role."""
        self._roles[role].write(b"".join(wire.encode(header)))

    async def settle(self) -> None:
        """Wait until all that the processes have offered so far is here, or is counted in `dropped`."""
        replies = len(self.policies) + len(self.roles)
        for role in self.roles:
            self.send(role, {"kind": "policy", **(self.policy or NOTHING)})
        await until(lambda: len(self.policies) >= replies, what="all messages")

    def hang_up(self) -> None:
        self.may_read.set()
        for writer in self._writers:
            writer.transport.abort()

    async def read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        role = ""
        try:
            while True:
                await self.may_read.wait()
                head, body = wire.lengths(await reader.readexactly(wire.PREFIX_SIZE))
                header, tensors = wire.decode(await reader.readexactly(head), await reader.readexactly(body))
                if header["kind"] == "hello":
                    self.hellos.append(header)
                    writer.write(wire.answer())
                    if self.policy is not None:
                        writer.write(b"".join(wire.encode({"kind": "policy", **self.policy})))
                    role = header.get("role", "")
                    self._roles[role] = writer
                else:
                    self.take(header, tensors, role)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    def take(self, header: dict[str, Any], tensors: dict[str, Tensor], role: str = "") -> None:
        self.numbers.append(header["number"])
        self._dropped.setdefault(role, []).append(header["dropped"])
        if header["kind"] == "finished":
            self.finished[header["rid"]] = header, tensors
            return
        kept = {"loaded": self.loaded, "policy": self.policies, "speedup": self.speedups}.get(header["kind"])
        if kept is not None:
            kept.append(header)
            return
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
async def listening(
    socket: Path, policy: dict[str, Any] | None = None, roles: Iterable[str] = ("",)
) -> AsyncIterator[Agent]:
    """An agent to which these processes of the server have said hello; it sends each the policy."""
    agent = Agent()
    agent.policy = policy
    await asyncio.to_thread(socket.unlink, missing_ok=True)
    async with asyncio.TaskGroup() as readers:

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            readers.create_task(agent.read(reader, writer))

        listener = await asyncio.start_unix_server(accept, socket)
        try:
            await until(lambda: agent.roles >= set(roles), what="the plugin's hello")
            await until(lambda: policy is None or len(agent.policies) >= len(set(roles)), what="the policy")
            yield agent
        finally:
            listener.close()
            agent.hang_up()
