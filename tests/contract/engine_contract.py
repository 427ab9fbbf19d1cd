"""What every engine promises the edges. Subclass `EngineContract` as `TestX` and give it the fixtures `engine` (open, two
slots, two in the queue, 128 tokens of context), `heard` (what its sink got), `drafts` (two good ones that it can exchange) and
`corrupt` (one whose weights are not what its digest says).
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

import pytest
import torch
from tests.support.wait import until

from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput
from updraft_inference.engine import (
    CaptureParams,
    Delta,
    DraftCheckpoint,
    Drafter,
    Engine,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)

GREEDY = SamplingParams(temperature=0.0)
NUM_SLOTS = MAX_QUEUED = 2


def asking(name: str, *, max_tokens: int = 12, num_prompt: int = 9, **more: object) -> GenerationRequest:
    """A greedy request that only its limit ends."""
    request = GenerationRequest(
        request_id=name,
        prompt_ids=tuple(range(3, 3 + num_prompt)),
        max_tokens=max_tokens,
        sampling=GREEDY,
        ignore_eos=True,
    )
    return replace(request, **more)  # type: ignore[arg-type]  # the names are the request's own


def lasting(engine: Engine, name: str) -> GenerationRequest:
    """One that fills the context: it still runs when a slow reader has read its first token."""
    return asking(name, max_tokens=engine.info.max_context - len(asking(name).prompt_ids))


async def whole(engine: Engine, request: GenerationRequest) -> tuple[list[int], FinishedRequest]:
    """All tokens, and the end."""
    tokens: list[int] = []
    finished = None
    async for delta in engine.generate(request):
        tokens += delta.token_ids
        assert finished is None, "a delta came after the last"
        finished = delta.finished
    assert finished is not None
    return tokens, finished


class EngineContract:
    """Each test is a promise."""

    async def test_what_it_streams_is_what_it_reports_once(self, engine: Engine, heard: list[FinishedRequest]) -> None:
        tokens, finished = await whole(engine, asking("a"))

        assert tuple(tokens) == finished.output_ids
        assert len(tokens) == 12
        assert finished.reason is FinishReason.LENGTH
        assert [end.request.request_id for end in heard] == ["a"]
        assert finished.hidden is None
        assert 0 <= finished.time_to_first_token_s <= finished.duration_s

    async def test_greedy_output_is_the_same_with_any_drafter_and_lookahead(
        self, engine: Engine, drafts: list[DraftCheckpoint]
    ) -> None:
        plain, _ = await whole(engine, asking("plain", drafter=Drafter.NONE))
        await engine.swap(drafts[0])

        for drafter in Drafter:
            for lookahead in (0, 1, 3):
                request = asking(f"{drafter}-{lookahead}", drafter=drafter, lookahead=lookahead)
                tokens, finished = await whole(engine, request)
                assert tokens == plain
                assert all(len(step.draft_ids) <= lookahead for step in finished.steps)

    async def test_steps_cover_the_output_without_gaps(self, engine: Engine, drafts: list[DraftCheckpoint]) -> None:
        await engine.swap(drafts[0])

        _, finished = await whole(engine, asking("a", max_tokens=30, drafter=Drafter.EAGLE3))

        position = finished.steps[0].start
        assert position in {0, 1}
        for step in finished.steps:
            assert step.start == position
            assert 0 <= step.accepted <= len(step.draft_ids)
            assert len(step.draft_log_probs) == len(step.target_log_probs) == len(step.draft_ids)
            assert step.draft_ids[: step.accepted] == finished.output_ids[position:][: step.accepted]
            position += step.emitted
        assert position >= len(finished.output_ids)

    async def test_steps_name_the_version_that_drafted(self, engine: Engine, drafts: list[DraftCheckpoint]) -> None:
        await engine.swap(drafts[1])

        _, finished = await whole(engine, asking("a", drafter=Drafter.EAGLE3, lookahead=2))

        drafted = [step for step in finished.steps if step.draft_ids]
        assert drafted
        assert all((step.draft_version, step.drafter) == (2, Drafter.EAGLE3) for step in drafted)

    async def test_closing_early_cancels_and_frees_the_slot(self, engine: Engine, heard: list[FinishedRequest]) -> None:
        for name in map(str, range(2 * NUM_SLOTS)):
            async with aclosing(engine.generate(lasting(engine, name))) as deltas:
                await anext(deltas)

        await until(lambda: len(heard) == 2 * NUM_SLOTS, what="the cancelled requests' ends")
        assert all(end.reason is FinishReason.CANCELLED for end in heard)
        await whole(engine, asking("after"))

    async def test_what_nobody_reads_yet_holds_up_nobody_and_is_bounded_by_the_limit(self, engine: Engine) -> None:
        async with aclosing(engine.generate(asking("slow", max_tokens=60))) as deltas:
            unread = [await anext(deltas)]
            await whole(engine, asking("other"))
            unread += [delta async for delta in deltas]

        assert sum(len(delta.token_ids) for delta in unread) == 60

    async def test_a_full_queue_refuses(self, engine: Engine) -> None:
        async with AsyncExitStack() as stack:
            for name in map(str, range(NUM_SLOTS)):
                running = await stack.enter_async_context(aclosing(engine.generate(lasting(engine, name))))
                await anext(running)
            waiting = [engine.generate(asking(f"waits-{i}")) for i in range(MAX_QUEUED)]
            await _crowded(stack, waiting)

            with pytest.raises(Exhausted):
                await anext(engine.generate(asking("too many")))

    @pytest.mark.parametrize(
        "request_",
        [
            pytest.param(asking("a", num_prompt=0), id="empty prompt"),
            pytest.param(asking("a", max_tokens=0), id="nothing to generate"),
            pytest.param(asking("a", prompt_ids=(10**6,)), id="unknown token"),
            pytest.param(asking("a", prompt_ids=(-1,)), id="negative token"),
        ],
    )
    async def test_what_it_cannot_serve_it_refuses(
        self, engine: Engine, heard: list[FinishedRequest], request_: GenerationRequest
    ) -> None:
        with pytest.raises(InvalidInput):
            await anext(engine.generate(request_))
        assert not heard

    async def test_a_request_longer_than_the_context_is_refused(
        self, engine: Engine, heard: list[FinishedRequest]
    ) -> None:
        with pytest.raises(InvalidInput):
            await anext(engine.generate(_with_prompt(engine.info.max_context - 28, max_tokens=29)))
        assert not heard

    async def test_a_request_may_fill_the_context(self, engine: Engine) -> None:
        tokens, _ = await whole(engine, _with_prompt(engine.info.max_context - 28, max_tokens=28))

        assert len(tokens) == 28

    @pytest.mark.parametrize("prompt_rows", [0, 4, 64])
    async def test_a_payload_has_a_row_for_each_position_that_predicted(self, engine: Engine, prompt_rows: int) -> None:
        wish = CaptureParams(payload=True, prompt_rows=prompt_rows)

        tokens, finished = await whole(engine, asking("a", capture=wish))

        hidden = finished.hidden
        assert hidden is not None
        assert hidden.first_position == max(0, 9 - prompt_rows)
        end = hidden.first_position + len(hidden.aux)
        assert 9 + len(tokens) - 1 <= end <= 9 + len(tokens)
        assert not hidden.missing_rows
        assert len(hidden.teacher) == len(hidden.aux) - hidden.first_teacher_row
        assert hidden.first_teacher_row <= max(0, 9 - 1 - hidden.first_position), "every output token has a teacher"
        if isinstance(hidden.teacher, torch.Tensor):
            assert hidden.aux[:].shape[1] % hidden.teacher.shape[1] == 0

    @pytest.mark.parametrize("wanted", [0, 1, 9])
    async def test_rows_after_a_rejection_come_as_many_as_were_asked_for_and_are_there(
        self, engine: Engine, drafts: list[DraftCheckpoint], wanted: int
    ) -> None:
        await engine.swap(drafts[0])
        wish = CaptureParams(payload=True, counterfactual_rows=wanted)

        tokens, finished = await whole(engine, asking("a", drafter=Drafter.EAGLE3, lookahead=2, capture=wish))

        hidden = finished.hidden
        assert hidden is not None
        for one in hidden.counterfactuals:
            assert one.aux.shape[1:] == hidden.aux[:].shape[1:]
            assert len(one.teacher) == len(one.aux)
            if isinstance(one.teacher, torch.Tensor):
                assert isinstance(hidden.teacher, torch.Tensor)
                assert one.teacher.shape[1] == hidden.teacher.shape[1]
        assert {one.step: len(one.aux) for one in hidden.counterfactuals} == {
            index: min(wanted, len(step.draft_ids) - step.accepted)
            for index, step in enumerate(finished.steps)
            if wanted and step.accepted < len(step.draft_ids) and step.start + step.accepted < len(tokens)
        }

    async def test_a_swap_is_what_the_engine_then_says_it_holds(
        self, engine: Engine, drafts: list[DraftCheckpoint]
    ) -> None:
        for draft in [*drafts, drafts[0]]:
            swapped = await engine.swap(draft)

            assert swapped.loaded == engine.loaded
            assert engine.loaded.version == draft.version
            assert engine.loaded.tensors_digest == draft.tensors_digest
            assert swapped.pause_s >= 0
        await engine.swap(None)
        assert (engine.loaded.version, engine.loaded.tensors_digest) == (0, "")

    async def test_what_it_holds_it_can_hash_again(self, engine: Engine, drafts: list[DraftCheckpoint]) -> None:
        assert (await engine.rehash()).version == 0
        for draft in drafts:
            held = (await engine.swap(draft)).loaded

            assert await engine.rehash() == engine.loaded == held
        assert not engine.faults

    async def test_a_corrupt_draft_is_refused_and_the_old_one_stays(
        self, engine: Engine, drafts: list[DraftCheckpoint], corrupt: DraftCheckpoint
    ) -> None:
        await engine.swap(drafts[0])
        before = engine.loaded

        with pytest.raises(Corrupt):
            await engine.swap(corrupt)

        assert engine.loaded == before
        await whole(engine, asking("a"))

    async def test_a_swap_in_mid_request_neither_ends_nor_changes_it(
        self, engine: Engine, drafts: list[DraftCheckpoint]
    ) -> None:
        plain, _ = await whole(engine, asking("plain", max_tokens=60, drafter=Drafter.NONE))
        await engine.swap(drafts[0])
        tokens: list[int] = []

        async for delta in engine.generate(asking("swapped", max_tokens=60, drafter=Drafter.EAGLE3)):
            if len(tokens) < 30 <= len(tokens) + len(delta.token_ids):
                await engine.swap(drafts[1])
            tokens += delta.token_ids

        assert tokens == plain


def _with_prompt(num_tokens: int, *, max_tokens: int) -> GenerationRequest:
    """The prompt repeats one token, so it may be longer than the vocabulary."""
    return asking("a", prompt_ids=(3,) * num_tokens, max_tokens=max_tokens)


async def _crowded(stack: AsyncExitStack, waiting: list[AsyncGenerator[Delta, None]]) -> None:
    """Start these generators in tasks that end with the stack: each waits for a slot."""
    tasks = await stack.enter_async_context(asyncio.TaskGroup())
    started = [tasks.create_task(_first(deltas)) for deltas in waiting]
    for task in started:
        stack.callback(task.cancel)
    await asyncio.sleep(0)


async def _first(deltas: AsyncGenerator[Delta, None]) -> None:
    async with aclosing(deltas):
        await anext(deltas)
