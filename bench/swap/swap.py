"""The cost of a hot swap for running streams. See README.md in this folder."""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from bench import harness
from bench.engine_inputs import code_prompts, untrained_drafts
from bench.harness import Line, Measurements, spread
from bench.serving.arms import RunSpec, request

from updraft_cli import results
from updraft_inference.engine import DraftCheckpoint, Drafter
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

STREAMS = 8
TOKENS = 288
SWAPS = 20
ROUNDS = 4
SEED = 7
DRAFT_VOCAB = 8192

Run = tuple[list[tuple[int, ...]], float, list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The same streams without and with swaps."""

    dtype: str
    round: int
    longest_gap_s: float
    longest_gap_with_swaps_s: float
    swaps: int
    pauses_s: list[float]
    is_output_equal: bool
    ended_early: int

    @property
    def added_ms(self) -> float:
        """The part of the longest token gap that comes with swaps."""
        return 1e3 * (self.longest_gap_with_swaps_s - self.longest_gap_s)

    def __str__(self) -> str:
        gaps = f"{1e3 * self.longest_gap_s:.0f} ms, with swaps {1e3 * self.longest_gap_with_swaps_s:.0f} ms"
        return f"{self.dtype} round {self.round}: longest gap {gaps}"


async def stream(engine: TorchEngine, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], list[float]]:
    """Run one stream; return its tokens and the gaps between its deltas in seconds."""
    tokens: list[int] = []
    times_s: list[float] = []
    spec = RunSpec(batch=STREAMS, tokens=TOKENS, drafter=Drafter.EAGLE3, lookahead=2)
    async for delta in engine.generate(request(prompt, spec)):
        times_s.append(time.perf_counter())
        tokens += delta.token_ids
    return tuple(tokens), [end_s - start_s for start_s, end_s in pairwise(times_s)]


async def run(
    engine: TorchEngine, prompts: Sequence[tuple[int, ...]], drafts: list[DraftCheckpoint], swaps: int
) -> Run:
    """Run all streams at once, with swaps. Return their outputs, the longest gap, and the pause of each swap."""
    pauses: list[float] = []

    async def swap() -> None:
        await asyncio.sleep(4.0)  # after the prefills, whose gaps would hide those of swaps
        for n in range(swaps):
            pause_s = (await engine.swap(drafts[n % 2])).pause_s
            if engine.load.running == len(prompts):  # only swaps during which all streams ran count
                pauses.append(pause_s)
            await asyncio.sleep(0.25)

    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(stream(engine, prompt)) for prompt in prompts]
        tasks.create_task(swap())
    outcomes = [task.result() for task in streams]
    # The other streams are prefilled during the first third of a stream; the swaps come later.
    longest = max(max(gaps[len(gaps) // 3 :]) for _, gaps in outcomes)
    return [tokens for tokens, _ in outcomes], longest, pauses


async def measure_rounds(dtype: torch.dtype, num_rounds: int) -> list[Round]:
    """Rounds of the same streams without and with swaps, interleaved."""
    model = harness.model()
    prompts = code_prompts(model, STREAMS, seed=SEED)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        drafts = untrained_drafts(model, Path(folder), torch.arange(DRAFT_VOCAB))
        options = EngineOptions(limits=Limits(num_slots=STREAMS, max_context=512, max_lookahead=3), dtype=dtype)
        async with TorchEngine.open(model, options) as engine:
            await engine.swap(drafts[0])
            await run(engine, prompts[:2], drafts, 0)  # warm up
            for n in range(num_rounds):
                plain, plain_gap_s, _ = await run(engine, prompts, drafts, 0)
                swapped, swap_gap_s, pauses_s = await run(engine, prompts, drafts, SWAPS)
                rounds.append(
                    Round(
                        dtype=str(dtype).removeprefix("torch."),
                        round=n,
                        longest_gap_s=plain_gap_s,
                        longest_gap_with_swaps_s=swap_gap_s,
                        swaps=len(pauses_s),
                        pauses_s=pauses_s,
                        is_output_equal=plain == swapped,
                        ended_early=sum(len(tokens) < TOKENS for tokens in swapped),
                    )
                )
    return rounds


def lines(rounds: Sequence[Round]) -> tuple[Line, ...]:
    added_ms = [one.added_ms for one in rounds if one.dtype == "bfloat16"]
    exact = [one for one in rounds if one.dtype == "float32"]
    name = "added to the longest token gap, median over rounds"
    return (
        Line(results.at_most(name, statistics.median(added_ms), 30, "ms"), spread(added_ms)),
        Line(results.at_least("swaps under load per round", min(one.swaps for one in rounds), SWAPS)),
        Line(results.at_most("streams that ended early", sum(one.ended_early for one in rounds), 0)),
        Line(
            results.at_least("float32 rounds with equal output", sum(one.is_output_equal for one in exact), len(exact))
        ),
    )


def measure(arguments: argparse.Namespace) -> Measurements:
    torch.set_num_threads(arguments.threads)
    rounds = [
        *asyncio.run(measure_rounds(torch.bfloat16, arguments.rounds)),
        *asyncio.run(measure_rounds(torch.float32, 1)),
    ]
    pauses_ms = [1e3 * pause_s for one in rounds for pause_s in one.pauses_s]
    pauses = f"pause of a swap: median {statistics.median(pauses_ms):.1f} ms, longest {max(pauses_ms):.1f} ms"
    return Measurements(
        seed=SEED,
        lines=lines(rounds),
        samples=[asdict(one) for one in rounds],
        figures=[*map(str, rounds), pauses],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds in bfloat16 (default {ROUNDS})")
    parser.add_argument("--threads", type=int, default=2, help="threads of the engine (default 2)")
    harness.run("swap", parser, measure)


if __name__ == "__main__":
    main()
