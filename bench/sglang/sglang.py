"""What do capture and a swap cost a stock SGLang server? See README.md beside this file."""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import torch
from bench.sglang import pause_clock
from rich.console import Console
from tests.contract.engine_contract import whole
from tests.sglang.devices import GPU, PYTHON_VARIABLE
from tests.sglang.server import CPU, Device, Server

from updraft_artifacts.digests import tensors_digest
from updraft_cli import results
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_cli.prompts import domain_prompts
from updraft_draft import checkpoint
from updraft_draft.network import initial_network
from updraft_draft.target_weights import read_head
from updraft_inference.engine import CaptureParams, DraftCheckpoint, GenerationRequest, SamplingParams
from updraft_inference.sglang_engine import initial_draft
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.launch import arguments, plugin_folder
from updraft_inference.sglang_engine.server import SglangServer
from updraft_inference.text.tokenization import Tokenizer

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

console = Console()

ARMS = {"stock": 0, "light": 0, "payload": 1}
"""How many requests of a round are captured with hidden states; one of eight is a little more than 10 %."""


class Clocked(SglangServer):
    """When each pause was wished, on the clock of the scheduler."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.wishes_s: list[float] = []

    async def pause(self) -> None:
        """See SglangServer."""
        self.wishes_s.append(time.monotonic())
        await super().pause()


@dataclass(frozen=True, slots=True)
class Serving:
    """A server and an engine over it."""

    server: Server
    engine: SglangEngine
    client: Clocked


@dataclass(frozen=True, slots=True)
class Round:
    """Eight requests at once by one arm."""

    number: int
    arm: str
    tokens_per_s: float
    cpu_ms: float
    """Processor time of the process that runs the models, a token."""


@dataclass(frozen=True, slots=True)
class Swaps:
    """What the swaps of one server cost the requests that ran."""

    pauses_ms: list[float]
    """From the wish to pause to the answer to the wish to go on."""
    steps_ms: list[float]
    """Of that, until the scheduler had paused: the rest of the step that ran."""
    stands_ms: list[float]
    """Of that, from then until the scheduler went on."""
    requests: int
    changed: int


@contextmanager
def server(folder: Path, model: Path, draft: Path, device: Device, *, socket: Path | None) -> Iterator[Server]:
    """SGLang; without `socket` the plugin hooks nothing."""
    variables = {}
    wanted = [*arguments.speculation(draft, STEPS), "--max-running-requests", str(STREAMS), "--disable-radix-cache"]
    plugins = [plugin_folder.write(folder / "plugin")]
    if socket is not None:
        variables = {arguments.SOCKET_VARIABLE: str(socket), pause_clock.VARIABLE: str(folder / PAUSES)}
        plugins.append(pause_clock.write(folder / "clock"))
    log = folder / f"server-{len(variables)}.log"
    with Server(model, log, arguments=wanted, plugins=plugins, variables=variables, device=device) as running:
        yield running


@asynccontextmanager
async def serving(model: Path, running: Server, socket: Path) -> AsyncIterator[Serving]:
    """The adapter over a server."""
    options = SglangOptions(model=model, socket=socket, note=socket.with_suffix(".note"), hello_s=5)
    async with (
        Clocked(running.url) as client,
        opened(options, client, lambda _: None) as engine,
    ):
        yield Serving(running, engine, client)


def request(name: str, prompt: Sequence[int], capture: CaptureParams) -> GenerationRequest:
    """A greedy one of fixed length."""
    return GenerationRequest(
        request_id=name,
        prompt_ids=tuple(prompt),
        max_tokens=TOKENS,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
        capture=capture,
    )


def cpu_s(running: Server) -> float:
    """Processor seconds of the process that runs the models."""
    times = running.scheduler().cpu_times()
    return times.user + times.system


async def round_of(on: Serving, number: int, arm: str, prompts: list[tuple[int, ...]]) -> Round:
    """All prompts at once."""
    console.print(f"round {number}: {arm}", style="dim")
    wishes = [PAYLOAD] * ARMS[arm] + [CaptureParams()] * (STREAMS - ARMS[arm])
    asked = [request(f"{arm}-{number}-{n}", *one) for n, one in enumerate(zip(prompts, wishes, strict=True))]
    before_s, started_s = cpu_s(on.server), time.perf_counter()
    await asyncio.gather(*(whole(on.engine, one) for one in asked))
    wall_s, tokens = time.perf_counter() - started_s, TOKENS * len(prompts)
    return Round(number, arm, tokens / wall_s, 1e3 * (cpu_s(on.server) - before_s) / tokens)


async def captures(servings: dict[bool, Serving], prompts: list[tuple[int, ...]], rounds: int) -> list[Round]:
    """Rounds of the same prompts by each arm; the order changes from round to round."""
    rows = [
        await round_of(servings[arm != "stock"], number, arm, prompts)
        for number in range(-1, rounds)
        for arm in sorted(ARMS, reverse=bool(number % 2))
    ]
    return [row for row in rows if row.number >= 0]  # the first round warms up


async def swaps(on: Serving, prompts: list[tuple[int, ...]], drafts: list[DraftCheckpoint], noted: Path) -> Swaps:
    """Swaps while every slot is busy, from the first end of a request of each stream on. `noted`: see pause_clock."""
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
            if not turn:  # the first ones wait for what SGLang compiles, swap or not
                await all_run.wait()
            if is_over.is_set():
                return

    async with asyncio.TaskGroup() as tasks:
        for number in range(STREAMS):
            tasks.create_task(stream(number))
        await all_run.wait()
        console.print(f"{SWAPS} swaps under {STREAMS} streams", style="dim")
        for swap in range(SWAPS):
            await asyncio.sleep(BETWEEN_SWAPS_S)
            pauses_ms.append(1e3 * (await engine.swap(drafts[swap % 2])).pause_s)
        is_over.set()
    stood = list(zip(on.client.wishes_s, pause_clock.read(noted), strict=True))[-SWAPS:]  # a start may swap as well
    return Swaps(
        pauses_ms=pauses_ms,
        steps_ms=[1e3 * (paused - wished) for wished, (paused, _) in stood],
        stands_ms=[1e3 * (went_on - paused) for _, (paused, went_on) in stood],
        requests=len(are_equal),
        changed=are_equal.count(False),
    )


async def measure(rounds: int, device: Device, folder: Path) -> tuple[list[Round], Swaps]:
    """Both parts, on SmolLM2: rounds of each arm, and the swaps."""
    model = model_folder(cache_folder(os.environ))
    tokenizer = Tokenizer.open(model)
    prompts = [
        tokenizer.encode(text, add_special_tokens=False)[:200] for text in domain_prompts("code", STREAMS, seed=SEED)
    ]
    draft = initial_draft.write(model, folder / "seed", draft_vocab_size=DRAFT_VOCAB)
    async with AsyncExitStack() as stack:
        servings = {}
        for is_hooked, name in ((False, "unused"), (True, "socket")):
            socket = folder / name if is_hooked else None
            running = stack.enter_context(server(folder, model, draft, device, socket=socket))
            console.print(f"a server {'with' if is_hooked else 'without'} hooks is up", style="dim")
            servings[is_hooked] = await stack.enter_async_context(serving(model, running, folder / name))
        rows = await captures(servings, prompts, rounds)
        swapped = await swaps(servings[True], prompts, make_drafts(model, draft, folder), folder / PAUSES)
    return rows, swapped


def make_drafts(model: Path, first: Path, folder: Path) -> list[DraftCheckpoint]:
    """Two untrained drafts with the vocabulary of the server's first one: what they guess does not matter here."""
    head, (_, tensors) = read_head(model), checkpoint.load(first)
    token_ids = torch.arange(DRAFT_VOCAB) + tensors["d2t"]
    drafts = []
    for version in (1, 2):
        config = head.config.draft(draft_vocab_size=DRAFT_VOCAB)
        network = initial_network(config, head.embedding.float(), head.head, head.final_norm, token_ids, seed=version)
        checkpoint.save(network, folder / str(version))
        digest = tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(network)))
        drafts.append(DraftCheckpoint(version=version, folder=folder / str(version), tensors_digest=digest))
    return drafts


