"""Saves a trainer's state while it trains on.

A save copies the state in memory, for which training stands still, and writes the copy in a thread of its own. One save runs
at a time. A disk that is full costs that save only: it is counted and logged, and the next one is tried as long after it.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Exhausted
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.schedule import Progress, TrainingSchedule, is_save_due
from updraft_trainer.states.state import State, States, TrainingHistory

logger = logging.getLogger(__name__)


class Saver:
    """`take` returns the state of now, which may share memory with the learner; `progress` says how far training is.

    Training stops during both calls, so they may be made from a worker thread.
    """

    def __init__(
        self,
        states: States,
        schedule: TrainingSchedule,
        *,
        take: Callable[[], State],
        progress: Callable[[], Progress],
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._states = states
        self._schedule = schedule
        self._take = take
        self._progress = progress
        self._metrics = metrics
        self._clock = clock
        self.last_s = 0.0
        """Unix time of the last save, by an earlier process too; 0 before the first one."""
        self._saved = progress()
        self._duration_s = schedule.checkpoint_seconds / 2
        """From the start of the last save until it was durable. Before the first one, the longest that keeps the promise."""
        self._written: tuple[int, TrainingHistory] | None = None
        """The step and the history in the newest saved state."""
        self._saving: asyncio.Future[None] | None = None
        self._is_requested = False
        self._is_slow = False
        """Whether saves take so long that a kill costs more than it may."""

    def request_save(self) -> None:
        """Save soon, without regard to the schedule."""
        self._is_requested = True

    async def save_if_due(self, *, step_s: float = 0.0) -> None:
        """Start a save if one is due or requested, once the one before is written. `step_s`: when this is called again."""
        is_due = is_save_due(self._progress(), self._saved, self._schedule, duration_s=step_s + self._duration_s)
        if (is_due or self._is_requested) and (self._saving is None or self._saving.done()):
            await self._start()

    async def save(self) -> None:
        """Write everything durably that a restart needs, after a save that is under way."""
        await self.written()
        await asyncio.to_thread(self._save_last)

    def _save_last(self) -> None:
        """Nothing is written if nothing has changed since the last save."""
        progress, state = self._progress(), self._take()
        if self._is_requested or self._written != (progress.step, state.history):
            self._try_to_write(state, progress, "the next start resumes from the last saved state")

    async def written(self) -> None:
        """Return once no save is under way."""
        if self._saving is not None:
            await self._saving

    async def _start(self) -> None:
        """Copy the state and write it in a thread of its own."""
        if self._saving is not None:
            self._saving.result()
        self._is_requested = False
        progress = self._progress()
        state = await asyncio.to_thread(lambda: self._take().copied())
        self._metrics.checkpoint_pause.observe(self._clock.monotonic() - progress.at_s)
        self._saving = asyncio.get_running_loop().run_in_executor(None, self._try_to_write, state, progress)

    def _try_to_write(self, state: State, progress: Progress, otherwise: str = "trying again later") -> None:
        """A full disk is counted and logged. Training continues, because the previous state is intact."""
        try:
            self._write(state, progress)
        except Exhausted as error:
            self._metrics.checkpoint_failures.inc()
            facts = {"step": progress.step, "saved_step": self._saved.step}
            self._saved = replace(self._saved, at_s=self._clock.monotonic())
            logger.error("Could not save, %s: %s", otherwise, error, extra=facts)

    def _write(self, state: State, progress: Progress) -> None:
        self._states.save(state)
        self._written = progress.step, state.history
        self._saved, self._duration_s = progress, self._clock.monotonic() - progress.at_s
        self._metrics.checkpoint_seconds.observe(self._duration_s)
        self.last_s = self._clock.now()
        facts = {"step": progress.step, "samples": state.history.num_samples, "seconds": round(self._duration_s, 3)}
        logger.info("Saved", extra=facts)
        if 2 * self._duration_s > self._schedule.checkpoint_seconds and not self._is_slow:
            self._is_slow = True
            logger.warning(
                "Saving takes %.0f s, so a kill may cost %.0f s of training, more than UPDRAFT_TRAINER_CHECKPOINT_SECONDS;"
                " a faster disk for UPDRAFT_TRAINER_DATA_DIR would help",
                self._duration_s,
                2 * self._duration_s,
            )
