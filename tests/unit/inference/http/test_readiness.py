import asyncio

import pytest

from updraft_chassis.errors import Unavailable
from updraft_inference.http.readiness import Gate, Phase


async def test_nobody_comes_in_before_it_opens() -> None:
    gate: Gate[str] = Gate(max_inside=2)

    assert gate.phase is Phase.STARTING
    with pytest.raises(Unavailable, match="starting"), gate.admitted():
        pass


async def test_who_is_inside_may_finish_while_nobody_else_comes_in() -> None:
    gate: Gate[str] = Gate(max_inside=2)
    gate.open("backend")

    with gate.admitted() as backend:
        gate.drain()
        assert backend == "backend"
        assert gate.phase is Phase.DRAINING
        with pytest.raises(Unavailable, match="shutting down"), gate.admitted():
            pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await gate.empty()
    await gate.empty()
    assert gate.num_inside == 0
