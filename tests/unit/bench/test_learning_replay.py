"""The replay of `bench/learning`: what a stream is, what an arm learns from it, and when it publishes."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from bench.learning import delay, figures, kinds, streams
from bench.learning import replay as replay_module
from bench.learning.arms import AURORA, NO_CLOSED_FORM, OURS, SHIPPED, Arm
from bench.learning.replay import Memory, Replay, Run, accepted_when_sampled
from bench.learning.static import Split
from tests.support.tiny_target import DRAFT_VOCAB, make_tiny_target
from tests.support.traces import TraceMaker

from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import num_tokens

FAST = replace(NO_CLOSED_FORM, evaluation_every=4, evaluate_steps=8, steps_per_request=2.0)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> TraceMaker:
    return TraceMaker(make_tiny_target(tmp_path_factory.mktemp("models") / "target"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    return read_head(make_tiny_target(tmp_path_factory.mktemp("models") / "head"))


def samples(maker: TraceMaker, seeds: range) -> list[Sample]:
    return [read_sample(maker.data(seed), maker.expected) for seed in seeds]


def replayed(arm: Arm, maker: TraceMaker, target: TargetHead, monkeypatch: pytest.MonkeyPatch, length: int) -> Run:
    monkeypatch.setattr(replay_module, "DRAFT_VOCAB", DRAFT_VOCAB)
    held_out = {"rule": samples(maker, range(1000, 1008))}
    return Replay(arm, target, held_out, seed=1).run(samples(maker, range(length)), lambda _: None)


def test_a_draft_that_learned_is_published_and_needs_fewer_steps_for_what_comes_later(
    maker: TraceMaker, target: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replayed(FAST, maker, target, monkeypatch, 64)
    tokens = [num_tokens(one) for one in samples(maker, range(64))]
    assert run.published
    assert run.online[:8] == tuple(tokens[:8]), "without a draft every token is a step"
    assert sum(run.online[-8:]) < sum(tokens[-8:]) / 1.2
    assert sum(run.checkpoints[-1].steps["rule"]) < sum(run.checkpoints[0].steps["rule"]) / 1.2


def test_the_simulation_of_waiting_judges_drafts_when_an_arm_does(
    maker: TraceMaker, target: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replayed(OURS, maker, target, monkeypatch, 36)
    due = [n for n, now in enumerate(delay.looks(["rule"] * 36), 1) if now.is_estimate or now.is_fit]
    assert sorted({n for n, _ in run.looks}) == due


def test_a_draft_in_closed_form_serves_after_sixteen_requests(
    maker: TraceMaker, target: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replayed(OURS, maker, target, monkeypatch, 20)
    assert run.published == (16,), "of which the ninth is held out"
    (requests, sentence), *_ = run.looks
    assert requests == 16
    assert " % better than no draft for today's traffic" in sentence


def test_the_same_seed_gives_the_same_run(
    maker: TraceMaker, target: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (replayed(FAST, maker, target, monkeypatch, 16) for _ in range(2))
    assert first.online == second.online
    assert [one.steps for one in first.checkpoints] == [one.steps for one in second.checkpoints]


def test_aurora_swaps_after_a_number_of_requests_and_uses_each_sample_once(
    maker: TraceMaker, target: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replayed(replace(AURORA, publish_every=16), maker, target, monkeypatch, 40)
    assert run.published == (16, 32)


def test_a_held_out_request_is_never_learned_from(maker: TraceMaker) -> None:
    memory = Memory()
    for n, sample in enumerate(samples(maker, range(12))):
        memory.add(sample, is_evaluation=n % 3 == 2)
    rng = random.Random(0)
    learned = {sample.trace_id for _ in range(20) for sample in memory.batch(SHIPPED, rng)}
    held_out = {sample.trace_id for sample in memory.evaluation()}
    assert len(held_out) == 4
    assert learned.isdisjoint(held_out)


def test_streams_name_a_kind_for_each_request() -> None:
    assert streams.scratch("math", 5).order == ("math",) * 5
    assert streams.shift("math", 5).kinds[0] == "math"
    ordered = streams.ordered(("a", "b"), 9).order
    assert ordered == ("a",) * 3 + ("b",) * 3 + ("a",) * 3
    drift = streams.drift(("a", "b", "c"), 300, seed=1).order
    assert Counter(drift[:50])["a"] > 30
    assert Counter(drift[-50:])["c"] > 30


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_kinds_have_different_requests_to_learn_from_and_to_measure_on(kind: str) -> None:
    """As many as the bench asks for by default."""
    training, held_out = (kinds.requests(kind, n, held_out=held) for n, held in ((400, False), (48, True)))
    assert len(set(training)) == 400
    assert set(training).isdisjoint(held_out)


def test_an_interval_is_around_the_ratio_of_sums_and_narrow_for_equal_requests() -> None:
    equal = figures.acceptance_length([100] * 10, [[50] * 10])
    assert (equal.mean, equal.low, equal.high) == (2.0, 2.0, 2.0)
    mixed = figures.acceptance_length([100] * 10, [[100] * 5 + [50] * 5])
    assert mixed.low < mixed.mean < mixed.high


def test_a_paired_comparison_does_not_see_how_hard_the_requests_are() -> None:
    gain = figures.relative([[10, 100, 1000]], [[20, 200, 2000]])
    assert (gain.mean, gain.low, gain.high) == (2.0, 2.0, 2.0)


def test_a_surplus_is_what_is_accepted_beyond_the_token_that_a_step_yields_anyway() -> None:
    share = figures.surplus([100] * 10, [[90] * 10, [70] * 10], [[50] * 10])
    assert share.mean == pytest.approx(0.25)
    assert share.low == pytest.approx(share.high)


def test_a_dip_counts_against_the_first_checkpoint_and_what_was_forgotten_against_the_best_one() -> None:
    checkpoints = [[[100, 100]], [[125, 125]], [[50, 50]], [[80, 80]]]
    assert figures.lowest_of_first(checkpoints).mean == pytest.approx(0.8)
    assert figures.least_kept(checkpoints).mean == pytest.approx(0.625)
    assert figures.least_kept(checkpoints[:2]).mean == pytest.approx(0.8)


def test_after_a_shift_each_batch_rehearses_what_made_the_draft_that_serves_and_nothing_that_was_held_out(
    maker: TraceMaker, target: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    monkeypatch.setattr(Learner, "train", lambda _, batch: batches.append({one.trace_id for one in batch}))
    token_ids = torch.arange(DRAFT_VOCAB)
    draft = Learner(target, target.draft(draft_vocab_size=DRAFT_VOCAB), token_ids, FAST.hyper).network
    learned, _, held_out = Split.of(samples(maker, range(20)))
    new = samples(maker, range(100, 104))
    replay = Replay(replace(FAST, evaluate_steps=1000), target, {}, seed=1)
    replay.start_from(draft, learned, held_out)
    replay.run(new, lambda _: None)
    old_ids, new_ids = ({one.trace_id for one in group} for group in (learned, new))
    assert len(batches) == 8
    assert all(batch & old_ids and batch & new_ids and batch <= old_ids | new_ids for batch in batches)


def test_a_learned_draft_is_accepted_more_often_when_sampled(
    maker: TraceMaker, target: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = Learner(target, target.draft(draft_vocab_size=512), torch.arange(512), Hyperparameters()).network
    before = [accepted_when_sampled(untrained, target, one) for one in samples(maker, range(1000, 1008))]
    after = replayed(OURS, maker, target, monkeypatch, 20).sampled["rule"]
    assert all(0.0 <= one <= 1.0 for one in (*before, *after))
    assert sum(after) > 2 * sum(before)
    assert not replayed(OURS, maker, target, monkeypatch, 4).sampled, "nothing serves yet"
