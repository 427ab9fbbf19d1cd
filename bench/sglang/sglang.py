"""The cost of capture and of a swap for a stock SGLang server. See README.md in this folder."""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from bench import harness
from bench.engine_inputs import code_prompts, untrained_drafts
from bench.harness import Line, Measurements, spread
from bench.sglang import pause_clock
from rich.console import Console
from tests.contract.engine_contract import whole
from tests.sglang.devices import GPU, PYTHON_VARIABLE
from tests.sglang.server import CPU, Device, Server

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_cli import results
from updraft_draft import checkpoint
from updraft_inference.engine import CaptureParams, DraftCheckpoint, GenerationRequest, SamplingParams
from updraft_inference.launch import program, sglang_arguments
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.server import SglangServer
from updraft_inference.tap import initial_draft, plugin_folder

STREAMS = 8
TOKENS = 48
ROUNDS = 10
SWAPS = 20
BETWEEN_SWAPS_S = 0.5
STEPS = 3
SEED = 7
PAUSES = "pauses"
DRAFT_VOCAB = 8192
PAYLOAD = CaptureParams(payload=True, prompt_rows=512, counterfactual_rows=2)

_progress = Console(stderr=True, style="dim")

ARMS = {"stock": 0, "light": 0, "payload": 1}
"""Requests of a round that are captured with hidden states; one of eight is a little more than 10 %."""


