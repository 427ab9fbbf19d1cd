"""The simulation of waiting for evidence: drafts are judged when the trainer judges them, by its own gate."""

from dataclasses import replace

import pytest
from bench.learning.delay import GATES, Gate, Stream, learned, looks


@pytest.mark.parametrize(
    ("kinds", "fits"),
    [
        pytest.param(["a"] * 66, [16, 32, 64], id="one"),
        pytest.param(["a", "b"] * 33, [16, 31, 32, 63], id="two"),
    ],
)
def test_a_fit_is_due_when_all_traffic_or_a_kind_of_it_has_16_requests_and_doubles(
    kinds: list[str], fits: list[int]
) -> None:
    """And an estimate every 20 optimizer steps, which begin with the eighth request."""
    due = dict(enumerate(looks(kinds), 1))
    assert [n for n, now in due.items() if now.is_fit] == fits
    assert [n for n, now in due.items() if now.is_estimate] == [21, 34, 47, 61]


@pytest.mark.parametrize("num_kinds", [1, 5])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_the_first_version_serves_from_the_sixteenth_request_on(gate: Gate, num_kinds: int) -> None:
    run = Stream(40, num_kinds, gate, seed=1).run()
    assert run.lengths[:15] == [1.0] * 15
    assert run.lengths[15] == pytest.approx(learned(8), rel=0.05)


def test_each_fit_judges_two_candidates_more_but_one_that_training_goes_on_from() -> None:
    none, one, two = (Stream(100, 1, Gate("", at_fits=count), seed=1).run() for count in range(3))
    num_estimates = 6
    assert none.num_judged == num_estimates + 1, "the first version"
    assert one.num_judged == num_estimates + 3
    assert num_estimates + 3 < two.num_judged <= num_estimates + 6


def test_versions_get_better_unless_they_are_counted_as_worse() -> None:
    gate = replace(GATES[-1], at_fits=0)  # so that no request has two publications
    runs = [Stream(200, 1, gate, seed).run() for seed in range(5)]
    for run in runs:
        falls = sum(after < before for before, after in zip(run.lengths, run.lengths[1:], strict=False))
        assert falls == run.num_worse
    assert sum(run.num_worse for run in runs) > 0
    assert Stream(200, 1, gate, 0).run() == runs[0]
