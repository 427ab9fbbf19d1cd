"""The cost of capture and of a swap for a stock SGLang server. See README.md in this folder."""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from bench import harness
from bench.engine_inputs import code_prompts, untrained_drafts
from bench.harness import Line, Measurements, spread
from rich.console import Console
from tests.sglang.agent import ROLES, load
from tests.sglang.devices import GPU, PYTHON_VARIABLE
from tests.sglang.server import CPU, Device, Server
from tests.support.tap_agent import Agent, listening

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_cli import results
from updraft_draft import checkpoint
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.launch import sglang_arguments
from updraft_inference.tap import initial_draft, plugin_folder
from updraft_inference.tap.server_kind import SGLANG

STREAMS = 8
TOKENS = 48
ROUNDS = 10
SWAPS = 20
BETWEEN_SWAPS_S = 0.5
STEPS = 3
SEED = 7
DRAFT_VOCAB = 8192
POLICY = {"payload": 1.0, "prompt_rows": 512, "counterfactual_rows": 2}
OPTED_OUT = {"custom_params": {"updraft_capture": "off"}}

_progress = Console(stderr=True, style="dim")

ARMS = {"stock": 0, "counters": 0, "payload": 1}
"""Requests of a round that are captured with hidden states; one of eight is a little more than 10 %."""


@dataclass(frozen=True, slots=True)
class Round:
    """Eight requests at once by one arm."""

    number: int
    arm: str
    tokens_per_s: float
    cpu_ms: float
    """CPU time per token of the process that runs the models."""


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


async def round_of(on: Server, number: int, arm: str, prompts: list[tuple[int, ...]]) -> Round:
    """Send all prompts at once."""
    _progress.print(f"round {number}: {arm}")
    before_s, started_s = cpu_s(on), time.perf_counter()
    await asyncio.gather(*(answered(on, prompt, is_captured=n < ARMS[arm]) for n, prompt in enumerate(prompts)))
    wall_s, tokens = time.perf_counter() - started_s, TOKENS * len(prompts)
    return Round(number, arm, tokens / wall_s, 1e3 * (cpu_s(on) - before_s) / tokens)


async def captures(stock: Server, plugged: Server, prompts: list[tuple[int, ...]], rounds: int) -> list[Round]:
    """Rounds of the same prompts by each arm."""
    rows = [
        await round_of(stock if arm == "stock" else plugged, number, arm, prompts)
        for number in range(-1, rounds)
        for arm in harness.in_turn(tuple(ARMS), number)
    ]
    return [row for row in rows if row.number >= 0]  # the first round warms up


async def swaps(on: Server, agent: Agent, prompts: list[tuple[int, ...]], drafts: list[DraftCheckpoint]) -> Swaps:
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
        _progress.print(f"{SWAPS} swaps under {STREAMS} streams")
        for swap in range(SWAPS):
            await asyncio.sleep(BETWEEN_SWAPS_S)
            draft = drafts[swap % 2]
            loaded = await load(agent, draft.folder, draft.version)
            if loaded["refusal"]:
                raise SystemExit(f"SGLang refused a draft: {loaded['refusal']}")
            stands_ms.append(loaded["pause_us"] / 1e3)
        is_over.set()
    return Swaps(stands_ms=stands_ms, requests=len(are_equal), changed=are_equal.count(False))


async def serve(rounds: int, device: Device, folder: Path) -> tuple[list[Round], Swaps]:
    """Both parts, on SmolLM2: rounds of each arm, and the swaps."""
    model = harness.model()
    prompts = code_prompts(model, STREAMS, seed=SEED)
    draft = initial_draft.write(model, folder / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB))
    async with AsyncExitStack() as stack:
        stock = stack.enter_context(server(folder, model, draft, device, socket=None))
        plugged = stack.enter_context(server(folder, model, draft, device, socket=folder / "s"))
        agent = await stack.enter_async_context(listening(folder / "s", POLICY, roles=ROLES))
        rows = await captures(stock, plugged, prompts, rounds)
        _, tensors = checkpoint.load(draft)
        drafts = untrained_drafts(model, folder, torch.arange(DRAFT_VOCAB) + tensors["d2t"])
        swapped = await swaps(plugged, agent, prompts, drafts)
    return rows, swapped


def costs(rounds: list[Round], arm: str) -> tuple[list[float], list[float]]:
    """The cost of an arm against the stock server of each round in percent: of tokens per second, and of CPU time."""
    stock = {one.number: one for one in rounds if one.arm == "stock"}
    pairs = [(one, stock[one.number]) for one in rounds if one.arm == arm]
    slower = [100 * (1 - ours.tokens_per_s / theirs.tokens_per_s) for ours, theirs in pairs]
    return slower, [100 * (ours.cpu_ms / theirs.cpu_ms - 1) for ours, theirs in pairs]


def describe(times_ms: list[float]) -> str:
    median, longest = statistics.median(times_ms), max(times_ms)
    return f"median {median:.0f} ms, 95th percentile {p95(times_ms):.0f} ms, longest {longest:.0f} ms"


def p95(times_ms: list[float]) -> float:
    return statistics.quantiles(times_ms, n=20)[-1]


def measure(arguments: argparse.Namespace) -> Measurements:
    device, most = (GPU, 1) if arguments.gpu else (CPU, 5)
    with tempfile.TemporaryDirectory(prefix="updraft-") as folder:  # short enough for a Unix socket
        rounds, swapped = asyncio.run(serve(arguments.rounds, device, Path(folder)))
    figures = []
    for arm in ("counters", "payload"):
        slower, busier = costs(rounds, arm)
        figures.append(
            f"{arm:8} costs {statistics.median(slower):.1f} % of the tokens per second (rounds from {min(slower):.1f} to"
            f" {max(slower):.1f}), {statistics.median(busier):.1f} % more CPU time of SGLang's scheduler"
        )
    figures.append(f"the server stood still in a swap: {describe(swapped.stands_ms)}, {swapped.requests} requests")
    slower, _ = costs(rounds, "payload")
    name = "cost of capture, payload of one request in eight"
    return Measurements(
        seed=SEED,
        lines=(
            Line(results.at_most(name, statistics.median(slower), most, "%"), spread(slower)),
            Line(results.at_most(f"changed or failed requests over {SWAPS} swaps", swapped.changed, 0)),
            Line(
                results.at_most("standstill of a swap, median", statistics.median(swapped.stands_ms), 20, "ms"),
                spread(swapped.stands_ms),
            ),
        ),
        samples=[*(asdict(one) for one in rounds), asdict(swapped)],
        figures=figures,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"counted rounds (default {ROUNDS})")
    parser.add_argument("--gpu", action="store_true", help=f"use the SGLang of the interpreter {PYTHON_VARIABLE}")
    harness.run("sglang", parser, measure)


if __name__ == "__main__":
    main()
