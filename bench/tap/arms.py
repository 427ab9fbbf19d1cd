"""The arms that are compared on each engine, their bars, and what turns of them cost. Shared by both servers' benchmarks."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from bench import harness
from bench.harness import Line, spread
from bench.tap.plugged import NO_ROWS, ROLES, ROWS
from rich.console import Console
from tests.support.tap_agent import Agent, listening

from updraft_cli import results

STREAMS = 8
"""Requests at once, the first of which does not opt out of capture."""
TOKENS = 48
"""Length of each answer."""
SEED = 7

_progress = Console(stderr=True, style="dim")


class Arm(StrEnum):
    """How a server runs."""

    STOCK = "no plugin"
    OFF = "traces off"
    COUNTERS = "counters only"
    PAYLOAD = "payload of one request in eight"


POLICIES = {Arm.COUNTERS: NO_ROWS, Arm.PAYLOAD: ROWS}
"""The arms for which an agent listens, and the policy that it sends."""

MOST = {Arm.OFF: 0.5, Arm.COUNTERS: 1.0, Arm.PAYLOAD: 3.0}
"""The bars: tokens per second that an arm may cost, in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Eight requests at once in one arm."""

    round: int
    pair: int
    arm: Arm
    tokens_per_s: float
    cpu_ms: float
    """CPU time per token of all the server's processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The requests of a turn: each answer when it is awaited, and the CPU seconds of the server so far."""

    answers: Iterable[Coroutine[Any, Any, object]]
    cpu_s: Callable[[], float]

    async def timed(self) -> tuple[float, float]:
        """All at once. Tokens per second, and CPU milliseconds per token."""
        before_s, started_s = self.cpu_s(), time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for answer in self.answers:
                tasks.create_task(answer)
        wall_s, tokens = time.perf_counter() - started_s, TOKENS * STREAMS
        return tokens / wall_s, 1e3 * (self.cpu_s() - before_s) / tokens


async def turns(taken: Callable[[int, Arm], Awaitable[tuple[float, float]]], *, pairs: int, rounds: int) -> list[Turn]:
    """Rounds of the same prompts by each arm on each pair of servers, the arms in turn.

    `taken` is a turn on a pair: tokens per second, and CPU milliseconds per token.
    """
    found = []
    for number in range(-1, rounds):  # the first round warms up
        for place in range(pairs):
            for arm in harness.in_turn(tuple(Arm), number + place):
                tokens_per_s, cpu_ms = await taken(place, arm)
                _progress.print(
                    f"round {number} of {rounds}, servers {place}: {arm}: {tokens_per_s:.2f} tokens per second"
                )
                found.append(Turn(round=number, pair=place, arm=arm, tokens_per_s=tokens_per_s, cpu_ms=cpu_ms))
    return [one for one in found if one.round >= 0]


async def turn(on: AbstractContextManager[None], socket: Path, arm: Arm, requests: Requests) -> tuple[float, float]:
    """See `Requests.timed`. The server runs within `on`."""
    with on:
        if arm not in POLICIES:
            return await requests.timed()
        async with listening(socket, POLICIES[arm], roles=ROLES) as agent:
            timed = await requests.timed()
            await agent.settle()
    _check(agent, arm)
    return timed


def _check(agent: Agent, arm: Arm) -> None:
    """Else the arm would not be what its name says."""
    captured = [rid for rid, (_, tensors) in agent.finished.items() if tensors]
    assert len(agent.finished) == STREAMS, f"{len(agent.finished)} of {STREAMS} requests were counted"
    assert (len(captured), len(agent.seen)) == ((1, 1) if arm is Arm.PAYLOAD else (0, 0))
    assert agent.dropped == 0, f"{agent.dropped} messages were dropped"


def costs(taken: Sequence[Turn], arm: Arm) -> tuple[list[float], list[float]]:
    """The cost of an arm in each round on each pair, in percent: of tokens per second, and of CPU time."""
    stock = {(one.round, one.pair): one for one in taken if one.arm is Arm.STOCK}
    both = [(one, stock[one.round, one.pair]) for one in taken if one.arm is arm]
    slower = [100 * (1 - ours.tokens_per_s / theirs.tokens_per_s) for ours, theirs in both]
    return slower, [100 * (ours.cpu_ms / theirs.cpu_ms - 1) for ours, theirs in both]


def between_stock(taken: Sequence[Turn]) -> list[float]:
    """By how much two servers without the plugin differ in each round, in percent of tokens per second: the noise."""
    stock = {(one.round, one.pair): one.tokens_per_s for one in taken if one.arm is Arm.STOCK}
    return [100 * (1 - stock[number, 1] / stock[number, 0]) for number, place in stock if place == 1]


def lines(taken: Sequence[Turn]) -> list[Line]:
    """A bar for each arm, with the CPU time beside it."""
    found = []
    for arm, most in MOST.items():
        slower, busier = costs(taken, arm)
        bar = results.at_most(f"cost in tokens per second, {arm}", statistics.median(slower), most, "%")
        found.append(Line(bar, spread(slower), f"{statistics.median(busier):+.1f} % CPU time"))
    return found


def noise(taken: Sequence[Turn]) -> str:
    """A sentence about what the bars can tell apart."""
    found = spread(between_stock(taken))
    if found is None:
        return "One pair of servers ran, so it is not known by how much two equal servers differ."
    return f"Two servers without the plugin differ by {found.median:+.1f} % (quartiles {found})."
