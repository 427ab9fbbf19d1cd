"""Who continues prompts inside this process: our engine, and transformers' generate. Both give streams with their times."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from bench.serving.figures import Stream

from updraft_inference.engine.port import Drafter, GenerationRequest, Sampling
from updraft_inference.torch_engine.engine import TorchEngine

_names = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How a run generates. `lookahead` None: the engine's choice."""

    batch: int
    tokens: int
    drafter: Drafter
    temperature: float = 0.0
    lookahead: int | None = None


async def run(
    engine: TorchEngine, prompts: Sequence[tuple[int, ...]], wish: Wish
) -> tuple[list[Stream], list[tuple[int, ...]]]:
    """Continue all prompts, `wish.batch` at a time: each place takes the next one when it is free. Streams and outputs."""
    streams: dict[int, Stream] = {}
    outputs: dict[int, tuple[int, ...]] = {}
    todo = iter(enumerate(prompts))

    async def place() -> None:
        for n, prompt in todo:
            streams[n], outputs[n] = await _stream(engine, prompt, wish, seed=n)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(wish.batch):
            tasks.create_task(place())
    return [streams[n] for n in sorted(streams)], [outputs[n] for n in sorted(outputs)]


def request(prompt: tuple[int, ...], wish: Wish, *, seed: int = 0) -> GenerationRequest:
    """One that goes on past end tokens."""
    return GenerationRequest(
        request_id=f"bench-{next(_names)}",
        prompt_ids=prompt,
        max_tokens=wish.tokens,
        sampling=Sampling(temperature=wish.temperature, seed=seed),
        ignore_eos=True,
        drafter=wish.drafter,
        lookahead=wish.lookahead,
    )


async def _stream(
    engine: TorchEngine, prompt: tuple[int, ...], wish: Wish, *, seed: int
) -> tuple[Stream, tuple[int, ...]]:
    tokens: list[int] = []
    first_s = last_s = 0.0
    async with aclosing(engine.generate(request(prompt, wish, seed=seed))) as deltas:
        async for delta in deltas:
            last_s = time.perf_counter()
            first_s = first_s or last_s
            tokens += delta.token_ids
    return Stream(first_s, last_s, len(tokens)), tuple(tokens)


class Transformers:
    """`generate` as it comes: its own attention and cache, greedy, prompts padded on the left."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The same folder as the engine's, in bfloat16."""
        from transformers import AutoModelForCausalLM, logging  # noqa: PLC0415 - takes seconds, and one part needs it

        logging.disable_progress_bar()  # type: ignore[no-untyped-call] # theirs
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))

    def run(self, prompts: Sequence[tuple[int, ...]], *, batch: int, tokens: int) -> list[Stream]:
        """Continue all prompts, `batch` at a time."""
        return [
            stream
            for start in range(0, len(prompts), batch)
            for stream in self._together(prompts[start : start + batch], tokens)
        ]

    def _together(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[Stream]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        times: list[float] = []

        def note(found: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(found), dtype=torch.bool)

        self._model.generate(
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
