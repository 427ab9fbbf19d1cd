"""What does a hot swap cost the streams that run? See README.md beside this file."""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from updraft_artifacts.digests import tensors_digest
from updraft_cli import results
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_cli.prompts import domain_prompts
from updraft_draft import checkpoint
from updraft_draft.network import initial_network
from updraft_draft.target_weights import read_head
from updraft_inference.engine import DraftCheckpoint, Drafter, GenerationRequest, SamplingParams
from updraft_inference.text.tokenization import Tokenizer
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

STREAMS = 8
TOKENS = 160
SWAPS = 20
ROUNDS = 4
SEED = 7

Run = tuple[list[tuple[int, ...]], float, list[float]]


def make_drafts(model: Path, folder: Path) -> list[DraftCheckpoint]:
    """Two untrained drafts of the size that the trainer publishes (19.7 MB): what they guess does not matter here."""
    head = read_head(model)
    drafts = []
    for version in (1, 2):
        network = initial_network(
            head.config.draft(draft_vocab_size=8192),
            head.embedding.float(),
            head.head,
            head.final_norm,
            torch.arange(8192),
            seed=version,
        )
        checkpoint.save(network, folder / str(version))
        digest = tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(network)))
        drafts.append(DraftCheckpoint(version=version, folder=folder / str(version), tensors_digest=digest))
    return drafts


async def stream(engine: TorchEngine, name: str, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], list[float]]:
    """Run one stream; return its tokens and the gaps between its deltas in seconds, without the first."""
    tokens: list[int] = []
    gaps: list[float] = []
    last: float | None = None
    request = GenerationRequest(
        request_id=name,
        prompt_ids=prompt,
        max_tokens=TOKENS,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
        drafter=Drafter.EAGLE3,
        lookahead=2,
    )
    async for delta in engine.generate(request):
        now = time.perf_counter()
        if last is not None:
            gaps.append(now - last)
        last = now
        tokens += delta.token_ids
    return tuple(tokens), gaps


async def run(
    engine: TorchEngine, prompts: Sequence[tuple[int, ...]], drafts: list[DraftCheckpoint], swaps: int
) -> Run:
    """All streams at once, with `swaps` swaps spread over them; their outputs, the longest gap, the swaps' pauses."""
    pauses: list[float] = []

    async def swap() -> None:
        await asyncio.sleep(4.0)  # past the prefills, whose gaps would hide a swap's
        for n in range(swaps):
            pause_s = (await engine.swap(drafts[n % 2])).pause_s
            if engine.load.running == len(prompts):  # only swaps that every stream lived through count
                pauses.append(pause_s)
            await asyncio.sleep(0.25)

    names = [f"{time.monotonic_ns()}-{index}" for index in range(len(prompts))]
    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(stream(engine, *one)) for one in zip(names, prompts, strict=True)]
        tasks.create_task(swap())
    outcomes = [task.result() for task in streams]
    # A stream's first third holds the prefills of the others; the swaps come after it.
    longest = max(max(gaps[len(gaps) // 3 :]) for _, gaps in outcomes)
    return [tokens for tokens, _ in outcomes], longest, pauses


async def measure(dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """Rounds of the same streams without and with swaps, interleaved."""
    model = model_folder(cache_folder(os.environ))
    tokenizer = Tokenizer.open(model)
    prompts = [
        tokenizer.encode(text, add_special_tokens=False)[:200] for text in domain_prompts("code", STREAMS, seed=SEED)
    ]
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        drafts = make_drafts(model, Path(folder))
        options = EngineOptions(limits=Limits(num_slots=STREAMS, max_context=512, max_lookahead=3), dtype=dtype)
        async with TorchEngine.open(model, options) as engine:
            await engine.swap(drafts[0])
            await run(engine, prompts[:2], drafts, 0)  # warm up
            for n in range(rounds):
                plain, plain_gap, _ = await run(engine, prompts, drafts, 0)
                swapped, swap_gap, pauses = await run(engine, prompts, drafts, SWAPS)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "round": n,
                        "longest_gap_s": plain_gap,
                        "longest_gap_with_swaps_s": swap_gap,
                        "swaps": len(pauses),
                        "pauses_s": pauses,
                        "is_output_equal": plain == swapped,
                        "ended_early": sum(len(tokens) < TOKENS for tokens in swapped),
                    }
                )
    return rows


def bars(rows: list[dict[str, object]]) -> tuple[results.Bar, ...]:
    """The bars of the issue."""
    fast = [row for row in rows if row["dtype"] == "bfloat16"]
    exact = [row for row in rows if row["dtype"] == "float32"]
    added = [float(str(r["longest_gap_with_swaps_s"])) - float(str(r["longest_gap_s"])) for r in fast]
    return (
        results.at_most("added to the longest token gap, median over rounds", 1e3 * statistics.median(added), 30, "ms"),
        results.at_least("swaps under load a round", min(int(str(r["swaps"])) for r in rows), SWAPS),
        results.at_most("streams that ended early", sum(int(str(r["ended_early"])) for r in rows), 0),
        results.at_least(
            "float32 rounds with equal output", sum(bool(r["is_output_equal"]) for r in exact), len(exact)
        ),
    )


def main() -> None:
    """Measure, print one table, write bench/results/; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = datetime.now(UTC)
    rows = asyncio.run(measure(torch.bfloat16, arguments.rounds)) + asyncio.run(measure(torch.float32, 1))
    result = results.Result(
        name="swap",
        command="make bench-swap",
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=bars(rows),
        samples=rows,
    )
    console = Console()
    results.show_bars(console, result.bars)
    for row in rows:
        gaps = [1e3 * float(str(row[key])) for key in ("longest_gap_s", "longest_gap_with_swaps_s")]
        console.print(f"{row['dtype']} round {row['round']}: longest gap {gaps[0]:.0f} ms, with swaps {gaps[1]:.0f} ms")
    pauses = sorted(1e3 * p for row in rows if isinstance(row["pauses_s"], list) for p in row["pauses_s"])
    console.print(f"pause of a swap: median {statistics.median(pauses):.1f} ms, longest {pauses[-1]:.1f} ms")
    console.print(results.write(result, Path("bench/results")))
    sys.exit(results.missed(result.bars))


if __name__ == "__main__":
    main()
