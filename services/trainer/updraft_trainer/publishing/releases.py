"""Which candidates are published, when, and what becomes of them. A candidate comes from the loop, with its estimate."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

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
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.decision import PublishDecision, PublishThresholds, decide
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Candidate, Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView, RolloutState
from updraft_trainer.publishing.report import TrainingReport
from updraft_trainer.publishing.schedule import PublishBackoff
from updraft_trainer.states.state import TrainingHistory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Releases:
    """The publications of one trainer. Pauses between them grow while the registry rejects candidates."""

    publisher: Publisher
    registry: RegistryView
    thresholds: PublishThresholds
    backoff: PublishBackoff
    report: TrainingReport
    record: LearningRecord
    monitor: Monitor
    metrics: Metrics
    clock: Clock

    def first_due(self, candidates: Mapping[str, Candidate], state: RolloutState) -> Candidate | None:
        """The first candidate that is good enough, if it should be published now; None otherwise.

        Names of candidates are for the report. If none is good enough, it says why the first one is not.
        """
        decisions = {
            name: decide(one.estimate, subject=name, baseline_version=one.baseline_version, thresholds=self.thresholds)
            for name, one in candidates.items()
        }
        good = [name for name, decision in decisions.items() if decision.should_publish]
        name = next(iter(good or candidates))
        return candidates[name] if self._is_due(candidates[name], decisions[name], state) else None

    def _is_due(self, candidate: Candidate, decision: PublishDecision, state: RolloutState) -> bool:
        should_publish, sentence = decision
        self._record_gain(candidate)
        facts = {"step": candidate.step, "baseline_version": candidate.baseline_version}
        if not should_publish:
            self.report.decided(sentence)
        elif state.hold_reason:
            self.metrics.publishes.labels("withheld").inc()
            self.report.withheld(sentence, state.hold_reason)
        elif not self.backoff.is_over(self.clock.monotonic()):
            self.report.backed_off(sentence)
        else:
            self.report.decided(sentence)
            logger.info("Publishing: %s", sentence, extra=facts)
            return True
        logger.debug("Not published: %s", sentence, extra=facts | {"hold_reason": state.hold_reason})
        return False

    async def publish(self, candidate: Candidate, history: TrainingHistory, *, learning_rate: float) -> bool:
        """Upload a candidate and apply the registry's response. Returns whether the registry has a new version."""
        self.report.busy("it is being uploaded")
        try:
            with self.monitor.phase("publish"):
                response = await self.publisher.publish(candidate, history, learning_rate=learning_rate)
        except Unavailable as error:
            self.metrics.publishes.labels("unavailable").inc()
            self.report.done()
            logger.warning("Cannot publish now; trying again with a later candidate: %s", error)
            return False
        except (Conflict, Corrupt, Exhausted, Forbidden, InvalidInput, NotFound, Unauthenticated) as error:
            self.metrics.publishes.labels("refused").inc()
            wait_s = self.backoff.rejected(self.clock.monotonic())
            self.report.refused(error)
            logger.error("A candidate was refused: %s", error, extra={"wait_s": wait_s})
            return False
        if response is None:
            self.report.done()
            return False
        self._apply_phase(response.version)
        self.report.published(response.version, candidate.step)
        return True

    def _record_gain(self, candidate: Candidate) -> None:
        gain = candidate.estimate.gain(self.thresholds.confidence)
        if gain is not None:
            self.record.estimated(candidate.estimate, gain)
            self.monitor.estimated(gain)

    def _apply_phase(self, version: registry_pb2.Version) -> None:
        """Apply the phase that the registry gave to a published version."""
        phase = registry_pb2.Phase.Name(version.phase).removeprefix("PHASE_").lower()
        self.metrics.publishes.labels(phase).inc()
        facts = {"version": version.version, "phase": phase, "reason": version.reason}
        if version.phase == registry_pb2.PHASE_STABLE:
            self.registry.set_stable(version.version)
            self.backoff.reset()
            logger.info("Published", extra=facts)
        else:
            wait_s = self.backoff.rejected(self.clock.monotonic())
            logger.info("Published, but it does not serve; training continues", extra=facts | {"wait_s": wait_s})
