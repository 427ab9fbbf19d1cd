import asyncio
import json
import random
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.support.disk import file_size_limit
from tests.support.likeliest import show_likeliest
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.registry import PodStream
from tests.support.rpc import listening, service
from tests.support.traces import TraceMaker
from tests.support.trainer_bench import OPTIONS, Bench, bench, publish_elsewhere
from tests.support.wait import LONG_S, until, wait_until
from torch import Tensor

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1 import registry_pb2_grpc
from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis import rpc
from updraft_chassis.access import Access, Tokens
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Conflict
from updraft_chassis.lifecycle import Stop
from updraft_draft import checkpoint, vocabulary
from updraft_trainer.data.replay import IncomingTrace
from updraft_trainer.data.sample import read_sample
from updraft_trainer.following import Followers
from updraft_trainer.initial_state import InitialState, resume
from updraft_trainer.learning.compiled import Compiler
from updraft_trainer.learning.compute import Compute
from updraft_trainer.loop import Trainer
from updraft_trainer.publishing.evaluator import Evaluator
from updraft_trainer.publishing.publish import Candidate, Publisher
from updraft_trainer.states.state import State, States, TrainingHistory

pytestmark = pytest.mark.lasts(120)

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub


class Registry(Process):
    """A real registry; `start` returns once it serves."""

    def __init__(self, folder: Path, port: int) -> None:
        variables = {
            "UPDRAFT_REGISTRY_DATA_DIR": str(folder / "registry"),
            "UPDRAFT_REGISTRY_PORT": str(port),
            "UPDRAFT_REGISTRY_METRICS_PORT": "0",
            "UPDRAFT_REGISTRY_STRATEGY": "Immediate",
            "UPDRAFT_REGISTRY_SETTLE_SECONDS": "0",
        }
        self.port = port
        super().__init__("updraft_registry", variables, folder / "registry.log")

    def start(self) -> None:
        count = self.log().count("Registry serves")
        super().start()
        wait_until(lambda: self.log().count("Registry serves") > count, what="the registry's start")


@pytest.fixture(scope="module")
def shared_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a registry in which every test has a speculator of its own."""
    port = free_port()
    with Registry(tmp_path_factory.mktemp("registry"), port):
        yield port


@pytest.fixture
async def whole(tmp_path: Path, tiny_target: Path, traces: TraceMaker, shared_registry: int) -> AsyncIterator[Bench]:
    speculator = f"s-{uuid.uuid4().hex[:8]}"
    async with bench(tmp_path, tiny_target, traces, port=shared_registry, speculator=speculator) as made:
        yield made


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry of the test's own, not started."""
    made = Registry(tmp_path, free_port())
    yield made
    made.kill()


@pytest.fixture
async def alone(tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry: Registry) -> AsyncIterator[Bench]:
    """With a registry that the test starts and kills."""
    async with bench(tmp_path, tiny_target, traces, port=registry.port, speculator="default") as made:
        yield made


async def test_the_first_draft_is_published_once_it_beats_no_draft(whole: Bench) -> None:
    await whole.train(await whole.started())
    first = (await whole.versions())[0]
    manifest = first.manifest
    assert manifest.evaluation.baseline_version == 0
    assert manifest.evaluation.lookahead == 3
    num_judges = len(manifest.evaluation.samples)  # held out, or not trained on yet
    assert 12 <= num_judges <= 12 + OPTIONS.thresholds.min_samples
    assert all(s.baseline_steps == s.tokens == 23 for s in manifest.evaluation.samples)
    assert manifest.source == pb.SOURCE_TRAINER
    assert manifest.provenance.samples > 0
    assert manifest.provenance.step == 1, "a draft in closed form is judged at once"
    assert manifest.provenance.first_trace_id in whole.replay.training_ids()
    assert manifest.target_fingerprint == whole.traces.target_fingerprint
    assert whole.published("stable") >= 1


async def test_the_first_version_comes_from_sixteen_requests_without_an_optimizer_step(whole: Bench) -> None:
    whole.admit(0, 15)
    trainer = whole.trainer(await whole.initial())
    assert await trainer.fit() is None
    whole.admit(15, 16)
    candidate = await trainer.fit()
    assert candidate is not None
    await trainer.publish(candidate)
    (first,) = await whole.versions()
    assert first.phase == pb.PHASE_STABLE
    assert first.manifest.provenance.step == 0
    assert len(first.manifest.evaluation.samples) == 8
    assert await trainer.fit() is None, "nothing new to fit"


