"""Losses are zero where draft and target agree, and the acceptance loss is the probability of refusal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from updraft_trainer.learning.losses import LOSSES, Predictions, acceptance, combined, forward_kl


def _log_probs(seed: int) -> torch.Tensor:
    return (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * 2).log_softmax(-1)


@pytest.mark.parametrize("name", list(LOSSES))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_loss_is_never_negative_and_zero_for_equals(name: str, seed: int) -> None:
    log_q, log_p = _log_probs(seed), _log_probs(seed + 1)
    assert bool((LOSSES[name](log_q, Predictions.of(log_p))[0] >= -1e-6).all())
    losses, gradients = LOSSES[name](log_p, Predictions.of(log_p))
    torch.testing.assert_close(losses, torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients.sum(-1), torch.zeros(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(LOSSES))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_gradient_is_the_slope_of_its_loss(name: str, seed: int) -> None:
    logits, target = 3 * _log_probs(seed).double(), Predictions.of(_log_probs(seed + 1).double())
    loss = combined(LOSSES[name], acceptance, 0.5)
    gradients = loss(logits, target)[1]
    for token in range(7):
        step = torch.zeros(7, dtype=torch.float64)
        step[token] = 1e-6
        slope = (loss(logits + step, target)[0] - loss(logits - step, target)[0]) / 2e-6
        torch.testing.assert_close(gradients[:, token], slope, rtol=1e-4, atol=1e-6)


def test_forward_kl_by_hand() -> None:
    log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    losses, gradients = forward_kl(log_q, Predictions.of(log_p))
    torch.testing.assert_close(losses, torch.tensor([by_hand]))
    torch.testing.assert_close(gradients, torch.tensor([[-0.25, 0.25]]))


def test_the_acceptance_loss_is_the_probability_that_a_draft_is_refused() -> None:
    log_q, log_p = _log_probs(1), _log_probs(2)
    losses, _ = acceptance(log_q, Predictions.of(log_p))
    torch.testing.assert_close(losses, 1 - torch.minimum(log_p.exp(), log_q.exp()).sum(-1))
