"""Arms without a server: our engine, and transformers' generate. Both return streams with their times."""

import asyncio
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from bench.harness import concurrently
from bench.serving.figures import Stream

from updraft_inference.engine import Drafter, GenerationRequest, SamplingParams
from updraft_inference.torch_engine import openmp
from updraft_inference.torch_engine.engine import TorchEngine

_names = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """How a run generates. `drafter` or `lookahead` None: the engine's choice."""

    batch: int
    tokens: int
    drafter: Drafter | None
    temperature: float = 0.0
    lookahead: int | None = None


async def run(
    engine: TorchEngine, prompts: Sequence[tuple[int, ...]], spec: RunSpec
) -> tuple[list[Stream], list[tuple[int, ...]]]:
    """Continue all prompts, `spec.batch` at a time. Returns streams and outputs."""
    answers = await concurrently(prompts, spec.batch, lambda n, prompt: _stream(engine, prompt, spec, seed=n))
    return [stream for stream, _ in answers], [output for _, output in answers]


def request(prompt: tuple[int, ...], spec: RunSpec, *, seed: int = 0) -> GenerationRequest:
    """A request that continues past end tokens."""
    return GenerationRequest(
        request_id=f"bench-{next(_names)}",
        prompt_ids=prompt,
        max_tokens=spec.tokens,
        sampling=SamplingParams(temperature=spec.temperature, seed=seed),
        ignore_eos=True,
        drafter=spec.drafter,
        lookahead=spec.lookahead,
    )


async def _stream(
    engine: TorchEngine, prompt: tuple[int, ...], spec: RunSpec, *, seed: int
) -> tuple[Stream, tuple[int, ...]]:
    tokens: list[int] = []
    first_s = last_s = 0.0
    async with aclosing(engine.generate(request(prompt, spec, seed=seed))) as deltas:
        async for delta in deltas:
            last_s = time.perf_counter()
            first_s = first_s or last_s
            tokens += delta.token_ids
    return Stream(first_s, last_s, len(tokens)), tuple(tokens)


class Transformers:
    """`generate` with its defaults: its own attention and cache, greedy, prompts padded on the left.

    It runs in a separate process, because pools of threads in one process slow each other (see torch_engine/worker.py).
    """

    def __init__(self, process: Executor) -> None:
        self._process = process

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, *, threads: int) -> Iterator[Self]:
        """Open the engine's model folder, in bfloat16."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=_open, initargs=(folder, threads)) as process:
            own = os.environ.pop(openmp.VARIABLE, None)  # our engine sets it for itself
            process.submit(os.getpid).result()  # it starts
            os.environ |= {openmp.VARIABLE: own} if own else {}
            yield cls(process)

    async def run(self, prompts: Sequence[tuple[int, ...]], *, batch: int, tokens: int) -> list[Stream]:
        """Continue all prompts, `batch` at a time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._process, _continued, prompts, batch, tokens)


_model: Any = None
"""The model in the process that runs transformers."""


def _open(folder: Path, threads: int) -> None:
    global _model  # noqa: PLW0603 - an initializer has no other way to leave something behind
    from transformers import AutoModelForCausalLM, logging  # noqa: PLC0415 - takes seconds, and one part needs it

    torch.set_num_threads(threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call] # theirs
    _model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _continued(prompts: Sequence[tuple[int, ...]], batch: int, tokens: int) -> list[Stream]:
    groups = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    return [stream for group in groups for stream in _together(group, tokens)]


def _together(prompts: Sequence[tuple[int, ...]], tokens: int) -> list[Stream]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    times: list[float] = []

    def note(ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    _model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=[],  # on past end tokens, as all arms
        pad_token_id=0,
        stopping_criteria=[note],
    )
    assert len(times) == tokens, f"generate took {len(times)} steps for {tokens} tokens"
    return [Stream(times[0], times[-1], tokens)] * len(prompts)
