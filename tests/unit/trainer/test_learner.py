"""The learner lowers the loss of a learnable rule, survives what is not a number, and goes on where it stopped."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker

from updraft_draft.target_weights import read_head
from updraft_trainer.estimate import num_tokens, verify_steps
from updraft_trainer.learner import MAX_BAD_STEPS, Hyper, Learner
from updraft_trainer.sample import Sample, read_sample


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def samples(target: Path) -> list[Sample]:
    maker = TraceMaker(target)
    return [read_sample(maker.data(seed), maker.expected) for seed in range(12)]


def make_learner(target: Path, **hyper: float | str | bool) -> Learner:
    head = read_head(target)
    config = head.config.draft(draft_vocab_size=DRAFT_VOCAB)
    return Learner(head, config, torch.arange(DRAFT_VOCAB), Hyper(learning_rate=3e-3, **hyper))  # type: ignore[arg-type]


def acceptance_length(learner: Learner, samples: list[Sample]) -> float:
    return sum(map(num_tokens, samples)) / sum(verify_steps(learner.network, samples, lookahead=3))


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "acceptance"])
def test_a_rule_is_learnt_and_held_out_text_needs_fewer_steps(target: Path, samples: list[Sample], loss: str) -> None:
    learner = make_learner(target, loss=loss)
    before = acceptance_length(learner, samples[8:])
    losses = [learner.train(samples[:8]).loss for _ in range(40)]
    assert losses[-1] < losses[0]
    assert acceptance_length(learner, samples[8:]) > before + 0.3


def test_a_step_on_hidden_states_that_are_not_finite_changes_nothing(target: Path, samples: list[Sample]) -> None:
    learner = make_learner(target)
    learner.train(samples[:4])
    before = {name: p.clone() for name, p in learner.network.named_parameters()}
    bad = replace(samples[0], aux=torch.full_like(samples[0].aux, float("nan")))
    report = learner.train([bad])
    assert report.is_skipped
    assert learner.step == 1
    assert all(torch.equal(p, before[name]) for name, p in learner.network.named_parameters())


def test_after_several_bad_steps_the_last_good_weights_return(target: Path, samples: list[Sample]) -> None:
    learner = make_learner(target)
    learner.mark_good()
    good = learner.network.fc.weight.detach().clone()
    learner.train(samples[:4])
    bad = replace(samples[0], last=torch.full_like(samples[0].last, float("inf")))
    for _ in range(MAX_BAD_STEPS):
        assert learner.train([bad]).is_skipped
    assert torch.equal(learner.network.fc.weight, good)
    assert not learner.train(samples[:4]).is_skipped


def test_a_resumed_learner_takes_the_same_next_step(target: Path, samples: list[Sample]) -> None:
    one, other = make_learner(target), make_learner(target)
    for _ in range(3):
        one.train(samples[:4])
    other.load_state_dict(deepcopy(one.state_dict()))
    first, second = one.train(samples[4:8]), other.train(samples[4:8])
    assert first == second
    assert torch.equal(one.network.fc.weight, other.network.fc.weight)


def test_only_what_is_asked_for_is_trained(target: Path, samples: list[Sample]) -> None:
    frozen, trained = make_learner(target), make_learner(target, trains_head=True)
    before = frozen.network.lm_head.weight.detach().clone()
    frozen.train(samples[:4])
    trained.train(samples[:4])
    assert torch.equal(frozen.network.lm_head.weight, before)
    assert not torch.equal(trained.network.lm_head.weight, before)


def test_a_batch_without_a_token_of_the_draft_vocabulary_is_no_step(target: Path, samples: list[Sample]) -> None:
    learner = make_learner(target)
    foreign = replace(samples[0], ids=torch.full_like(samples[0].ids, 400))
    assert learner.train([foreign]).num_rows == 0
    assert learner.step == 0


def test_corrections_weigh_more(target: Path, samples: list[Sample]) -> None:
    marked = [replace(s, corrections=s.corrections & (torch.arange(len(s.ids)) % 3 == 0)) for s in samples[:4]]
    plain, weighted = make_learner(target, correction_weight=0.0), make_learner(target, correction_weight=5.0)
    assert plain.train(marked).loss != weighted.train(marked).loss
