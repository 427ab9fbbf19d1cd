import asyncio
from dataclasses import replace

import pytest
from tests.support.requests import ended

from updraft_inference.agent.completions import CompletionListeners
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.engine import FinishedRequest, FinishReason

PLAN = CapturePlan(trace_id=b"id", domain="law")
CANCELLED = replace(ended(num_output=2), reason=FinishReason.CANCELLED)


@pytest.fixture
def heard() -> list[tuple[FinishedRequest, CapturePlan]]:
    return []


@pytest.fixture
async def completions(heard: list[tuple[FinishedRequest, CapturePlan]]) -> CompletionListeners:
    completions = CompletionListeners(asyncio.get_running_loop())
    completions.subscribe(lambda finished, plan: heard.append((finished, plan)))
    return completions


async def test_an_end_from_another_thread_reaches_everyone_with_its_plan(
    completions: CompletionListeners, heard: list[tuple[FinishedRequest, CapturePlan]]
) -> None:
    completion = completions.expect("a", PLAN)

    await asyncio.to_thread(completions.sink, CANCELLED)

    assert await completion.finished() == CANCELLED
    assert heard == [(CANCELLED, PLAN)]
    assert not completions.expected


async def test_a_request_cut_at_a_stop_string_was_not_cancelled(
    completions: CompletionListeners, heard: list[tuple[FinishedRequest, CapturePlan]]
) -> None:
    completion = completions.expect("a", PLAN)
    completion.stop()

    completions.sink(CANCELLED)
    await completion.finished()

    assert heard[0][0].reason is FinishReason.STOP


async def test_a_request_that_the_engine_refused_is_expected_no_more(
    completions: CompletionListeners, heard: list[tuple[FinishedRequest, CapturePlan]]
) -> None:
    completions.expect("a", PLAN)
    completions.forget("a")

    completions.sink(CANCELLED)
    await asyncio.sleep(0)

    assert not heard
    assert not completions.expected


async def test_only_a_request_that_is_never_reported_fails(completions: CompletionListeners) -> None:
    started, failed = list[CapturePlan](), list[CapturePlan]()
    completions.subscribe_to_starts(started.append, failed.append)
    other = replace(PLAN, domain="sql")
    completions.expect("a", PLAN)
    completions.expect("b", other)

    completions.sink(replace(CANCELLED, request=replace(CANCELLED.request, request_id="a")))
    await asyncio.sleep(0)
    for request_id in ("a", "b", "b", "never"):
        completions.forget(request_id)

    assert (started, failed) == ([PLAN, other], [other])


def test_an_engine_that_outlives_the_loop_is_not_troubled() -> None:
    loop = asyncio.new_event_loop()
    completions = CompletionListeners(loop)
    loop.close()

    completions.sink(CANCELLED)
