"""Tokens per second and shares of time are those of the last minute."""

import pytest

from updraft_trainer.publishing.throughput import Throughput, Work


def _step(end_s: float, duration_s: float = 1.0, tokens: int = 100) -> Work:
    seconds = {"data": 0.25 * duration_s, "forward": 0.75 * duration_s}
    return Work(
        start_s=end_s - duration_s,
        end_s=end_s,
        seconds=seconds,  # type: ignore[arg-type]  # the names are phases
        tokens=tokens,
        flops=4.0 * tokens,
        step_s=duration_s,
    )


def test_nothing_is_said_before_any_work() -> None:
    throughput = Throughput(peak_flops=1e3)
    assert (throughput.tokens_per_s, throughput.shares, throughput.flops_utilization) == (0.0, {}, None)


def test_tokens_per_second_are_those_of_the_last_minute() -> None:
    throughput = Throughput()
    for end_s in range(1, 601):
        throughput.add(_step(float(end_s), tokens=100 if end_s <= 500 else 300))
    assert throughput.tokens_per_s == pytest.approx(300.0)
    for end_s in range(601, 631):
        throughput.add(_step(float(end_s), tokens=100))
    assert throughput.tokens_per_s == pytest.approx(200.0, rel=0.1)


def test_a_step_that_takes_longer_than_a_minute_counts_as_a_whole() -> None:
    throughput = Throughput()
    for end_s in (400.0, 800.0):
        throughput.add(_step(end_s, duration_s=400.0, tokens=2000))
    assert throughput.tokens_per_s == pytest.approx(5.0)


def test_pauses_lower_tokens_per_second_but_not_the_utilization() -> None:
    throughput = Throughput(peak_flops=1000.0)
    for end_s in range(2, 62, 2):
        throughput.add(_step(end_s - 1.0))
        throughput.add(Work(start_s=end_s - 1.0, end_s=end_s, seconds={"waiting": 1.0}))
    assert throughput.tokens_per_s == pytest.approx(50.0)
    assert throughput.flops_utilization == pytest.approx(0.4)
    assert throughput.shares == {"waiting": pytest.approx(0.5), "forward": pytest.approx(0.375), "data": 0.125}


def test_the_largest_share_is_first_and_shares_are_at_most_one() -> None:
    throughput = Throughput()
    throughput.add(Work(start_s=5.0, end_s=5.0, seconds={"data": 1.0, "backward": 3.0}))
    assert list(throughput.shares.items()) == [("backward", 0.75), ("data", 0.25)]


def test_a_device_without_a_known_peak_has_no_utilization() -> None:
    throughput = Throughput()
    throughput.add(_step(1.0))
    assert throughput.flops_utilization is None
