"""The speedup is measured on live traffic, and speculation is turned off where it is slower."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_tap.drafting.speedup import (
    BLOCK,
    FIRST_BLOCK,
    FIRST_SLICE,
    LOADS,
    MIN_BLOCKS,
    SLICE,
    SpeedupMeter,
)

PLAIN_S = 0.03


def run(
    meter: SpeedupMeter,
    steps: int,
    gain: float | Callable[[int], float],
    *,
    batch: int = 1,
    neighbour: Callable[[int], float] = lambda _: 1.0,
    rng: random.Random | None = None,
) -> list[bool]:
    """Steps whose drafts decode `gain` times as fast as none, beside a neighbour that slows all by a factor."""
    rng = rng or random.Random(0)
    allowed = []
    for n in range(steps):
        allows = meter.allows_drafts(batch)
        allowed.append(allows)
        tokens = batch * (rng.choice((1, 2, 3)) if allows else 1)
        worth = (gain(n) if callable(gain) else gain) if allows else 1.0
        seconds = PLAIN_S * (2.0 if allows else 1.0) / worth  # two tokens a step on average
        meter.observe(batch, tokens, seconds * neighbour(n) * rng.uniform(0.9, 1.1), is_drafted=allows)
    return allowed


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.5])
def test_the_speedup_is_what_speculation_is_worth(gain: float) -> None:
    meter = SpeedupMeter(random.Random(1))
    run(meter, 60 * BLOCK, gain)
    speedup = meter.speedups[1]
    assert speedup.ratio == pytest.approx(gain, rel=0.05)
    assert speedup.low <= speedup.ratio <= speedup.high
    assert meter.speedups[0] == speedup


def test_a_neighbour_that_comes_and_goes_changes_the_speed_and_not_the_speedup() -> None:
    meter = SpeedupMeter(random.Random(1))
    run(meter, 60 * BLOCK, 1.4, neighbour=lambda n: 3.0 if n // 1500 % 2 else 1.0)
    assert meter.speedups[1].ratio == pytest.approx(1.4, rel=0.1)


def test_where_speculation_pays_few_steps_go_without() -> None:
    allowed = run(SpeedupMeter(random.Random(1)), 40 * BLOCK, 1.4)
    assert allowed[20 * BLOCK :].count(False) / (20 * BLOCK) == pytest.approx(SLICE / BLOCK, rel=0.1)


def test_a_new_draft_that_pays_gives_up_few_steps_until_its_worth_is_known() -> None:
    meter = SpeedupMeter(random.Random(1))
    first = run(meter, MIN_BLOCKS * FIRST_BLOCK, 1.4)
    assert first.count(False) == MIN_BLOCKS * FIRST_SLICE <= len(first) / 8
    assert meter.speedups[1].low > 1.0


def mean_speed(gain: float, *, steps: int, swap_after: int, servers: int = 20) -> float:
    """Speed over that without drafts, as in ADR 0096: 1 to 4 tokens a step with drafts, and times that vary by 15 %."""
    numbers, weights = (1, 2, 3, 4), (0.55, 0.26, 0.12, 0.07)
    mean = sum(number * weight for number, weight in zip(numbers, weights, strict=True))
    total, taken = 0, 0.0
    for seed in range(servers):
        rng, meter = random.Random(seed), SpeedupMeter(random.Random(seed + 1_000_000))
        for step in range(steps):
            if step % swap_after == 0:
                meter.serve(1 + step)
            allows = meter.allows_drafts(1)
            tokens = rng.choices(numbers, weights)[0] if allows else 1
            seconds = PLAIN_S * (mean / gain if allows else 1.0) * max(0.2, rng.gauss(1, 0.15))
            meter.observe(1, tokens, seconds, is_drafted=allows)
            total, taken = total + tokens, taken + seconds
    return total / taken * PLAIN_S


@pytest.mark.parametrize(
    ("gain", "steps", "swap_after", "at_least"), [(1.3, 200, 200, 1.24), (0.8, 200, 200, 0.80), (0.8, 3000, 300, 0.83)]
)
def test_little_is_lost_to_the_measurement_of_a_new_draft(
    gain: float, steps: int, swap_after: int, at_least: float
) -> None:
    assert mean_speed(gain, steps=steps, swap_after=swap_after) > at_least


def test_where_speculation_is_slower_it_is_tried_now_and_then_until_it_pays() -> None:
    meter = SpeedupMeter(random.Random(1))
    allowed = run(meter, 40 * BLOCK, lambda n: 0.8 if n < 20 * BLOCK else 1.5)
    assert allowed[5 * BLOCK : 20 * BLOCK].count(True) < 0.1 * 15 * BLOCK
    assert allowed[35 * BLOCK :].count(True) > 0.9 * 5 * BLOCK


def test_each_load_is_measured_by_itself() -> None:
    meter = SpeedupMeter(random.Random(1))
    for _ in range(30):
        run(meter, BLOCK, 1.5, batch=1)
        run(meter, BLOCK, 0.7, batch=9)
    assert meter.speedups[1].low > 1.2
    assert meter.speedups[8].high < 1.0
    assert run(meter, BLOCK, 1.5, batch=1).count(True) > BLOCK / 2
    assert run(meter, BLOCK, 0.7, batch=9).count(True) < BLOCK / 2


def test_steps_whose_requests_all_failed_are_not_counted() -> None:
    meter, failing = SpeedupMeter(random.Random(1)), SpeedupMeter(random.Random(1))
    for _ in range(10 * BLOCK):
        assert not failing.observe(1, 0, 0.01, is_drafted=True)
    assert run(meter, 10 * BLOCK, 1.5) == run(failing, 10 * BLOCK, 1.5)
    assert failing.speedups == meter.speedups


def test_nothing_is_said_of_a_draft_before_enough_blocks_or_after_a_swap() -> None:
    meter = SpeedupMeter(random.Random(1))
    run(meter, 8 * (MIN_BLOCKS - 1), 1.5)
    assert not meter.speedups
    run(meter, 10 * BLOCK, 1.5)
    assert meter.speedups
    known = meter.speedups
    meter.serve(2)
    assert not meter.speedups
    meter.serve(0)
    assert meter.speedups == known, "a switchback comes back to it"


@pytest.mark.parametrize(("gain", "is_used"), [(0.8, False), (1.5, True)])
def test_a_draft_that_begins_off_is_used_once_slices_show_that_it_pays(gain: float, is_used: bool) -> None:  # noqa: FBT001
    meter = SpeedupMeter(random.Random(1))
    meter.serve(1, is_on=False)
    first = run(meter, MIN_BLOCKS * FIRST_BLOCK, gain)
    later = run(meter, 20 * BLOCK, gain)
    assert first.count(True) == MIN_BLOCKS * SLICE
    assert (later.count(True) > 0.8 * len(later)) is is_used


@pytest.mark.parametrize(("is_on", "gain"), [(True, 0.7), (False, 1.5)])
def test_the_speedup_stays_known_while_a_turn_is_measured(gain: float, *, is_on: bool) -> None:
    meter = SpeedupMeter(random.Random(1))
    meter.serve(1, is_on=is_on)
    run(meter, MIN_BLOCKS * FIRST_BLOCK, gain)
    for _ in range(MIN_BLOCKS):
        assert meter.speedups[1].ratio == pytest.approx(gain, rel=0.2)
        assert meter.speedups[0] == meter.speedups[1]
        run(meter, FIRST_BLOCK, gain)


def test_a_draft_may_begin_at_each_load_as_the_one_before() -> None:
    meter = SpeedupMeter(random.Random(1))
    for _ in range(30):
        run(meter, BLOCK, 1.5, batch=1)
        run(meter, BLOCK, 0.7, batch=9)
    meter.serve(2, is_on=None)
    assert run(meter, FIRST_BLOCK, 1.5, batch=1).count(True) == FIRST_BLOCK - FIRST_SLICE
    assert run(meter, FIRST_BLOCK, 0.7, batch=9).count(True) == SLICE


def test_a_slice_ends_even_if_none_of_its_steps_says_anything() -> None:
    meter = SpeedupMeter(random.Random(1))
    allowed = [(meter.allows_drafts(1), meter.skip(1))[0] for _ in range(10 * FIRST_BLOCK)]
    assert allowed.count(False) == 10 * FIRST_SLICE
    assert not meter.speedups


def test_a_draft_that_begins_off_is_used_where_no_block_can_be_measured() -> None:
    meter = SpeedupMeter(random.Random(1))
    meter.serve(1, is_on=False)
    num = MIN_BLOCKS * FIRST_BLOCK
    allowed = [(meter.allows_drafts(1), meter.skip(1))[0] for _ in range(2 * num)]
    assert allowed[:num].count(True) == MIN_BLOCKS * SLICE
    assert allowed[num:].count(False) == MIN_BLOCKS * FIRST_SLICE


@given(batches=st.lists(st.integers(0, 100), min_size=1, max_size=400), seed=st.integers(0, 9))
def test_any_order_of_loads_is_counted(batches: list[int], seed: int) -> None:
    meter = SpeedupMeter(random.Random(seed))
    for batch in batches:
        allows = meter.allows_drafts(batch)
        assert allows == meter.allows_drafts(batch)
        meter.observe(batch, max(1, batch), 0.01, is_drafted=allows)
    assert set(meter.speedups) <= {0, *LOADS}
