"""The plugin's end of the agent's socket, for tests: processes of a server that says what the test wants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from updraft_tap import wire

AUX = 6
K = 2

SAMPLING = {
    "temperature": 0.5,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "max_tokens": 9,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}


def hello(role: str, **changed: Any) -> dict[str, Any]:
    return {
        "kind": "hello",
        "protocol": wire.PROTOCOL,
        "id": f"{role}-1",
        "server": "one",
        "tap": "0.2.0",
        "engine": {"name": "vLLM", "version": "0.32.0"},
        "pid": 7,
        "role": role,
        "dtype": "f32",
        "version": 0,
        "digest": "",
        "problem": "",
    } | changed


def prefill(
    rid: str, num_prompt: int, *, dropped: int = 0, probability: Any = 1.0
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The whole prompt, each position's states its number."""
    part = {"rid": rid, "probability": probability, "position": 0, "cached": 0, "rows": num_prompt, "teacher_rows": 1}
    header = {"kind": "prefill", "number": 1, "dropped": dropped, "requests": [part]}
    return header, rows(0, num_prompt, taught=1)


def step(
    rid: str, position: int, accepted: int, *, version: int = 0, rejected: int = 0, dropped: int = 0
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Three draft tokens, of which the target accepted some."""
    part = {
        "rid": rid,
        "probability": 1.0,
        "version": version,
        "position": position,
        "accepted": accepted,
        "drafts": [5, 6, 7],
        "log_p": [-1.0] * 3,
        "rows": accepted + 1,
        "counterfactual_rows": rejected,
    }
    header = {"kind": "steps", "number": 1, "dropped": dropped, "batch_size": 2, "duration_us": 10, "requests": [part]}
    return header, rows(position, accepted + 1 + rejected)


def finished(
    rid: str, num_prompt: int, num_output: int, *, captured: bool = True, **changed: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Its tokens are the numbers of their positions. By default it was decoded in one step of a draft that is not known."""
    sums = {"version": None, "steps": 1, "proposed": 3, "proposed_by_position": [1, 1, 1]}
    sums |= {"accepted": [1, 0, 0], "us": 30_000}
    header = {
        "kind": "finished",
        "number": 1,
        "dropped": 0,
        "rid": rid,
        "finish": "length_capped",
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "preemptions": 0,
        "duration_us": 50_000,
        "constrained": False,
        "probability": 1.0 if captured else 0.0,
        "counters": [sums],
        "sampling": SAMPLING if captured else None,
    }
    tokens = torch.arange(num_prompt + num_output, dtype=torch.int32)
    return header | changed, {"tokens": tokens} if captured else {}


def rows(position: int, num: int, *, taught: int | None = None) -> dict[str, torch.Tensor]:
    """Rows that say their position."""
    places = torch.arange(position, position + num, dtype=torch.float32)
    teacher = places[num - (num if taught is None else taught) :]
    return {
        "aux": places[:, None].expand(num, AUX),
        "ids": torch.arange(1, K + 1, dtype=torch.int32).expand(len(teacher), K),
        "log_probs": -torch.ones(len(teacher), K),
        "log_sum_exp": teacher,
    }


class Process:
    """A process of a server. What the agent says is in `heard`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard: list[dict[str, Any]] = []
        self._reader = reader
        self._writer = writer

    async def say(self, header: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        for piece in wire.encode(header, tensors):
            self._writer.write(bytes(piece))
        await self._writer.drain()

    async def say_bytes(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def hear(self) -> dict[str, Any]:
        """The agent's next message. Raises EOFError if it has hung up."""
        async with asyncio.timeout(60):
            head, body = wire.lengths(await self._reader.readexactly(wire.PREFIX_SIZE))
            header, _ = wire.decode(await self._reader.readexactly(head), await self._reader.readexactly(body))
        self.heard.append(header)
        return header

    def hang_up(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def process(socket: Path, role: str, **changed: Any) -> AsyncIterator[Process]:
    """A process that has said hello; its first message is the agent's answer."""
    reader, writer = await asyncio.open_unix_connection(socket)
    one = Process(reader, writer)
    try:
        await one.say(hello(role, **changed))
        yield one
    finally:
        writer.transport.abort()
