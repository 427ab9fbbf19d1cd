"""Two ranks fit, judge and restart one draft. They are processes that talk by gloo; the registry is a real one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.support.ranks import run_ranks
from tests.support.traces import TraceMaker, trace_id
from tests.support.trainer_bench import OPTIONS, Bench, bench, publish_elsewhere
from torch import Tensor

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.lifecycle import Stop
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.data.sample import read_sample
from updraft_trainer.learning.learner import Learner
from updraft_trainer.loop import Trainer
from updraft_trainer.publishing.publish import Candidate

pytestmark = pytest.mark.lasts(120)

Scenario = Callable[[Bench], Awaitable[Trainer]]


@dataclass(frozen=True)
class Traffic:
    """Requests that one rank has stored: seeds of those to train on, and of held-out ones."""

    training: tuple[int, int]
    held_out: tuple[int, int] = (0, 0)
    rule: int = 0


@dataclass(frozen=True)
class Outcome:
    """One rank in the end."""

    weights: dict[str, Tensor]
    step: int
    uses: dict[str, int]
    stored: list[str]


def live(
    ranks: Ranks, target: Path, folder: Path, port: int, traffic: Sequence[Traffic], scenario: Scenario
) -> Outcome:
    return asyncio.run(_live(ranks, target, folder, port, traffic[ranks.rank], scenario))


async def _live(ranks: Ranks, target: Path, folder: Path, port: int, traffic: Traffic, scenario: Scenario) -> Outcome:
    own = folder / f"rank-{ranks.rank}"
    async with bench(own, target, TraceMaker(target), port=port, speculator="default", ranks=ranks) as made:
        made.admit(*traffic.training, rule=traffic.rule)
        made.admit(*traffic.held_out, rule=traffic.rule, evaluation=True)
        if not ranks.leads:
            follower = made.follower()
            await follower.run(Stop())
            assert follower.learner is not None
            return _outcome(made, follower.learner, follower.history.uses)
        trainer = await scenario(made)
        made.components.followers.end()
        return _outcome(made, trainer.learner, trainer.history.uses)


def _outcome(made: Bench, learner: Learner, uses: dict[str, int]) -> Outcome:
    weights = {name: one.clone() for name, one in learner.network.state_dict().items()}
    return Outcome(weights, learner.step, uses, made.replay.training_ids())


async def started(made: Bench, num_elsewhere: int, num_held_out: int = 0) -> Trainer:
    """A trainer whose follower has its learner; heartbeats would tell rank 0 of so many requests elsewhere."""
    made.components.record.elsewhere = (num_elsewhere, num_held_out)
    trainer = made.trainer(await made.initial())
    made.components.followers.load_learner(trainer.learner, uses=trainer.history.uses)
    return trainer


def assert_equal(outcomes: Sequence[Outcome]) -> None:
    first, second = outcomes
    assert first.step == second.step
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


async def fit(made: Bench) -> Trainer:
    trainer = await started(made, num_elsewhere=16)
    candidate = await made.publish_closed_form(trainer)
    assert len(candidate.estimate.pairs) == OPTIONS.thresholds.min_samples
    own, other = ([(seed + 100 * rule, rule) for seed in range(12)] for rule in range(2))
    assert distance(made, trainer, candidate, [*own, *other]) < 0.01
    assert distance(made, trainer, candidate, own) > 0.1
    return trainer


def distance(made: Bench, trainer: Trainer, candidate: Candidate, traces: Sequence[tuple[int, int]]) -> float:
    """The relative distance of a candidate from the draft in closed form of these traces, given by seed and rule."""
    data = [made.traces.data(seed, rule=rule) for seed, rule in traces]
    draft = trainer.learner.closed_form([read_sample(one, made.traces.expected) for one in data])
    assert draft is not None
    found, expected = (one.fc.weight.detach().float() for one in (candidate.network, draft))
    return float((found - expected).norm() / expected.norm())


def test_a_draft_in_closed_form_is_fitted_to_the_requests_of_all_ranks(
    tiny_target: Path, tmp_path: Path, registry_port: int
) -> None:
    """Each but its newest, which judge it: four of each rank."""
    traffic = [Traffic((0, 16)), Traffic((100, 116), rule=1)]
    outcomes = run_ranks(live, tiny_target, tmp_path, registry_port, traffic, fit)
    assert_equal(outcomes)
    assert sorted(outcomes[1].uses) == sorted(outcomes[1].stored[:12])


async def fit_to_few(made: Bench) -> Trainer:
    trainer = await started(made, num_elsewhere=7)
    assert await trainer.fit() is None
    made.components.record.elsewhere = (8, 0)
    await made.publish_closed_form(trainer)
    return trainer


def test_sixteen_requests_of_all_ranks_together_make_a_first_version(
    tiny_target: Path, tmp_path: Path, registry_port: int
) -> None:
    assert_equal(
        run_ranks(live, tiny_target, tmp_path, registry_port, [Traffic((0, 8)), Traffic((100, 108))], fit_to_few)
    )


async def publish_trained(made: Bench) -> Trainer:
    trainer, followers = await started(made, num_elsewhere=64, num_held_out=4), made.components.followers
    while trainer.train():
        pass
    learned = followers.uses(trainer.history.uses)
    made.admit(64, 68)
    trained = trainer.learner.average.fc.weight.bfloat16()
    candidate = await trainer.fit()
    assert candidate is not None
    assert torch.equal(candidate.network.fc.weight.bfloat16(), trained)
    assert learned.keys() == trace_ids([*range(64), *range(100, 164)])
    held_out = trace_ids([*range(1000, 1004), *range(1100, 1104)], evaluation=True)
    assert set(candidate.estimate.trace_ids) == held_out | trace_ids(range(64, 68))
    assert followers.uses(trainer.history.uses) == learned
    await trainer.publish(candidate)
    assert [version.version for version in await made.versions()] == [1]
    assert trainer.train()
    return trainer


def trace_ids(seeds: Sequence[int], *, evaluation: bool = False) -> set[str]:
    return {trace_id(seed, evaluation=evaluation).hex() for seed in seeds}


def test_a_draft_that_all_ranks_train_is_published_at_a_fit_by_requests_that_none_has_learned(
    tiny_target: Path, tmp_path: Path, registry_port: int
) -> None:
    """Only rank 0 has new ones. Then all go on training it, and none counts what the draft in closed form was fitted to."""
    traffic = [Traffic((0, 64), (1000, 1004)), Traffic((100, 164), (1100, 1104))]
    outcomes = run_ranks(live, tiny_target, tmp_path, registry_port, traffic, publish_trained)
    assert_equal(outcomes)


async def get_worse(made: Bench) -> Trainer:
    trainer = await started(made, num_elsewhere=16, num_held_out=8)
    serving = await made.publish_closed_form(trainer)
    knows_nothing = {name: torch.zeros_like(one) for name, one in trainer.learner.network.named_parameters()}
    trainer.learner.start_from(trainer.learner.network.state_dict() | knows_nothing)
    made.components.followers.load_learner(trainer.learner)
    made.clock.advance(15.0)
    assert await trainer.evaluate() is None
    assert torch.equal(trainer.learner.network.fc.weight.bfloat16(), serving.network.fc.weight.bfloat16())
    assert trainer.history.origin == "version 1"
    assert trainer.train()
    return trainer


def test_ranks_whose_draft_got_worse_go_on_together_from_what_serves(
    tiny_target: Path, tmp_path: Path, registry_port: int
) -> None:
    traffic = [Traffic((0, 16), (1000, 1008)), Traffic((100, 116), (1100, 1108))]
    outcomes = run_ranks(live, tiny_target, tmp_path, registry_port, traffic, get_worse)
    assert_equal(outcomes)
    assert outcomes[1].step == 1
    assert outcomes[1].weights["fc.weight"].any()


async def start_over(target: Path, made: Bench) -> Trainer:
    await publish_elsewhere(made, target, torch.arange(100))
    small = replace(made, spec=replace(made.spec, shape=ShapeChoice(draft_vocab_size=32)))
    trainer = await started(small, num_elsewhere=16)
    for _ in range(OPTIONS.schedule.evaluate_steps):
        assert trainer.train()
    assert len(trainer.learner.network.token_ids) == 100
    state = made.components.registry.state
    assert state is not None
    made.components.registry.state = replace(state, stable=0, is_unloadable=True)
    await trainer.evaluate()
    assert trainer.history.uses == {}
    assert trainer.history.origin == "random weights"
    assert trainer.train()
    return trainer


def test_ranks_start_over_together_when_no_pod_can_load_the_published_draft(
    tiny_target: Path, tmp_path: Path, registry_port: int
) -> None:
    """Rank 0 has too few requests to choose a vocabulary by; those of rank 1 speak of other tokens too."""
    traffic = [Traffic((0, 4)), Traffic((100, 116), rule=1)]
    outcomes = run_ranks(live, tiny_target, tmp_path, registry_port, traffic, partial(start_over, tiny_target))
    assert_equal(outcomes)
    first, second = outcomes
    assert first.step == OPTIONS.schedule.evaluate_steps + 1
    assert len(second.weights["d2t"]) == 32
    assert set(second.uses.values()) == {1}, "of the new draft only"
