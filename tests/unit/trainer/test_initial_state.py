"""Training goes on from a draft of any shape that its target allows, and from what was saved of it."""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from google.protobuf import json_format
from tests.support import families
from tests.support.tiny_target import DRAFT_VOCAB, VOCAB
from tests.support.traces import TraceMaker
from torch import Tensor

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.rope import Rope
from updraft_artifacts.transfer import MANIFEST
from updraft_chassis.errors import Conflict
from updraft_chassis.lifecycle import Stop, Stopped
from updraft_draft import checkpoint
from updraft_draft.config import DraftConfig
from updraft_draft.network import initial_network
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer import initial_state
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import CHUNK_MARK, ReplayLimits
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.initial_state import Elsewhere, InitialState, TrainerSpec, resume, start
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.registry_view import RegistryView, RolloutState
from updraft_trainer.states.state import Identity, State, States, TrainingHistory

IDENTITY = Identity(speculator="default", target_fingerprint="sha256:t", tokenizer_fingerprint="sha256:k")


class OneDraft(RegistryView):
    """A registry whose only version lies in a folder; without a folder it has none."""

    def __init__(self, folder: Path | None) -> None:
        self._draft = folder
        version = 0 if folder is None else 1
        self.state = RolloutState(
            stable=version,
            candidate=0,
            start_version=version,
            is_unloadable=False,
            hold_reason="",
            target_fingerprint="sha256:t",
        )

    async def fetch(self, version: int) -> Path:
        assert version == 1
        assert self._draft is not None
        return self._draft


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    families.make("gemma3", folder)
    return folder


def spec(head: TargetHead) -> TrainerSpec:
    return TrainerSpec(
        target=head,
        target_fingerprint="sha256:t",
        hyper=Hyperparameters(adaptation_rate=3e-3),
        shape=ShapeChoice(draft_vocab_size=DRAFT_VOCAB),
        first_samples=1,
        seed=0,
    )


def imported_config(head: TargetHead) -> DraftConfig:
    """As another trainer may have shaped it."""
    return replace(
        head.draft(draft_vocab_size=DRAFT_VOCAB),
        intermediate_size=40,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        rope=Rope(theta=1e5, kind="linear", factor=2.0),
        norm_before_residual=True,
    )


def save(head: TargetHead, config: DraftConfig, folder: Path) -> Path:
    ids = torch.arange(DRAFT_VOCAB)
    checkpoint.save(
        initial_network(config, head.embedding, head.rows(ids), head.final_norm, ids, seed=3),
        folder,
    )
    provenance = registry_pb2.Provenance(tenants=[7])
    (folder / MANIFEST).write_text(json_format.MessageToJson(registry_pb2.Manifest(provenance=provenance)))
    return folder


async def begun(spec: TrainerSpec, target: Path, draft: Path | None, tmp_path: Path) -> InitialState:
    """After one request whose tokens are not among the lowest ids."""
    maker, limits = TraceMaker(target), ReplayLimits.of(1 << 20)
    expected, trace = maker.expected, maker.trace(1)
    trace.output_ids[:] = [VOCAB - 1] * len(trace.output_ids)
    data = trace.SerializeToString()
    with Replay.open(tmp_path / "replay", limits=limits, expected=expected, cache_bytes=1 << 20) as replay:
        replay.admit([IncomingTrace(sample=read_sample(data, expected), data=data)])
        initial = await start(spec, OneDraft(draft), replay, Stop())
    assert initial is not None
    return initial


@pytest.mark.parametrize("first_samples", [0, 1])
async def test_a_new_draft_has_the_tokens_of_the_samples_that_it_waited_for(
    target: Path, tmp_path: Path, first_samples: int
) -> None:
    initial = await begun(replace(spec(read_head(target)), first_samples=first_samples), target, None, tmp_path)
    assert bool(initial.learner.network.t2d[VOCAB - 1]) is (first_samples == 1)
    assert len(initial.learner.network.token_ids) == DRAFT_VOCAB
    assert initial.history.num_samples == first_samples
    assert initial.history.origin == ("closed form" if first_samples else "random weights")


