"""What does a second pool of torch's threads cost? `python -m bench.serving.pools`: the steps of plain decoding with eight
streams on a thread of their own, with and without a pool that another thread once computed with. See ADR 0016.

Each arm is a process, for a pool ends with its thread and never before. They take turns.
"""

import argparse
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
from bench.serving import figures
from bench.serving.inline import Inline
from bench.serving.plan import SEED, in_turn
from bench.serving.workloads import Words, prompts

from updraft_cli import output
from updraft_cli.folders import cache_folder
from updraft_cli.model import model_folder
from updraft_inference.engine.port import Drafter
from updraft_inference.torch_engine.worker import on_passing_thread

ALONE, BESIDE = "one pool", "beside another one"
_BATCH, _WARM_UP_STEPS = 8, 8


def step_ms(model: Path, threads: int, steps: int, arm: str) -> float:
    """Median of the steps, on a thread of their own."""
    torch.set_num_threads(threads)
    if arm == BESIDE:
        _compute()  # on this thread, which stays
    asked = prompts(Words.open(model), "chat", _BATCH, seed=SEED, is_held_out=True)
    tokens = 2 * _BATCH + _WARM_UP_STEPS + steps + 1

    def measured() -> float:
        context = max(map(len, asked)) + tokens
        inline = Inline.open(model, num_slots=_BATCH, max_context=context, dtype=torch.bfloat16)
        inline.start(asked, max_tokens=tokens, drafter=Drafter.NONE)
        for _ in range(_WARM_UP_STEPS):
            inline.step()
        return median(1e3 * inline.step().step_s for _ in range(steps))

    return on_passing_thread(measured)


def _compute() -> None:
    """Something that is large enough for several threads."""
    torch.ones(1 << 20).add_(1)
    assert threading.current_thread() is threading.main_thread()


def main() -> None:
    """Measure both arms in turn, and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = model_folder(cache_folder(os.environ))
    found: dict[str, list[float]] = {ALONE: [], BESIDE: []}
    context = multiprocessing.get_context("spawn")
    for round_ in range(arguments.rounds):
        for arm in in_turn((ALONE, BESIDE), round_):
            with ProcessPoolExecutor(1, mp_context=context) as process:
                found[arm].append(process.submit(step_ms, model, arguments.threads, arguments.steps, arm).result())
    table = output.table("torch's threads", ">ms a step", "~quartiles (rounds)")
    for arm, values in found.items():
        spread = figures.spread(values)
        assert spread is not None
        table.add_row(arm, f"{spread.median:.1f}", f"{spread.low:.1f} to {spread.high:.1f} ({spread.count})")
    ratio = median(b / a for a, b in zip(found[ALONE], found[BESIDE], strict=True))
    output.console().print(table, f"A second pool makes a step last {ratio:.2f} times as long.")


if __name__ == "__main__":
    main()
