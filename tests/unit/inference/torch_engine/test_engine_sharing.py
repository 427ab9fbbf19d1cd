"""What requests share: rows of a prefix, slots that are all taken, and a batch in which everything happens at once."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import every_second_token, make_draft, make_tiny_target, save_draft
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.wait import until

from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import (
    CaptureParams,
    DraftCheckpoint,
    Drafter,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

GREEDY = SamplingParams(temperature=0)
PROMPT = tuple(range(40, 97))
_ids = count()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(make_tiny_target(tmp_path_factory.mktemp("models") / "target", seed=3))


@pytest.fixture(scope="module")
def drafts(target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[DraftCheckpoint]:
    """They have no token in common."""
    folders = tmp_path_factory.mktemp("drafts")
    return [
        DraftCheckpoint(
            version=n,
            folder=folders / str(n),
            tensors_digest=save_draft(make_draft(target, seed=n, token_ids=every_second_token(n)), folders / str(n)),
        )
        for n in (1, 2)
    ]


@pytest.fixture
async def engine(target: Path) -> AsyncIterator[TorchEngine]:
    async with open_engine(target) as opened:
        yield opened


def open_engine(target: Path, *, slots: int = 3, max_context: int = 200, num_remembered: int = 0) -> TorchEngine:
    limits = Limits(num_slots=slots, max_context=max_context, max_lookahead=7, num_remembered=num_remembered)
    return TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.float32))


def request(prompt: tuple[int, ...], **kwargs: object) -> GenerationRequest:
    defaults: dict[str, object] = {"max_tokens": 40, "sampling": GREEDY, "ignore_eos": True}
    return GenerationRequest(request_id=f"r{next(_ids)}", prompt_ids=prompt, **{**defaults, **kwargs})  # type: ignore[arg-type]


async def run(engine: TorchEngine, wanted: GenerationRequest) -> FinishedRequest:
    (finished,) = [delta.finished async for delta in engine.generate(wanted) if delta.finished]
    return finished


@pytest.mark.parametrize("drafter", [Drafter.NONE, Drafter.HYBRID])
async def test_prompts_that_begin_alike_are_read_once_and_answered_alike(
    target: Path, drafts: list[DraftCheckpoint], drafter: Drafter
) -> None:
    start = tuple(range(60, 120))
    prompts = [(*start, *end) for end in ((5, 6), (5, 7, 8), (), (9,))]
    capture = CaptureParams(payload=True, prompt_rows=4)

    async def answers(engine: TorchEngine, *, together: bool) -> list[FinishedRequest]:
        wanted = [request(prompt, drafter=drafter, capture=capture) for prompt in prompts]
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
            alone.append(await run(engine, request(prompt, drafter=drafter, capture=capture)))
            assert engine.load.cached_tokens == 0
    assert num_cached > 2 * (len(start) - 6)
    for one, other, fresh in zip(first, again, alone, strict=True):
        assert one.output_ids == other.output_ids == fresh.output_ids
        for finished in (one, other):
            assert finished.hidden is not None
            assert fresh.hidden is not None
            assert finished.hidden.first_position == fresh.hidden.first_position
            torch.testing.assert_close(finished.hidden.aux, fresh.hidden.aux, rtol=1e-4, atol=1e-4)


async def test_a_request_that_ends_at_once_leaves_its_prompt_to_those_that_draft_too(
    engine: TorchEngine, drafts: list[DraftCheckpoint]
) -> None:
    """It ends before it ever drafted, so its draft had read nothing yet."""
    await engine.swap(drafts[0])
    first = await run(engine, request(PROMPT, drafter=Drafter.HYBRID, max_tokens=1))
    await run(engine, request((*PROMPT, *first.output_ids, 5, 6), drafter=Drafter.HYBRID, max_tokens=1))
    assert engine.load.cached_tokens >= len(PROMPT) - 1


async def test_conversations_that_take_turns_find_what_each_has_left(engine: TorchEngine) -> None:
    """As many as there are slots; each goes on where it was, though others came between."""
    texts = [tuple(range(first, first + 60)) for first in (10, 110, 210)]
    for round_ in range(4):
        for i, text in enumerate(texts):
            before = engine.load.cached_tokens
            finished = await run(engine, request((*text, 5), max_tokens=3))
            num_cached = engine.load.cached_tokens - before
            assert finished.num_cached == num_cached
            assert num_cached == (0 if round_ == 0 else len(text)), f"turn {round_} of conversation {i}"
            texts[i] = (*text, 5, *finished.output_ids[:-1])


async def test_a_client_finds_nothing_that_another_one_has_left(engine: TorchEngine) -> None:
    await run(engine, request(PROMPT, client="a"))
    await run(engine, request(PROMPT, client="b"))
    assert engine.load.cached_tokens == 0
    await run(engine, request(PROMPT, client="a"))
    assert engine.load.cached_tokens == len(PROMPT) - 1


async def test_an_answer_is_looked_up_in_the_next_one_to_the_same_client_and_changes_nothing_of_it(
    target: Path,
) -> None:
    async with open_engine(target, num_remembered=1024) as engine:
        plain = await run(engine, request(PROMPT))

        async def num_kept(client: str) -> int:
            finished = await run(engine, request(PROMPT, drafter=Drafter.NGRAM, lookahead=7, client=client))
            assert finished.output_ids == plain.output_ids
            return sum(step.accepted for step in finished.steps)

        own = await num_kept("a")
        assert await num_kept("b") == own
        assert await num_kept("a") > own
        assert len(plain.output_ids) - await num_kept("a") <= 7  # eight tokens a step


@pytest.mark.parametrize("between", [None, 1], ids=["none", "other weights"])
async def test_a_new_draft_does_not_take_over_what_another_network_read(
    engine: TorchEngine, drafts: list[DraftCheckpoint], between: int | None
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
    target: Path, engine: TorchEngine, drafts: list[DraftCheckpoint]
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
        finished = await run(engine, request(PROMPT, **wanted))
        for step, expected in zip(finished.steps, fresh.steps, strict=True):
            assert step.draft_log_probs == pytest.approx(expected.draft_log_probs, abs=1e-4)
        async for _ in old:
            pass


async def test_requests_beyond_the_memory_wait_for_it_and_none_fails(
    target: Path, drafts: list[DraftCheckpoint]
) -> None:
    """Several times what the slots hold; those that hold them first leave half-way."""
    wanted = [request(tuple(range(3 + n, 103 + n)), max_tokens=60) for n in range(10)]
    async with open_engine(target, max_context=1000) as engine:
        await engine.swap(drafts[0])
        leaving = [engine.generate(request(PROMPT, max_tokens=900, drafter=Drafter.NONE)) for _ in range(3)]
        for stream in leaving:
            await anext(stream)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(run(engine, one)) for one in wanted]
            await until(lambda: engine.load.queued == len(wanted))
            assert engine.load.running == 3
            for stream in leaving:
                await stream.aclose()
        load = engine.load
    ended = [task.result() for task in running]
    assert [(one.reason, len(one.output_ids)) for one in ended] == [(FinishReason.LENGTH, 60)] * len(wanted)
    assert (load.running, load.queued, load.used_tokens) == (0, 0, 0)
    async with open_engine(target, slots=1) as plain:
        for one in ended[::3]:
            again = request(one.request.prompt_ids, max_tokens=60, drafter=Drafter.NONE)
            assert (await run(plain, again)).output_ids == one.output_ids


def test_slots_that_memory_cannot_hold_are_refused_before_anything_is_served(target: Path) -> None:
    with pytest.raises(InvalidInput, match=r"100000000 slots of 208 positions need \d+\.\d GiB .* fewer slots"):
        open_engine(target, slots=10**8)


SCHEMA = json.dumps({"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 2, "maxItems": 6})
START = tuple(range(10, 310))


def mixture(sampling: SamplingParams) -> list[GenerationRequest]:
    """Long prompts that begin alike, short ones; schemas and penalties; every drafter, lookahead, and capture or not.

    The engine chooses the lookahead of one hybrid request, and drafts nothing for it where a busy machine makes that slow.
    """
    capture = CaptureParams(payload=True, prompt_rows=4, counterfactual_rows=2)
    penalised = replace(sampling, frequency_penalty=0.4)
    schema: dict[str, object] = {"json_schema": SCHEMA, "ignore_eos": False}
    return [
        request((*START, 5, 6), sampling=sampling, drafter=Drafter.EAGLE3, lookahead=7, capture=capture),
        request((*START, 9), sampling=sampling, drafter=Drafter.EAGLE3, lookahead=2, **schema),
        request((*START[:290], 7), sampling=sampling, drafter=Drafter.HYBRID, lookahead=3, capture=capture, **schema),
        request((7,) * 40, sampling=sampling, drafter=Drafter.NGRAM, lookahead=5),
        request((7,) * 40, sampling=penalised, drafter=Drafter.HYBRID),
        request((91, 44, 91, 44), sampling=sampling, drafter=Drafter.NGRAM, lookahead=4, **schema),
        request(START, sampling=penalised, drafter=Drafter.NONE),
        request(tuple(range(300, 320)), sampling=sampling, drafter=Drafter.EAGLE3, lookahead=1),
    ]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=5)], ids=["greedy", "seeded"])
async def test_output_is_that_of_plain_decoding_with_everything_at_once(
    target: Path, drafts: list[DraftCheckpoint], sampling: SamplingParams
) -> None:
    """A shared prefix, prompts in chunks beside streams, grammars, penalties, capture, unequal lengths, requests that wait,
    and swaps. Plain is one request after another in an engine with one slot, no draft, and nothing in its memory."""
    plain = []
    for one in mixture(sampling):
        async with open_engine(target, slots=1, max_context=400) as engine:
            plain.append((await run(engine, replace(one, drafter=Drafter.NONE, lookahead=None))).output_ids)
            assert engine.load.cached_tokens == 0
    async with open_engine(target, slots=5, max_context=400) as engine:
        await engine.swap(drafts[0])
        for later in (drafts[0], drafts[1]):
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(run(engine, one)) for one in mixture(sampling)]
                await engine.swap(later)
            ended = [task.result() for task in running]
            assert [one.output_ids for one in ended] == plain
        assert engine.load.cached_tokens > 2 * len(START)
    steps = [step for one in ended for step in one.steps]
    assert {step.drafter for step in steps if step.draft_ids} == {Drafter.EAGLE3, Drafter.HYBRID, Drafter.NGRAM}
    assert max(step.batch_size for step in steps) == 5
    assert len({len(step.draft_ids) for step in steps if step.batch_size == 5}) > 3
