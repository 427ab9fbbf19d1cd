"""The training loop: train, evaluate, publish and save, and pause when all samples are used up. Intake fills replay meanwhile,
and a saved state is written while training goes on. With several ranks this is rank 0, which tells the others what to do
(`following`).

One step runs at a time, in a worker thread, so everything it uses has a single user. The held-out estimate decides whether to
publish (`decision`), never the number of steps. While the registry is unavailable or rejects candidates, training continues,
and the next candidate has a new estimate.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from updraft_chassis.errors import Corrupt, Exhausted, Forbidden, NotFound, Unauthenticated, Unavailable
from updraft_chassis.lifecycle import Stop, Stopped
from updraft_draft import memory
from updraft_draft.network import DraftNetwork
from updraft_trainer.components import Components, TrainingOptions
from updraft_trainer.coordination.watch import Activity
from updraft_trainer.data.retention import Pool
from updraft_trainer.data.sample import Sample
from updraft_trainer.following import fit_batch
from updraft_trainer.initial_state import CLOSED_FORM, RANDOM, InitialState, TrainerSpec
from updraft_trainer.learning.average import FITTED_DECAY, TRAINED_DECAY
from updraft_trainer.publishing.decision import NO_DRAFT
from updraft_trainer.publishing.estimate import is_better, looks_better
from updraft_trainer.publishing.evaluator import Baseline
from updraft_trainer.publishing.publish import Candidate
from updraft_trainer.publishing.registry_view import RolloutState
from updraft_trainer.publishing.releases import Releases
from updraft_trainer.publishing.report import TrainingReport
from updraft_trainer.publishing.schedule import (
    Progress,
    PublishBackoff,
    is_estimate_due,
    is_fit_due,
    next_estimate,
    sizes_over_ranks,
)
from updraft_trainer.saving import Saver
from updraft_trainer.states.state import Identity, State, TrainingHistory

logger = logging.getLogger(__name__)

_IDLE_S = 0.5
"""Pause before looking for new samples when there is nothing to train on."""

_LONG_S = 10.0
"""Work that takes longer is shown while it lasts."""


class Trainer:
    """Trains one draft from an initial state on."""

    def __init__(
        self,
        initial: InitialState,
        components: Components,
        options: TrainingOptions,
        *,
        identity: Identity,
        spec: TrainerSpec,
    ) -> None:
        self.learner = initial.learner
        self.history = initial.history
        self._rng = initial.rng
        self._counted = initial.counted
        if initial.counted is not None and components.folder_ids[0] not in initial.counted:
            found = components.replay.found_training_ids()
            self.history.count_as_used(found)
            self.history.learn_from(components.replay.tenants(found))
        self._components = components
        self._options = options
        self._identity = identity
        self._spec = spec
        self._followers = components.followers
        self._num_judges = spec.compute.ranks.per_rank(options.thresholds.min_samples)
        """Requests that judge drafts before they are trained on, at this rank."""
        self._estimated = None if self._is_new_closed_form else self._progress()
        self._estimate_s = 0.0
        """Duration of the last estimate, without the download of the serving draft."""
        self._step_s = 0.0
        """Duration of the last optimizer step."""
        self.saver = Saver(
            components.states,
            options.schedule,
            take=self._state,
            progress=self._progress,
            metrics=components.metrics,
            clock=components.clock,
        )
        if initial.saved_s is None:
            self.saver.request_save()
        else:
            self.saver.last_s = initial.saved_s
        self._report = TrainingReport(components.registry.set_message)
        self._report.decided("no draft has been judged since the trainer started")
        self._releases = Releases(
            publisher=components.publisher,
            registry=components.registry,
            thresholds=options.thresholds,
            backoff=PublishBackoff(options.schedule.evaluate_seconds),
            report=self._report,
            record=components.record,
            monitor=components.monitor,
            metrics=components.metrics,
            clock=components.clock,
        )
        self._fitted: Mapping[str, float] = {}
        """Sizes of clusters at the last fit."""
        self._restarted_from = NO_DRAFT
        components.demand.uses = lambda: self.history.uses
        components.record.trained(self.learner.step, None)
        if initial.fit_s:
            components.metrics.fit_seconds.observe(initial.fit_s)

    async def run(self, stop: Stop) -> None:
        """Train, evaluate, publish and save until `stop` here or at another rank, then save once more."""
        load_learner = self._followers.load_learner
        with suppress(Stopped):
            await asyncio.to_thread(load_learner, self.learner, uses=self.history.uses, counted=self._counted)
            await self.saver.save_if_due()
            await self._run(stop)
        await self.saver.save()
        await asyncio.to_thread(self._followers.end)
        stop.request()

    async def _run(self, stop: Stop) -> None:
        self._components.monitor.begin()
        while not stop.requested:
            if (state := self._components.registry.state) is not None:
                self._report.follow(state.stable, state.candidate)
            for propose in (self.evaluate, self.fit):
                if (candidate := await propose()) is not None:
                    await self.publish(candidate)
            stop.check()
            has_trained = await asyncio.to_thread(self.train)
            self._components.record.trained(self.learner.step, self._components.clock.now() if has_trained else None)
            with self._components.monitor.phase("save"):
                await self.saver.save_if_due(step_s=self._step_s)
            if self._followers.are_stopping:
                return
            if not has_trained:
                self._report.idle(self.learner.step)
                self._followers.busy(Activity.IDLE)
                with self._components.monitor.phase("waiting"):
                    await stop.wait(_IDLE_S)
            self._note_turn()

    def _note_turn(self) -> None:
        components, now = self._components, self._progress()
        components.monitor.turn(self.learner)
        steps, seconds = next_estimate(now, self._estimated, self._options.schedule, duration_s=self._estimate_s)
        components.record.next_estimate(steps, components.clock.now() + seconds)
        components.record.last_save_s = self.saver.last_s

    def train(self) -> bool:
        """One optimizer step; false if every sample has been used `max_uses` times."""
        options, clock = self._options, self._components.clock
        start_s = clock.monotonic()
        self._followers.take_step()
        with self._components.monitor.phase("data"):
            samples = self._components.replay.training_batch(
                self.history.uses,
                num_tokens=options.batch_tokens,
                max_uses=options.max_uses,
                rng=self._rng,
                num_waiting=self._num_judges,
            )
        with self._components.monitor.phase("all_reduce"):
            drawn = self._followers.drawn(samples, self.history.uses)
        if not drawn.num_samples:
            self._components.demand.paused()
            return False
        start_s += self._warm_up()
        step = self.learner.step
        report = self.learner.train(samples)
        memory.release()  # samples that arrive during a step lie between its tensors and leave gaps in the heap
        # Also after a skipped step, so that a sample that breaks training is not used endlessly.
        num_new = self.history.count_uses(sample.trace_id for sample in samples)
        self.history.learn_from(sample.tenant_text for sample in samples)
        self.history.num_samples += drawn.num_new - num_new
        end_s = clock.monotonic()
        if samples and report.num_rows:
            self._components.demand.trained([sample.num_rows for sample in samples], start_s=start_s, end_s=end_s)
        else:
            self._components.demand.paused()
        self._step_s = end_s - start_s
        if self.learner.step > step:
            self._components.record.loss = report.loss
        self._components.monitor.stepped(
            self.learner, report, num_steps=self.learner.step - step, duration_s=self._step_s
        )
        return True

    def _warm_up(self) -> float:
        """Seconds that it takes to compile the step, once if it is compiled."""
        if not self.learner.is_cold:
            return 0.0
        self._report.busy("the training step is being compiled, which may take minutes")
        seconds = self.learner.warm_up()
        self._report.done()
        return seconds

    async def evaluate(self) -> Candidate | None:
        """Estimate if it is due; return a candidate if it should be published now."""
        schedule, began = self._options.schedule, self._progress()
        if not is_estimate_due(began, self._estimated, schedule, duration_s=self._estimate_s):
            return None
        state = await self._set_baseline()
        if state is None:
            return None
        if self._estimate_s >= _LONG_S or self._estimated is None:
            self._report.busy("a draft is being judged by other requests")
        self._estimated, start_s = began, self._components.clock.monotonic()
        replay, uses = self._components.replay, self.history.uses
        unseen = await asyncio.to_thread(replay.untrained_batch, uses, count=self._num_judges)
        candidate = await self._candidate(self.learner.average, unseen)
        await self._compare_with_trained(candidate)
        await self._follow_gain(candidate)
        self._estimate_s = self._components.clock.monotonic() - start_s
        return self._releases.first_due({self._name: candidate}, state)

    async def fit(self) -> Candidate | None:
        """A draft in closed form if one is due; return it, or the draft in training, if that should be published now.

        The newest requests judge both beside held-out ones, so the first version does not wait for many of these. Training goes
        on from the closed form if it looks better and is surely worse in no kind. Else the draft in training is a candidate
        too, judged by requests that it has not learned; the one that looks better comes first. What serves is replaced by a
        publication only.
        """
        if not self._is_fit_due() or (state := await self._set_baseline()) is None:
            return None
        self._fitted, start_s = self._cluster_sizes(), self._components.clock.monotonic()
        await asyncio.to_thread(self._followers.collect, self.learner)
        own, unseen = await asyncio.to_thread(
            fit_batch, self._components.replay, self._spec.compute.ranks, num_judges=self._num_judges
        )
        samples = await asyncio.to_thread(self._followers.fitted_samples, own)
        self._followers.busy(Activity.FIT)
        self._report.busy(f"a draft in closed form is being fitted to {len(samples)} samples and judged")
        with self._components.monitor.phase("fit"):
            if await asyncio.to_thread(self.learner.update_vocabulary, samples, check=self._components.check):
                self.history.learn_from(sample.tenant_text for sample in samples)
                await asyncio.to_thread(self._followers.load_learner, self.learner)
                logger.info("Changed the draft's vocabulary", extra={"step": self.learner.step})
            logger.info("Fitting a draft in closed form", extra={"samples": len(samples), "step": self.learner.step})
            draft = await asyncio.to_thread(self.learner.closed_form, samples, check=self._components.check)
        self._components.metrics.fit_seconds.observe(self._components.clock.monotonic() - start_s)
        if draft is None:
            self._report.done()
            await self._end_fit(own, is_used=False)
            return None
        closed, trained = await self._candidate(draft, unseen), await self._candidate(self.learner.average, unseen)
        goes_on = is_better(closed.estimate, trained.estimate)
        candidates = {"a draft in closed form": closed}
        if not goes_on:
            named = {self._name: replace(trained, estimate=trained.estimate.without_learned(self.history.uses))}
            closed_first = looks_better(closed.estimate, trained.estimate)
            candidates = candidates | named if closed_first else named | candidates
        published = self._releases.first_due(candidates, state)
        is_used = goes_on or published is closed
        await self._end_fit(own, is_used=is_used)
        if is_used:
            self.history.learn_from(sample.tenant_text for sample in samples)
        if goes_on:
            await self._restart(draft, CLOSED_FORM)
            logger.info("Restarted from a draft in closed form", extra={"step": self.learner.step})
        return published

    @property
    def _name(self) -> str:
        """The draft in training, as the subject of a sentence."""
        return f"the draft of {self.history.num_samples:,} samples"

    async def _end_fit(self, own: Sequence[Sample], *, is_used: bool) -> None:
        """Samples of a draft that is served or trained may not judge a draft that continues it."""
        if is_used:
            self.history.count_uses(sample.trace_id for sample in own)
        self.history.num_samples += await asyncio.to_thread(self._followers.end_fit, is_used=is_used)

    def _is_fit_due(self) -> bool:
        """Whether the requests of all ranks suffice for a fit. A fit to few requests teaches little."""
        num_judges, elsewhere = self._options.thresholds.min_samples, self._components.record.elsewhere
        num_training = self._components.replay.num_requests(Pool.WINDOW, Pool.RESERVOIR) + elsewhere[0]
        return num_training >= num_judges and is_fit_due(self._cluster_sizes(), self._fitted, first=2 * num_judges)

    def _cluster_sizes(self) -> Mapping[str, float]:
        return sizes_over_ranks(self._components.replay.cluster_sizes(), sum(self._components.record.elsewhere))

    async def _set_baseline(self) -> RolloutState | None:
        """The registry's state, after its serving draft became the baseline; None if that is not possible now."""
        components, state = self._components, self._components.registry.state
        if state is None:
            return None
        state.check_target(self._identity.target_fingerprint)
        self._followers.busy(Activity.BASELINE)
        try:
            has_changed = await components.evaluator.set_baseline(state.stable, self.learner.network.embedding)
        except (Unavailable, Unauthenticated, Forbidden, NotFound, Corrupt, Exhausted, OSError) as error:
            logger.warning("Cannot fetch the serving draft: %s", error, extra={"version": state.stable})
            self._report.decided(f"version {state.stable} cannot be fetched to compare with: {error}")
            return None
        if has_changed:
            self._releases.backoff.reset()
            await asyncio.to_thread(self._followers.set_baseline, components.evaluator.baseline)
        await asyncio.to_thread(self._follow_shape, state)
        return state

    def _follow_shape(self, state: RolloutState) -> None:
        """Go on from the serving draft if its shape is not ours, which engines might never serve then.

        If no pod can load the published draft, start a new one of the chosen shape.
        """
        serving = self._components.evaluator.baseline
        if state.is_unloadable and self.learner.network.config != self._spec.draft_config:
            self._start_over()
        if serving.network is None or serving.network.config == self.learner.network.config:
            return
        self.learner = self.learner.continuing(serving.network)
        self._followers.load_learner(self.learner)
        self._continue(serving)
        logger.info("Restarted from a serving draft of another shape", extra={"version": serving.version})

    def _continue(self, serving: Baseline) -> None:
        """Training goes on from the serving draft, so what it has learned from counts."""
        self.history.origin = f"version {serving.version}"
        self.history.learn_from(serving.tenants, has_more=serving.has_more_tenants)

    def _start_over(self) -> None:
        """Random weights of the chosen shape, over the most frequent tokens of the stored requests."""
        components, spec = self._components, self._spec
        own = components.replay.first_batch(count=spec.first_samples, rng=self._rng)
        samples = [*own, *self._followers.first_samples(spec.first_samples - len(own))][: spec.first_samples]
        self._followers.busy(Activity.FIRST_DRAFT)
        learner = spec.new_learner(samples, check=components.check)
        learner.count_from(self.learner.step)
        self.learner, self.history, self._fitted = learner, TrainingHistory(origin=RANDOM), {}
        self.history.learn_from(sample.tenant_text for sample in samples)
        self._followers.load_learner(learner, uses={})
        logger.warning("Started a new draft, because no pod can load the published one", extra={"step": learner.step})

    async def _candidate(self, network: DraftNetwork, unseen: Sequence[Sample] = ()) -> Candidate:
        components, estimate = self._components, self._components.evaluator.estimate
        start_s = components.clock.monotonic()
        with components.monitor.phase("estimate"):
            candidate = await asyncio.to_thread(estimate, network, step=self.learner.step, unseen=unseen)
        await asyncio.to_thread(memory.release)
        if candidate.unknown_share is not None:
            components.metrics.unknown_tokens.set(candidate.unknown_share)
        components.metrics.evaluation_seconds.observe(components.clock.monotonic() - start_s)
        return candidate

    async def _compare_with_trained(self, candidate: Candidate) -> None:
        """How much of what it accepts was learned by heart."""
        components, gain = self._components, candidate.estimate.gain(self._options.thresholds.confidence)
        with components.monitor.phase("estimate"):
            trained = await asyncio.to_thread(components.evaluator.trained_length, candidate.network, self.history.uses)
        if trained is not None:
            components.metrics.trained_length.set(trained)
            components.record.trained_length = trained
        if trained is not None and gain is not None:
            self._report.learned(trained, gain.candidate)

    async def _follow_gain(self, candidate: Candidate) -> None:
        """Keep the weights of a candidate that is not worse than the serving draft, to restore them if training diverges.

        Training goes on from the serving draft if that is certainly better, as after a shift of traffic. Once per version,
        because acceptance may fall during the first steps from it too.
        """
        gain = candidate.estimate.gain(self._options.thresholds.confidence)
        serving = self._components.evaluator.baseline
        if gain is not None and gain.percent >= 0:
            await asyncio.to_thread(self._mark_good)
        if gain is None or gain.high_percent >= 0 or serving.network is None:
            return
        if serving.version == self._restarted_from:
            return
        self._restarted_from = serving.version
        await self._restart(serving.network, f"version {serving.version}")
        self._continue(serving)
        logger.info("Restarted from the serving draft", extra={"version": serving.version, "gain": gain.percent})

    async def _restart(self, draft: DraftNetwork, origin: str) -> None:
        """In a thread, because copying the weights of a large draft takes seconds."""
        least_decay = FITTED_DECAY if origin == CLOSED_FORM else TRAINED_DECAY
        await asyncio.to_thread(self.learner.start_from, draft.state_dict(), least_decay=least_decay)
        await asyncio.to_thread(self._followers.load_learner, self.learner)
        self.history.origin = origin

    def _mark_good(self) -> None:
        self.learner.mark_good()
        self._followers.mark_good()

    async def publish(self, candidate: Candidate) -> None:
        """Upload a candidate and apply the registry's response."""
        await asyncio.to_thread(self._followers.collect_tenants, self.history)
        self._followers.busy(Activity.PUBLISH)
        if await self._releases.publish(candidate, self.history, learning_rate=self.learner.learning_rate):
            self.saver.request_save()  # the registry has this draft now, so it should not be lost with this process
            await self.saver.save_if_due()

    def _state(self) -> State:
        stored = set(self._components.replay.training_ids())
        self.history.uses = {id_: uses for id_, uses in self.history.uses.items() if id_ in stored}
        uses = self._followers.uses(self.history.uses)
        self._followers.collect_tenants(self.history)
        self._followers.collect(self.learner)
        self._followers.busy(Activity.SAVE)
        return State(
            identity=self._identity,
            token_ids=self.learner.network.token_ids,
            learner=self.learner.state_dict(),
            history=replace(self.history, uses=uses, folders=list(self._components.folder_ids)),
            rng=self._rng.getstate(),
            config_digest=self._spec.config_digest,
            draft_config=self.learner.network.config,
            taken_s=self._components.clock.now(),
        )

    @property
    def _is_new_closed_form(self) -> bool:
        """A first draft from a closed form is judged at once: before its first step it already proposes likely tokens."""
        return self.learner.step == 0 and self.history.origin == CLOSED_FORM

    def _progress(self) -> Progress:
        return Progress(
            step=self.learner.step,
            num_held_out=self._components.replay.num_held_out,
            at_s=self._components.clock.monotonic(),
        )
