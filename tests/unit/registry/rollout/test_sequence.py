"""The confidence sequence: its closed form against its definition, and its promise against simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_registry.rollout.gate.sequence import G, Moments, lower, margin, upper

observations = st.lists(st.floats(-5.0, 5.0), min_size=4, max_size=30).filter(lambda x: float(np.ptp(x)) > 1e-3)
alphas = st.floats(0.001, 0.3)


def moments(observed: list[float]) -> Moments:
    result = Moments()
    for observation in observed:
        result = result.plus(observation)
    return result


def bayes_factors(observed: np.ndarray, mean: float) -> tuple[float, float]:
    """Of a normal effect, and of a positive one, against none: by quadrature over sigma and over the effect."""
    x = observed - mean
    n = len(x)
    cosine = x.sum() / math.sqrt(float(x @ x))
    deltas = np.linspace(-12 * math.sqrt(G), 12 * math.sqrt(G), 1601)
    u = np.linspace(1e-9, n / 2 + 40 * math.sqrt(n), 1200)
    log_u = (n / 2 - 1) * np.log(u) - u - math.lgamma(n / 2)
    exponent = log_u[None, :] + deltas[:, None] * cosine * np.sqrt(2 * u)[None, :] - n * deltas[:, None] ** 2 / 2
    likelihoods = np.exp(exponent).sum(axis=1) * (u[1] - u[0])
    prior = np.exp(-(deltas**2) / (2 * G)) / math.sqrt(2 * math.pi * G) * (deltas[1] - deltas[0])
    weighted = likelihoods * prior
    return float(weighted.sum()), float(2 * weighted[deltas > 0].sum() + weighted[deltas == 0].sum())


@given(observed=observations)
def test_moments_are_those_of_all_observations_at_once(observed: list[float]) -> None:
    summary = moments(observed)
    assert summary.count == len(observed)
    assert summary.mean == pytest.approx(float(np.mean(observed)), abs=1e-9)
    assert summary.squares == pytest.approx(float(np.var(observed)) * len(observed), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("count", [5, 12, 40])
def test_at_the_lower_bound_a_positive_effect_is_one_over_alpha_times_likelier(count: int, alpha: float) -> None:
    observed = np.random.default_rng(count).normal(0.3, 1.0, count)
    bound = lower(moments(list(observed)), alpha)
    either_way, positive = bayes_factors(observed, bound)
    assert either_way == pytest.approx((1 + 1 / alpha) / 2, rel=1e-3)
    assert 1 / alpha <= positive < 1 / alpha + 1  # BF- is what is given away


@given(observed=observations, alpha=alphas, scale=st.floats(1e-3, 1e3), shift=st.floats(-10.0, 10.0))
def test_bounds_move_with_the_unit_and_the_origin(
    observed: list[float], alpha: float, scale: float, shift: float
) -> None:
    there = moments([scale * x + shift for x in observed])
    expected = scale * margin(moments(observed), alpha)
    assert margin(there, alpha) == pytest.approx(expected, rel=1e-4, abs=1e-9) or math.isinf(expected)


@given(observed=observations, alpha=alphas)
def test_less_certainty_gives_a_narrower_interval_around_the_mean(observed: list[float], alpha: float) -> None:
    summary = moments(observed)
    assert lower(summary, alpha) <= summary.mean <= upper(summary, alpha)
    assert margin(summary, alpha) <= margin(summary, alpha / 2)


@pytest.mark.parametrize("observed", [[], [0.1], [0.1, 0.1], [0.1, 0.2, 0.1]])
def test_three_observations_bound_nothing_at_five_percent(observed: list[float]) -> None:
    assert math.isinf(margin(moments(observed), 0.05))


def test_observations_without_noise_are_bounded_by_themselves_from_the_fourth_on() -> None:
    assert margin(moments([0.25] * 4), 0.05) == 0.0


def ever_wrong(draws: np.ndarray, alpha: float) -> float:
    """Share of the rows (mean 0) whose lower bound is above 0 at any look."""
    count = draws.shape[1]
    looks = np.arange(1, count + 1)
    means = np.cumsum(draws, axis=1) / looks
    squares = np.maximum(np.cumsum(draws**2, axis=1) - looks * means**2, 0.0)
    unit = [margin(Moments(count=n, squares=1.0), alpha) for n in looks]
    firsts = next(n for n, m in enumerate(unit) if math.isfinite(m))
    wrong = means[:, firsts:] > np.asarray(unit[firsts:]) * np.sqrt(squares[:, firsts:])
    return float(wrong.any(axis=1).mean())


@pytest.mark.parametrize("alpha", [0.05, 0.2])
@pytest.mark.parametrize("sigma", [0.001, 1.0])
def test_looking_after_every_observation_keeps_the_promised_error(sigma: float, alpha: float) -> None:
    draws = np.random.default_rng(1).normal(0.0, sigma, (5000, 300))
    assert alpha / 3 < ever_wrong(draws, alpha) <= alpha


def test_heavy_symmetric_tails_do_not_break_the_promise() -> None:
    draws = np.random.default_rng(2).standard_t(3, (5000, 300))
    assert ever_wrong(draws, 0.05) <= 0.05


def test_a_fixed_sample_bound_would_break_it_by_far() -> None:
    """Why a sequence at all: Student's t at 5 % (here its normal quantile, which is smaller) at every look."""
    draws = np.random.default_rng(3).normal(size=(2000, 300))
    looks = np.arange(1, 301)
    means = np.cumsum(draws, axis=1) / looks
    wrong = means[:, 9:] > 1.645 / np.sqrt(looks[9:])
    assert wrong.any(axis=1).mean() > 0.2
