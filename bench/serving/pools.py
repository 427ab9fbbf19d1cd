"""What do torch's threads cost each other? `python -m bench.serving.pools` times plain steps of eight streams on a thread of
their own, alone on the machine and next to a busy process. See `torch_engine/worker.py`, `openmp.py`, ADR 0025.

Each arm is a process, for a pool ends with its thread and never before. They take turns.
"""

import argparse
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from subprocess import Popen

import torch
from bench.serving import figures
from bench.serving.inline import Inline
from bench.serving.plan import SEED, in_turn
from bench.serving.workloads import Words, prompts

from updraft_cli import output
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.openmp import SPINS, VARIABLE
from updraft_inference.torch_engine.worker import on_passing_thread

_BATCH, _WARM_UP_STEPS = 8, 8


@dataclass(frozen=True, slots=True)
class Arm:
    """The spin count (None: OpenMP's default), and whether another thread has a pool too."""

    name: str
    spins: int | None
    has_second_pool: bool = False


ARMS = (
    Arm("one pool, which waits briefly", SPINS),
    Arm("one pool, which waits as OpenMP does", None),
    Arm("next to another pool", None, has_second_pool=True),
)


def step_ms(model: Path, threads: int, steps: int, arm: Arm) -> float:
    """Median seconds of the steps, on a thread of their own."""
    torch.set_num_threads(threads)
    if arm.has_second_pool:
        torch.ones(1 << 20).add_(1)  # large enough for several threads, on this thread, which stays
    asked = prompts(Words.open(model), "chat", _BATCH, seed=SEED, is_held_out=True)
    tokens = 8 * _BATCH + _WARM_UP_STEPS + steps + 1

    def measured() -> float:
        context = max(map(len, asked)) + tokens
        inline = Inline.open(model, num_slots=_BATCH, max_context=context, dtype=torch.bfloat16)
        inline.start(asked, max_tokens=tokens, drafter=Drafter.NONE)
        for _ in range(_WARM_UP_STEPS):
            inline.step()
        return median(1e3 * inline.step().step_s for _ in range(steps))

    return on_passing_thread(measured)


@contextmanager
def waiting(spins: int | None) -> Iterator[None]:
    """Set the variable for processes that start in this block; it is read when torch is loaded."""
    os.environ.pop(VARIABLE, None)
    if spins is not None:
        os.environ[VARIABLE] = str(spins)
    yield
    os.environ.pop(VARIABLE, None)


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that is always busy."""
    with Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    """Measure all arms in turn, and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model, context = model_folder(cache_folder(os.environ)), multiprocessing.get_context("spawn")
    times: defaultdict[tuple[Arm, bool], list[float]] = defaultdict(list)
    for round_ in range(arguments.rounds):
        for is_busy, arm in product((False, True), in_turn(ARMS, round_)):
            busy = neighbour() if is_busy else nullcontext()
            with waiting(arm.spins), busy, ProcessPoolExecutor(1, mp_context=context) as process:
                ms = process.submit(step_ms, model, arguments.threads, arguments.steps, arm).result()
            times[arm, is_busy].append(ms)
    table = output.table(
        "torch's threads", *(f">{where}, ms per step" for where in ("alone", "next to a busy process"))
    )
    for arm in ARMS:
        spreads = [figures.spread(times[arm, is_busy]) for is_busy in (False, True)]
        table.add_row(arm.name, *(f"{one.median:.1f} ({one.low:.1f} to {one.high:.1f})" for one in spreads if one))
    output.console().print(table)


if __name__ == "__main__":
    main()
