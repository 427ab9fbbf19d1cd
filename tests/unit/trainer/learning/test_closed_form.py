"""A draft in closed form knows a rule that a few samples show, without an optimizer step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.likeliest import show_likeliest
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker
from torch import Tensor

from updraft_draft.network import DraftNetwork, initial_network
from updraft_draft.target_weights import read_head
from updraft_draft.tensors import EncodedRows
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.data.teacher import DraftVocabulary, LastHidden, TopK
from updraft_trainer.learning import closed_form
from updraft_trainer.publishing.estimate import num_tokens, verify_steps


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def samples(target: Path) -> list[Sample]:
    maker = TraceMaker(target)
    return [read_sample(maker.data(seed), maker.expected) for seed in range(24)]


def untrained(target: Path, *, norm_before_residual: bool = False) -> DraftNetwork:
    head = read_head(target)
    config = replace(head.draft(draft_vocab_size=DRAFT_VOCAB), norm_before_residual=norm_before_residual)
    tokens = torch.arange(DRAFT_VOCAB)
    return initial_network(config, head.embedding, head.rows(tokens), head.final_norm, tokens)


def vocabulary(target: Path) -> DraftVocabulary:
    return DraftVocabulary.of(read_head(target).head, torch.arange(DRAFT_VOCAB))


def likeliest(target: Path, seeds: range, *, k: int = 16, has_sums: bool = True) -> list[Sample]:
    """As a server sends them that shows its likeliest tokens instead of last hidden states."""
    maker, head = TraceMaker(target), read_head(target).head
    traces = [show_likeliest(maker.trace(seed), head, k=k) for seed in seeds]
    for trace in traces:
        if not has_sums:
            trace.payload.top_k.ClearField("log_sum_exp")
    return [read_sample(trace.SerializeToString(), maker.expected) for trace in traces]


def acceptance_length(network: DraftNetwork, samples: list[Sample]) -> float:
    return sum(map(num_tokens, samples)) / sum(verify_steps(network, samples, lookahead=3))


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_it_needs_fewer_steps_for_text_that_it_never_saw(
    target: Path, samples: list[Sample], *, norm_before_residual: bool
) -> None:
    network = untrained(target, norm_before_residual=norm_before_residual)
    before = acceptance_length(network, samples[16:])

    assert closed_form.fit(network, samples[:16], vocabulary(target), num_steps=3)

    assert acceptance_length(network, samples[16:]) > before + 0.5


def test_the_first_samples_that_the_work_allows_are_fitted(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, of_two, of_all = untrained(target), untrained(target), untrained(target)
    closed_form.fit(first, samples[:2], vocabulary(target), num_steps=3)
    num_rows = sum(len(sample.ids) - sample.first_output for sample in samples[:2])
    num_inputs = first.config.aux_size + first.config.hidden_size
    monkeypatch.setattr(closed_form, "MAX_WORK", num_rows * num_inputs**2)
    closed_form.fit(of_two, samples, vocabulary(target), num_steps=3)
    assert torch.equal(of_two.fc.weight, first.fc.weight)
    monkeypatch.setattr(closed_form, "MAX_WORK", 0)
    assert closed_form.fit(of_all, samples, vocabulary(target), num_steps=3), "one sample is fitted in any case"


def test_a_long_answer_is_read_a_few_rows_at_a_time_and_gives_the_same_draft(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = untrained(target), untrained(target)
    closed_form.fit(whole, samples[:8], vocabulary(target), num_steps=3)
    monkeypatch.setattr(closed_form, "MAX_ROWS", 7)
    closed_form.fit(parts, samples[:8], vocabulary(target), num_steps=3)
    torch.testing.assert_close(parts.fc.weight, whole.fc.weight, rtol=1e-2, atol=1e-3)


class EndedError(Exception):
    pass


@pytest.mark.parametrize("has_states", [True, False])
def test_work_can_be_ended_before_each_part_of_it(target: Path, samples: list[Sample], *, has_states: bool) -> None:
    lessons = samples[:4] if has_states else likeliest(target, range(4))

    def parts(allowed: int) -> Callable[[], None]:
        remaining = iter(range(allowed))

        def check() -> None:
            if next(remaining, None) is None:
                raise EndedError

        return check

    num_parts = 4 * (2 + closed_form.ROUNDS) + closed_form.ROUNDS + 1
    num_parts += 0 if has_states else 4 + 4 * closed_form.STATE_ROUNDS * closed_form.FOLDS
    assert closed_form.fit(untrained(target), lessons, vocabulary(target), num_steps=3, check=parts(num_parts))
    for allowed in (0, 3, num_parts - 1):
        with pytest.raises(EndedError):
            closed_form.fit(untrained(target), lessons, vocabulary(target), num_steps=3, check=parts(allowed))


def test_random_features_explain_a_part_of_what_attention_leaves(target: Path, samples: list[Sample]) -> None:
    whole = untrained(target)
    assert closed_form.fit(whole, samples[:16], vocabulary(target), num_steps=3)
    linear = whole.copy()
    linear.midlayer.mlp.down_proj.weight.data.zero_()

    @torch.no_grad()
    def error(network: DraftNetwork, sample: Sample) -> float:
        assert isinstance(sample.teacher, LastHidden)
        wanted = sample.teacher.states[sample.first_output - 1 - sample.first_teacher_row :].float()
        states = network.unroll(sample.aux.decoded()[None].float(), sample.ids[None, 1:], num_steps=1)[0][0]
        return float((states[sample.first_output - 2 :][: len(wanted)] - wanted / network.norm.weight).square().mean())

    assert sum(error(whole, sample) for sample in samples[16:]) < sum(error(linear, sample) for sample in samples[16:])


def test_with_fewer_rows_than_features_the_mlp_is_small_and_random(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, before = untrained(target), untrained(target)
    monkeypatch.setattr(closed_form, "MAX_WORK", 0)  # one sample is fitted
    assert closed_form.fit(network, samples[:1], vocabulary(target), num_steps=3)
    expected = closed_form.MLP_SCALE * before.midlayer.mlp.down_proj.weight
    torch.testing.assert_close(network.midlayer.mlp.down_proj.weight, expected)


def test_it_attends_to_its_own_row(target: Path, samples: list[Sample]) -> None:
    network = untrained(target)
    closed_form.fit(network, samples[:8], vocabulary(target), num_steps=3)
    sample = samples[20]
    whole = network.unroll(sample.aux.decoded()[None].float(), sample.ids[None, 1:], num_steps=1)[0][0, -1]
    alone = network.unroll(sample.aux[-1:].decoded()[None].float(), sample.ids[None, -1:], num_steps=1)[0][0, -1]
    assert torch.cosine_similarity(whole, alone, dim=0) > 0.9


def test_the_likeliest_tokens_do_instead_of_hidden_states(target: Path, samples: list[Sample]) -> None:
    network = untrained(target)
    before = acceptance_length(network, samples[16:])

    assert closed_form.fit(network, likeliest(target, range(16)), vocabulary(target), num_steps=3)

    assert acceptance_length(network, samples[16:]) > before + 0.5


def test_predictions_from_other_samples_improve_what_few_tokens_tell(
    target: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, generator = untrained(target), torch.Generator().manual_seed(1)
    size = network.config.hidden_size
    head = torch.randn(DRAFT_VOCAB, size, generator=generator)
    last = [torch.randn(len(sample.teacher), size, generator=generator) for sample in samples]
    last = [states / states.square().mean(-1, keepdim=True).sqrt() for states in last]
    telling = [
        _with_auxiliary(replace(one, teacher=four_of(rows @ head.T)), rows)
        for one, rows in zip(samples, last, strict=True)
    ]

    def error() -> float:
        found = closed_form.with_states(network, telling, DraftVocabulary.of(head, torch.arange(DRAFT_VOCAB)))
        return sum(float((states(one) - rows).square().sum()) for one, rows in zip(found, last, strict=True))

    improved = error()
    monkeypatch.setattr(closed_form, "STATE_ROUNDS", 0)
    assert improved < 0.8 * error()


def four_of(logits: Tensor) -> TopK:
    sums, top = logits.logsumexp(-1), logits.topk(4)
    return TopK(top.indices, top.values - sums[:, None], sums)


def _with_auxiliary(sample: Sample, last: Tensor) -> Sample:
    """With auxiliary states that tell the next row's last hidden state."""
    aux = torch.zeros_like(sample.aux.decoded())
    aux[len(aux) - len(last) : -1, : last.shape[1]] = last[1:]
    return replace(sample, aux=EncodedRows.of(aux))