class NotingFollowers(Followers):
    """Note of each fit that ends whether its draft is used."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[bool] = []

    def end_fit(self, *, is_used: bool) -> int:
        self.ends.append(is_used)
        return super().end_fit(is_used=is_used)


async def test_every_fit_ends_at_the_other_ranks_also_one_whose_draft_is_not_used(whole: Bench) -> None:
    followers = NotingFollowers()
    made = replace(whole, components=replace(whole.components, followers=followers))
    made.admit(0, 16)
    trainer = made.trainer(await made.initial())
    await made.publish_closed_form(trainer)
    used = dict(trainer.history.uses)
    assert followers.ends == [True]

    made.admit(16, 64)
    assert await trainer.fit() is None
    assert (followers.ends, trainer.history.uses) == ([True, False], used)


async def test_held_out_requests_count_among_the_sixteen_of_the_first_version(whole: Bench) -> None:
    whole.admit(0, 13)
    whole.admit(1000, 1002, evaluation=True)
    trainer = whole.trainer(await whole.initial())
    assert await trainer.fit() is None
    whole.admit(1002, 1003, evaluation=True)
    await whole.publish_closed_form(trainer)
    (first,) = await whole.versions()
    assert first.phase == pb.PHASE_STABLE
    assert len(first.manifest.evaluation.samples) == 8


@pytest.mark.parametrize("num_training", [0, 7], ids=str)
async def test_no_draft_is_fitted_to_fewer_requests_than_judge_one(whole: Bench, num_training: int) -> None:
    learner = whole.spec.learner(torch.arange(128))
    trainer = whole.trainer(InitialState(learner=learner, history=TrainingHistory(), rng=random.Random(0)))
    whole.admit(0, num_training)
    whole.admit(1000, 1040, evaluation=True)
    await whole.refresh()
    assert await trainer.fit() is None
    whole.admit(num_training, 8)
    await whole.publish_closed_form(trainer)


async def test_after_a_shift_training_goes_on_from_a_closed_form_that_is_better(whole: Bench) -> None:
    whole.admit(0, 32)  # and nothing held out that a draft for the new traffic is worse for
    trainer = whole.trainer(await whole.initial())
    await whole.publish_closed_form(trainer)
    whole.admit(2000, 2040, rule=1)
    before = trainer.learner.average
    candidate = await whole.publish_closed_form(trainer)
    assert trainer.learner.average is not before
    assert torch.equal(trainer.learner.network.fc.weight.bfloat16(), candidate.network.fc.weight.bfloat16())


async def test_requests_that_a_closed_form_was_fitted_to_do_not_judge_what_comes_of_it(whole: Bench) -> None:
    whole.admit(0, 32)
    trainer = whole.trainer(await whole.initial())
    await whole.publish_closed_form(trainer)
    judges = {one.trace_id for one in whole.replay.untrained_batch(trainer.history.uses, count=100)}
    assert judges
    assert judges <= set(whole.replay.training_ids()[-OPTIONS.thresholds.min_samples :]), "those that judged it"


async def old_and_new(whole: Bench) -> Trainer:
    """A trainer whose draft for old traffic serves, before the first step on new traffic, for which a fit is due."""
    whole.admit(0, 32, domain="old")
    whole.admit(1000, 1016, evaluation=True, domain="old")
    trainer = whole.trainer(await whole.initial())
    await whole.train(trainer)
    whole.admit(2000, 2064, rule=1, domain="new")
    whole.admit(3000, 3016, rule=1, evaluation=True, domain="new")
    return trainer


async def test_a_fit_publishes_the_draft_in_training_if_that_is_surely_better(whole: Bench) -> None:
    trainer = await old_and_new(whole)
    for _ in range(80):
        assert trainer.train()
    trained = trainer.learner.average.fc.weight.bfloat16()
    candidate = await trainer.fit()
    assert candidate is not None
    assert torch.equal(candidate.network.fc.weight.bfloat16(), trained)
    num_versions = len(await whole.versions())
    await trainer.publish(candidate)
    assert len(await whole.versions()) == num_versions + 1


async def test_of_two_drafts_that_are_good_enough_at_a_fit_that_which_looks_better_is_published(whole: Bench) -> None:
    whole.admit(0, 32)  # and nothing held out that a draft for the new traffic is worse for
    trainer = whole.trainer(await whole.initial())
    await whole.publish_closed_form(trainer)
    whole.admit(2000, 2064, rule=1)
    for _ in range(120):
        assert trainer.train()
    trained = trainer.learner.average.fc.weight.bfloat16()
    candidate = await trainer.fit()
    assert candidate is not None
    assert torch.equal(candidate.network.fc.weight.bfloat16(), trained)


async def test_requests_that_the_draft_in_training_has_learned_do_not_judge_it_at_a_fit(whole: Bench) -> None:
    trainer = await old_and_new(whole)
    while trainer.train():
        pass
    learned = set(whole.replay.training_ids())
    whole.admit(2064, 2068, rule=1, domain="new")
    trained = trainer.learner.average.fc.weight.bfloat16()
    candidate = await trainer.fit()
    assert candidate is not None
    assert torch.equal(candidate.network.fc.weight.bfloat16(), trained)
    judges = set(candidate.estimate.trace_ids)
    assert judges.isdisjoint(learned)
    assert judges > set(whole.replay.training_ids()) - learned, "the four newest, beside held-out ones"
    shares = sum(pair.weight for pair in candidate.estimate.pairs if pair.kind == "domain:new") / len(judges)
    assert shares == pytest.approx(1.0), "as of the newest requests, all of which are of the new kind"


async def test_a_draft_that_got_worse_starts_over_from_what_serves_once_per_version(whole: Bench) -> None:
    whole.admit(0, 32)
    trainer = whole.trainer(await whole.initial())
    serving = await whole.publish_closed_form(trainer)
    knows_nothing = {name: torch.zeros_like(one) for name, one in trainer.learner.network.named_parameters()}
    for is_restarted in (True, False):
        trainer.learner.start_from(trainer.learner.network.state_dict() | knows_nothing)
        first = 1000 + 8 * is_restarted
        whole.admit(first, first + 8, evaluation=True)
        whole.clock.advance(15.0)
        assert await trainer.evaluate() is None
        weight = trainer.learner.network.fc.weight.bfloat16()
        assert torch.equal(weight, serving.network.fc.weight.bfloat16()) == is_restarted


async def test_what_is_published_is_what_the_engine_will_hold(whole: Bench) -> None:
    await whole.train(await whole.started())
    version = (await whole.versions())[-1]
    folder = await whole.components.registry.fetch(version.version)
    _, tensors = checkpoint.load(folder)
    specs = checkpoint.tensor_specs(sorted(tensors.items()))
    assert tensors_digest(specs) == version.manifest.tensors_digest
    assert checkpoint.vocabulary_fingerprint(tensors["d2t"] + torch.arange(128)) == (
        version.manifest.draft_vocabulary_fingerprint
    )


async def test_after_a_shift_the_next_version_beats_the_one_that_serves(whole: Bench) -> None:
    trainer = await whole.started()
    await whole.train(trainer)
    before = await whole.versions()
    whole.admit(2000, 2040, rule=1)
    whole.admit(3000, 3016, rule=1, evaluation=True)
    await whole.train(trainer)
    after = await whole.versions()
    assert len(after) > len(before)
    newest = after[-1].manifest
    assert after[-1].phase == pb.PHASE_STABLE
    assert newest.parent_version == newest.evaluation.baseline_version == after[-2].version
    assert sum(s.candidate_steps for s in newest.evaluation.samples) < sum(
        s.baseline_steps for s in newest.evaluation.samples
    )


async def test_a_draft_for_todays_traffic_is_published_though_requests_of_older_traffic_are_still_held_out(
    whole: Bench,
) -> None:
    whole.admit(0, 32, domain="old")
    whole.admit(1000, 1016, evaluation=True, domain="old")
    trainer = whole.trainer(await whole.initial())
    await whole.train(trainer)
    before = await whole.versions()
    whole.admit(2000, 2072, rule=1, domain="new")
    whole.admit(3000, 3008, rule=1, evaluation=True, domain="new")
    await whole.train(trainer)
    after = await whole.versions()
    assert len(after) > len(before)
    newest = after[len(before)].manifest.evaluation
    weights = {
        kind: [one.weight for one in newest.samples if one.kind == kind] for kind in ("domain:old", "domain:new")
    }
    assert weights == {"domain:old": [0.0] * 16, "domain:new": [2.0] * 16}  # 8 held out, 8 not trained on yet
    assert after[len(before)].reason.endswith("over 16 requests")


async def test_acceptance_on_learned_requests_is_measured_beside_that_on_held_out_ones(whole: Bench) -> None:
    await whole.train(await whole.started())
    trained = whole.metrics.registry.get_sample_value("updraft_trainer_trained_acceptance_length_tokens")
    held_out = whole.metrics.registry.get_sample_value(
        "updraft_trainer_acceptance_length_tokens", {"role": "candidate"}
    )
    assert trained is not None
    assert held_out is not None
    assert 1.0 < held_out <= trained + 1e-9 <= 4.0 + 1e-9  # equal means of other weights differ by rounding


async def test_the_output_of_todays_traffic_outside_the_draft_vocabulary_is_measured(
    tmp_path: Path, tiny_target: Path, traces: TraceMaker, shared_registry: int
) -> None:
    speculator = f"s-{uuid.uuid4().hex[:8]}"
    async with bench(
        tmp_path, tiny_target, traces, port=shared_registry, speculator=speculator, vocab_size=16
    ) as small:
        trainer = await small.started()
        await small.train(trainer)
        unknown = small.metrics.registry.get_sample_value("updraft_trainer_unknown_tokens_ratio")
        judges = [read_sample(traces.data(seed, evaluation=True), traces.expected) for seed in range(1000, 1012)]
        outputs = [one.ids[one.first_output :] for one in judges]
        expected = vocabulary.unknown_share(outputs, trainer.learner.network.token_ids)
    assert 0.6 < expected < 1.0
    assert unknown == pytest.approx(expected, abs=0.1)  # the newest requests judged too


async def test_why_a_draft_is_not_published_is_known_to_the_registry(whole: Bench) -> None:
    async def waits(stored: int) -> bool:
        return await whole.trainer_message() == f"a first draft waits for 8 requests to learn from, has {stored}"

    assert await whole.trainer_message() == "the trainer waits for the first requests"
    whole.admit(0, 7, domain="old")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(whole.initial())
        await until(lambda: waits(7), what="the reason why there is no draft yet")
        whole.admit(7, 8, domain="old")
        whole.admit(1000, 1005, evaluation=True, domain="old")
    trainer = whole.trainer(waiting.result())
    assert await whole.trainer_message() == "no draft has been judged since the trainer started"
    await whole.train(trainer)
    state = await whole.state()
    assert "waits for 8 held-out requests of today's traffic, has 5" in state.trainer_message
    assert (state.learning.samples, state.learning.held_out) == (8, 5)
    assert state.learning.too_small == ""
    assert (state.learning.device, state.learning.world_size) == ("cpu (1 thread)", 1)
    whole.admit(8, 32, domain="old")
    while trainer.train():
        pass
    whole.admit(1005, 1008, evaluation=True, domain="old")
    whole.clock.advance(15.0)
    candidate = await trainer.evaluate()
    assert candidate is not None
    await trainer.publish(candidate)
    assert (await whole.trainer_message()).startswith("version 1 was published and serves: acceptance length ")
    whole.admit(2000, 2040, rule=1, domain="new")
    whole.admit(3000, 3016, rule=1, evaluation=True, domain="new")
    assert await trainer.fit() is None
    message = await whole.trainer_message()
    assert message.startswith("a draft in closed form is ")
    assert " % better than version 1 for today's traffic (" in message
    assert ", but surely worse for 'old' (" in message


async def test_pods_are_granted_what_the_trainer_can_use_and_less_of_it_the_more_is_stored(
    whole: Bench, shared_registry: int
) -> None:
    async def granted() -> float:
        whole.components.registry.set_demand(whole.components.demand.tokens_per_s())
        await whole.components.registry.report()
        return (await pod.receive()).capture.payload_tokens_per_second

    await whole.started()
    async with rpc.channel(f"127.0.0.1:{shared_registry}") as channel:
        pod = PodStream(channel)
        pod.identity.speculator = whole.identity.speculator
        await pod.report()
        await pod.receive()
        few = await granted()
        assert few == pytest.approx(whole.metrics.demand._value.get(), rel=0.05)
        whole.admit(1012, 1032, evaluation=True)
        assert 0.0 < await granted() < few
        await pod.end()


async def test_the_next_engine_shows_the_likeliest_tokens_and_its_traffic_is_learnt_too(whole: Bench) -> None:
    """A speculator whose engine was changed: the same draft goes on, on traces of both engines."""
    trainer = await whole.started()
    await whole.train(trainer)
    before, head = await whole.versions(), whole.spec.target.head
    shifted = [
        whole.traces.trace(seed, rule=1, evaluation=seed >= 3000) for seed in (*range(2000, 2040), *range(3000, 3016))
    ]
    data = [show_likeliest(one, head, k=8).SerializeToString() for one in shifted]
    whole.replay.admit([IncomingTrace(sample=read_sample(one, whole.traces.expected), data=one) for one in data])
    await whole.train(trainer)
    after = await whole.versions()
    assert len(after) > len(before)
    assert after[-1].phase == pb.PHASE_STABLE
    samples = after[-1].manifest.evaluation.samples
    assert sum(s.candidate_steps for s in samples) < sum(s.baseline_steps for s in samples)


async def test_a_rejected_candidate_is_not_sent_again_and_training_goes_on(whole: Bench) -> None:
    gate = pb.OfflineGate(min_samples=8, min_gain_percent=900.0, confidence=0.8)
    await whole.set_policy(pb.RolloutPolicy(strategy=pb.STRATEGY_IMMEDIATE, offline_gate=gate))
    trainer = await whole.started()
    await whole.train(trainer)
    (rejected,) = await whole.versions()
    assert rejected.phase == pb.PHASE_REJECTED
    assert whole.published("rejected") == 1
    step = trainer.learner.step
    whole.clock.advance(15.0)
    whole.admit(100, 140)
    await whole.train(trainer)
    assert trainer.learner.step > step
    digests = [version.manifest.tensors_digest for version in await whole.versions()]
    assert len(set(digests)) == len(digests) == 2


async def test_the_same_tensors_are_sent_only_once(whole: Bench) -> None:
    trainer = await whole.started()
    for _ in range(40):
        trainer.train()
    await whole.refresh()
    candidate = await trainer.evaluate()
    assert candidate is not None
    await trainer.publish(candidate)
    await trainer.publish(candidate)
    assert len(await whole.versions()) == 1
    assert whole.published("stable") == 1


async def test_while_a_version_is_pinned_nothing_is_published(whole: Bench) -> None:
    trainer = await whole.started()
    await whole.train(trainer)
    before = await whole.versions()
    await whole.pin(0)
    whole.admit(2000, 2040, rule=1)
    whole.admit(3000, 3016, rule=1, evaluation=True)
    await whole.train(trainer)
    assert len(await whole.versions()) == len(before)
    assert whole.published("withheld") >= 1
    with rpc.errors():
        await whole.stub.Unpin(pb.UnpinRequest(speculator=whole.identity.speculator), timeout=LONG_S)
    whole.admit(2040, 2080, rule=1)
    await whole.train(trainer)
    after = await whole.versions()
    assert len(after) > len(before)
    assert after[-1].phase == pb.PHASE_STABLE


async def test_the_baseline_follows_a_pin_to_an_older_version(whole: Bench) -> None:
    trainer = await whole.started()
    await whole.train(trainer)
    whole.admit(2000, 2040, rule=1)
    whole.admit(3000, 3016, rule=1, evaluation=True)
    await whole.train(trainer)
    assert len(await whole.versions()) >= 2
    await whole.pin(1)
    await whole.refresh()
    whole.clock.advance(15.0)
    whole.admit(3016, 3017, rule=1, evaluation=True)
    assert await trainer.evaluate() is None
    assert whole.components.evaluator.baseline.version == 1
    assert [path.name for path in (whole.folder / "drafts").iterdir()] == ["1"]


async def test_learning_goes_on_without_a_registry_and_publishes_when_it_is_back(
    alone: Bench, registry: Registry
) -> None:
    registry.start()
    trainer = await alone.started()
    registry.kill()
    for _ in range(25):
        assert trainer.train()
    candidate = await trainer.evaluate()
    assert candidate is not None
    await trainer.publish(candidate)
    assert alone.published("unavailable") == 1
    registry.start()
    await alone.train(trainer)
    assert (await alone.versions())[-1].phase == pb.PHASE_STABLE


async def test_a_registry_killed_in_the_middle_of_a_publication_gets_a_fresh_candidate_later(
    alone: Bench, registry: Registry
) -> None:
    registry.start()
    trainer = await alone.started()
    for _ in range(25):
        trainer.train()
    candidate = await trainer.evaluate()
    assert candidate is not None
    registry.pause()  # it takes bytes in and answers nothing
    async with asyncio.TaskGroup() as tasks:
        publication = tasks.create_task(trainer.publish(candidate))
        await until((alone.folder / "candidate" / checkpoint.WEIGHTS).exists)
        assert not publication.done()
        registry.kill()
    assert alone.published("unavailable") == 1
    registry.start()
    await alone.train(trainer)
    versions = await alone.versions()
    assert versions[-1].phase == pb.PHASE_STABLE
    assert all(version.manifest.provenance.step > candidate.step for version in versions)


async def test_a_disk_without_room_for_a_candidate_costs_that_candidate_only(
    whole: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = await whole.started()
    for _ in range(25):
        trainer.train()
    await whole.refresh()
    candidate = await trainer.evaluate()
    assert candidate is not None
    with file_size_limit(10_000):
        await trainer.publish(candidate)
    assert "the draft cannot be written to" in caplog.text
    assert whole.published("refused") == 1
    assert await whole.versions() == []
    whole.clock.advance(15.0)  # it waits as after a refusal
    await whole.train(trainer)
    assert (await whole.versions())[-1].phase == pb.PHASE_STABLE


async def test_a_new_trainer_goes_on_from_the_draft_that_serves(whole: Bench, tiny_target: Path) -> None:
    await publish_elsewhere(whole, tiny_target, torch.arange(100))
    trainer = await whole.started()
    assert trainer.history.uses == {}, "that draft cannot have learned from what has come since the start"
    await whole.train(trainer)
    versions = await whole.versions()
    assert len(versions) >= 2
    assert versions[1].manifest.parent_version == 1
    provenance = versions[1].manifest.provenance
    assert provenance.origin in ("version 1", "closed form")
    assert provenance.learning_rate == whole.spec.hyper.adaptation_rate
    assert len({version.manifest.draft_vocabulary_fingerprint for version in versions}) == 1


async def test_versions_list_the_tenants_that_they_learned_from_and_a_new_trainer_goes_on_with_these(
    whole: Bench, tiny_target: Path
) -> None:
    for seed in range(32):
        whole.admit(seed, seed + 1, tenant=2 - seed % 2)
    whole.admit(1000, 1012, evaluation=True, tenant=3)
    trainer = whole.trainer(await whole.initial())
    await whole.train(trainer)
    first = (await whole.versions())[0].manifest.provenance
    assert list(first.tenants) == [1, 2], "held-out requests judge drafts, and teach none"
    assert trainer.history.tenants == ["0000000000000001", "0000000000000002"]

    again = whole.trainer(await whole.initial())
    assert set(again.history.tenants) >= {f"{tenant:016x}" for tenant in first.tenants}


async def test_drafts_that_were_all_rejected_bind_no_new_trainer(
    whole: Bench, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory, traces: TraceMaker, shared_registry: int
) -> None:
    gate = pb.OfflineGate(min_samples=8, min_gain_percent=900.0, confidence=0.8)
    await whole.set_policy(pb.RolloutPolicy(strategy=pb.STRATEGY_IMMEDIATE, offline_gate=gate))
    await whole.train(await whole.started())
    assert (await whole.versions())[-1].phase == pb.PHASE_REJECTED
    await whole.set_policy(pb.RolloutPolicy(strategy=pb.STRATEGY_IMMEDIATE))
    folder, speculator = tmp_path_factory.mktemp("new"), whole.identity.speculator
    async with bench(folder, tiny_target, traces, port=shared_registry, speculator=speculator, vocab_size=100) as new:
        await new.train(await new.started())
        accepted = (await new.versions())[-1]
        assert accepted.phase == pb.PHASE_STABLE
        assert json.loads(accepted.manifest.config_json)["draft_vocab_size"] == 100


async def test_a_registry_with_drafts_of_another_target_ends_the_trainer(whole: Bench, tiny_target: Path) -> None:
    await publish_elsewhere(whole, tiny_target, torch.arange(100), is_target=False)
    with pytest.raises(Conflict, match="target sha256:other"):
        await whole.started()


async def test_training_goes_on_from_a_serving_draft_of_another_size(whole: Bench, tiny_target: Path) -> None:
    trainer = await whole.started()
    await publish_elsewhere(whole, tiny_target, torch.arange(100))
    await whole.train(trainer)
    assert len(trainer.learner.network.token_ids) == 100
    assert trainer.learner.learning_rate == whole.spec.hyper.adaptation_rate
    await trainer.saver.save()
    state = whole.components.states.load(whole.identity)
    assert state is not None
    assert len(resume(state, whole.spec).learner.network.token_ids) == 100
    ours = (await whole.versions())[1:]
    assert ours
    assert {json.loads(version.manifest.config_json)["draft_vocab_size"] for version in ours} == {100}


async def test_a_published_draft_that_no_pod_can_load_is_left_for_one_of_the_chosen_shape(
    whole: Bench, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory, traces: TraceMaker, shared_registry: int
) -> None:
    await publish_elsewhere(whole, tiny_target, torch.arange(100))
    trainer = await whole.started()
    assert len(trainer.learner.network.token_ids) == 100
    async with rpc.channel(f"127.0.0.1:{shared_registry}") as channel:
        pod = PodStream(channel, target=traces.target_fingerprint)
        pod.identity.speculator = whole.identity.speculator
        await pod.report()
        await pod.receive_version(1)
        await pod.answer(fleet_pb2.OUTCOME_NACK, loaded=(0, ""), reason="norm_before_residual is not supported")

        async def has_failed() -> bool:
            return (await whole.versions())[0].phase == pb.PHASE_FAILED

        await until(has_failed, what="the version has failed")
        await pod.end()
    await whole.refresh()
    await trainer.fit()
    assert len(trainer.learner.network.token_ids) == 128
    assert trainer.history.origin == "closed form"
    folder, speculator = tmp_path_factory.mktemp("new"), whole.identity.speculator
    async with bench(folder, tiny_target, traces, port=shared_registry, speculator=speculator) as new:
        assert len((await new.started()).learner.network.token_ids) == 128, "neither does a new trainer start from it"


async def test_a_new_draft_that_replaces_an_unloadable_one_has_the_tokens_of_the_stored_requests(
    whole: Bench, tiny_target: Path
) -> None:
    await publish_elsewhere(whole, tiny_target, torch.arange(100))
    small = replace(whole, spec=replace(whole.spec, shape=ShapeChoice(draft_vocab_size=32)))
    trainer = await small.started()
    for _ in range(OPTIONS.schedule.evaluate_steps):
        trainer.train()
    state = whole.components.registry.state
    assert state is not None
    whole.components.registry.state = replace(state, stable=0, is_unloadable=True)
    await trainer.evaluate()
    token_ids = trainer.learner.network.token_ids
    assert len(token_ids) == 32
    assert not torch.equal(token_ids, torch.arange(32)), "not just the lowest ones"


async def test_the_download_of_a_serving_draft_does_not_delay_the_next_estimate(
    whole: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, evaluator = await whole.started(), whole.components.evaluator
    set_baseline, estimate, estimates = evaluator.set_baseline, evaluator.estimate, []

    async def slowly(version: int, embedding: Tensor) -> bool:
        whole.clock.advance(100.0)
        return await set_baseline(version, embedding)

    def counted(*arguments: Any, **options: Any) -> Candidate:
        estimates.append(trainer.learner.step)
        return estimate(*arguments, **options)

    monkeypatch.setattr(evaluator, "set_baseline", slowly)
    monkeypatch.setattr(evaluator, "estimate", counted)
    await trainer.evaluate()
    trainer.train()
    await trainer.evaluate()
    assert estimates == [0, 1]


async def test_a_draft_of_another_vocabulary_and_the_same_size_is_a_baseline_like_any_other(
    whole: Bench, tiny_target: Path
) -> None:
    trainer = await whole.started()
    await publish_elsewhere(whole, tiny_target, 200 + torch.arange(128))
    await whole.train(trainer)
    first, *ours = await whole.versions()
    assert ours[0].manifest.parent_version == 1
    assert ours[-1].phase == pb.PHASE_STABLE
    assert ours[-1].manifest.draft_vocabulary_fingerprint != first.manifest.draft_vocabulary_fingerprint


async def test_a_vocabulary_follows_the_traffic(whole: Bench, tiny_target: Path) -> None:
    rare = 200 + torch.arange(128)
    await publish_elsewhere(whole, tiny_target, rare)
    whole.admit(0, 32)
    trainer = whole.trainer(await whole.initial())
    assert torch.equal(trainer.learner.network.token_ids, rare)
    await trainer.fit()
    assert not torch.equal(trainer.learner.network.token_ids, rare)


async def test_training_resumes_where_it_was_saved(whole: Bench) -> None:
    trainer = await whole.started()
    for _ in range(15):
        trainer.train()
    await trainer.saver.save()
    weights = {k: v.clone() for k, v in trainer.learner.network.state_dict().items()}
    for _ in range(5):
        trainer.train()
    state = whole.components.states.load(whole.identity)
    assert state is not None
    resumed = whole.trainer(resume(state, whole.spec))
    assert resumed.learner.step == 15
    assert resumed.saver.last_s == state.taken_s > 0
    assert all(resumed.learner.network.state_dict()[name].equal(tensor) for name, tensor in weights.items())
    for _ in range(5):
        resumed.train()
    for name, tensor in trainer.learner.network.state_dict().items():
        assert resumed.learner.network.state_dict()[name].equal(tensor), f"{name} differs after the same steps"


class SlowStates(States):
    """A save ends when it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_end = threading.Event()

    def save(self, state: State) -> Path:
        self.may_end.wait(60)
        return super().save(state)


