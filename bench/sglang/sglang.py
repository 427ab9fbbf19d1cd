"""The cost of capture and of a swap for a stock SGLang server. See README.md in this folder."""

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path

from bench import harness
from bench.engine_inputs import code_prompts, drafts_like, seed_draft
from bench.harness import Line, Measurements, p95, spread
from bench.tap import arms
from bench.tap.arms import SEED, STREAMS, TOKENS, Arm, Requests, Turn
from rich.console import Console
from tests.sglang.agent import ROLES, load
from tests.sglang.devices import GPU, PYTHON_VARIABLE
from tests.sglang.server import CPU, Device, Server
from tests.support.tap_agent import Agent, listening

from updraft_cli import results
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.launch import sglang_arguments
from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import SGLANG

ARMS, SWAPPING = PARTS = ("arms", "swaps")
ROUNDS = 10
SWAPS = 20
BETWEEN_SWAPS_S = 0.5
STEPS = 3
OPTED_OUT = {"custom_params": {"updraft_capture": "off"}}

_progress = Console(stderr=True, style="dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A server without the plugin and one with it, on whose socket an agent may listen."""

    stock: Server
    plugged: Server
    socket: Path


@dataclass(frozen=True, slots=True)
class Swaps:
    """The cost of the swaps of one server for the running requests."""

    stands_ms: list[float]
    """How long the server stood still."""
    requests: int
    changed: int


@contextmanager
def server(folder: Path, model: Path, draft: Path, device: Device, *, socket: Path | None) -> Iterator[Server]:
    """An SGLang server. Without `socket`, the plugin installs no hooks."""
    options = [
        *sglang_arguments.speculation(draft, STEPS),
        *("--max-running-requests", str(STREAMS), "--disable-radix-cache"),
    ]
    variables = {} if socket is None else {SGLANG.socket_variable: str(socket)}
    plugins = [plugin_folder.write(folder / "plugin")]
    log = folder / f"server-{len(variables)}.log"
    with Server(model, log, arguments=options, plugins=plugins, variables=variables, device=device) as running:
        yield running


async def answered(on: Server, prompt: Sequence[int], *, is_captured: bool) -> list[int]:
    """A greedy answer of fixed length."""
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, **({} if is_captured else OPTED_OUT)}
    body = await asyncio.to_thread(on.post, "/generate", input_ids=list(prompt), sampling_params=sampling)
    return list(body["output_ids"])


def cpu_s(running: Server) -> float:
    """CPU seconds of the process that runs the models."""
    times = running.scheduler().cpu_times()
    return times.user + times.system


@contextmanager
def turn(on: Server) -> Iterator[None]:
    """Let the server run for the length of the block: an idle one polls, and has only two cores to do it on."""
    os.killpg(on.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(on.pid, signal.SIGSTOP)


async def taken(pair: Pair, arm: Arm, prompts: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """One turn of an arm: tokens per second, and CPU milliseconds per token."""
    on = pair.stock if arm is Arm.STOCK else pair.plugged
    answers = (answered(on, prompt, is_captured=n == 0) for n, prompt in enumerate(prompts))
    return await arms.turn(turn(on), pair.socket, arm, Requests(answers=answers, cpu_s=partial(cpu_s, on)))


async def turns(pair: Pair, prompts: Sequence[tuple[int, ...]], rounds: int) -> list[Turn]:
    """Rounds of the same prompts by each arm, the arms in turn."""
    found = []
    for number in range(-1, rounds):  # the first round warms up
        for arm in harness.in_turn(tuple(Arm), number):
            _progress.print(f"round {number} of {rounds}: {arm}")
            tokens_per_s, cpu_ms = await taken(pair, arm, prompts)
            found.append(Turn(round=number, pair=0, arm=arm, tokens_per_s=tokens_per_s, cpu_ms=cpu_ms))
    return [one for one in found if one.round >= 0]


async def swaps(
    on: Server, agent: Agent, prompts: list[tuple[int, ...]], drafts: list[DraftCheckpoint], num_swaps: int
) -> Swaps:
    """Swap while every slot is busy, after each stream has ended its first request."""
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
        _progress.print(f"{num_swaps} swaps under {STREAMS} streams")
        for swap in range(num_swaps):
            await asyncio.sleep(BETWEEN_SWAPS_S)
            draft = drafts[swap % 2]
            loaded = await load(agent, draft.folder, draft.version)
            if loaded["refusal"]:
                raise SystemExit(f"SGLang refused a draft: {loaded['refusal']}")
            stands_ms.append(loaded["pause_us"] / 1e3)
        is_over.set()
    return Swaps(stands_ms=stands_ms, requests=len(are_equal), changed=are_equal.count(False))


async def serve(plan: argparse.Namespace, device: Device, folder: Path) -> tuple[list[Turn], Swaps | None]:
    """Both parts, on SmolLM2, or one of them: rounds of each arm, and the swaps."""
    model, socket = harness.model(), folder / "s"
    prompts = code_prompts(model, STREAMS, seed=SEED)
    draft, found = seed_draft(model, folder), list[Turn]()
    with server(folder, model, draft, device, socket=socket) as plugged:
        if ARMS in plan.only:
            os.killpg(plugged.pid, signal.SIGSTOP)
            with server(folder, model, draft, device, socket=None) as stock:
                os.killpg(stock.pid, signal.SIGSTOP)
                found = await turns(Pair(stock=stock, plugged=plugged, socket=socket), prompts, plan.rounds)
            os.killpg(plugged.pid, signal.SIGCONT)
        if SWAPPING not in plan.only:
            return found, None
        async with listening(socket, roles=ROLES) as agent:
            return found, await swaps(plugged, agent, prompts, drafts_like(draft, model, folder), plan.swaps)


def describe(times_ms: list[float]) -> str:
    median, longest = statistics.median(times_ms), max(times_ms)
    return f"median {median:.0f} ms, 95th percentile {p95(times_ms):.0f} ms, longest {longest:.0f} ms"


def measure(arguments: argparse.Namespace) -> Measurements:
    device = GPU if arguments.gpu else CPU
    with tempfile.TemporaryDirectory(prefix="updraft-") as folder:  # short enough for a Unix socket
        rounds, swapped = asyncio.run(serve(arguments, device, Path(folder)))
    lines, samples, figures = list[Line](), [asdict(one) for one in rounds], list[str]()
    if rounds:
        lines += arms.lines(rounds)
    if swapped is not None:
        lines += lines_of(swapped)
        samples.append(asdict(swapped))
        figures.append(f"the server stood still in a swap: {describe(swapped.stands_ms)}, {swapped.requests} requests")
    return Measurements(seed=SEED, lines=lines, samples=samples, figures=figures)


def lines_of(swapped: Swaps) -> list[Line]:
    """The bars of the swaps."""
    count = len(swapped.stands_ms)
    return [
        Line(results.at_most(f"changed or failed requests over {count} swaps", swapped.changed, 0)),
        Line(
            results.at_most("standstill of a swap, median", statistics.median(swapped.stands_ms), 20, "ms"),
            spread(swapped.stands_ms),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run these parts (default: both)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"counted rounds (default {ROUNDS})")
    parser.add_argument("--swaps", type=int, default=SWAPS, help=f"swaps under load (default {SWAPS})")
    parser.add_argument("--gpu", action="store_true", help=f"use the SGLang of the interpreter {PYTHON_VARIABLE}")
    harness.run("sglang", parser, measure)


if __name__ == "__main__":
    main()
