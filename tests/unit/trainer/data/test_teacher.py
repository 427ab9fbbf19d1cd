"""Both forms of the teacher are the same distribution over the draft vocabulary, as far as the likeliest tokens tell it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from updraft_draft.precision import linear
from updraft_trainer.data.teacher import IMPOSSIBLE, DraftVocabulary, LastHidden, Teacher, TopK, joined
from updraft_trainer.learning.losses import LEAST_LOG_P, LOSSES, Predictions

VOCAB, HIDDEN = 40, 8


def of_logits(logits: Tensor, k: int) -> TopK:
    values, ids = logits.log_softmax(-1).topk(k)
    return TopK(ids, values)


def with_sums(logits: Tensor, k: int) -> TopK:
    """As an engine sends it."""
    return replace(of_logits(logits, k), log_sum_exp=logits.logsumexp(-1))


def rows(seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    """Last hidden states [count, HIDDEN] and a head [VOCAB, HIDDEN]."""
    generator = torch.Generator().manual_seed(seed)
    states, head = torch.randn(count, HIDDEN, generator=generator), torch.randn(VOCAB, HIDDEN, generator=generator)
    return states.bfloat16(), head.bfloat16()


def vocabulary(head: Tensor, token_ids: list[int]) -> DraftVocabulary:
    return DraftVocabulary.of(head, torch.tensor(token_ids))


TOKEN_IDS = st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB).map(sorted)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), token_ids=TOKEN_IDS)
def test_all_tokens_say_what_the_last_hidden_state_says(seed: int, token_ids: list[int]) -> None:
    states, head = rows(seed)
    known = vocabulary(head, token_ids)
    everything = of_logits(linear(states, head).float(), VOCAB)
    torch.testing.assert_close(everything.log_p(known), LastHidden(states).log_p(known), rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1000), token_ids=TOKEN_IDS, k=st.integers(1, VOCAB))
def test_what_the_likeliest_tokens_say_is_renormalised_over_the_draft_vocabulary(
    seed: int, token_ids: list[int], k: int
) -> None:
    states, head = rows(seed)
    logits = torch.nn.functional.linear(states, head).float()
    teacher, known = of_logits(logits, k), torch.zeros(VOCAB, dtype=torch.bool)
    known[token_ids] = True
    is_trainable = teacher.is_trainable(known)
    log_p = teacher.at(is_trainable).log_p(vocabulary(head, token_ids))
    assert bool(torch.isfinite(log_p).all())
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(int(is_trainable.sum())))
    for row, p in zip(torch.nonzero(is_trainable)[:, 0].tolist(), log_p.exp(), strict=True):
        named = set(teacher.ids[row].tolist()) & set(token_ids)
        true = logits[row].softmax(-1)
        total = sum(float(true[token]) for token in named)
        expected = [float(true[token]) / total if token in named else 0.0 for token in token_ids]
        torch.testing.assert_close(p, torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert [value == 0.0 for value in p.tolist()] == [token not in named for token in token_ids], "exactly nothing"
    torch.testing.assert_close(log_p.softmax(-1), log_p.exp(), rtol=1e-6, atol=0)


def test_a_row_that_names_no_token_of_the_draft_cannot_be_trained() -> None:
    teacher = TopK(torch.tensor([[3, 4], [4, 5], [5, 6]]), torch.full((3, 2), -1.0))
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[[4, 9]] = True
    assert teacher.is_trainable(known).tolist() == [True, True, False]
    assert LastHidden(torch.zeros(3, HIDDEN)).is_trainable(known).tolist() == [True, True, True]


@pytest.mark.parametrize("name", list(LOSSES))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, VOCAB))
def test_no_loss_and_no_gradient_is_lost_to_what_is_impossible(name: str, seed: int, k: int) -> None:
    states, head = rows(seed)
    log_p = of_logits(torch.nn.functional.linear(states, head).float(), k).log_p(vocabulary(head, list(range(VOCAB))))
    # A draft that is sure of one token: its other log q are far below what float32 can exponentiate.
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(seed + 1))
    logits[:3, seed % VOCAB] += 300.0
    losses, gradients = LOSSES[name](logits, Predictions.of(log_p))
    assert bool(torch.isfinite(losses).all())
    assert bool((losses >= -1e-5).all())
    assert bool(torch.isfinite(gradients).all())


def test_reverse_kl_is_bounded_where_the_draft_says_the_impossible() -> None:
    log_p = TopK(torch.tensor([[0]]), torch.tensor([[0.0]])).log_p(vocabulary(torch.zeros(3, HIDDEN), [0, 1, 2]))
    log_q = torch.tensor([[-200.0, 0.0, -200.0]])
    assert log_p.tolist() == [[0.0, IMPOSSIBLE, IMPOSSIBLE]]
    losses, _ = LOSSES["reverse_kl"](log_q, Predictions.of(log_p))
    assert losses.tolist() == pytest.approx([-LEAST_LOG_P])


def test_teachers_of_several_forms_keep_their_rows_in_order() -> None:
    states, head = rows(1, count=4)
    logits = torch.nn.functional.linear(states, head).float()
    parts: list[Teacher] = [
        LastHidden(states[:1]),
        LastHidden(states[1:2]),
        of_logits(logits[2:3], 7),
        of_logits(logits[3:], 9),
        of_logits(logits[:1], 9),
        LastHidden(states[2:]),
    ]
    known = vocabulary(head, list(range(0, VOCAB, 2)))
    together = joined(parts)
    assert [len(one) for one in together] == [2, 1, 2, 2]
    assert torch.equal(
        torch.cat([one.log_p(known) for one in together]), torch.cat([one.log_p(known) for one in parts])
    )


def test_the_whole_vocabulary_shares_the_targets_head_and_predicts_as_a_copy_does() -> None:
    head = torch.randn(16, 8).bfloat16()
    whole = DraftVocabulary.whole(head)
    assert whole.head.data_ptr() == head.data_ptr(), "a copy would take a gigabyte of a large target"
    rows = LastHidden(torch.randn(3, 8).bfloat16())
    assert torch.equal(rows.log_p(whole), rows.log_p(DraftVocabulary.of(head, torch.arange(16))))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 0.5]), cap=st.sampled_from([None, 30.0]))
def test_enough_likely_tokens_tell_the_last_hidden_state(seed: int, scale: float, cap: float | None) -> None:
    states, head = rows(seed)
    norm = torch.linspace(0.5, 2.0, HIDDEN)
    normed = states.float() / states.float().square().mean(-1, keepdim=True).sqrt()
    known = replace(vocabulary(head, list(range(VOCAB))), logit_scale=scale, logit_cap=cap)
    logits = scale * (normed * norm) @ head.float().T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)

    found = with_sums(logits, 4 * HIDDEN).estimate_states(known, norm, torch.zeros(len(states), HIDDEN))

    assert float((found - normed).norm() / normed.norm()) < 0.1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, VOCAB))
def test_an_expected_state_with_the_same_logits_stays(seed: int, k: int) -> None:
    states, head = rows(seed)
    expected = states.float() / states.float().square().mean(-1, keepdim=True).sqrt()
    teacher = with_sums(expected @ head.float().T, k)

    found = teacher.estimate_states(vocabulary(head, list(range(VOCAB))), torch.ones(HIDDEN), expected)

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_tokens_that_the_draft_does_not_know_tell_nothing() -> None:
    states, head = rows(3)
    teacher, expected = with_sums(states.float() @ head.float().T, 5), torch.zeros(len(states), HIDDEN)
    known = sorted(set(range(VOCAB)) - set(teacher.ids[0].tolist()))

    found = teacher.estimate_states(vocabulary(head, known), torch.ones(HIDDEN), expected)

    assert not bool(found[0].any())
    assert bool(found[1:].any())


def test_no_state_is_longer_than_the_norm_makes_it() -> None:
    states, head = rows(4)
    teacher = with_sums(1e4 * states.float() @ head.float().T, 5)

    found = teacher.estimate_states(
        vocabulary(head, list(range(VOCAB))), torch.ones(HIDDEN), torch.zeros(len(states), HIDDEN)
    )

    torch.testing.assert_close(found.square().mean(-1), torch.ones(len(states)))


@pytest.mark.parametrize("value", [3e38, -3e38, float("inf"), float("nan")])
def test_an_absurd_log_sum_exp_makes_no_state_absurd(value: float) -> None:
    states, head = rows(7)
    teacher = replace(with_sums(states.float() @ head.float().T, 5), log_sum_exp=torch.full((len(states),), value))

    found = teacher.estimate_states(
        vocabulary(head, list(range(VOCAB))), torch.ones(HIDDEN), torch.zeros(len(states), HIDDEN)
    )

    assert bool(found.isfinite().all())
    assert float(found.square().mean(-1).max()) < 1.001


def test_rows_that_do_not_fit_into_memory_together_are_estimated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    states, head = rows(5)
    teacher, expected = with_sums(states.float() @ head.float().T, 5), torch.zeros(len(states), HIDDEN)
    whole = teacher.estimate_states(vocabulary(head, list(range(VOCAB))), torch.ones(HIDDEN), expected)
    sizes, factor = list[int](), torch.linalg.cholesky

    def seen(products: Tensor) -> Tensor:
        sizes.append(len(products))
        factored: Tensor = factor(products)
        return factored

    monkeypatch.setattr("updraft_trainer.data.teacher._MAX_EQUATIONS", 2 * 5 * HIDDEN)
    monkeypatch.setattr(torch.linalg, "cholesky", seen)

    parts = teacher.estimate_states(vocabulary(head, list(range(VOCAB))), torch.ones(HIDDEN), expected)

    torch.testing.assert_close(parts, whole)
    assert sizes == [2, 2, 2]


def test_a_row_without_its_log_sum_exp_tells_no_state() -> None:
    states, head = rows(6)
    teacher = of_logits(states.float() @ head.float().T, 5)
    with pytest.raises(ValueError, match="log-sum-exp"):
        teacher.estimate_states(vocabulary(head, [1]), torch.ones(HIDDEN), torch.zeros(len(states), HIDDEN))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_log_sum_exp_that_is_not_finite_is_a_problem(value: float) -> None:
    teacher = TopK(torch.tensor([[1, 2]]), torch.full((1, 2), -1.0), torch.tensor([value]))
    assert "log-sum-exps are not finite" in teacher.problem(hidden_size=HIDDEN, vocab_size=VOCAB)
