"""Importance weights: they undo a bias of capture, within bounds."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_trainer.data.importance import MAX_RATIO, weights


@given(probabilities=st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=50))
def test_weights_have_the_mean_one_and_bounds_and_favour_what_was_unlikely(probabilities: list[float]) -> None:
    found = weights(probabilities)
    assert sum(found) / len(found) == pytest.approx(1.0)
    assert max(found) <= MAX_RATIO * min(found) * (1 + 1e-9)
    by_probability = [weight for _, weight in sorted(zip(probabilities, found, strict=True), key=lambda pair: pair[0])]
    assert all(a >= b * (1 - 1e-9) for a, b in pairwise(by_probability))


@given(probability=st.floats(1e-9, 1.0), count=st.integers(1, 20))
def test_samples_that_were_equally_likely_count_alike(probability: float, count: int) -> None:
    assert weights([probability] * count) == pytest.approx([1.0] * count)


def test_a_weighted_mean_of_biased_samples_is_the_mean_of_all_requests() -> None:
    rng = random.Random(0)
    requests = [(value, 0.25 if value < 0.5 else 0.5) for value in (rng.random() for _ in range(20_000))]
    taken = [request for request in requests if rng.random() < request[1]]
    plain = sum(value for value, _ in taken) / len(taken)
    weighted = sum(
        value * weight for (value, _), weight in zip(taken, weights([p for _, p in taken]), strict=True)
    ) / len(taken)
    assert abs(plain - 0.5) > 0.05
    assert weighted == pytest.approx(0.5, abs=0.01)


def test_no_samples_have_no_weights() -> None:
    assert weights([]) == []