async def test_a_new_draft_is_made_beside_the_event_loop(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def choose(samples: Sequence[Sample], head: TargetHead, *, size: int, check: Callable[[], None]) -> Tensor:
        threads.append(threading.current_thread())
        return choose_vocabulary(samples, head, size=size, check=check)

    monkeypatch.setattr(initial_state, "choose_vocabulary", choose)
    await begun(spec(read_head(target)), target, None, tmp_path)
    assert threads
    assert threading.main_thread() not in threads


async def test_a_new_draft_waits_for_as_many_requests_and_not_for_as_many_chunks_of_one(
    target: Path, tmp_path: Path
) -> None:
    maker, limits, stop = TraceMaker(target), ReplayLimits.of(1 << 20), Stop()
    stop.request()
    data = maker.data(1)
    sample = read_sample(data, maker.expected)
    names = [f"{sample.trace_id}{CHUNK_MARK}{chunk}" for chunk in range(4)]
    with Replay.open(tmp_path / "replay", limits=limits, expected=maker.expected, cache_bytes=1 << 20) as replay:
        replay.admit([IncomingTrace(sample=replace(sample, trace_id=name), data=data) for name in names])
        two, one = (replace(spec(read_head(target)), first_samples=first) for first in (2, 1))
        assert await start(two, OneDraft(None), replay, stop) is None
        assert await start(one, OneDraft(None), replay, Stop()) is not None


async def test_a_first_draft_comes_from_requests_of_all_ranks_which_send_them_once_there_are_enough(
    target: Path, tmp_path: Path
) -> None:
    maker, limits, asked = TraceMaker(target), ReplayLimits.of(1 << 20), list[int]()
    own, *others = (read_sample(maker.data(seed), maker.expected) for seed in range(4))
    heard = iter([0, 1, 2, 2])

    def send(count: int) -> list[Sample]:
        asked.append(count)
        return others[: len(asked)]  # the first time one is damaged

    with Replay.open(tmp_path / "replay", limits=limits, expected=maker.expected, cache_bytes=1 << 20) as replay:
        replay.admit([IncomingTrace(sample=own, data=maker.data(0))])
        three = replace(spec(read_head(target)), first_samples=3)
        elsewhere = Elsewhere(num_requests=heard.__next__, samples=send)
        initial = await start(three, OneDraft(None), replay, Stop(), elsewhere=elsewhere)
    assert initial is not None
    assert list(heard) == []
    assert asked == [2, 2]
    assert initial.history.uses == {one.trace_id: 1 for one in (own, *others[:2])}


async def test_a_stop_ends_the_making_of_a_new_draft(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()

    def choose(samples: Sequence[Sample], head: TargetHead, *, size: int, check: Callable[[], None]) -> Tensor:
        stop.event.set()
        return choose_vocabulary(samples, head, size=size)

    monkeypatch.setattr(initial_state, "choose_vocabulary", choose)
    maker, limits = TraceMaker(target), ReplayLimits.of(1 << 20)
    data = maker.data(1)
    with Replay.open(tmp_path / "replay", limits=limits, expected=maker.expected, cache_bytes=1 << 20) as replay:
        replay.admit([IncomingTrace(sample=read_sample(data, maker.expected), data=data)])
        with pytest.raises(Stopped):
            await start(spec(read_head(target)), OneDraft(None), replay, stop)


def saved(learner: Learner, tmp_path: Path) -> State:
    """The learner's state, as it comes from a disk."""
    state = State(
        identity=IDENTITY,
        token_ids=learner.network.token_ids,
        learner=learner.state_dict(),
        history=TrainingHistory(),
        rng=random.Random(1).getstate(),
        config_digest="sha256:c",
        draft_config=learner.network.config,
        taken_s=1_700_000_000.0,
    )
    States(tmp_path / "states").save(state)
    loaded = States(tmp_path / "states").load(IDENTITY)
    assert loaded is not None
    return loaded


def test_a_state_that_the_settings_do_not_fit_is_refused_with_two_ways_out(target: Path, tmp_path: Path) -> None:
    """The optimizer has no moments of a head that was not trained."""
    before = spec(read_head(target))
    after = replace(before, hyper=replace(before.hyper, trains_head=True))
    state = saved(before.learner(torch.arange(DRAFT_VOCAB)), tmp_path)
    with pytest.raises(
        Conflict, match=r"restore UPDRAFT_TRAINER_TRAINS_HEAD or set UPDRAFT_TRAINER_DATA_DIR to another"
    ):
        resume(state, after)
    assert resume(state, before).learner.step == 0


async def test_an_imported_draft_of_its_own_shape_is_trained_and_resumed(target: Path, tmp_path: Path) -> None:
    head = read_head(target)
    config = imported_config(head)
    initial = await begun(spec(head), target, save(head, config, tmp_path / "draft"), tmp_path)
    assert initial.history.tenants == ["0000000000000007"], "what the draft has learned from counts"
    learner = initial.learner
    assert (initial.history.origin, learner.learning_rate) == ("version 1", spec(head).hyper.adaptation_rate)
    _, tensors = checkpoint.load(tmp_path / "draft")
    assert learner.network.config == config
    assert torch.equal(learner.network.fc.weight.bfloat16(), tensors["fc.weight"])
    maker = TraceMaker(target)
    samples = [read_sample(maker.data(seed), maker.expected) for seed in range(6)]
    losses = [learner.train(samples).loss for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
    resumed = resume(saved(learner, tmp_path), spec(head))
    assert resumed.saved_s == 1_700_000_000.0
    again = resumed.learner
    assert again.network.config == config
    assert torch.equal(again.network.fc.weight, learner.network.fc.weight)


async def test_a_draft_that_reads_other_layers_is_refused(target: Path, tmp_path: Path) -> None:
    head = read_head(target)
    config = replace(imported_config(head), aux_layers=(1, 2, 3))
    with pytest.raises(Conflict, match=r"is not for this trainer's target: the draft reads layers \[1, 2, 3\]"):
        await begun(spec(head), target, save(head, config, tmp_path / "draft"), tmp_path)
