import asyncio

import pytest

from updraft_chassis.errors import Unavailable
from updraft_inference.http.readiness import Readiness, ServingPhase


async def test_nobody_comes_in_before_it_opens() -> None:
    readiness: Readiness[str] = Readiness(max_inside=2)

    assert readiness.phase is ServingPhase.STARTING
    with pytest.raises(Unavailable, match="starting"), readiness.admitted():
        pass


async def test_who_is_inside_may_finish_while_nobody_else_comes_in() -> None:
    readiness: Readiness[str] = Readiness(max_inside=2)
    readiness.open("backend")

    with readiness.admitted() as backend:
        readiness.drain()
        assert backend == "backend"
        assert readiness.phase is ServingPhase.DRAINING
        with pytest.raises(Unavailable, match="shutting down"), readiness.admitted():
            pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await readiness.empty()
    await readiness.empty()
    assert readiness.num_inside == 0
