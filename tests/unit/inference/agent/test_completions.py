import asyncio
from dataclasses import replace

import pytest
from tests.support.requests import ended

from updraft_inference.agent.completions import Endings
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.engine import Finished, FinishReason

PLAN = CapturePlan(trace_id=b"id", domain="law")
CANCELLED = replace(ended(num_output=2), reason=FinishReason.CANCELLED)


@pytest.fixture
def heard() -> list[tuple[Finished, CapturePlan]]:
    return []


@pytest.fixture
async def endings(heard: list[tuple[Finished, CapturePlan]]) -> Endings:
    endings = Endings(asyncio.get_running_loop())
    endings.subscribe(lambda finished, plan: heard.append((finished, plan)))
    return endings


async def test_an_end_from_another_thread_reaches_everyone_with_its_plan(
    endings: Endings, heard: list[tuple[Finished, CapturePlan]]
) -> None:
    ending = endings.expect("a", PLAN)

    await asyncio.to_thread(endings.sink, CANCELLED)

    assert await ending.finished() == CANCELLED
    assert heard == [(CANCELLED, PLAN)]
    assert not endings.expected


async def test_a_request_cut_at_a_stop_string_was_not_cancelled(
    endings: Endings, heard: list[tuple[Finished, CapturePlan]]
) -> None:
    ending = endings.expect("a", PLAN)
    ending.stop()

    endings.sink(CANCELLED)
    await ending.finished()

    assert heard[0][0].reason is FinishReason.STOP


async def test_a_request_that_the_engine_refused_is_expected_no_more(
    endings: Endings, heard: list[tuple[Finished, CapturePlan]]
) -> None:
    endings.expect("a", PLAN)
    endings.forget("a")

    endings.sink(CANCELLED)
    await asyncio.sleep(0)

    assert not heard
    assert not endings.expected


def test_an_engine_that_outlives_the_loop_is_not_troubled() -> None:
    loop = asyncio.new_event_loop()
    endings = Endings(loop)
    loop.close()

    endings.sink(CANCELLED)
