"""How much memory do serving and training hold? See README.md beside this file."""

import asyncio
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
from rich.console import Console

from updraft_cli import results
from updraft_cli.local.folders import cache_folder
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack
from updraft_cli.models.smollm2 import model_folder
from updraft_cli.prompts import domain_prompts

SEED = 7
SLOTS = 8
CONTEXT = 2048
TRAIN_REQUESTS = 40


async def load(url: str) -> None:
    """Learnable traffic first, so that the trainer trains, then all slots filled to the end of their context."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        prompts = domain_prompts("math", TRAIN_REQUESTS, seed=SEED)
        limit = asyncio.Semaphore(SLOTS)

        async def chat(text: str) -> None:
            body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 64, "temperature": 0}
            async with limit:
                (await client.post("/v1/chat/completions", json=body)).raise_for_status()

        async def fill(text: str) -> None:
            body = {"model": model, "prompt": (text + " ") * 40, "max_tokens": 1, "temperature": 0}
            # The longest prompt that fits: cut by what the server says it counted.
            while (answer := await client.post("/v1/completions", json=body)).status_code == httpx.codes.BAD_REQUEST:
                body["prompt"] = str(body["prompt"])[: int(len(str(body["prompt"])) * 0.9)]
            answer.raise_for_status()

        await asyncio.gather(*(chat(text) for text in prompts))
        await asyncio.gather(*(fill(text) for text in prompts[:SLOTS]))


async def sample(stack: Stack, done: asyncio.Event) -> dict[str, int]:
    """Peak resident bytes of each process, twice a second."""
    peaks: dict[str, int] = {}
    while not done.is_set():
        for child in stack.children:
            if child.pid is not None:
                resident = psutil.Process(child.pid).memory_info().rss
                peaks[child.process.name] = max(resident, peaks.get(child.process.name, 0))
        await asyncio.sleep(0.5)
    return peaks


async def measure(stack: Stack) -> dict[str, int]:
    """Peaks under load, and for a minute of training after it."""
    done = asyncio.Event()

    async def run() -> None:
        await load(stack.addresses.inference_url)
        await asyncio.sleep(60)
        done.set()

    peaks, _ = await asyncio.gather(sample(stack, done), run())
    return peaks


def main() -> None:
    """Measure, print one table, write bench/results/; exit 1 where a bar is missed."""
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        config = StackConfig(
            model=model_folder(cache_folder(os.environ)), data=Path(folder), port=0, registry_port=0, slots=SLOTS
        )
        with Stack(config) as stack:
            peaks = asyncio.run(measure(stack))
    gigabytes = {name: value / 1e9 for name, value in peaks.items()}
    result = results.Result(
        name="memory",
        command="make bench-memory",
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=(
            results.at_most("serving, peak resident", gigabytes.get("inference"), 1.5, "GB"),
            results.at_most("trainer, peak resident", gigabytes.get("trainer"), 2.0, "GB"),
        ),
        samples=[{"process": name, "peak_resident_bytes": value} for name, value in sorted(peaks.items())],
    )
    console = Console()
    results.show_bars(console, result.bars)
    console.print(", ".join(f"{name} {value:.2f} GB" for name, value in sorted(gigabytes.items())))
    console.print(results.write(result, Path("bench/results")))
    sys.exit(results.missed(result.bars))


if __name__ == "__main__":
    main()
