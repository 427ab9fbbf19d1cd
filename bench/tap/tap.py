"""The cost of Updraft's plugin for a stock vLLM server, and of a swap there. See README.md in this folder."""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import psutil
import torch
from bench import harness
from bench.engine_inputs import code_prompts, untrained_drafts
from bench.harness import Line, Measurements, spread
from bench.serving import servers
from bench.serving.servers import Server
from bench.tap import endings, swaps
from bench.tap.plugged import NO_ROWS, ROLES, ROWS, plugged, speculation
from rich.console import Console
from tests.support.tap_agent import Agent, listening
from tests.vllm import build

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_cli import results
from updraft_draft import checkpoint
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.tap import initial_draft

STREAMS = 8
TOKENS = 48
SEED = 7
DRAFT_VOCAB = 8192
OPT_OUT = {"vllm_xargs": {"updraft_capture": "off"}}

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
class Pair:
    """A server without the plugin and one with it, on whose socket an agent may listen."""

    stock: Server
    plugged: Server
    socket: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Eight requests at once in one arm."""

    round: int
    pair: int
    arm: Arm
    tokens_per_s: float
    cpu_ms: float
    """CPU time per token of all the server's processes."""


@asynccontextmanager
async def pair_of_servers(model: Path, draft: Path, folder: Path, threads: int) -> AsyncIterator[Pair]:
    """Both on the same draft, which nobody trained: a step gives about one token, so hooks run as often as they can."""
    socket = folder / "s"
    async with (
        plugged(model, draft, folder, socket, threads=threads) as ours,
        servers.vllm(model, folder / "stock.log", threads=threads, options=speculation(draft)) as stock,
    ):
        yield Pair(stock=stock, plugged=ours, socket=socket)


