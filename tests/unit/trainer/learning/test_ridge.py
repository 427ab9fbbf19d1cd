"""Sums of products: what is added up in parts has the same solution as the whole, and few rows have the same as their sums."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from updraft_trainer.learning.ridge import RIDGE, Stacked, Sums, regression

INPUTS, OUTPUTS = 6, 3


def rows(seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Outputs that follow from two of the inputs, with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, INPUTS, generator=generator)
    y = x @ torch.randn(INPUTS, 2, generator=torch.Generator().manual_seed(0)) @ torch.ones(2, OUTPUTS)
    return x, y + 0.1 * torch.randn(number, OUTPUTS, generator=generator)


def sums(*parts: tuple[Tensor, Tensor]) -> Sums:
    return Sums.of(parts, INPUTS, OUTPUTS)


@given(seed=st.integers(0, 1000), number=st.integers(2, 60), cuts=st.lists(st.integers(1, 59), max_size=4))
@settings(deadline=None)
def test_sums_of_parts_add_up_to_the_sums_of_the_whole(seed: int, number: int, cuts: list[int]) -> None:
    x, y = rows(seed, number)
    bounds = [0, *sorted(min(cut, number) for cut in cuts), number]
    parts = [(x[a:b], y[a:b]) for a, b in pairwise(bounds)]
    whole, added = sums((x, y)), sums()
    for part in parts:
        added = added + sums(part)
    for one in (added, sums(*parts)):
        torch.testing.assert_close(one.xx, whole.xx, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.solve(), whole.solve(), rtol=1e-3, atol=1e-3)


def test_the_solution_is_that_of_ridge_regression_and_leaves_the_sums_as_they_were() -> None:
    x, y = rows(1, 50)
    one = sums((x, y))
    before = one.xx.clone()
    gram = x.double().T @ x.double()
    expected = torch.linalg.solve(gram + RIDGE * gram.diagonal().diag(), x.double().T @ y.double())
    torch.testing.assert_close(one.solve().double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(one.xx, before)


@given(scale=st.floats(0.02, 50.0))
@settings(deadline=None)
def test_the_scale_of_an_input_does_not_change_the_prediction(scale: float) -> None:
    x, y = rows(2, 50)
    scales = torch.ones(INPUTS)
    scales[0] = scale
    prediction, scaled = x @ sums((x, y)).solve(), (x * scales) @ sums((x * scales, y)).solve()
    torch.testing.assert_close(scaled, prediction, rtol=1e-2, atol=1e-2)


def test_a_solution_of_low_rank_predicts_outputs_that_have_this_rank() -> None:
    x, y = rows(3, 50)
    first, second = sums((x, y)).solve_low_rank(1)
    assert (first.shape, second.shape) == ((INPUTS, 1), (1, OUTPUTS))
    error, size = ((x @ first @ second - y).pow(2).mean(), y.pow(2).mean())
    assert error < 0.05 * size


WIDE = 40
"""Inputs of rows that are fewer than their inputs."""


def few_rows(seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Inputs of scales between 0.01 and 100, with a common part, as hidden states have them; one input is always 0."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** torch.linspace(-2, 2, WIDE)
    x = (torch.randn(number, WIDE, generator=generator) + 2) * scales
    x[:, 0] = 0
    return x, torch.randn(number, OUTPUTS, generator=generator)


@given(seed=st.integers(0, 1000), number=st.integers(1, WIDE - 1), cut=st.integers(0, WIDE - 1))
@settings(deadline=None)
def test_fewer_rows_than_inputs_have_the_same_solution_as_their_sums(seed: int, number: int, cut: int) -> None:
    x, y = few_rows(seed, number)
    parts = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    one = regression(parts, number, WIDE, OUTPUTS)
    assert isinstance(one, Stacked)
    exact = Sums.of([(x, y)], WIDE, OUTPUTS)
    gram = exact.xx.double()
    penalty = RIDGE * (gram.diagonal() + 1e-6 * gram.diagonal().mean())
    expected = torch.linalg.solve(gram + penalty.diag(), x.double().T @ y.double())
    torch.testing.assert_close(x.double() @ one.solve().double(), x.double() @ expected, rtol=1e-3, atol=1e-3)
    for rank in (1, OUTPUTS):
        (first, second), (a, b) = one.solve_low_rank(rank), exact.solve_low_rank(rank)
        torch.testing.assert_close(x @ first @ second, x @ a @ b, rtol=2e-2, atol=2e-2)


def test_as_many_rows_as_inputs_are_added_up() -> None:
    x, y = few_rows(1, WIDE)
    assert isinstance(regression([(x, y)], WIDE, WIDE, OUTPUTS), Sums)


@pytest.mark.parametrize("value", [3e38, float("nan"), float("inf")])
def test_few_rows_that_are_not_finite_when_squared_have_no_solution(value: float) -> None:
    x, y = few_rows(1, 5)
    x[2, 3] = value
    with pytest.raises(RuntimeError):
        regression([(x, y)], 5, WIDE, OUTPUTS).solve()
