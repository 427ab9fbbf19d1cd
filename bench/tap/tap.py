"""The cost of Updraft's plugin for a stock vLLM server, and of a swap there. See README.md in this folder."""

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil
from bench import harness
from bench.engine_inputs import code_prompts, drafts_like, seed_draft
from bench.serving import servers
from bench.serving.servers import Server
from bench.tap import arms, endings, loop, parts, reading, steps, swaps
from bench.tap.arms import SEED, STREAMS, TOKENS, Arm, Requests, Turn
from bench.tap.parts import Part
from bench.tap.plugged import SOCKET, plugged, speculation
from rich.console import Console
from tests.vllm import build

from updraft_inference.tap.server_kind import VLLM

OPT_OUT = {"vllm_xargs": {"updraft_capture": "off"}}

_progress = Console(stderr=True, style="dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A server without the plugin and one with it, on whose socket an agent may listen."""

    stock: Server
    plugged: Server
    socket: Path


@asynccontextmanager
async def pair_of_servers(model: Path, draft: Path, folder: Path, threads: int) -> AsyncIterator[Pair]:
    """Both on the same draft, which nobody trained: a step gives about one token, so hooks run as often as they can."""
    async with (
        plugged(model, draft, folder, threads=threads) as ours,
        servers.vllm(model, folder / "stock.log", threads=threads, options=speculation(draft)) as stock,
    ):
        yield Pair(stock=stock, plugged=ours, socket=folder / SOCKET)


async def turn(server: Server, socket: Path, arm: Arm, prompts: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Tokens per second, and CPU milliseconds per token."""
    answers = (server.stream(prompt, TOKENS, OPT_OUT if number else {}) for number, prompt in enumerate(prompts))
    return await arms.turn(server.turn(), socket, arm, Requests(answers=answers, cpu_s=partial(cpu_s, server)))


def cpu_s(server: Server) -> float:
    """CPU seconds of all processes of the server."""
    main = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (main, *main.children(recursive=True))]
    return sum(one.user + one.system for one in times)


async def cost_of_arms(plan: argparse.Namespace, folder: Path, model: Path, draft: Path) -> list[Turn]:
    """The first part."""
    async with AsyncExitStack() as stack:
        pairs = []
        for place in range(plan.pairs):
            _progress.print(f"servers {place} start, one without the plugin and one with it")
            opened = pair_of_servers(model, draft, folder / str(place), plan.threads)
            pairs.append(await stack.enter_async_context(opened))
        prompts = code_prompts(model, STREAMS, seed=SEED)

        async def taken(place: int, arm: Arm) -> tuple[float, float]:
            on = pairs[place]
            return await turn(on.stock if arm is Arm.STOCK else on.plugged, on.socket, arm, prompts)

        return await arms.turns(taken, pairs=len(pairs), rounds=plan.rounds)


def measured_arms(plan: argparse.Namespace, folder: Path) -> Part:
    """Compare the arms."""
    model = harness.model()
    taken = asyncio.run(cost_of_arms(plan, folder, model, seed_draft(model, folder)))
    return Part(lines=arms.lines(taken), samples=list(map(asdict, taken)), figures=[arms.noise(taken)])


async def cost_of_hooks(plan: argparse.Namespace, folder: Path, model: Path, draft: Path) -> list[steps.Turn]:
    """The second part."""
    prompts, more = code_prompts(model, STREAMS, seed=SEED), partial(steps.variables, folder, VLLM)
    async with plugged(model, draft, folder, threads=plan.threads, more=more) as server:
        return await steps.turns(partial(turn, server, folder / SOCKET, prompts=prompts), folder, plan.rounds)


def measured_hooks(plan: argparse.Namespace, folder: Path) -> Part:
    """Time the hooks."""
    model = harness.model()
    taken = asyncio.run(cost_of_hooks(plan, folder / "hooks", model, seed_draft(model, folder)))
    return Part(lines=steps.lines(taken), samples=list(map(asdict, taken)), figures=list(steps.figures(taken)))


def measured_swaps(plan: argparse.Namespace, folder: Path) -> Part:
    """Swap drafts under load."""
    _progress.print(f"{plan.swaps} swaps under {plan.streams} streams")
    model = harness.model()
    drafts, prompts = (
        drafts_like(seed_draft(model, folder), model, folder),
        code_prompts(model, plan.streams, seed=SEED),
    )
    swapped = asyncio.run(swaps.measured(model, drafts, prompts, plan, folder / "swaps"))
    return Part(lines=swapped.lines(), samples=[swapped.row()], figures=list(swapped.figures()))


def measured_reading(_: argparse.Namespace, folder: Path) -> Part:
    """Read a large draft."""
    _progress.print(f"a draft of {reading.MB} MB is read")
    gaps = reading.measured(folder / "reading")
    return Part(lines=[gaps.line()], samples=[asdict(gaps)], figures=[])


def measured_endings(plan: argparse.Namespace, folder: Path) -> Part:
    """End wide requests."""
    _progress.print("ends of requests with rows of a target of width 4096")
    holds = endings.measured(folder / "e", plan.endings)
    return Part(lines=[holds.line()], samples=[asdict(holds)], figures=[holds.figure()])


def measured_loop(plan: argparse.Namespace, folder: Path) -> Part:
    """Run the loop from an untrained draft."""
    model = harness.model()
    found = loop.measured(model, seed_draft(model, folder), folder)
    return Part(lines=[found.line()], samples=[found.row()], figures=list(found.figures()))


PARTS = {
    "arms": measured_arms,
    "hooks": measured_hooks,
    "swaps": measured_swaps,
    "reading": measured_reading,
    "endings": measured_endings,
    "loop": measured_loop,
}


def parser() -> argparse.ArgumentParser:
    """The arguments: how much of each part."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="these parts (default all)")
    arguments.add_argument(
        "--rounds", type=harness.positive, default=20, help="counted rounds of all arms (default 20)"
    )
    arguments.add_argument(
        "--pairs", type=harness.positive, default=2, help="servers with and without the plugin (default 2 of each)"
    )
    arguments.add_argument("--threads", type=harness.positive, default=1, help="threads of each server (default 1)")
    arguments.add_argument(
        "--streams", type=harness.positive, default=24, help="streams while drafts are swapped (default 24)"
    )
    arguments.add_argument("--swaps", type=harness.positive, default=20, help="swaps (default 20)")
    arguments.add_argument(
        "--endings", type=harness.positive, default=50, help="ended requests of width 4096 (default 50)"
    )
    return arguments


def main() -> None:
    """Measure if vLLM is there."""
    arguments = parser()
    if not build.is_built():
        arguments.error("vLLM is not built: run `make vllm-build` first")
    harness.run("tap", arguments, partial(parts.measured, PARTS))


if __name__ == "__main__":
    main()
