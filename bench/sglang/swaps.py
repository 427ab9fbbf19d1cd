"""Swaps in a stock SGLang server while every slot is busy."""

import asyncio
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from bench.harness import Line, p95, spread
from bench.sglang.servers import answered
from bench.tap.arms import STREAMS
from tests.sglang.agent import load
from tests.sglang.server import Server
from tests.support.tap_agent import Agent

from updraft_cli import results
from updraft_inference.engine import DraftCheckpoint

BETWEEN_S = 0.5
MOST_MS = 20
"""The bar of a standstill, in the median."""


@dataclass(frozen=True, slots=True)
class Swaps:
    """The cost of the swaps of one server for the running requests."""

    stands_ms: list[float]
    """How long the server stood still."""
    requests: int
    changed: int

    def lines(self) -> list[Line]:
        """The bars."""
        return [
            Line(results.at_most(f"changed or failed requests over {len(self.stands_ms)} swaps", self.changed, 0)),
            Line(
                results.at_most("standstill of a swap, median", statistics.median(self.stands_ms), MOST_MS, "ms"),
                spread(self.stands_ms),
            ),
        ]

    def row(self) -> dict[str, Any]:
        """The samples."""
        return asdict(self)

    def figures(self) -> Iterator[str]:
        """A sentence with the longest one."""
        median, longest = statistics.median(self.stands_ms), max(self.stands_ms)
        yield (
            f"the server stood still in a swap: median {median:.0f} ms, 95th percentile {p95(self.stands_ms):.0f} ms,"
            f" longest {longest:.0f} ms, {self.requests} requests"
        )


async def measured(
    on: Server, agent: Agent, prompts: list[tuple[int, ...]], drafts: list[DraftCheckpoint], num_swaps: int
) -> Swaps:
    """Swap after each stream has ended its first request."""
    alone = [await answered(on, prompt, is_captured=False) for prompt in prompts]
    is_over, all_run = asyncio.Event(), asyncio.Barrier(STREAMS + 1)
    are_equal: list[bool] = []
    stands_ms: list[float] = []

    async def stream(number: int) -> None:
        for turn in count():
            are_equal.append(await answered(on, prompts[number], is_captured=False) == alone[number])
            if not turn:  # the first requests also wait for SGLang to compile
                await all_run.wait()
            if is_over.is_set():
                return

    async with asyncio.TaskGroup() as tasks:
        for number in range(STREAMS):
            tasks.create_task(stream(number))
        await all_run.wait()
        for number in range(num_swaps):
            await asyncio.sleep(BETWEEN_S)
            draft = drafts[number % 2]
            loaded = await load(agent, draft.folder, draft.version)
            if loaded["refusal"]:
                raise SystemExit(f"SGLang refused a draft: {loaded['refusal']}")
            stands_ms.append(loaded["pause_us"] / 1e3)
        is_over.set()
    return Swaps(stands_ms=stands_ms, requests=len(are_equal), changed=are_equal.count(False))
