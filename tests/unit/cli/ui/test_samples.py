"""Samples for the charts: bounded, and finest near the end."""

import math

from updraft_cli.ui.samples import Recent, Samples, Swaps


def test_samples_reach_back_to_the_start_however_many_there_are() -> None:
    samples = Samples(max_points=100)
    for second in range(10_000):
        samples.add(float(second), {"loss": float(second)})
    times, (values,) = samples.since(-math.inf, ["loss"])
    assert len(samples) <= 100
    assert times[0] == 0.0
    assert times[-40:] == [float(second) for second in range(9_960, 10_000)]
    assert values == times


def test_a_figure_that_was_absent_is_none_and_only_newer_points_are_returned() -> None:
    samples = Samples()
    samples.add(1.0, {"stable": 2.0})
    samples.add(2.0, {"stable": 2.1, "candidate": 2.5})
    samples.add(2.0, {"stable": 9.9})
    assert samples.since(0.0, ["stable", "candidate"]) == ([1.0, 2.0], [[2.0, 2.1], [None, 2.5]])
    assert samples.since(1.0, ["candidate"]) == ([2.0], [[2.5]])


def test_names_with_a_prefix_keep_the_order_of_their_first_appearance() -> None:
    samples = Samples()
    samples.add(1.0, {"domain b": 1.0, "stable": 1.0})
    samples.add(2.0, {"domain a": 1.0, "domain b": 1.0})
    assert samples.names("domain ") == ["domain b", "domain a"]


def test_the_acceptance_of_the_last_minute_follows_a_shift_that_the_mean_hides() -> None:
    recent = Recent(window_s=60.0)
    for second in range(0, 1000, 10):
        recent.add(float(second), {1: (30 * second, 10 * second)})
    tokens, steps = 30 * 990, 10 * 990
    for second in range(10, 80, 10):
        lengths = recent.add(990.0 + second, {1: (tokens + 10 * second, steps + 10 * second)})
    assert lengths == {1: 1.0}


def test_a_version_that_appears_counts_from_nothing() -> None:
    recent = Recent()
    assert recent.add(0.0, {1: (100, 50)}) == {}
    assert recent.add(10.0, {1: (100, 50), 2: (60, 20)}) == {2: 3.0}


def test_a_pod_that_leaves_or_restarts_begins_the_minute_again() -> None:
    recent = Recent()
    recent.add(0.0, {1: (3000, 1000)}, num_pods=2)
    assert recent.add(10.0, {1: (1530, 510)}, num_pods=1) == {}
    assert recent.add(20.0, {1: (1560, 520)}, num_pods=1) == {1: 3.0}
    assert recent.add(30.0, {1: (90, 30)}, num_pods=1) == {}  # as many pods, but one counts from nothing
    assert recent.add(40.0, {1: (120, 40)}, num_pods=1) == {1: 3.0}


def test_a_pod_that_comes_back_with_its_counts_is_no_traffic_of_this_minute() -> None:
    recent = Recent()
    recent.add(0.0, {1: (1500, 500)}, num_pods=1)
    assert recent.add(10.0, {1: (9000, 8500)}, num_pods=2) == {}


def test_less_than_one_token_per_step_is_no_acceptance_length() -> None:
    recent = Recent()
    recent.add(0.0, {1: (100, 50)})
    assert recent.add(10.0, {1: (110, 90)}) == {}


def test_a_few_steps_are_no_acceptance_length() -> None:
    recent = Recent()
    recent.add(0.0, {1: (100, 50)})
    assert recent.add(10.0, {1: (109, 53)}) == {}


def test_pods_that_swap_one_after_the_other_are_one_swap_and_new_pods_are_none() -> None:
    swaps = Swaps()
    swaps.add(0.0, {"a": 1, "b": 1})
    swaps.add(5.0, {"a": 2, "b": 1, "c": 2})
    swaps.add(9.0, {"a": 2, "b": 2, "c": 2})
    swaps.add(200.0, {"a": 1, "b": 2, "c": 2})
    assert [(swap.at_s, swap.version, swap.num_pods) for swap in swaps.seen] == [(5.0, 2, 2), (200.0, 1, 1)]
