"""How the ranks of a trainer work together: rank 0 runs `loop.Trainer`, and each other rank a `Follower` that obeys it.

Each rank trains on samples of its own replay and judges drafts on its own held-out requests. Nothing else is decided here.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from updraft_chassis.clock import Clock
from updraft_chassis.lifecycle import Stop, Stopped
from updraft_draft import checkpoint, memory
from updraft_draft.network import DraftNetwork
from updraft_trainer.commands import (
    Collect,
    Command,
    CommandChannel,
    DraftTensors,
    End,
    EndFit,
    Estimate,
    LoadLearner,
    MarkGood,
    ReportTenants,
    ReportUses,
    SetBaseline,
    ShareFitted,
    ShareSamples,
    TakeStep,
    WorkCommand,
)
from updraft_trainer.coordination.ranks import ALONE, Ranks
from updraft_trainer.coordination.watch import Activity, Watch
from updraft_trainer.data.demand import FITTED_SAMPLES, DemandMeter
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import Pool
from updraft_trainer.data.sample import Sample
from updraft_trainer.initial_state import TrainerSpec
from updraft_trainer.learning.learner import Learner
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.estimate import Evidence
from updraft_trainer.publishing.evaluator import Baseline, Judge
from updraft_trainer.publishing.schedule import num_newest_judges
from updraft_trainer.states.state import TrainingHistory


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Samples that all ranks have drawn for a step, how many of them are trained on for the first time, and how many ranks
    want to stop."""

    num_samples: int
    num_new: int
    num_stopping: int

    @classmethod
    def by_all(cls, ranks: Ranks, samples: Sequence[Sample], uses: Mapping[str, int], *, is_stopping: bool) -> "Drawn":
        """Every rank calls this with its own."""
        num_new = sum(sample.trace_id not in uses for sample in samples)
        counts = torch.tensor([len(samples), num_new, is_stopping])
        ranks.sum([counts])
        num_samples, num_new, num_stopping = counts.tolist()
        return cls(num_samples=num_samples, num_new=num_new, num_stopping=num_stopping)


class Followers:
    """The other ranks, as rank 0 sees them. Every method is a command to them; without other ranks it does nothing."""

    def __init__(
        self, ranks: Ranks = ALONE, channel: CommandChannel | None = None, *, watch: Watch | None = None
    ) -> None:
        """`watch` is told what rank 0 is busy with."""
        self._ranks = ranks
        self._watch = watch
        self._channel = channel
        self.are_stopping = False
        """One of them was told to stop."""

    def busy(self, activity: Activity) -> None:
        """Rank 0 is, and sends no command meanwhile."""
        if self._watch is not None:
            self._watch.begin(activity)

    def first_samples(self, count: int) -> list[Sample]:
        """One of each of up to `count` requests at each of them."""
        if self._channel is None or not count:
            return []
        self._send(ShareSamples(count))
        nothing: list[Sample] = []
        parts = self._ranks.gather(nothing)
        self.busy(Activity.IDLE)
        return [sample for part in parts for sample in part]

    def fitted_samples(self, own: Sequence[Sample]) -> list[Sample]:
        """Samples of all ranks for a fit in closed form: one of each rank in turn, beginning with rank 0's (`own`)."""
        if self._channel is None:
            return list(own)
        self._send(ShareFitted())
        nothing: list[Sample] = []
        parts = [own, *self._ranks.gather(nothing)]
        return [sample for turn in zip_longest(*parts) for sample in turn if sample is not None]

    def end_fit(self, *, is_used: bool) -> int:
        """End the fit. If its draft is used, the other ranks count their samples; return how many were not used before."""
        self._send(EndFit(is_used))
        return sum(self._ranks.gather(0))

    def load_learner(
        self, learner: Learner, *, uses: Mapping[str, int] | None = None, counted: Collection[str] | None = None
    ) -> None:
        """Train the draft of this learner from now on; see `LoadLearner`."""
        self.busy(LoadLearner.activity)
        if self._channel is None:
            return  # without a copy of the state
        network = learner.network
        self._send(
            LoadLearner(
                config=network.config,
                token_ids=network.token_ids.cpu(),
                learner=learner.state_dict(),
                uses=uses,
                counted=counted,
            )
        )

    def take_step(self) -> None:
        """Draw samples. Rank 0 draws too, and then calls `drawn`."""
        self._send(TakeStep())

    def drawn(self, samples: Sequence[Sample], uses: Mapping[str, int]) -> Drawn:
        """Count the samples of all ranks; `samples`: rank 0's. If there are any, all call `Learner.train` next."""
        drawn = Drawn.by_all(self._ranks, samples, uses, is_stopping=False)
        self.are_stopping = drawn.num_stopping > 0
        return drawn

    def mark_good(self) -> None:
        """Keep the averaged weights."""
        self._send(MarkGood())

    def set_baseline(self, baseline: Baseline) -> None:
        """Compare with this draft."""
        network = baseline.network
        self._send(SetBaseline(baseline.version, None if network is None else _packed(network)))

    def evidence(self, candidate: DraftNetwork, own: Callable[[], Evidence]) -> list[Evidence]:
        """The evidence of all ranks; `own` computes that of rank 0 meanwhile. Raises Stopped if a rank was told to stop."""
        self.busy(Estimate.activity)
        if self._channel is None:
            return [own()]
        self._send(Estimate(_packed(candidate)))
        parts = self._ranks.gather(_unless_stopped(own))
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            self.are_stopping = True
            raise Stopped
        return found

    def collect(self, learner: Learner) -> None:
        """Send what they hold of the learner's state, so that its `state_dict` is whole."""
        self._send(Collect())
        learner.collect()

    def uses(self, own: Mapping[str, int]) -> dict[str, int]:
        """How often all ranks together trained on each sample, `own` at rank 0."""
        self._send(ReportUses())
        total = Counter[str]()
        for uses in self._ranks.gather(own):
            total.update(uses)
        return dict(total)

    def collect_tenants(self, history: TrainingHistory) -> None:
        """Add the tenants of all other ranks' samples to the history of rank 0."""
        if self._channel is None:
            return
        self._send(ReportTenants())
        own: tuple[list[str], bool] = ([], False)
        for tenants, has_more in self._ranks.gather(own):
            history.learn_from(tenants, has_more=has_more)

    def end(self) -> None:
        """End their processes."""
        self._send(End())

    def _send(self, command: Command) -> None:
        self.busy(command.activity)
        if self._channel is not None:
            self._channel.send(command)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """See the settings of the same names. `num_waiting`: the newest requests, which are not trained on yet."""

    batch_tokens: int | None
    max_uses: int
    num_waiting: int