def costs(rows: list[Round], arm: str) -> tuple[list[float], list[float]]:
    """What an arm costs against the stock server in each round, in percent: of tokens a second, and of processor time."""
    stock = {row.number: row for row in rows if row.arm == "stock"}
    pairs = [(row, stock[row.number]) for row in rows if row.arm == arm]
    slower = [100 * (1 - ours.tokens_per_s / theirs.tokens_per_s) for ours, theirs in pairs]
    return sorted(slower), sorted(100 * (ours.cpu_ms / theirs.cpu_ms - 1) for ours, theirs in pairs)


def spread(times_ms: list[float]) -> str:
    """In words."""
    p95 = statistics.quantiles(times_ms, n=20)[-1]
    return f"median {statistics.median(times_ms):.0f} ms, 95th percentile {p95:.0f} ms, longest {max(times_ms):.0f} ms"


def main() -> None:
    """Measure, print one table, write bench/results/; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--gpu", action="store_true", help=f"with the SGLang of the interpreter {PYTHON_VARIABLE}")
    asked = parser.parse_args()
    device, most = (GPU, 1) if asked.gpu else (CPU, 5)
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="updraft-") as folder:  # short enough for a Unix socket
        rows, swapped = asyncio.run(measure(asked.rounds, device, Path(folder)))
    slower, _ = costs(rows, "payload")
    pauses = swapped.pauses_ms
    result = results.Result(
        name="sglang",
        command="make bench-sglang",
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=(
            results.at_most("cost of capture, payload of one request in eight", statistics.median(slower), most, "%"),
            results.at_most("changed or failed requests over 20 swaps", swapped.changed, 0),
            results.at_most("swap pause, 95th percentile", statistics.quantiles(pauses, n=20)[-1], 100, "ms"),
        ),
        samples=[*(asdict(row) for row in rows), asdict(swapped)],
    )
    results.show_bars(console, result.bars)
    for arm in ("light", "payload"):
        slower, busier = costs(rows, arm)
        console.print(
            f"{arm:8} costs {statistics.median(slower):.1f} % of the tokens a second (rounds from {slower[0]:.1f} to"
            f" {slower[-1]:.1f}), {statistics.median(busier):.1f} % more processor time of SGLang's scheduler"
        )
    console.print(f"swap pause: {spread(pauses)}, of {swapped.requests} requests")
    console.print(f"    of it the rest of the step that ran: {spread(swapped.steps_ms)}")
    console.print(f"    of it the server stood still: {spread(swapped.stands_ms)}")
    console.print(results.write(result, Path("bench/results")))
    sys.exit(results.missed(result.bars))


if __name__ == "__main__":
    main()