async def test_training_goes_on_while_a_state_is_written_and_the_state_is_of_when_it_was_taken(
    whole: Bench,
) -> None:
    states = SlowStates(whole.folder / "states")
    slow = replace(whole, components=replace(whole.components, states=states))
    trainer = await slow.started()
    for _ in range(3):
        trainer.train()
    weights = {name: tensor.clone() for name, tensor in trainer.learner.network.state_dict().items()}
    uses = dict(trainer.history.uses)
    whole.clock.advance(60)
    await trainer.saver.save_if_due()
    for _ in range(5):
        trainer.train()
        await trainer.saver.save_if_due()
    assert states.load(whole.identity) is None
    states.may_end.set()
    await until(lambda: states.load(whole.identity) is not None)
    state = states.load(whole.identity)
    assert state is not None
    assert (state.learner["step"], trainer.learner.step) == (3, 8)
    assert state.history.uses == uses
    assert all(state.learner["network"][name].equal(tensor) for name, tensor in weights.items())


async def test_a_draft_that_is_published_while_a_state_is_written_is_saved_next(whole: Bench) -> None:
    states = SlowStates(whole.folder / "states")
    slow = replace(whole, components=replace(whole.components, states=states))
    whole.admit(0, 32)
    trainer = slow.trainer(await slow.initial())
    trainer.train()
    whole.clock.advance(60)
    await trainer.saver.save_if_due()
    trainer.train()
    await slow.publish_closed_form(trainer)
    step = trainer.learner.step
    states.may_end.set()

    async def is_saved() -> bool:
        await trainer.saver.save_if_due()
        state = states.load(whole.identity)
        return state is not None and state.learner["step"] == step

    await until(is_saved, what="a state with the published draft")