class TimedServer(SglangServer):
    """Notes when each pause was requested, on the clock of the scheduler."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.requested_s: list[float] = []

    async def pause(self) -> None:
        self.requested_s.append(time.monotonic())
        await super().pause()


@dataclass(frozen=True, slots=True)
class Serving:
    """A server and an engine over it."""

    server: Server
    engine: SglangEngine
    client: TimedServer


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

    pauses_ms: list[float]
    """From the request to pause to the answer to the request to continue."""
    steps_ms: list[float]
    """Part of it until the scheduler had paused: the rest of the running step."""
    stands_ms: list[float]
    """Part of it from then until the scheduler continued."""
    requests: int
    changed: int


@contextmanager
def server(folder: Path, model: Path, draft: Path, device: Device, *, socket: Path | None) -> Iterator[Server]:
    """An SGLang server. Without `socket`, the plugin installs no hooks."""
    variables = {}
    options = [
        *sglang_arguments.speculation(draft, STEPS),
        "--max-running-requests",
        str(STREAMS),
        "--disable-radix-cache",
    ]
    plugins = [plugin_folder.write(folder / "plugin")]
    if socket is not None:
        variables = {program.SGLANG.socket_variable: str(socket), pause_clock.VARIABLE: str(folder / PAUSES)}
        plugins.append(pause_clock.write(folder / "clock"))
    log = folder / f"server-{len(variables)}.log"
    with Server(model, log, arguments=options, plugins=plugins, variables=variables, device=device) as running:
        yield running


@asynccontextmanager
async def serving(model: Path, running: Server, socket: Path) -> AsyncIterator[Serving]:
    """The adapter of a server."""
    options = SglangOptions(model=model, socket=socket, note=socket.with_suffix(".note"), hello_s=5)
    async with (
        TimedServer(running.url) as client,
        opened(options, client, lambda _: None) as engine,
    ):
        yield Serving(running, engine, client)


def request(name: str, prompt: Sequence[int], capture: CaptureParams) -> GenerationRequest:
    """A greedy request of fixed length."""
    return GenerationRequest(
        request_id=name,
        prompt_ids=tuple(prompt),
        max_tokens=TOKENS,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
        capture=capture,
    )


def cpu_s(running: Server) -> float:
    """CPU seconds of the process that runs the models."""
    times = running.scheduler().cpu_times()
    return times.user + times.system


async def round_of(on: Serving, number: int, arm: str, prompts: list[tuple[int, ...]]) -> Round:
    """Send all prompts at once."""
    _progress.print(f"round {number}: {arm}")
    capture_params = [PAYLOAD] * ARMS[arm] + [CaptureParams()] * (STREAMS - ARMS[arm])
    requests = [request(f"{arm}-{number}-{n}", *one) for n, one in enumerate(zip(prompts, capture_params, strict=True))]
    before_s, started_s = cpu_s(on.server), time.perf_counter()
    await asyncio.gather(*(whole(on.engine, one) for one in requests))
    wall_s, tokens = time.perf_counter() - started_s, TOKENS * len(prompts)
    return Round(number, arm, tokens / wall_s, 1e3 * (cpu_s(on.server) - before_s) / tokens)


async def captures(servings: dict[bool, Serving], prompts: list[tuple[int, ...]], rounds: int) -> list[Round]:
    """Rounds of the same prompts by each arm."""
    rows = [
        await round_of(servings[arm != "stock"], number, arm, prompts)
        for number in range(-1, rounds)
        for arm in harness.in_turn(tuple(ARMS), number)
    ]
    return [row for row in rows if row.number >= 0]  # the first round warms up


async def swaps(on: Serving, prompts: list[tuple[int, ...]], drafts: list[DraftCheckpoint], noted: Path) -> Swaps:
    """Swap while every slot is busy, after each stream has ended its first request. `noted` is the file of pause_clock."""
    engine = on.engine
    alone = [
        (await whole(engine, request(f"alone-{n}", prompt, CaptureParams())))[0] for n, prompt in enumerate(prompts)
    ]
    is_over, all_run = asyncio.Event(), asyncio.Barrier(STREAMS + 1)
    are_equal: list[bool] = []
    pauses_ms: list[float] = []

    async def stream(number: int) -> None:
        for turn in count():
            tokens, _ = await whole(engine, request(f"swap-{number}-{turn}", prompts[number], CaptureParams()))
            are_equal.append(tokens == alone[number])
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
            pauses_ms.append(1e3 * (await engine.swap(drafts[swap % 2])).pause_s)
        is_over.set()
    pauses = list(zip(on.client.requested_s, pause_clock.read(noted), strict=True))[-SWAPS:]  # the start may swap too
    return Swaps(
        pauses_ms=pauses_ms,
        steps_ms=[1e3 * (paused - requested) for requested, (paused, _) in pauses],
        stands_ms=[1e3 * (continued - paused) for _, (paused, continued) in pauses],
        requests=len(are_equal),
        changed=are_equal.count(False),
    )


async def serve(rounds: int, device: Device, folder: Path) -> tuple[list[Round], Swaps]:
    """Both parts, on SmolLM2: rounds of each arm, and the swaps."""
    model = harness.model()
    prompts = code_prompts(model, STREAMS, seed=SEED)
    draft = initial_draft.write(model, folder / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB))
    async with AsyncExitStack() as stack:
        servings = {}
        for is_hooked, name in ((False, "unused"), (True, "socket")):
            socket = folder / name if is_hooked else None
            running = stack.enter_context(server(folder, model, draft, device, socket=socket))
            _progress.print(f"a server {'with' if is_hooked else 'without'} hooks is up")
            servings[is_hooked] = await stack.enter_async_context(serving(model, running, folder / name))
        rows = await captures(servings, prompts, rounds)
        _, tensors = checkpoint.load(draft)
        drafts = untrained_drafts(model, folder, torch.arange(DRAFT_VOCAB) + tensors["d2t"])
        swapped = await swaps(servings[True], prompts, drafts, folder / PAUSES)
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
    for arm in ("light", "payload"):
        slower, busier = costs(rounds, arm)
        figures.append(
            f"{arm:8} costs {statistics.median(slower):.1f} % of the tokens per second (rounds from {min(slower):.1f} to"
            f" {max(slower):.1f}), {statistics.median(busier):.1f} % more CPU time of SGLang's scheduler"
        )
    figures += [
        f"swap pause: {describe(swapped.pauses_ms)}, {swapped.requests} requests",
        f"    until the running step ended: {describe(swapped.steps_ms)}",
        f"    while the server stood still: {describe(swapped.stands_ms)}",
    ]
    slower, _ = costs(rounds, "payload")
    name = "cost of capture, payload of one request in eight"
    return Measurements(
        seed=SEED,
        lines=(
            Line(results.at_most(name, statistics.median(slower), most, "%"), spread(slower)),
            Line(results.at_most(f"changed or failed requests over {SWAPS} swaps", swapped.changed, 0)),
            Line(
                results.at_most("swap pause, 95th percentile", p95(swapped.pauses_ms), 100, "ms"),
                spread(swapped.pauses_ms),
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
