import time

import pytest
from tests.support.clock import ManualClock

from updraft_chassis.clock import Clock, SystemClock


@pytest.mark.parametrize("clock", [SystemClock(), ManualClock()], ids=["system", "manual"])
def test_durations_are_never_negative(clock: Clock) -> None:
    first = clock.monotonic()
    assert clock.monotonic() >= first


def test_the_system_clock_tells_unix_time() -> None:
    assert abs(SystemClock().now() - time.time()) < 1.0


def test_a_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(unix_s=100.0)
    clock.advance(2.5)
    assert (clock.now(), clock.monotonic()) == (102.5, 2.5)