async def turn(on: Pair, arm: Arm, prompts: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Tokens per second, and CPU milliseconds per token."""
    server = on.stock if arm is Arm.STOCK else on.plugged
    with server.turn():
        if arm not in POLICIES:
            return await _timed(server, prompts)
        async with listening(on.socket, POLICIES[arm], roles=ROLES) as agent:
            timed = await _timed(server, prompts)
            await agent.settle()
    _check(agent, arm, len(prompts))
    return timed


async def _timed(server: Server, prompts: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    before_s, started_s = cpu_s(server), time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, prompt in enumerate(prompts):
            tasks.create_task(server.stream(prompt, TOKENS, OPT_OUT if number else {}))
    wall_s, tokens = time.perf_counter() - started_s, TOKENS * len(prompts)
    return tokens / wall_s, 1e3 * (cpu_s(server) - before_s) / tokens


def _check(agent: Agent, arm: Arm, num_requests: int) -> None:
    """Else the arm would not be what its name says."""
    captured = [rid for rid, (_, tensors) in agent.finished.items() if tensors]
    assert len(agent.finished) == num_requests, f"{len(agent.finished)} of {num_requests} requests were counted"
    assert (len(captured), len(agent.seen)) == ((1, 1) if arm is Arm.PAYLOAD else (0, 0))
    assert agent.dropped == 0, f"{agent.dropped} messages were dropped"


def cpu_s(server: Server) -> float:
    """CPU seconds of all processes of the server."""
    main = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (main, *main.children(recursive=True))]
    return sum(one.user + one.system for one in times)


async def turns(pairs: Sequence[Pair], prompts: Sequence[tuple[int, ...]], rounds: int) -> list[Turn]:
    """Rounds of the same prompts by each arm on each pair, the arms in turn."""
    taken = []
    for number in range(-1, rounds):  # the first round warms up
        for place, on in enumerate(pairs):
            for arm in harness.in_turn(tuple(Arm), number + place):
                _progress.print(f"round {number} of {rounds}, servers {place}: {arm}")
                tokens_per_s, cpu_ms = await turn(on, arm, prompts)
                taken.append(Turn(round=number, pair=place, arm=arm, tokens_per_s=tokens_per_s, cpu_ms=cpu_ms))
    return [one for one in taken if one.round >= 0]


async def cost_of_arms(plan: argparse.Namespace, folder: Path, model: Path, draft: Path) -> list[Turn]:
    """The first part."""
    async with AsyncExitStack() as stack:
        pairs = []
        for place in range(plan.pairs):
            _progress.print(f"servers {place} start, one without the plugin and one with it")
            opened = pair_of_servers(model, draft, folder / str(place), plan.threads)
            pairs.append(await stack.enter_async_context(opened))
        return await turns(pairs, code_prompts(model, STREAMS, seed=SEED), plan.rounds)


async def run(plan: argparse.Namespace, folder: Path) -> tuple[list[Turn], swaps.Swaps]:
    """Both parts that have servers, one after the other."""
    model = harness.model()
    draft = initial_draft.write(model, folder / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB))
    taken = await cost_of_arms(plan, folder, model, draft)
    _progress.print(f"{plan.swaps} swaps under {plan.streams} streams")
    prompts = code_prompts(model, plan.streams, seed=SEED)
    return taken, await swaps.measured(model, _drafts(model, draft, folder), prompts, plan, folder / "swaps")


def _drafts(model: Path, draft: Path, folder: Path) -> list[DraftCheckpoint]:
    """Two drafts of the served one's vocabulary."""
    _, tensors = checkpoint.load(draft)
    return untrained_drafts(model, folder, torch.arange(DRAFT_VOCAB) + tensors["d2t"])


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


def lines_of_arms(taken: Sequence[Turn]) -> list[Line]:
    """A bar for each arm, with the CPU time beside it."""
    lines = []
    for arm, most in MOST.items():
        slower, busier = costs(taken, arm)
        bar = results.at_most(f"cost in tokens per second, {arm}", statistics.median(slower), most, "%")
        lines.append(Line(bar, spread(slower), f"{statistics.median(busier):+.1f} % CPU time"))
    return lines


def noise(taken: Sequence[Turn]) -> str:
    """A sentence about what the bars can tell apart."""
    found = spread(between_stock(taken))
    if found is None:
        return "One pair of servers ran, so it is not known by how much two equal servers differ."
    return f"Two servers without the plugin differ by {found.median:+.1f} % (quartiles {found})."


def measure(plan: argparse.Namespace) -> Measurements:
    """All three parts."""
    with tempfile.TemporaryDirectory(prefix="updraft-") as folder:  # short enough for a Unix socket
        taken, swapped = asyncio.run(run(plan, Path(folder)))
        _progress.print("ends of requests with rows of a target of width 4096")
        holds = endings.measured(Path(folder) / "e", plan.endings)
    return Measurements(
        seed=SEED,
        lines=[*lines_of_arms(taken), *swapped.lines(), holds.line()],
        samples=[*map(asdict, taken), swapped.row(), asdict(holds)],
        figures=[noise(taken), *swapped.figures(), holds.figure()],
    )


def parser() -> argparse.ArgumentParser:
    """The arguments: how much of each part."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=20, help="counted rounds of all arms (default 20)")
    arguments.add_argument(
        "--pairs", type=int, default=2, help="servers with and without the plugin (default 2 of each)"
    )
    arguments.add_argument("--threads", type=int, default=1, help="threads of each server (default 1)")
    arguments.add_argument("--streams", type=int, default=24, help="streams while drafts are swapped (default 24)")
    arguments.add_argument("--swaps", type=int, default=20, help="swaps (default 20)")
    arguments.add_argument("--endings", type=int, default=50, help="ended requests of width 4096 (default 50)")
    return arguments


def main() -> None:
    """Measure if vLLM is there."""
    arguments = parser()
    if not build.is_built():
        arguments.error("vLLM is not built: run `make vllm-build` first")
    harness.run("tap", arguments, measure)


if __name__ == "__main__":
    main()
