"""What requests share: rows of a prefix, slots that are all taken, and a batch in which everything happens at once."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft
from tests.support.tiny_tokenizer import write_tokenizer

from updraft_inference.engine.port import (
    CaptureWish,
    Drafter,
    DraftOnDisk,
    Finished,
    FinishReason,
    GenerationRequest,
    Sampling,
)
from updraft_inference.torch_engine.decoder import Limits
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine

GREEDY = Sampling(temperature=0)
PROMPT = tuple(range(40, 97))
_ids = count()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(make_tiny_target(tmp_path_factory.mktemp("models") / "target", seed=3))


@pytest.fixture(scope="module")
def drafts(target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[DraftOnDisk]:
    folders = tmp_path_factory.mktemp("drafts")
    return [
        DraftOnDisk(
            version=n,
            folder=folders / str(n),
            tensors_digest=save_draft(make_draft(target, seed=n), folders / str(n)),
        )
        for n in (1, 2)
    ]


@pytest.fixture
async def engine(target: Path) -> AsyncIterator[TorchEngine]:
    async with open_engine(target) as opened:
        yield opened


def open_engine(target: Path, *, slots: int = 3, max_context: int = 200) -> TorchEngine:
    limits = Limits(num_slots=slots, max_context=max_context, max_lookahead=7)
    return TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.float32))


def request(prompt: tuple[int, ...], **kwargs: object) -> GenerationRequest:
    defaults: dict[str, object] = {"max_tokens": 40, "sampling": GREEDY, "ignore_eos": True}
    return GenerationRequest(request_id=f"r{next(_ids)}", prompt_ids=prompt, **{**defaults, **kwargs})  # type: ignore[arg-type]


async def run(engine: TorchEngine, wanted: GenerationRequest) -> Finished:
    (finished,) = [delta.finished async for delta in engine.generate(wanted) if delta.finished]
    return finished


@pytest.mark.parametrize("drafter", [Drafter.NONE, Drafter.HYBRID])
async def test_prompts_that_begin_alike_are_read_once_and_answered_alike(
    target: Path, drafts: list[DraftOnDisk], drafter: Drafter
) -> None:
    start = tuple(range(60, 120))
    prompts = [(*start, *end) for end in ((5, 6), (5, 7, 8), (), (9,))]
    wish = CaptureWish(payload=True, prompt_rows=4)

    async def answers(engine: TorchEngine, *, together: bool) -> list[Finished]:
        wanted = [request(prompt, drafter=drafter, capture=wish) for prompt in prompts]
        if together:
            return list(await asyncio.gather(*(run(engine, one) for one in wanted)))
        return [await run(engine, one) for one in wanted]

    async with open_engine(target) as engine:
        await engine.swap(drafts[0])
        first = await answers(engine, together=False)
        num_cached = engine.load.cached_tokens
        again = await answers(engine, together=True)
    alone = []
    for prompt in prompts:
        async with open_engine(target) as engine:
            await engine.swap(drafts[0])
            alone.append(await run(engine, request(prompt, drafter=drafter, capture=wish)))
            assert engine.load.cached_tokens == 0
    assert num_cached > 2 * (len(start) - 6)
    for one, other, fresh in zip(first, again, alone, strict=True):
        assert one.output_ids == other.output_ids == fresh.output_ids
        for found in (one, other):
            assert found.hidden is not None
            assert fresh.hidden is not None
            assert found.hidden.first_position == fresh.hidden.first_position
            torch.testing.assert_close(found.hidden.aux, fresh.hidden.aux, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("between", [None, 1], ids=["none", "other weights"])
async def test_a_new_draft_does_not_take_over_what_another_network_read(
    engine: TorchEngine, drafts: list[DraftOnDisk], between: int | None
) -> None:
    await engine.swap(drafts[0])
    first = await run(engine, request(PROMPT, drafter=Drafter.EAGLE3, lookahead=4))
    await engine.swap(None if between is None else drafts[between])
    await engine.swap(drafts[0])
    before = engine.load.cached_tokens
    again = await run(engine, request(PROMPT, drafter=Drafter.EAGLE3, lookahead=4))
    assert engine.load.cached_tokens == before
    assert again.output_ids == first.output_ids
    assert any(step.draft_ids for step in again.steps)
    await run(engine, request(PROMPT, drafter=Drafter.EAGLE3, lookahead=4))
    assert engine.load.cached_tokens > before, "its own rows are shared"


async def test_a_new_draft_takes_over_nothing_from_a_request_that_the_old_one_began(
    target: Path, engine: TorchEngine, drafts: list[DraftOnDisk]
) -> None:
    """It drafts for it over the old one's rows; a fresh request gets the drafts that it would get from a new engine."""
    wanted = {"drafter": Drafter.EAGLE3, "lookahead": 4}
    async with open_engine(target) as another:
        await another.swap(drafts[1])
        fresh = await run(another, request(PROMPT, **wanted))
    await engine.swap(drafts[0])
    old = engine.generate(request(PROMPT, max_tokens=140, **wanted))
    await anext(old)
    await anext(old)
    await engine.swap(drafts[1])
    for _ in range(2):
        found = await run(engine, request(PROMPT, **wanted))
        for step, expected in zip(found.steps, fresh.steps, strict=True):
            assert step.draft_log_probs == pytest.approx(expected.draft_log_probs, abs=1e-4)
        async for _ in old:
            pass