async def test_a_sample_that_breaks_training_is_skipped_and_soon_left_alone(whole: Bench) -> None:
    huge = whole.traces.trace(5000)
    values = torch.full((27, 3 * 64), 3e38, dtype=torch.bfloat16)
    huge.payload.aux_hidden.data = values.view(torch.uint8).numpy().tobytes()
    data = huge.SerializeToString()
    trainer = await whole.started()
    whole.replay.admit([IncomingTrace(sample=read_sample(data, whole.traces.expected), data=data)])
    await whole.train(trainer)
    skipped = whole.metrics.registry.get_sample_value("updraft_trainer_optimizer_steps_skipped_total")
    assert skipped is not None
    assert skipped >= 1
    assert all(bool(torch.isfinite(p).all()) for p in trainer.learner.network.parameters())
    assert (await whole.versions())[-1].phase == pb.PHASE_STABLE


async def test_a_batch_that_does_not_fit_into_memory_is_skipped_and_is_no_training_that_pods_are_asked_for(
    whole: Bench,
) -> None:
    trainer = await whole.started()
    trainer.train()
    trained = whole.components.demand._tokens

    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.learner.network.fc.register_forward_pre_hook(allocate)
    assert trainer.train(), "the samples are used, so that they do not come again and again"
    assert trainer.learner.step == 1
    assert whole.metrics.registry.get_sample_value("updraft_trainer_optimizer_steps_skipped_total") == 1
    assert whole.components.demand._tokens == trained > 0


