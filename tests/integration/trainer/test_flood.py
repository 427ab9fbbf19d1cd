"""One tenant floods the trainer with junk: what a real learner on a real replay loses of the others' requests.

The junk of a tenant is text in which each request follows a rule of its own, so it teaches nothing, and contradicts the rule
that all others follow.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.traces import TraceMaker

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import read_head
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.data.selection import TrafficMix
from updraft_trainer.initial_state import TrainerSpec
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import GainEstimate, compare, verify_steps
from updraft_trainer.publishing.publish import snapshot

pytestmark = pytest.mark.lasts(120)

OTHERS, FLOOD = (10, 11, 12, 13), 2
NUM_BEFORE, NUM_JUNK, NUM_STORED = 48, 480, 160
BATCH_TOKENS, STEPS = 108, 144
_ALL_ALIKE = TrafficMix(shares={"": 1.0})


class Learning:
    """A learner and its replay, which has room for three times what comes before the flood."""

    def __init__(self, replay: Replay, target: Path, traces: TraceMaker) -> None:
        self._replay = replay
        self._traces = traces
        self._rng = random.Random(0)
        self._uses: dict[str, int] = {}
        spec = TrainerSpec(
            target=read_head(target),
            target_fingerprint=traces.target_fingerprint,
            hyper=Hyperparameters(adaptation_rate=1e-3),
            shape=ShapeChoice(draft_vocab_size=128),
            first_samples=8,
            seed=0,
        )
        self.admit(range(NUM_BEFORE), tenants=OTHERS)
        samples = replay.first_batch(count=8, rng=self._rng)
        self._learner: Learner = spec.new_learner(samples)
        draft = self._learner.closed_form(samples)
        assert draft is not None
        self._learner.start_from(draft.state_dict())

    def admit(self, seeds: range, *, tenants: tuple[int, ...], is_junk: bool = False) -> None:
        data = [
            self._traces.data(seed, tenant=tenants[seed % len(tenants)], rule=seed if is_junk else 0) for seed in seeds
        ]
        expected = self._traces.expected
        self._replay.admit([IncomingTrace(sample=read_sample(one, expected), data=one) for one in data])

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            batch = self._replay.training_batch(self._uses, num_tokens=BATCH_TOKENS, max_uses=6, rng=self._rng)
            if not batch:
                return
            self._learner.train(batch)
            for sample in batch:
                self._uses[sample.trace_id] = self._uses.get(sample.trace_id, 0) + 1

    @property
    def draft(self) -> DraftNetwork:
        return snapshot(self._learner.average)


@pytest.fixture
def held_out(traces: TraceMaker) -> list[Sample]:
    """Requests of the others, of which nothing was trained on."""
    return [
        read_sample(traces.data(5000 + seed, tenant=OTHERS[seed % 4], evaluation=True), traces.expected)
        for seed in range(24)
    ]


@pytest.fixture
def learning(tmp_path: Path, tiny_target: Path, traces: TraceMaker, max_share: float) -> Iterator[Learning]:
    num_bytes = NUM_STORED * len(traces.data(0, tenant=1))
    with Replay.open(
        tmp_path / "replay",
        limits=ReplayLimits.of(num_bytes, max_tenant_share=max_share),
        expected=traces.expected,
        cache_bytes=10 * 1024**2,
        fitted_bytes=5 * 1024**2,
    ) as replay:
        yield Learning(replay, tiny_target, traces)


def flooded(learning: Learning, held_out: list[Sample]) -> GainEstimate:
    """What a flood changes for the others, who send nothing meanwhile."""
    learning.train(200)
    before = verify_steps(learning.draft, held_out, lookahead=3)
    for first in range(0, NUM_JUNK, 40):
        learning.admit(range(100_000 + first, 100_040 + first), tenants=(FLOOD,), is_junk=True)
        learning.train(STEPS // (NUM_JUNK // 40))
    after = verify_steps(learning.draft, held_out, lookahead=3)
    return compare(held_out, after, before, _ALL_ALIKE)


@pytest.mark.parametrize("max_share", [0.5])
def test_with_the_default_share_others_lose_nothing_that_could_be_measured(
    learning: Learning, held_out: list[Sample]
) -> None:
    gain = flooded(learning, held_out).gain(0.9)

    assert gain is not None
    assert gain.high_percent >= 0, "not surely worse"
    assert gain.percent > -2


@pytest.mark.parametrize("max_share", [1.0])
def test_without_a_limit_they_do(learning: Learning, held_out: list[Sample]) -> None:
    gain = flooded(learning, held_out).gain(0.9)

    assert gain is not None
    assert gain.high_percent < 0, "surely worse"
