"""Losses are zero where draft and target agree, and the acceptance loss is the probability of refusal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from updraft_trainer.learning.losses import LOSSES, acceptance, forward_kl


def _log_probs(seed: int) -> torch.Tensor:
    return (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * 2).log_softmax(-1)


@pytest.mark.parametrize("name", list(LOSSES))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_loss_is_never_negative_and_zero_for_equals(name: str, seed: int) -> None:
    log_q, log_p = _log_probs(seed), _log_probs(seed + 1)
    assert bool((LOSSES[name](log_q, log_p) >= -1e-6).all())
    torch.testing.assert_close(LOSSES[name](log_p, log_p), torch.zeros(5), rtol=0, atol=1e-6)


def test_forward_kl_by_hand() -> None:
    log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(forward_kl(log_q, log_p), torch.tensor([by_hand]))


def test_the_acceptance_loss_is_the_probability_that_a_draft_is_refused() -> None:
    log_q, log_p = _log_probs(1), _log_probs(2)
    torch.testing.assert_close(acceptance(log_q, log_p), 1 - torch.minimum(log_p.exp(), log_q.exp()).sum(-1))
