"""The memory of serving and training. See README.md in this folder."""

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import psutil
from bench import harness
from bench.chat import chat_client
from bench.harness import Line, Measurements, concurrently
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from updraft_cli import results
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.scrape import scrape
from updraft_cli.local.stack import Stack
from updraft_cli.prompts import DOMAINS, domain_prompts, num_prompts

REQUESTS = 1000
STREAMS = 8
SEED = 7
SHORTEST, LONGEST = 100, 1000
"""Tokens of a request, prompt and output together."""
CHARS_PER_TOKEN = 3.8
"""Average of the packaged prompts; lengths need not be exact."""
REST_S = 60
"""Seconds of training after the last request."""
SAMPLE_S = 0.5
KEPT_EVERY = 20
"""One of so many samples is kept in the result."""


@dataclass(frozen=True, slots=True)
class Length:
    """Characters of a prompt and tokens of its output."""

    prompt_chars: int
    output_tokens: int


def lengths(num_requests: int) -> Iterator[Length]:
    """Total lengths are uniform; a fifth to four fifths of each is prompt."""
    rng = random.Random(SEED)
    for _ in range(num_requests):
        total, share = rng.randint(SHORTEST, LONGEST), rng.uniform(0.2, 0.8)
        yield Length(prompt_chars=int(CHARS_PER_TOKEN * total * share), output_tokens=int(total * (1 - share)))


def texts() -> Iterator[str]:
    """Prompts of all domains in turn, in the same order every time."""
    for prompts in zip(*(cycle(domain_prompts(one, num_prompts(one), seed=SEED)) for one in DOMAINS), strict=True):
        yield from prompts


def prompt(source: Iterator[str], num_chars: int) -> str:
    """Join texts, and cut the last one."""
    text = next(source)
    while len(text) < num_chars:
        text += "\n\n" + next(source)
    return text[:num_chars]


@dataclass(slots=True)
class Load:
    """Totals of the answered requests."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


async def send(url: str, num_requests: int, load: Load) -> None:
    """Keep `STREAMS` requests running until all are answered."""
    source = texts()
    async with chat_client(url) as client:

        async def complete(_: int, length: Length) -> None:
            usage = await client.complete(prompt(source, length.prompt_chars), length.output_tokens)
            load.requests += 1
            load.prompt_tokens += usage["prompt_tokens"]
            load.output_tokens += usage["completion_tokens"]

        await concurrently(lengths(num_requests), STREAMS, complete)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Resident bytes of each process at one time."""

    seconds: float
    requests: int
    resident: dict[str, int]


def resident(stack: Stack) -> dict[str, int]:
    """Resident bytes by process, as `ps` and a container's limit count them. Processes that restart are left out."""
    sizes = {}
    for child in stack.children:
        with contextlib.suppress(psutil.Error):
            if child.pid is not None:
                sizes[child.process.name] = psutil.Process(child.pid).memory_info().rss
    return sizes


async def watch(stack: Stack, load: Load, progress: Progress, num_requests: int) -> list[Sample]:
    """Samples until `REST_S` after the last answer."""
    bar = progress.add_task("", total=num_requests)
    samples: list[Sample] = []
    started, ends = time.monotonic(), float("inf")
    while time.monotonic() < ends:
        sizes = resident(stack)
        samples.append(Sample(seconds=round(time.monotonic() - started, 1), requests=load.requests, resident=sizes))
        shown = ", ".join(f"{name} {sizes[name] / 1e9:.2f} GB" for name in ("inference", "trainer") if name in sizes)
        progress.update(bar, completed=load.requests, description=shown)
        if load.requests == num_requests and ends == float("inf"):
            ends = time.monotonic() + REST_S
        await asyncio.sleep(SAMPLE_S)
    return samples


async def serve(stack: Stack, num_requests: int) -> tuple[list[Sample], Load]:
    """Send all requests, and let the trainer train for a while after them."""
    load = Load()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send(stack.addresses.inference_url, num_requests, load))
            watching = tasks.create_task(watch(stack, load, progress, num_requests))
    return watching.result(), load


def counters(stack: Stack) -> dict[str, float | None]:
    """Optimizer steps and swaps since the start. Without them, the run does not show the memory of real use."""
    urls = stack.addresses.metrics_urls
    trainer, inference = scrape(urls["trainer"]), scrape(urls["inference"])
    return {
        "optimizer_steps": trainer.total("updraft_trainer_optimizer_steps_total") if trainer else None,
        "swaps": inference.total("updraft_inference_swaps_total", outcome="swapped") if inference else None,
    }


def measure(arguments: argparse.Namespace) -> Measurements:
    with tempfile.TemporaryDirectory() as folder:
        config = StackConfig(model=harness.model(), data=Path(folder), port=0, registry_port=0, slots=STREAMS)
        with Stack(config) as stack:
            samples, load = asyncio.run(serve(stack, arguments.requests))
            counts = counters(stack)
    last = samples[-1].resident
    names = sorted({name for sample in samples for name in sample.resident})
    peaks = {name: max(sample.resident.get(name, 0) for sample in samples) / 1e9 for name in names}
    sizes = [f"{name}: {peaks[name]:.2f} GB at peak, {last.get(name, 0) / 1e9:.2f} GB at the end" for name in names]
    return Measurements(
        seed=SEED,
        lines=(
            Line(results.at_most("inference, peak resident", peaks.get("inference"), 1.5, "GB")),
            Line(results.at_most("trainer, peak resident", peaks.get("trainer"), 2.0, "GB")),
            Line(results.at_least("optimizer steps", counts["optimizer_steps"], 1)),
            Line(results.at_least("swaps", counts["swaps"], 1)),
        ),
        samples=[asdict(load), *map(asdict, samples[::KEPT_EVERY]), asdict(samples[-1])],
        figures=[
            *sizes,
            f"{load.requests} requests, {load.prompt_tokens} prompt tokens, {load.output_tokens} output tokens",
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help=f"requests to send ({REQUESTS})")
    harness.run("memory", parser, measure)


if __name__ == "__main__":
    main()
