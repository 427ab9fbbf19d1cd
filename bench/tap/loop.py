"""The whole loop on a stock vLLM, from an untrained draft: how many tokens a verify step gives, by vLLM's own counters.

`updraft up --engine vllm` as it runs for a user: Redis, registry, trainer, vLLM and its agent share the machine's cores. A
client asks requests that it has not asked before, eight at a time, and pauses in between: while vLLM answers, and for a second
after, its two processes keep a core each busy. The first requests went to a vLLM without Updraft before, which had an untrained
draft too, of fewer draft tokens.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.chat import chat_client
from bench.harness import Line
from rich.console import Console
from tests.vllm import build
from tests.vllm.server import Drafted, cpu_environment, serving

from updraft_cli import results
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.scrape import scrape
from updraft_cli.local.stack import Stack
from updraft_cli.prompts import domain_prompts, num_prompts

DOMAIN = "json"
BATCH, TOKENS = 8, 64
PAUSE_S = 6.0
WITHIN_S = 600.0
AT_LEAST = 1.5
SETTINGS = {
    "UPDRAFT_INFERENCE_DTYPE": "float32",
    "UPDRAFT_INFERENCE_VLLM_ARGS": "--max-model-len 512 --max-num-seqs 8",
    "UPDRAFT_INFERENCE_CAPTURE_PAYLOAD_FRACTION": "1",
    "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.25",
    "UPDRAFT_TRAINER_EVALUATE_SECONDS": "10",
    "UPDRAFT_TRAINER_MIN_SAMPLES": "6",
    "UPDRAFT_TRAINER_MAX_USES": "16",
    "UPDRAFT_REGISTRY_GATE_MIN_SAMPLES": "6",
}

_progress = Console(stderr=True, style="dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests at once: when they had ended, counted from the first one, and by vLLM's counters their tokens per step."""

    ended_s: float
    version: int
    steps: float
    """Verify steps; 0 while nothing is drafted, and then a step gives one token."""
    acceptance_length: float


@dataclass(slots=True, kw_only=True)
class Loop:
    """The batches with Updraft, and the tokens per step of the first ones on a vLLM without it."""

    batches: list[Batch] = field(default_factory=list)
    without: float

    @property
    def in_time(self) -> list[Batch]:
        """The batches that had ended within the time."""
        return [one for one in self.batches if one.ended_s <= WITHIN_S]

    @property
    def reached(self) -> Batch | None:
        """The first of them of the length that is asked for."""
        return next((one for one in self.in_time if one.steps and one.acceptance_length >= AT_LEAST), None)

    def line(self) -> Line:
        """The bar: the best batch within the time."""
        best = max((one.acceptance_length for one in self.in_time), default=0.0)
        name = f"tokens per verify step within {WITHIN_S / 60:.0f} minutes from scratch, of requests never asked before"
        note = f"after {self.reached.ended_s:.0f} s" if self.reached else ""
        return Line(results.at_least(name, best, AT_LEAST), note=note)

    def figures(self) -> Iterator[str]:
        """The figures behind the bar."""
        yield f"Without Updraft a step of the same vLLM gives {self.without:.2f} tokens of the first requests."
        for one in self.batches:
            drafts = f"{one.acceptance_length:.2f} tokens per step" if one.steps else "nothing is drafted"
            yield f"After {one.ended_s:.0f} s: {drafts}, version {one.version}."

    def row(self) -> dict[str, Any]:
        return {"without": self.without, "batches": [asdict(one) for one in self.batches]}


def measured(model: Path, seed: Path, folder: Path) -> Loop:
    """First without Updraft, then with it, until a batch reaches the length or the time is over."""
    batches = _batches()
    with serving(model, seed, folder / "plain", options=("--max-num-seqs", str(BATCH))) as server:
        loop = Loop(without=asyncio.run(_asked(server.url, batches[0])).acceptance_length)
    _progress.print(f"without Updraft: {loop.without:.2f} tokens per step")
    with _stack(model, folder) as stack:
        started_s = time.monotonic()
        for prompts in batches:
            drafted = asyncio.run(_asked(stack.addresses.inference_url, prompts))
            ended_s = time.monotonic() - started_s
            one = Batch(
                ended_s=ended_s,
                version=_version(stack),
                steps=drafted.steps,
                acceptance_length=drafted.acceptance_length,
            )
            _progress.print(f"{one}")
            loop.batches.append(one)
            if loop.reached or ended_s > WITHIN_S:
                break
            time.sleep(PAUSE_S)
    return loop


@contextmanager
def _stack(model: Path, folder: Path) -> Iterator[Stack]:
    variables = {
        **cpu_environment(),
        "UPDRAFT_VLLM_DRAFTING": "trained",
    }  # also if drafting does not pay on this machine
    config = StackConfig(
        model=model,
        data=folder / "data",
        port=0,
        registry_port=0,
        trainer_threads=1,
        engine="vllm",
        vllm_python=build.python(),
        settings=SETTINGS,
    )
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        with Stack(config) as stack:
            yield stack
    finally:
        os.environ.clear()
        os.environ.update(before)


def _batches() -> list[list[str]]:
    """Every prompt of the domain once."""
    prompts = domain_prompts(DOMAIN, num_prompts(DOMAIN))
    return [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]


async def _asked(url: str, prompts: Sequence[str]) -> Drafted:
    """All of them at once; vLLM's counters of them."""
    before = _drafted(url)
    async with chat_client(url) as client, asyncio.TaskGroup() as tasks:
        for prompt in prompts:
            tasks.create_task(client.complete(prompt, TOKENS, ignore_eos=False))
    return _drafted(url).since(before)


def _drafted(url: str) -> Drafted:
    metrics = scrape(f"{url}/metrics")
    assert metrics is not None, "vLLM shows no metrics"
    steps, accepted = (metrics.total(f"vllm:spec_decode_num_{name}_total") for name in ("drafts", "accepted_tokens"))
    return Drafted(steps=steps or 0.0, accepted=accepted or 0.0)


def _version(stack: Stack) -> int:
    metrics = scrape(stack.addresses.metrics_urls["inference"])
    return int((metrics.total("updraft_inference_draft_version") if metrics else None) or 0)
