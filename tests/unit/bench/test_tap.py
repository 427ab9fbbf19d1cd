"""From samples to the bars of `make bench-tap`, and the stand-in by which it measures the ends of wide requests."""

from pathlib import Path

import pytest
from bench.tap import arms, endings, swaps
from bench.tap.arms import Arm, Turn
from bench.tap.loop import Batch, Loop
from bench.tap.swaps import Swaps, Window

from updraft_cli import results


def turn(number: int, arm: Arm, tokens_per_s: float, cpu_ms: float = 10.0, *, pair: int = 0) -> Turn:
    return Turn(round=number, pair=pair, arm=arm, tokens_per_s=tokens_per_s, cpu_ms=cpu_ms)


TURNS = [
    *(turn(0, arm, rate, cpu) for arm, rate, cpu in zip(Arm, (100, 99, 98, 96), (10, 10, 10.1, 10.3), strict=True)),
    *(turn(1, arm, rate, cpu) for arm, rate, cpu in zip(Arm, (50, 50, 49.5, 48), (20, 20, 20.2, 20.8), strict=True)),
    *(turn(0, arm, rate, pair=1) for arm, rate in zip(Arm, (98, 98, 98, 94.08), strict=True)),
    *(turn(1, arm, rate, pair=1) for arm, rate in zip(Arm, (51, 51, 51, 51), strict=True)),
]


def test_an_arm_is_compared_with_the_server_without_the_plugin_of_the_same_round_and_pair() -> None:
    slower, busier = arms.costs(TURNS, Arm.PAYLOAD)

    assert slower == pytest.approx([4, 4, 4, 0])
    assert busier == pytest.approx([3, 4, 0, 0])


def test_each_arm_has_its_bar_and_the_bar_says_which_is_missed() -> None:
    lines = {line.bar.name.rpartition(", ")[2]: line.bar for line in arms.lines(TURNS)}

    assert {name: bar.target for name, bar in lines.items()} == {Arm.OFF: 0.5, Arm.COUNTERS: 1.0, Arm.PAYLOAD: 3.0}
    assert [bar.met for bar in lines.values()] == [True, True, False]


def test_the_noise_is_how_much_two_servers_without_the_plugin_differ() -> None:
    assert arms.between_stock(TURNS) == pytest.approx([2, -2])
    assert "differ by +0.0 %" in arms.noise(TURNS)
    assert "not known" in arms.noise([one for one in TURNS if one.pair == 0])


LONG = (1.0, 1.25)
GAPS = [*((n / 10, (n + 1) / 10) for n in range(10)), LONG, *((1.25 + n / 10, 1.35 + n / 10) for n in range(10))]


@pytest.mark.parametrize(
    ("start_s", "end_s", "added"),
    [
        pytest.param(0.95, 1.2, 150.0, id="the longest gap within, less the longest before"),
        pytest.param(1.1, 1.11, 150.0, id="a gap that begins before and ends after"),
        pytest.param(0.51, 0.79, 0.0, id="steps like those before"),
        pytest.param(1.47, 1.75, -150.0, id="the long gap was before"),
        pytest.param(5.0, 5.1, 0.0, id="no tokens at all"),
    ],
)
def test_a_swap_adds_what_a_time_as_long_before_it_had_not(start_s: float, end_s: float, added: float) -> None:
    assert swaps.added_ms(GAPS, start_s, end_s) == pytest.approx(added)


def test_the_time_before_a_swap_is_compared_with_the_one_before_it_as_a_swap_is() -> None:
    swapped = Swaps(windows=[Window(start_s=1.47, end_s=1.75, pause_ms=3.0, refusal="")], gaps=GAPS)

    assert swapped.added_ms == pytest.approx([-150.0])
    assert swapped.added_by_nothing_ms == pytest.approx([150.0])


def test_a_refused_swap_and_a_changed_request_miss_their_bars() -> None:
    window = Window(start_s=1.0, end_s=1.5, pause_ms=3.0, refusal="")
    good = Swaps(windows=[window, window], gaps=[(0.9, 1.0), (1.0, 1.11), (1.11, 1.21)], requests=5)
    bad = Swaps(windows=[window, Window(start_s=1.0, end_s=1.5, pause_ms=0.0, refusal="no")], requests=5, changed=1)

    assert results.missed([line.bar for line in good.lines()]) is None
    assert [line.bar.measured for line in bad.lines()][:3] == [1, 0, 1]
    assert [line.bar.met for line in bad.lines()][:3] == [False, True, False]


def test_the_stand_in_of_width_4096_sends_what_a_server_would(short_tmp_path: Path) -> None:
    holds = endings.measured(short_tmp_path / "e", 2)

    assert (len(holds.ends_ms), len(holds.steps_ms)) == (2, 2 * endings.STEPS)
    assert holds.line().bar.measured == max(holds.ends_ms)


def test_the_loop_has_reached_its_bar_with_the_first_batch_that_drafts_so_well() -> None:
    lengths = [(0.0, 1.0), (30.0, 1.2), (30.0, 1.6), (30.0, 1.5)]
    batches = [
        Batch(ended_s=60.0 * number, version=number, steps=steps, acceptance_length=length)
        for number, (steps, length) in enumerate(lengths, 1)
    ]
    reached, missed = Loop(without=1.0, batches=batches), Loop(without=1.0, batches=batches[:2])

    assert (reached.line().bar.met, reached.line().bar.measured, reached.line().note) == (True, 1.6, "after 180 s")
    assert (missed.line().bar.met, missed.line().bar.measured, missed.line().note) == (False, 1.2, "")
    assert "nothing is drafted" in list(reached.figures())[1]
