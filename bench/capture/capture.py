"""What does capturing cost the tokens a second? See README.md beside this file."""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import httpx
import redis
from rich.console import Console

from updraft_cli import results
from updraft_cli.local.folders import cache_folder
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack
from updraft_cli.models.smollm2 import model_folder
from updraft_cli.prompts import domain_prompts

ARMS = {"light": "0.0", "payload": "1.0"}
"""Fraction of requests whose hidden states are captured too."""
STREAMS = 8
TOKENS = 96
ROUNDS = 8
SEED = 7


async def round_of(url: str, prompts: list[str], headers: dict[str, str]) -> float:
    """Tokens a second of all prompts at once, one a stream."""
    async with httpx.AsyncClient(base_url=url, timeout=600, headers=headers) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]

        async def chat(text: str) -> int:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            }
            answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
            return int(answer["usage"]["completion_tokens"])

        started = time.perf_counter()
        tokens = await asyncio.gather(*(chat(text) for text in prompts))
        return sum(tokens) / (time.perf_counter() - started)


def measure(rounds: int) -> tuple[list[dict[str, object]], dict[str, int]]:
    """Rounds of the same prompts, captured and opted out in turn on one process; and the stream lengths at the end."""
    model = model_folder(cache_folder(os.environ))
    rows: list[dict[str, object]] = []
    with ExitStack() as running:
        stacks = {}
        for arm, fraction in ARMS.items():
            data = Path(running.enter_context(tempfile.TemporaryDirectory()))
            settings = {
                "UPDRAFT_INFERENCE_CAPTURE_PAYLOAD_FRACTION": fraction,
                "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.0",
            }
            config = StackConfig(model=model, data=data, port=0, registry_port=0, trainer=False, settings=settings)
            stacks[arm] = running.enter_context(Stack(config))
        for n in range(-1, rounds):  # the first round warms up and is not counted
            prompts = domain_prompts("code", STREAMS, seed=SEED + n)
            for arm, stack in stacks.items():
                rates = {}
                for is_captured in (True, False) if n % 2 else (False, True):
                    headers = {} if is_captured else {"X-Updraft-Capture": "off"}
                    rates[is_captured] = asyncio.run(round_of(stack.addresses.inference_url, prompts, headers))
                if n >= 0:
                    rows.append({"round": n, "arm": arm, "captured": rates[True], "off": rates[False]})
        entries = {arm: _entries(stack) for arm, stack in stacks.items()}
    return rows, entries


def _entries(stack: Stack) -> int:
    client = redis.Redis.from_url(stack.addresses.redis_url)
    return sum(int(str(client.xlen(key))) for key in client.scan_iter("updraft:*:samples:v1"))


def costs(rows: list[dict[str, object]], arm: str) -> list[float]:
    """What capture loses in each round against opting out, in percent, ascending."""
    pairs = [(float(str(row["captured"])), float(str(row["off"]))) for row in rows if row["arm"] == arm]
    return sorted(100 * (1 - captured / off) for captured, off in pairs)


def main() -> None:
    """Measure, print one table, write bench/results/; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    started = datetime.now(UTC)
    rows, entries = measure(rounds)
    captured = (rounds + 1) * STREAMS
    result = results.Result(
        name="capture",
        command="make bench-capture",
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=(
            results.at_most("cost of the light record", statistics.median(costs(rows, "light")), 2, "%"),
            results.at_most("cost with every payload", statistics.median(costs(rows, "payload")), 10, "%"),
            results.at_least("traces in Redis, light (opted-out ones leave none)", entries["light"], captured),
            results.at_least("traces in Redis, payload", entries["payload"], captured),
        ),
        samples=rows,
    )
    console = Console()
    results.show_bars(console, result.bars)
    for arm in ARMS:
        cost = costs(rows, arm)
        rate = statistics.median(float(str(row["off"])) for row in rows if row["arm"] == arm)
        console.print(
            f"{arm:8} cost a round from {cost[0]:.1f} to {cost[-1]:.1f} %, {rate:.1f} tokens/s without capture"
        )
    console.print(results.write(result, Path("bench/results")))
    sys.exit(results.missed(result.bars))


if __name__ == "__main__":
    main()