def test_rows_that_no_regression_predicts_keep_their_first_estimate(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = untrained(target)
    later = [replace(sample, first_output=sample.first_output + 3) for sample in likeliest(target, range(4))]
    improved = closed_form.with_states(network, later, vocabulary(target))
    monkeypatch.setattr(closed_form, "STATE_ROUNDS", 0)
    first = closed_form.with_states(network, later, vocabulary(target))

    for one, other in zip(improved, first, strict=True):
        torch.testing.assert_close(states(one)[:3], states(other)[:3], rtol=0.02, atol=0.02)
        assert not torch.allclose(states(one)[3:], states(other)[3:], rtol=0.02, atol=0.02)


def states(sample: Sample) -> Tensor:
    assert isinstance(sample.teacher, LastHidden)
    return sample.teacher.states.float()


def test_samples_of_both_forms_are_fitted_together(target: Path, samples: list[Sample]) -> None:
    both, one = untrained(target), untrained(target)

    assert closed_form.fit(both, [*samples[:8], *likeliest(target, range(8, 16))], vocabulary(target), num_steps=3)
    assert closed_form.fit(one, samples[:8], vocabulary(target), num_steps=3)

    assert not torch.equal(both.fc.weight, one.fc.weight)
    assert acceptance_length(both, samples[16:]) > acceptance_length(untrained(target), samples[16:]) + 0.5


def test_probabilities_whose_logits_are_not_told_change_nothing(target: Path) -> None:
    network = untrained(target)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    assert not closed_form.fit(network, likeliest(target, range(2), has_sums=False), vocabulary(target), num_steps=3)

    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("value", [3e38, float("nan")])
def test_a_sample_of_another_scale_costs_nothing(target: Path, samples: list[Sample], value: float) -> None:
    bad = replace(samples[0], aux=EncodedRows.of(torch.full_like(samples[0].aux.decoded(), value)))
    network, other = untrained(target), untrained(target)

    assert closed_form.fit(network, [bad, *samples[1:9]], vocabulary(target), num_steps=3)
    assert closed_form.fit(other, samples[1:9], vocabulary(target), num_steps=3)

    assert torch.equal(network.fc.weight, other.fc.weight)


def test_values_that_overflow_are_not_fitted(target: Path, samples: list[Sample]) -> None:
    bad = [replace(sample, aux=EncodedRows.of(torch.full_like(sample.aux.decoded(), 3e38))) for sample in samples[:4]]
    assert not closed_form.fit(untrained(target), bad, vocabulary(target), num_steps=3)
