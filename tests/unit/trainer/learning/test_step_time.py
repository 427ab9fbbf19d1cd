"""The time of a step is split by phase, and a GPU is never waited for."""

import pytest
import torch
from tests.support.clock import ManualClock

from updraft_trainer.learning.step_time import StepTimes


class Device:
    """A stream that passes what it was given only when it is told to, at 3 ms a marker."""

    def __init__(self) -> None:
        self.num_passed = 0
        self.events: list[Marker] = []

    def new_event(self) -> "Marker":
        return Marker(self)


class Marker:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.place = -1

    def record(self) -> None:
        self.place = len(self.device.events)
        self.device.events.append(self)

    def query(self) -> bool:
        return self.place < self.device.num_passed

    def elapsed_time(self, end_event: object) -> float:
        assert isinstance(end_event, Marker)
        assert end_event.query(), "reading an event that was not passed would wait"
        return 3.0 * (end_event.place - self.place)


def test_the_seconds_of_a_phase_add_up_until_they_are_taken() -> None:
    clock = ManualClock()
    times = StepTimes(clock=clock.monotonic)
    for phase, seconds in (("data", 2.0), ("forward", 3.0), ("data", 0.5)):
        with times.phase(phase):  # type: ignore[arg-type]  # the names are phases
            clock.advance(seconds)
    clock.advance(100.0)
    times.flops += 7.0
    assert times.take() == ({"data": 2.5, "forward": 3.0}, 7.0)
    assert times.take() == ({}, 0.0)


def test_a_phase_that_fails_is_counted() -> None:
    clock = ManualClock()
    times = StepTimes(clock=clock.monotonic)

    def fail() -> None:
        with times.phase("forward"):
            clock.advance(4.0)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert times.take().seconds == {"forward": 4.0}


def test_a_whole_counts_nothing_of_what_is_within_and_keeps_what_was_before() -> None:
    clock, device = ManualClock(), Device()
    times = StepTimes(clock=clock.monotonic, new_event=device.new_event)
    with times.phase("data"):
        clock.advance(1.0)
    with times.phase("forward"):
        pass
    with times.whole("compile"):
        clock.advance(5.0)
        with times.phase("data"):
            clock.advance(2.0)
        with times.phase("forward"):
            pass
        times.flops += 9.0
    device.num_passed = 4
    assert times.take() == ({"data": 1.0, "compile": 7.0, "forward": 0.003}, 0.0)


def test_phases_of_a_gpu_are_counted_once_it_has_passed_them_and_nothing_waits_for_it() -> None:
    clock, device = ManualClock(), Device()
    times = StepTimes(clock=clock.monotonic, new_event=device.new_event)
    with times.phase("data"):
        clock.advance(1.0)
    with times.phase("forward"):
        clock.advance(9.0)  # the host's time says nothing about kernels
    with times.phase("backward"):
        pass
    device.num_passed = 3  # backward has begun
    assert times.take().seconds == {"data": 1.0, "forward": 0.003}
    assert times.take().seconds == {}
    device.num_passed = 4
    assert times.take().seconds == {"backward": 0.003}


def test_a_cpu_has_no_events() -> None:
    times = StepTimes(torch.device("cpu"))
    with times.phase("forward"):
        pass
    assert set(times.take().seconds) == {"forward"}
