"""The trainer's loop: while intake fills replay, learn, evaluate, publish and save, and rest when all is learnt.

One step runs at a time, in a worker thread, so that everything it touches has one user. Whether a draft is published is
decided by the held-out estimate (`decision`), never by counting steps. A registry that is away or says no costs nothing
but time: learning goes on, and the next candidate comes with a fresh estimate.
"""

import asyncio
import logging
from dataclasses import dataclass, replace

from updraft.registry.v1 import registry_pb2
from updraft_chassis.clock import Clock
from updraft_chassis.errors import (
    Conflict,
    Corrupt,
    Exhausted,
    Forbidden,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from updraft_chassis.lifecycle import Stop
from updraft_draft import checkpoint
from updraft_trainer.data.replay import Replay
from updraft_trainer.learning.initial_state import InitialState
from updraft_trainer.learning.state import Identity, State, States
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.decision import PublishThresholds, decide
from updraft_trainer.publishing.evaluator import Evaluator
from updraft_trainer.publishing.publish import Candidate, Publisher
from updraft_trainer.publishing.registry_view import RegistryView, RolloutState
from updraft_trainer.publishing.schedule import Progress, PublishBackoff, TrainingSchedule, is_estimate_due

logger = logging.getLogger(__name__)

_REST_S = 0.5
"""Between looks for new samples when there is nothing to learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How to use the samples; see the settings of the same names."""

    batch_samples: int
    max_uses: int
    pace: TrainingSchedule
    bar: PublishThresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What the trainer works with and does not own."""

    replay: Replay
    drafts: RegistryView
    evaluator: Evaluator
    publisher: Publisher
    states: States
    metrics: Metrics
    clock: Clock


class Trainer:
    """One draft in training, from its first or last state on."""

    def __init__(
        self,
        origin: InitialState,
        around: Components,
        plan: TrainingOptions,
        *,
        identity: Identity,
        config_digest: str,
    ) -> None:
        self.learner = origin.learner
        self._around = around
        self._plan = plan
        self._identity = identity
        self.progress = origin.progress
        self._rng = origin.rng
        self._config_digest = config_digest
        self._holdoff = PublishBackoff(plan.pace.evaluate_seconds)
        self._estimated = self._mark()
        self._saved = self._estimated
        self._lineage = checkpoint.vocabulary_fingerprint(origin.learner.network.token_ids)

    async def run(self, stop: Stop) -> None:
        """Learn, evaluate, publish and save until `stop`; then save once more."""
        while not stop.requested:
            has_learnt = await asyncio.to_thread(self.learn)
            candidate = await self.evaluate()
            if candidate is not None:
                await self.publish(candidate)
            await self.save_if_due()
            if not has_learnt:
                await stop.wait(_REST_S)
        await self._try_to_save(otherwise="the next start goes on from the last state that was saved")

    def learn(self) -> bool:
        """One optimizer step; false if every sample was used enough."""
        plan, metrics, clock = self._plan, self._around.metrics, self._around.clock
        start_s = clock.monotonic()
        samples = self._around.replay.training_batch(
            self.progress.uses, count=plan.batch_samples, max_uses=plan.max_uses, rng=self._rng
        )
        if not samples:
            return False
        step = self.learner.step
        report = self.learner.train(samples)
        for sample in samples:  # also of a skipped step: a sample that breaks training must not come back for ever
            self.progress.count_use(sample.trace_id)
        metrics.step_seconds.observe(clock.monotonic() - start_s)
        metrics.trained_rows.inc(report.num_rows)
        metrics.loss.set(report.loss)
        metrics.grad_norm.set(report.grad_norm)
        if report.is_skipped:
            metrics.skipped_steps.inc()
            logger.warning("Skipped a step that was not finite", extra={"step": self.learner.step})
        metrics.steps.inc(self.learner.step - step)
        return True

    async def evaluate(self) -> Candidate | None:
        """Estimate if it is due; a candidate if it is worth publishing now."""
        outlook, around = self._around.drafts.outlook, self._around
        if outlook is None or not is_estimate_due(self._mark(), self._estimated, self._plan.pace):
            return None
        outlook.check_target(self._identity.target_fingerprint)
        outlook.check_vocabulary(self._lineage)
        self._estimated = self._mark()
        try:
            if await around.evaluator.follow(outlook.serving, self.learner.network.embedding):
                self._holdoff.reset()
        except (Unavailable, Unauthenticated, Forbidden, NotFound, Corrupt, Exhausted, OSError) as error:
            logger.warning("Cannot fetch what serves: %s", error, extra={"version": outlook.serving})
            return None
        start_s = around.clock.monotonic()
        candidate = await asyncio.to_thread(around.evaluator.estimate, self.learner.network, step=self.learner.step)
        around.metrics.evaluation_seconds.observe(around.clock.monotonic() - start_s)
        return candidate if self._is_worth_publishing(candidate, outlook) else None

    async def publish(self, candidate: Candidate) -> None:
        """Send a candidate and take the registry's word for what became of it."""
        publisher, metrics = self._around.publisher, self._around.metrics
        try:
            response = await publisher.publish(candidate, self.progress)
        except Unavailable as error:
            metrics.publishes.labels("unavailable").inc()
            logger.warning("Could not publish; a later candidate will be: %s", error)
            return
        except (Conflict, Corrupt, Exhausted, Forbidden, InvalidInput, NotFound, Unauthenticated) as error:
            metrics.publishes.labels("refused").inc()
            wait_s = self._holdoff.refused(self._around.clock.monotonic())
            logger.error("A candidate was refused: %s", error, extra={"wait_s": wait_s})
            return
        if response is not None:
            self._heed(response.version)
            await self._try_to_save()  # the registry now has this lineage: it must not be lost with this process

    async def save_if_due(self) -> None:
        """Save when enough was learnt to be sorry for."""
        now, pace = self._mark(), self._plan.pace
        if now.step != self._saved.step and now.at_s - self._saved.at_s >= pace.checkpoint_seconds:
            await self._try_to_save()

    def save(self) -> None:
        """Make everything durable that a restart needs."""
        clock = self._around.clock
        start_s = clock.monotonic()
        kept = set(self._around.replay.training_ids())
        self.progress.uses = {id_: uses for id_, uses in self.progress.uses.items() if id_ in kept}
        self._around.states.save(
            State(
                identity=self._identity,
                token_ids=self.learner.network.token_ids,
                learner=self.learner.state_dict(),
                progress=self.progress,
                rng=self._rng.getstate(),
                config_digest=self._config_digest,
                draft_config=self.learner.network.config,
            )
        )
        self._saved = self._mark()
        self._around.metrics.checkpoint_seconds.observe(clock.monotonic() - start_s)
        logger.info("Saved", extra={"step": self.learner.step, "samples": self.progress.num_samples})

    async def _try_to_save(self, *, otherwise: str = "trying again later") -> None:
        """A full disk is survived and counted: what was saved before is whole, and nothing else needs the disk."""
        try:
            await asyncio.to_thread(self.save)
        except Exhausted as error:
            self._around.metrics.checkpoint_failures.inc()
            facts = {"step": self.learner.step, "saved_step": self._saved.step}
            self._saved = replace(self._saved, at_s=self._around.clock.monotonic())
            logger.error("Could not save, %s: %s", otherwise, error, extra=facts)

    def _is_worth_publishing(self, candidate: Candidate, outlook: RolloutState) -> bool:
        """Whether it is better, and whether anybody would take it now."""
        decision = decide(candidate.estimate, baseline_version=candidate.baseline_version, bar=self._plan.bar)
        self._show(candidate)
        facts = {"step": candidate.step, "baseline_version": candidate.baseline_version}
        if not decision.is_better:
            logger.debug("Not published: %s", decision.reason, extra=facts)
            return False
        if outlook.hold:
            self._around.metrics.publishes.labels("withheld").inc()
            logger.debug("Not published while %s: %s", outlook.hold, decision.reason, extra=facts)
            return False
        if not self._holdoff.is_over(self._around.clock.monotonic()):
            return False
        logger.info("Publishing: %s", decision.reason, extra=facts)
        return True

    def _show(self, candidate: Candidate) -> None:
        gain, metrics = candidate.estimate.gain(self._plan.bar.confidence), self._around.metrics
        if gain is None:
            return
        if gain.percent >= 0:
            self.learner.mark_good()
        metrics.acceptance_length.labels("candidate").set(gain.candidate)
        metrics.acceptance_length.labels("baseline").set(gain.baseline)
        for bound, percent in (("low", gain.low_percent), ("high", gain.high_percent), ("mean", gain.percent)):
            metrics.gain.labels(bound).set(percent / 100)

    def _heed(self, version: registry_pb2.Version) -> None:
        """Go by the registry's word on a version."""
        phase = registry_pb2.Phase.Name(version.phase).removeprefix("PHASE_").lower()
        self._around.metrics.publishes.labels(phase).inc()
        facts = {"version": version.version, "phase": phase, "reason": version.reason}
        if version.phase == registry_pb2.PHASE_STABLE:
            self._around.drafts.note_serving(version.version)
            self._holdoff.reset()
            logger.info("Published", extra=facts)
        else:
            wait_s = self._holdoff.refused(self._around.clock.monotonic())
            logger.info("Published, but it does not serve; learning goes on", extra=facts | {"wait_s": wait_s})

    def _mark(self) -> Progress:
        return Progress(
            step=self.learner.step,
            num_held_out=self._around.replay.num_held_out,
            at_s=self._around.clock.monotonic(),
        )
