"""Speculative sampling gives the target's distribution, whatever the draft: the theorem, checked by counting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from updraft_draft.acceptance import (
    Acceptance,
    accept_sampled,
    draw,
    filtered_probs,
    token_at,
)

VOCAB = 6


def _distribution(seed: int, rows: int) -> Tensor:
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5).softmax(-1)


def _chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def _first_tokens(p: Tensor, q: Tensor | None, accept: object, rounds: int = 4000) -> Tensor:
    """Counts of the first token that a step emits, over many rounds of drafting one token and verifying it."""
    generator = torch.Generator().manual_seed(11)
    counts = torch.zeros(VOCAB)
    for _ in range(rounds):
        draft = int(torch.multinomial(q[0], 1, generator=generator)) if q is not None else 2
        outcome = accept(p, [draft], q, generator)  # type: ignore[operator]  # the broken rule shares the signature
        counts[draft if outcome.count else outcome.bonus_id] += 1
    return counts


CRITICAL = 20.5
"""Chi-square with 5 degrees of freedom exceeds this once in a thousand."""


@pytest.mark.parametrize("is_point_mass", [pytest.param(True, id="lookup"), pytest.param(False, id="model")])
@pytest.mark.parametrize("seed", range(3))
def test_the_output_has_the_targets_distribution(seed: int, *, is_point_mass: bool) -> None:
    p, q = _distribution(seed, 2), None if is_point_mass else _distribution(seed + 50, 1)
    assert _chi_square(_first_tokens(p, q, accept_sampled), p[0]) < CRITICAL


def _accept_by_likelihood(p: Tensor, drafts: list[int], q: Tensor | None, generator: torch.Generator) -> Acceptance:
    """A plausible wrong rule: keep a draft with probability p, redraw from p."""
    keep = float(torch.rand(1, generator=generator)) < float(p[0, drafts[0]])
    return Acceptance(count=int(keep), bonus_id=int(torch.multinomial(p[int(keep)], 1, generator=generator)))


def _accept_without_residual(p: Tensor, drafts: list[int], q: Tensor | None, generator: torch.Generator) -> Acceptance:
    """The classic bug: the right acceptance, but a refused draft is redrawn from p instead of max(p - q, 0)."""
    assert q is not None
    keep = float(torch.rand(1, generator=generator)) * float(q[0, drafts[0]]) < float(p[0, drafts[0]])
    return Acceptance(count=int(keep), bonus_id=int(torch.multinomial(p[int(keep)], 1, generator=generator)))


@pytest.mark.parametrize("broken", [_accept_by_likelihood, _accept_without_residual])
def test_the_same_count_catches_a_wrong_rule(broken: object) -> None:
    p, q = _distribution(0, 2), _distribution(50, 1)
    assert _chi_square(_first_tokens(p, q, broken), p[0]) > CRITICAL


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(0, 5))
def test_kept_drafts_are_a_prefix_and_the_next_token_is_possible(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = _distribution(seed, k + 1), _distribution(seed + 1, max(k, 1))[:k]
    drafts = [int(torch.multinomial(row, 1, generator=generator)) for row in q]
    outcome = accept_sampled(p, drafts, q, generator)
    assert 0 <= outcome.count <= k
    assert p[outcome.count, outcome.bonus_id] > 0


def test_a_draft_equal_to_the_target_is_always_kept() -> None:
    p = _distribution(3, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drafts = [int(torch.multinomial(row, 1, generator=generator)) for row in p[:3]]
        assert accept_sampled(p, drafts, p[:3], generator).count == 3


def test_drafts_are_kept_as_often_as_the_overlap_says() -> None:
    p, q = _distribution(4, 2), _distribution(90, 1)
    generator = torch.Generator().manual_seed(1)
    rounds = 4000
    kept = sum(
        accept_sampled(p, [int(torch.multinomial(q[0], 1, generator=generator))], q, generator).count
        for _ in range(rounds)
    )
    overlap = float(torch.minimum(p[0], q[0]).sum())
    assert abs(kept / rounds - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / rounds)


def test_no_row_is_computed_after_the_first_refusal_and_none_twice() -> None:
    class Counted:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def __getitem__(self, row: int) -> torch.Tensor:
            self.asked.append(row)
            return torch.tensor([0.0, 1.0, 0.0])

    for drafts, rows in (([1, 1, 1], [0, 1, 2, 3]), ([1, 0, 1], [0, 1]), ([], [0])):
        p = Counted()
        assert accept_sampled(p, drafts, None, torch.Generator()).bonus_id == 1
        assert p.asked == rows


def test_top_k_and_top_p_keep_the_likeliest_and_always_one() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert (filtered_probs(logits, temperature=1.0, top_k=2) > 0).sum() == 2
    assert (filtered_probs(logits, temperature=1.0, top_p=0.01) > 0).sum() == 1
    assert filtered_probs(logits, temperature=1.0, top_p=1e-300).tolist() == [[1, 0, 0, 0]], "0 in float32"
    assert torch.allclose(filtered_probs(logits, temperature=1.0), logits.softmax(-1))
    with pytest.raises(ValueError, match="temperature"):
        filtered_probs(logits, temperature=0.0)


@given(st.lists(st.sampled_from([0.0, 0.0, 1e-12, 0.3, 5.0]), min_size=1, max_size=9), st.integers(0, 99))
def test_only_what_has_a_probability_is_drawn(weights: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if not sum(weights):
        with pytest.raises(RuntimeError, match="do not form a distribution"):
            draw(torch.tensor(weights), generator)
        return
    p = torch.tensor(weights) / sum(weights)
    assert all(p[draw(p, generator)] > 0 for _ in range(20))


@pytest.mark.parametrize(("share", "token"), [(0.0, 1), (0.199, 1), (0.201, 3), (1.0, 3)])
def test_each_token_has_its_share_of_the_scale(share: float, token: int) -> None:
    assert token_at(torch.tensor([0.0, 0.2, 0.0, 0.8, 0.0]), share) == token


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_is_drawn_from_what_is_not_finite(bad: float) -> None:
    with pytest.raises(RuntimeError, match="do not form a distribution"):
        draw(torch.tensor([0.5, bad]), torch.Generator())