class Follower:
    """A rank other than 0."""

    def __init__(  # noqa: PLR0913 - what a rank has of its own
        self,
        ranks: Ranks,
        channel: CommandChannel,
        spec: TrainerSpec,
        replay: Replay,
        judge: Judge,
        options: StepOptions,
        *,
        folder_id: str,
        demand: DemandMeter,
        metrics: Metrics,
        clock: Clock,
        watch: Watch,
    ) -> None:
        self._ranks = ranks
        self._channel = channel
        self._spec = spec
        self._folder_id = folder_id
        self._replay = replay
        self._judge = judge
        self._options = options
        self._demand = demand
        self._metrics = metrics
        self._clock = clock
        self._watch = watch
        self._rng = random.Random(f"{spec.seed}/{ranks.rank}")
        self.learner: Learner | None = None
        """None until rank 0 has one."""
        self.history = TrainingHistory()
        self._fitted: Sequence[str] = ()
        """Trace ids of the samples that this rank sent for the fit in progress."""
        demand.uses = lambda: self.history.uses

    async def run(self, stop: Stop) -> None:
        """Obey rank 0 until it ends. A request to stop is passed on to it."""
        while await asyncio.to_thread(self.obey, stop):
            pass
        stop.request()

    def obey(self, stop: Stop) -> bool:
        """Carry out the next command; false if it was the last one."""
        self._watch.begin(Activity.IDLE)
        command = self._channel.receive()
        self._watch.begin(command.activity)
        if isinstance(command, End):
            return False
        self._carry_out(command, stop)
        return True

    def _carry_out(self, command: WorkCommand, stop: Stop) -> None:
        match command:
            case LoadLearner():
                self._load_learner(command)
            case TakeStep():
                self._take_step(stop)
            case MarkGood():
                self._the_learner().mark_good()
            case Collect():
                self._the_learner().collect()
            case SetBaseline(version, draft):
                self._set_baseline(version, draft)
            case _:
                self._ranks.gather(self._answer(command))

    def _answer(self, command: Estimate | ReportUses | ReportTenants | ShareSamples | ShareFitted | EndFit) -> object:
        match command:
            case Estimate(draft):
                return self._evidence(self._unpacked(draft))
            case ShareSamples(count):
                return self._replay.first_batch(count=count, rng=self._rng)
            case ShareFitted():
                fitted, _ = fit_batch(self._replay, self._ranks, num_judges=self._options.num_waiting)
                self._fitted = [sample.trace_id for sample in fitted]
                return fitted
            case EndFit(is_used):
                sent, self._fitted = self._fitted, ()
                return self.history.count_uses(sent) if is_used else 0
            case ReportUses():
                return self._stored_uses(self.history.uses)
            case ReportTenants():
                return self.history.tenants, self.history.has_more_tenants

    def _set_baseline(self, version: int, draft: DraftTensors | None) -> None:
        network = None if draft is None else self._unpacked(draft)
        self._judge.baseline = Baseline(version=version, network=network)

    def _load_learner(self, command: LoadLearner) -> None:
        self.learner = None  # its memory is needed
        self.learner = self._spec.learner(command.token_ids, command.config)
        self.learner.load_state_dict(dict(command.learner))
        if command.uses is not None:
            self.history = TrainingHistory(uses=self._stored_uses(command.uses))
        if command.counted is not None and self._folder_id not in command.counted:
            found = self._replay.found_training_ids()
            self.history.count_as_used(found)
            self.history.learn_from(self._replay.tenants(found))

    def _take_step(self, stop: Stop) -> None:
        options, start_s, learner = self._options, self._clock.monotonic(), self._the_learner()
        samples = self._replay.training_batch(
            self.history.uses,
            num_tokens=options.batch_tokens,
            max_uses=options.max_uses,
            rng=self._rng,
            num_waiting=options.num_waiting,
        )
        drawn = Drawn.by_all(self._ranks, samples, self.history.uses, is_stopping=stop.requested)
        if not samples:
            self._demand.paused()
        if not drawn.num_samples:
            return
        start_s += learner.warm_up()
        step, report = learner.step, learner.train(samples)
        memory.release()
        self.history.count_uses(sample.trace_id for sample in samples)
        self.history.learn_from(sample.tenant_text for sample in samples)
        end_s = self._clock.monotonic()
        if samples:
            self._demand.trained([sample.num_rows for sample in samples], start_s=start_s, end_s=end_s)
        self._metrics.step_seconds.observe(end_s - start_s)
        if learner.step > step:
            self._metrics.loss.set(report.loss)
            self._metrics.steps.inc(learner.step - step)
        for phase, seconds in learner.times.take().seconds.items():
            self._metrics.phase_seconds.labels(phase).inc(seconds)

    def _evidence(self, candidate: DraftNetwork) -> Evidence | None:
        learned = self.history.uses | dict.fromkeys(self._fitted, 1)
        unseen = self._replay.untrained_batch(learned, count=self._options.num_waiting)
        evidence = _unless_stopped(lambda: self._judge.evidence(candidate, unseen))
        memory.release()
        return evidence

    def _stored_uses(self, uses: Mapping[str, int]) -> dict[str, int]:
        return {id_: uses[id_] for id_ in self._replay.training_ids() if id_ in uses}

    def _unpacked(self, draft: DraftTensors) -> DraftNetwork:
        return checkpoint.build(draft.config, dict(draft.tensors), self._the_learner().network.embedding)

    def _the_learner(self) -> Learner:
        assert self.learner is not None, "rank 0 first says what to train"
        return self.learner


def fit_batch(replay: Replay, ranks: Ranks, *, num_judges: int) -> tuple[list[Sample], list[Sample]]:
    """This rank's samples for a fit in closed form, and its newest requests, which judge the fit."""
    num_training = replay.num_requests(Pool.WINDOW, Pool.RESERVOIR)
    return replay.closed_form_batch(
        count=ranks.per_rank(FITTED_SAMPLES),
        min_count=num_judges,
        num_held_out=num_newest_judges(num_training, num_judges),
    )


def _packed(network: DraftNetwork) -> DraftTensors:
    return DraftTensors(config=network.config, tensors=dict(checkpoint.checkpoint_tensors(network)))


def _unless_stopped(work: Callable[[], Evidence]) -> Evidence | None:
    """None if the work ends because a stop is requested: the other ranks wait for an answer in any case."""
    try:
        return work()
    except Stopped:
        return None
