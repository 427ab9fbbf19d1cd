"""A trainer that learns beside a measurement, as `updraft up` runs it: its threads, its niceness and its scheduling class.

`updraft up` answers the requests of a recipe once, and its data folder is kept. A copy of it is then started for each
measurement: the trainer goes on, with these requests for as long as it runs, and the server ends, because the engine that is
measured runs in another process.
"""

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from bench.chat import chat_client
from bench.fleet.usage import peak_bytes
from bench.harness import concurrently
from bench.serving import workloads
from bench.serving.figures import Learnt
from bench.serving.plan import SEED, Recipe
from tests.support.wait import wait_until

from updraft_cli.local.folders import cache_folder
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.scrape import scrape
from updraft_cli.local.stack import Stack
from updraft_inference.torch_engine import openmp
from updraft_inference.torch_engine.worker import on_passing_thread

STREAMS = 8
_LEARNS_WITHIN_S = 300.0
_VERSION = 1
"""Raise it when the folder changes in a way that neither model nor requests show."""
_RESTLESS = {"UPDRAFT_TRAINER_MAX_USES": "1000000"}
"""No traffic comes any more, so it may use what it has without end."""

Tell = Callable[[str, int, int], None]


class Trainer:
    """The trainer of a stack, from now on."""

    def __init__(self, stack: Stack) -> None:
        pid = stack.child("trainer").pid
        assert pid is not None
        self._url = stack.addresses.metrics_urls["trainer"]
        self._process = psutil.Process(pid)
        self._started_s, self._processor_s = time.monotonic(), self._processor()
        self._steps = _optimizer_steps(self._url)

    def learnt(self) -> Learnt:
        """Until now. If it has ended, no step counts."""
        steps = _optimizer_steps(self._url)
        try:
            return Learnt(
                optimizer_steps=None if steps is None else steps - (self._steps or 0),
                peak_bytes=peak_bytes(self._process.pid),
                core_share=(self._processor() - self._processor_s) / (time.monotonic() - self._started_s),
            )
        except (psutil.NoSuchProcess, FileNotFoundError, StopIteration):  # a zombie has no size
            return Learnt(optimizer_steps=None, peak_bytes=0, core_share=0.0)

    def _processor(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def trainer(model: Path, recipe: Recipe, tell: Tell = lambda *_: None) -> Iterator[Trainer]:
    """A trainer that has got the answers to the requests of a recipe, and learns until the block ends. The first call serves
    them, in about four minutes for 200 requests."""
    texts = [
        text for d in recipe.domains for text in workloads.requests(d, seed=SEED, is_held_out=False)[: recipe.requests]
    ]
    kept = _served(cache_folder(os.environ), model, texts, recipe.tokens, tell)
    with tempfile.TemporaryDirectory(prefix="updraft-") as folder:
        data = Path(folder) / "stack"
        shutil.copytree(kept, data, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])
        tell("the trainer starts", 0, 1)
        with _stack(data, model, _RESTLESS) as stack:
            stack.child("inference").terminate()
            stack.child("inference").join()
            _wait_until_it_learns(stack)
            yield Trainer(stack)


def _served(cache: Path, model: Path, texts: Sequence[str], tokens: int, tell: Tell) -> Path:
    """The data folder of `updraft up` after these requests."""
    key = hashlib.sha256(repr((_VERSION, model.name, tokens, list(texts))).encode()).hexdigest()
    folder = cache / "bench" / f"stack-{key[:16]}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with _stack(partial, model, {}) as stack:
            url = stack.addresses.inference_url
            on_passing_thread(lambda: asyncio.run(_answer(url, texts, tokens, tell)))  # the caller may have a loop
            _wait_until_it_learns(stack)
        partial.rename(folder)
    return folder


@contextmanager
def _stack(data: Path, model: Path, settings: dict[str, str]) -> Iterator[Stack]:
    own = os.environ.pop(openmp.VARIABLE, None)  # inference sets it for itself, and the trainer keeps the default
    try:
        config = StackConfig(
            model=model, data=data, port=0, registry_port=0, slots=STREAMS, drafter="ngram", settings=settings
        )
        with Stack(config) as stack:
            os.environ |= {openmp.VARIABLE: own} if own else {}
            yield stack
    finally:
        os.environ |= {openmp.VARIABLE: own} if own else {}


async def _answer(url: str, texts: Sequence[str], tokens: int, tell: Tell) -> None:
    async with chat_client(url) as client:

        async def complete(n: int, text: str) -> None:
            tell("answering requests for the trainer", n, len(texts))
            await client.complete(text, tokens)

        await concurrently(texts, STREAMS, complete)


def _wait_until_it_learns(stack: Stack) -> None:
    url = stack.addresses.metrics_urls["trainer"]
    wait_until(
        lambda: bool(_optimizer_steps(url)), timeout_s=_LEARNS_WITHIN_S, what="the trainer has made an optimizer step"
    )


def _optimizer_steps(url: str) -> float | None:
    metrics = scrape(url)
    return None if metrics is None else metrics.total("updraft_trainer_optimizer_steps_total")