async def test_the_loop_rests_when_all_is_learnt_and_saves_when_it_stops(whole: Bench) -> None:
    trainer = await whole.started()
    stop = Stop()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(whole.components.registry.run(stop))
        tasks.create_task(trainer.run(stop))
        await until(
            lambda: len(trainer.history.uses) == 32 and min(trainer.history.uses.values()) == OPTIONS.max_uses,
            what="the end of what there is to learn",
        )
        step = trainer.learner.step
        whole.admit(100, 108)
        await until(lambda: trainer.learner.step > step, what="learning from new samples")
        stop.request()
    state = whole.components.states.load(whole.identity)
    assert state is not None
    assert state.learner["step"] == trainer.learner.step


@pytest.mark.parametrize("num_calls", [1, 5])
async def test_a_stop_does_not_wait_for_the_end_of_an_estimate_and_saves_what_was_learnt(
    whole: Bench, num_calls: int
) -> None:
    stop, calls = Stop(), iter(range(num_calls - 1))

    def check() -> None:
        if next(calls, None) is None:
            stop.event.set()
        stop.check()

    evaluator = Evaluator(whole.replay, whole.components.registry, num_samples=32, lookahead=3, check=check)
    trainer = await replace(whole, components=replace(whole.components, evaluator=evaluator)).started()
    async with asyncio.timeout(LONG_S):
        await trainer.run(stop)
    assert trainer.learner.step == 0
    assert await whole.versions() == []
    state = whole.components.states.load(whole.identity)
    assert state is not None
    assert resume(state, whole.spec).history.num_samples == 8


