"""The cost of Updraft's plugin for a stock SGLang server, and of a swap there. See README.md in this folder."""

import argparse
import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bench import harness
from bench.engine_inputs import code_prompts, drafts_like, seed_draft
from bench.sglang import servers, swaps
from bench.sglang.servers import SOCKET, Setup
from bench.sglang.swaps import Swaps
from bench.tap import arms, parts, steps
from bench.tap.arms import SEED, STREAMS, Arm, Turn
from bench.tap.parts import Part
from rich.console import Console
from tests.sglang.agent import ROLES
from tests.sglang.devices import GPU, PYTHON_VARIABLE
from tests.sglang.server import CPU
from tests.support.tap_agent import listening

from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import SGLANG

T = TypeVar("T")

_progress = Console(stderr=True, style="dim")


def setup(plan: argparse.Namespace, folder: Path) -> Setup:
    """The same draft for all parts."""
    model = harness.model()
    return Setup(device=GPU if plan.gpu else CPU, model=model, draft=seed_draft(model, folder))


def run(work: Coroutine[Any, Any, T]) -> T:
    """With a thread for each stream and two more: of asyncio's own, there are 6 on two cores, so some streams would wait."""

    async def with_threads() -> T:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(STREAMS + 2))
        return await work

    return asyncio.run(with_threads())


def measured_arms(plan: argparse.Namespace, folder: Path) -> Part:
    """Compare the arms."""
    taken = run(cost_of_arms(plan, folder / "arms", setup(plan, folder)))
    return Part(lines=arms.lines(taken), samples=list(map(asdict, taken)), figures=[arms.noise(taken)])


async def cost_of_arms(plan: argparse.Namespace, folder: Path, on: Setup) -> list[Turn]:
    """Turns of all arms on pairs of servers."""
    prompts = code_prompts(on.model, STREAMS, seed=SEED)
    count = 1 if plan.gpu else plan.pairs  # a GPU has memory for two servers
    _progress.print(f"{count} pairs of servers start, one of each without the plugin")
    with servers.pairs(on, folder, count) as pairs:

        async def taken(place: int, arm: Arm) -> tuple[float, float]:
            return await pairs[place].turn(arm, prompts)

        return await arms.turns(taken, pairs=count, rounds=plan.rounds)


def measured_hooks(plan: argparse.Namespace, folder: Path) -> Part:
    """Time the hooks."""
    taken = run(cost_of_hooks(plan, folder / "hooks", setup(plan, folder)))
    return Part(lines=steps.lines(taken), samples=list(map(asdict, taken)), figures=list(steps.figures(taken)))


async def cost_of_hooks(plan: argparse.Namespace, folder: Path, on: Setup) -> list[steps.Turn]:
    """Turns of the arms with the plugin on one server."""
    prompts = code_prompts(on.model, STREAMS, seed=SEED)
    variables = steps.variables(folder, SGLANG, plugin_folder.write(folder / "plugin"))
    with on.plugged(folder, variables) as server:
        turn = partial(servers.turn, server, folder / SOCKET, prompts=prompts)
        return await steps.turns(turn, folder, plan.rounds)


def measured_swaps(plan: argparse.Namespace, folder: Path) -> Part:
    """Swap drafts under load."""
    swapped = run(cost_of_swaps(plan, folder, setup(plan, folder)))
    return Part(lines=swapped.lines(), samples=[swapped.row()], figures=list(swapped.figures()))


async def cost_of_swaps(plan: argparse.Namespace, folder: Path, on: Setup) -> Swaps:
    """Swaps on one server."""
    own = folder / "swaps"
    prompts, drafts = code_prompts(on.model, STREAMS, seed=SEED), drafts_like(on.draft, on.model, folder)
    with on.plugged(own) as server:
        async with listening(own / SOCKET, roles=ROLES) as agent:
            _progress.print(f"{plan.swaps} swaps under {STREAMS} streams")
            return await swaps.measured(server, agent, prompts, drafts, plan.swaps)


PARTS = {"arms": measured_arms, "hooks": measured_hooks, "swaps": measured_swaps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run these parts (default: all)")
    parser.add_argument("--rounds", type=harness.positive, default=10, help="counted rounds of all arms (default 10)")
    parser.add_argument(
        "--pairs", type=harness.positive, default=2, help="servers with and without the plugin (default 2 of each)"
    )
    parser.add_argument("--swaps", type=harness.positive, default=20, help="swaps under load (default 20)")
    parser.add_argument("--gpu", action="store_true", help=f"use the SGLang of the interpreter {PYTHON_VARIABLE}")
    harness.run("sglang", parser, partial(parts.measured, PARTS))


if __name__ == "__main__":
    main()
