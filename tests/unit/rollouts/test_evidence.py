"""The estimate of a gain: right on average, and no surer than it says."""

import random
from collections.abc import Sequence

import pytest

from updraft_rollouts.evidence import Paired, gain, student_t


def test_the_gain_is_the_ratio_of_summed_steps_so_that_long_requests_weigh_more() -> None:
    pairs = [
        Paired(tokens=90, candidate_steps=30, baseline_steps=45),
        Paired(tokens=10, candidate_steps=10, baseline_steps=5),
    ]
    estimate = gain(pairs, 0.8)
    assert (estimate.candidate, estimate.baseline) == (2.5, 2.0)
    assert estimate.percent == pytest.approx(25.0)
    assert estimate.low_percent < 25.0 < estimate.high_percent


def test_requests_that_agree_leave_no_doubt() -> None:
    estimate = gain([Paired(tokens=20, candidate_steps=5, baseline_steps=10)] * 8, 0.8)
    assert estimate.low_percent == pytest.approx(100.0)
    assert estimate.high_percent == pytest.approx(100.0)


def test_a_few_long_requests_among_many_short_ones_count_as_a_few() -> None:
    rng = random.Random(3)
    even = [_request(rng, 100) for _ in range(16)]
    uneven = [_request(rng, 1500) for _ in range(2)] + [_request(rng, 5) for _ in range(14)]
    assert _width(uneven) > 2 * _width(even)


@pytest.mark.parametrize(
    ("degrees", "quantiles"),
    [
        pytest.param(2, (1.886, 2.920), id="2"),
        pytest.param(5, (1.476, 2.015), id="5"),
        pytest.param(7, (1.415, 1.895), id="7"),
        pytest.param(30, (1.310, 1.697), id="30"),
    ],
)
def test_students_t_is_that_of_the_tables(degrees: int, quantiles: tuple[float, float]) -> None:
    found = [student_t(probability, degrees) for probability in (0.9, 0.95)]
    assert found == pytest.approx(quantiles, rel=0.005)


@pytest.mark.parametrize("num_requests", [8, 16, 64])
def test_equal_drafts_look_better_no_more_often_than_the_confidence_allows(num_requests: int) -> None:
    """An 80 % interval lies above a true gain of zero in a tenth of all cases; within sampling error and small bias."""
    rng = random.Random(7)
    rounds = 1500
    fooled = sum(gain(_equal_drafts(rng, num_requests), 0.8).low_percent > 0.0 for _ in range(rounds))
    assert 0.075 < fooled / rounds < 0.13


def _equal_drafts(rng: random.Random, num_requests: int) -> list[Paired]:
    return [_request(rng, int(rng.lognormvariate(5.0, 0.8)) + 20) for _ in range(num_requests)]


def _request(rng: random.Random, tokens: int) -> Paired:
    """Both drafts equally good on average; how hard the request is, they share."""
    length = rng.uniform(1.5, 3.0)
    candidate, baseline = (min(tokens, max(1, round(tokens / length * rng.uniform(0.8, 1.2)))) for _ in range(2))
    return Paired(tokens=tokens, candidate_steps=candidate, baseline_steps=baseline)


def _width(pairs: Sequence[Paired]) -> float:
    estimate = gain(pairs, 0.8)
    return estimate.high_percent - estimate.low_percent