async def test_a_first_draft_is_published_before_its_first_step(whole: Bench) -> None:
    whole.admit(0, 8)
    whole.admit(1000, 1008, evaluation=True)
    trainer = whole.trainer(await whole.initial())
    candidate = await trainer.evaluate()
    assert candidate is not None
    assert await trainer.evaluate() is None, "nothing has changed"
    await trainer.publish(candidate)
    (first,) = await whole.versions()
    assert first.phase == pb.PHASE_STABLE
    assert first.manifest.provenance.step == 0
    assert len(first.manifest.evaluation.samples) == 8


async def test_a_trainer_whose_role_may_not_publish_says_so_and_learns_on(
    whole: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def never(requests: AsyncIterator[pb.PublishRequest], context: Any) -> pb.PublishResponse:
        raise AssertionError

    tokens_file, token_file = whole.folder / "tokens", whole.folder / "token"
    tokens_file.write_text("read:0123456789abcdef")
    token_file.write_text("0123456789abcdef")
    trainer = await whole.started()
    for _ in range(25):
        trainer.train()
    await whole.refresh()
    candidate = await trainer.evaluate()
    assert candidate is not None
    registry = service(pb.DESCRIPTOR.services_by_name["Registry"], Publish=never)
    async with (
        listening(registry, access=Access(Tokens(tokens_file))) as address,
        rpc.channel(address, Credentials(token_file=token_file)) as channel,
    ):
        stub: RegistryAsyncStub = registry_pb2_grpc.RegistryStub(channel)
        publisher = Publisher(
            stub, identity=whole.identity, config_digest="", folder=whole.folder / "refused", clock=whole.clock
        )
        initial = InitialState(learner=trainer.learner, history=trainer.history, rng=random.Random(0))
        denied = replace(whole, components=replace(whole.components, publisher=publisher)).trainer(initial)
        await denied.publish(candidate)

    assert "role read may not call Registry.Publish, which requires role publish or operate" in caplog.text
    assert whole.published("refused") == 1
    await trainer.publish(candidate)
    assert (await whole.versions())[-1].phase == pb.PHASE_STABLE


async def test_a_new_trainer_counts_what_an_earlier_process_stored_as_used(
    tmp_path: Path, tiny_target: Path, traces: TraceMaker, shared_registry: int
) -> None:
    opened = partial(bench, tmp_path, tiny_target, traces, port=shared_registry, speculator=f"s-{uuid.uuid4().hex[:8]}")
    async with opened() as earlier:
        earlier.admit(0, 3)
        stored = earlier.replay.training_ids()
    async with opened() as made:
        await publish_elsewhere(made, tiny_target, torch.arange(100))
        made.admit(3, 5)
        trainer = made.trainer(await made.initial())
    assert trainer.history.uses == dict.fromkeys(stored, 1)


async def test_the_registry_knows_that_a_step_is_being_compiled(whole: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences, compiler = list[str](), Compiler()

    @contextmanager
    def slowly() -> Iterator[None]:
        sentences.append("compiling")
        yield

    monkeypatch.setattr(compiler, "compiled", lambda function: function)  # without a compiler
    monkeypatch.setattr(compiler, "during", slowly)
    monkeypatch.setattr(whole.components.registry, "set_message", sentences.append)
    trainer = await whole.started()
    trainer.learner = replace(whole.spec, compute=Compute(compiler=compiler)).learner(torch.arange(128))
    sentences.clear()
    assert trainer.train()
    assert trainer.train()
    before, during, after = sentences
    assert before.endswith("; the training step is being compiled, which may take minutes")
    assert (during, after) == ("compiling", before.partition(";")[0])
