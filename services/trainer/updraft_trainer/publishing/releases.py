"""Which candidates are published, when, and what becomes of them. A candidate comes from the loop, with its estimate."""

import logging

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
from updraft_trainer.publishing.decision import PublishThresholds, decide
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Candidate, Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView, RolloutState
from updraft_trainer.publishing.report import TrainingReport
from updraft_trainer.publishing.schedule import PublishBackoff
from updraft_trainer.states.state import TrainingHistory

logger = logging.getLogger(__name__)


class Releases:
    """The publications of one trainer. Pauses between them grow while the registry rejects candidates."""

    def __init__(  # noqa: PLR0913 - the parts that a publication touches
        self,
        publisher: Publisher,
        registry: RegistryView,
        thresholds: PublishThresholds,
        backoff: PublishBackoff,
        *,
        report: TrainingReport,
        record: LearningRecord,
        monitor: Monitor,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._publisher = publisher
        self._registry = registry
        self._thresholds = thresholds
        self._backoff = backoff
        self._report = report
        self._record = record
        self._monitor = monitor
        self._metrics = metrics
        self._clock = clock

    def reset_backoff(self) -> None:
        """Allow the next publication at once, for example because another draft serves now."""
        self._backoff.reset()

    def is_due(self, candidate: Candidate, state: RolloutState, *, subject: str) -> bool:
        """Whether to publish the candidate now. `subject` names it in the report."""
        should_publish, sentence = decide(
            candidate.estimate,
            subject=subject,
            baseline_version=candidate.baseline_version,
            thresholds=self._thresholds,
        )
        self._record_gain(candidate)
        facts = {"step": candidate.step, "baseline_version": candidate.baseline_version}
        if not should_publish:
            self._report.decided(sentence)
        elif state.hold_reason:
            self._metrics.publishes.labels("withheld").inc()
            self._report.withheld(sentence, state.hold_reason)
        elif not self._backoff.is_over(self._clock.monotonic()):
            self._report.backed_off(sentence)
        else:
            self._report.decided(sentence)
            logger.info("Publishing: %s", sentence, extra=facts)
            return True
        logger.debug("Not published: %s", sentence, extra=facts | {"hold_reason": state.hold_reason})
        return False

    async def publish(self, candidate: Candidate, history: TrainingHistory, *, learning_rate: float) -> bool:
        """Upload a candidate and apply the registry's response. Returns whether the registry has a new version."""
        self._report.busy("it is being uploaded")
        try:
            with self._monitor.phase("publish"):
                response = await self._publisher.publish(candidate, history, learning_rate=learning_rate)
        except Unavailable as error:
            self._metrics.publishes.labels("unavailable").inc()
            self._report.done()
            logger.warning("Cannot publish now; trying again with a later candidate: %s", error)
            return False
        except (Conflict, Corrupt, Exhausted, Forbidden, InvalidInput, NotFound, Unauthenticated) as error:
            self._metrics.publishes.labels("refused").inc()
            wait_s = self._backoff.rejected(self._clock.monotonic())
            self._report.refused(error)
            logger.error("A candidate was refused: %s", error, extra={"wait_s": wait_s})
            return False
        if response is None:
            self._report.done()
            return False
        self._apply_phase(response.version)
        self._report.published(response.version, candidate.step)
        return True

    def _record_gain(self, candidate: Candidate) -> None:
        gain = candidate.estimate.gain(self._thresholds.confidence)
        if gain is None:
            return
        self._record.estimates += 1
        self._monitor.estimated({"candidate": gain.candidate, "baseline": gain.baseline})
        for bound, percent in (("low", gain.low_percent), ("high", gain.high_percent), ("mean", gain.percent)):
            self._metrics.gain.labels(bound).set(percent / 100)

    def _apply_phase(self, version: registry_pb2.Version) -> None:
        """Apply the phase that the registry gave to a published version."""
        phase = registry_pb2.Phase.Name(version.phase).removeprefix("PHASE_").lower()
        self._metrics.publishes.labels(phase).inc()
        facts = {"version": version.version, "phase": phase, "reason": version.reason}
        if version.phase == registry_pb2.PHASE_STABLE:
            self._registry.set_stable(version.version)
            self._backoff.reset()
            logger.info("Published", extra=facts)
        else:
            wait_s = self._backoff.rejected(self._clock.monotonic())
            logger.info("Published, but it does not serve; training continues", extra=facts | {"wait_s": wait_s})
