"""The level-based loop: after any change, read the whole state, decide, write, and then direct the pods.

One task decides for all speculators, so decisions never race. A call writes the desired state, wakes the loop and waits
for the decision. Blocking work runs on the archive's thread or, if it is long and touches no state, on others. A decision
that cannot be written (a full disk) is not sent: pods keep their directives, and the decision is retried. The desired
state is stored by then, so the call that changed it succeeds.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

from updraft.registry.v1 import registry_pb2
from updraft_chassis.clock import Clock
from updraft_chassis.errors import Exhausted, UpdraftError
from updraft_registry.fleet import Fleet, Session
from updraft_registry.messages import wire
from updraft_registry.messages.reports import Report
from updraft_registry.metrics import Metrics
from updraft_registry.rollout.decision import Decision, decide, explain
from updraft_registry.rollout.placement import FleetView, Pod
from updraft_registry.rollout.retention import evictable, versions_to_keep
from updraft_registry.rollout.version import Rollout, Speculator, Transition, in_canary, number_of, roles_of
from updraft_registry.storage.archive import Action, Archive
from updraft_registry.storage.stores.port import Upload
from updraft_registry.trainers import Trainers
from updraft_rollouts.terms import Phase

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

TICK_S = 1.0
"""Interval for expiring silent pods, retrying failed decisions, judging canaries, and updating watchers."""

BEAT_S = 0.1
"""Minimum time between decisions that reports trigger, so that a thousand reports at once cause few decisions. Beyond a
thousand pods it grows with the fleet, because the cost of a decision does."""

SETTLE_S = 15.0
"""Time from the first pod that (re)connects until the fleet counts as complete. Pods try every five seconds."""

DOCUMENTS_RETRY_S = 30.0
"""Interval for retrying documents that could not be written (a full disk, an unavailable bucket)."""

SWEEP_GRACE_S = 60.0
"""No weights are deleted for this long after a start, because pods have not reported yet what they hold."""

SWEEP_RETRY_S = 60.0
"""Pause after a failed deletion, so that the archive's thread does not keep waiting for an unavailable bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    """A speculator after its last decision."""

    speculator: Speculator
    directed: Mapping[str, int]
    """Version that each pod was directed to serve."""
    tenant_salt: bytes = b""
    """For the pods; empty without any."""


class Control:
    """Owns the state in memory: the last decisions and the fleet."""

    def __init__(
        self, archive: Archive, fleet: Fleet, clock: Clock, metrics: Metrics, *, settle_s: float = SETTLE_S
    ) -> None:
        self._archive = archive
        self._settle_s = settle_s
        self._fleet = fleet
        self._trainers = Trainers()
        self._clock = clock
        self._metrics = metrics
        self._next_documents_s = clock.monotonic() + DOCUMENTS_RETRY_S
        self._next_sweep_s = self._evicts_from_s = clock.monotonic() + SWEEP_GRACE_S
        self._is_swept = False
        """A full sweep succeeded. Before it there may be orphaned blobs of an earlier process or a failed sweep."""
        self._settles_s: dict[str, float] = {}
        """When a returning fleet counts as complete, by speculator; infinite until its first pod reports."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="archive")
        self._decided: dict[str, _Decided] = {}
        self._due: set[str] = set()
        self._due_soon: set[str] = set()
        """Woken by reports: decided on at the next beat."""
        self._failed: dict[str, str] = {}
        """Why the last decision could not be written, by speculator."""
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._awake = asyncio.Event()
        self._changed = asyncio.Event()
        self._is_reported = False
        self.is_ready = False
        self.is_closed = False

    async def run(self) -> None:
        """Decide until cancelled. The first round covers all speculators of the catalogue."""
        names = await self.call(self._archive.catalogue.names)
        self._settles_s |= dict.fromkeys(names, math.inf)
        for name in names:
            await self._decide(name)
        self.is_ready = True
        loop, next_tick_s, next_beat_s = asyncio.get_running_loop(), 0.0, 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(next_tick_s, next_beat_s if self._due_soon else math.inf)):
                    await self._awake.wait()
            self._awake.clear()
            if loop.time() >= next_tick_s:
                next_tick_s = loop.time() + TICK_S
                await self._tick()
            if loop.time() >= next_beat_s:
                next_beat_s = loop.time() + BEAT_S * max(1.0, len(self._fleet) / 1000)
                self._due |= self._due_soon
                self._due_soon.clear()
            due, self._due = self._due, set()
            for name in sorted(due):
                await self._decide(name)

    def join(self) -> None:
        """Wait for the archive's thread. Call nothing afterwards."""
        self._thread.shutdown()

    def close(self) -> None:
        """End all streams and watches. Other calls complete."""
        self.is_closed = True
        self.is_ready = False
        self._fleet.close()
        self._announce()

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function of the archive on its thread."""
        return await asyncio.wrap_future(self._thread.submit(function, *args, **kwargs))

    async def change(self, name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a change on the archive's thread, and return once the speculator was decided on.

        Cancelling the call does not stop the decision. The change succeeds even if the decision cannot be written yet.
        """
        loop = asyncio.get_running_loop()
        job = self._thread.submit(function, *args, **kwargs)
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._wake, name))
        result = await asyncio.wrap_future(job)
        await self._until_decided(name)
        return result

    async def begin_evicting(self, manifest: registry_pb2.Manifest) -> Upload:
        """Start an upload to a full volume: delete the oldest weights that no policy, pod or person needs.

        Exhausted if that does not make enough room, or if pods may not have reported yet what they hold.
        """
        try:
            in_use = {name: self._fleet.in_use(name) for name in self._decided}
            return await self.call(self._begin_evicting, manifest, in_use, self.now_ms())
        finally:
            for name in self._decided:
                self._wake(name)

    async def act(self, name: str, action: Action, number: int, why: str) -> None:
        """Promote or reject a version, then decide on its speculator."""
        for transition in await self.change(name, self._archive.act, action, name, number, why, self.now_ms()):
            self._log(name, transition)

    def report(self, session: Session, report: Report) -> None:
        """Take a pod's report; InvalidInput if the stream belongs to another pod."""
        effect = self._fleet.report(session, report, self._clock.monotonic())
        self._metrics.count_report(effect, lag_s=self._clock.now() - report.sent_ms / 1000 if report.sent_ms else None)
        self._is_reported = True
        if self._settles_s.get(report.speculator) == math.inf:
            self._settles_s[report.speculator] = self._clock.monotonic() + self._settle_s
        if effect.is_change:
            self._wake_soon(report.speculator)

    def report_training(
        self, name: str, message: str, learning: registry_pb2.Learning, demand: float | None = None
    ) -> None:
        """Take a trainer's report and demand; watchers and pods see them at the next tick."""
        self._is_reported |= self._trainers.report(name, message, learning, self._clock.monotonic(), demand=demand)

    def disconnect(self, session: Session) -> None:
        self._fleet.disconnect(session)
        if session.owner is not None:
            self._wake_soon(session.owner[0])

    def now_ms(self) -> int:
        return int(self._clock.now() * 1000)

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of any state. Get it before you read the state."""
        return self._changed

    async def state(self, name: str) -> registry_pb2.SpeculatorState:
        """The state of a speculator, empty if it is unknown: the last decision with the latest reports."""
        known = self._decided.get(name)
        speculator = known.speculator if known else await self.call(self._archive.catalogue.speculator, name)
        message, canary_state = explain(speculator, self._fleet.pods(name), is_settled=self._is_settled(name))
        roles = roles_of(speculator)
        why = self._failed.get(name)
        state = wire.state_to_proto(
            speculator,
            canary_state,
            f"{message}; the next decision could not be written: {why}" if why else message,
            pods=self._fleet.count(name, roles.stable, roles.candidate),
            traffic=self._fleet.traffic(name),
        )
        state.capture_problem = self._fleet.capture_problem(name)
        state.capture_too_small = self._fleet.capture_too_small(name)
        state.trainer_message = self._trainers.message(name)
        state.volume_bytes = self._archive.store.volume_bytes()
        state.max_draft_bytes = self._archive.max_draft_bytes
        if (learning := self._trainers.learning(name)) is not None:
            state.learning.CopyFrom(learning)
        if (demand := self._trainers.demand(name)) is not None:
            state.demand_tokens_per_second = demand
            state.granted_tokens_per_second = self._fleet.granted(name)
        if (speedup := self._fleet.speedup(name)) is not None:
            state.speedup.CopyFrom(speedup)
        return state

    def pods(self, name: str, pod: str, *, after: str, size: int) -> list[registry_pb2.PodState]:
        """The last reports of `size` pods after `after`; with `pod`, of that one and with its traffic, or NotFound."""
        now = self._clock.monotonic(), self.now_ms()
        return [self._fleet.state(name, pod, *now)] if pod else self._fleet.states(name, *now, after=after, size=size)

    async def names(self) -> list[str]:
        """All speculators of the catalogue, and those that a trainer prepares the first version of."""
        return sorted({*await self.call(self._archive.catalogue.names), *self._trainers.speculators})

    def _is_settled(self, name: str) -> bool:
        return name not in self._settles_s

    def _wake(self, name: str) -> None:
        self._due.add(name)
        self._awake.set()

    def _wake_soon(self, name: str) -> None:
        if not self._due_soon:
            self._awake.set()
        self._due_soon.add(name)

    async def _until_decided(self, name: str) -> None:
        """Wait for a decision that includes everything known now."""
        decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append(decided)
        self._wake(name)
        await decided

    async def _decide(self, name: str) -> None:
        waiting = [future for future in self._waiting.pop(name, []) if not future.done()]
        known = self._decided.get(name)
        self._fleet.refuse_foreign(name, known.speculator.target if known else "")
        view = FleetView(
            pods=self._fleet.pods(name), directed=known.directed if known else {}, is_settled=self._is_settled(name)
        )
        try:
            decided, decision = await self.call(self._decide_and_record, name, known, view, self.now_ms())
        except UpdraftError as error:
            logger.warning("Decision not written; will retry", extra={"speculator": name, "error": str(error)})
            self._metrics.failed_decisions.inc()
            self._failed[name] = str(error)
            self._announce()
        else:
            self._failed.pop(name, None)
            self._apply(decided, decision, view.pods)
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _decide_and_record(
        self, name: str, known: _Decided | None, view: FleetView, now_ms: int
    ) -> tuple[_Decided, Decision]:
        """Read, decide and write in one job of the archive's thread, so that nothing changes in between.

        `now_ms` is the time of `view`: the job may wait, and by then a switchback may direct pods to the other version.
        """
        stored = self._archive.catalogue.speculator(name)
        # The canary in memory has more than the stored one: the last reports of the pods.
        speculator = replace(stored, rollout=known.speculator.rollout) if known else stored
        decision = decide(speculator, view.pods, now_ms, directed=view.directed, is_settled=view.is_settled)
        if decision.transitions or _text(decision.rollout) != _text(stored.rollout):
            self._archive.record(name, decision.transitions, decision.rollout)
        target = self._archive.catalogue.speculator(name).target  # one that was just rejected does not define it
        speculator = replace(stored, versions=decision.versions, rollout=decision.rollout, target=target)
        directed = {pod: directive.serve for pod, directive in decision.directives.items()}
        salt = self._archive.tenant_salt(name) if view.pods else b""
        return _Decided(speculator=speculator, directed=directed, tenant_salt=salt), decision

    def _apply(self, known: _Decided, decision: Decision, pods: Collection[Pod]) -> None:
        """Publish a written decision to pods, metrics and watchers."""
        speculator = known.speculator
        name, before = speculator.name, self._decided.get(speculator.name)
        self._fleet.refuse_foreign(name, speculator.target)
        self._fleet.send(name, decision.directives, pods, tenant_salt=known.tenant_salt)
        if speculator.is_known:
            self._decided[name] = known
            self._measure(speculator)
            self._measure_end(speculator, before.speculator.rollout if before else None)
        for transition in decision.transitions:
            self._log(name, transition)
        self._announce()

    async def _tick(self) -> None:
        now_s = self._clock.monotonic()
        if now_s >= self._next_documents_s:
            self._next_documents_s = now_s + DOCUMENTS_RETRY_S
            await self.call(self._archive.write_stale_documents)
        expired = self._fleet.expire(now_s)
        self._is_reported |= self._trainers.expire(now_s)
        self._grant()
        settled = {name for name, at_s in self._settles_s.items() if at_s <= now_s}
        self._settles_s = {name: at_s for name, at_s in self._settles_s.items() if name not in settled}
        self._settles_s |= {name: math.inf for name in expired & self._decided.keys() if not self._fleet.pods(name)}
        running = {name for name, known in self._decided.items() if known.speculator.rollout is not None}
        self._due |= expired | settled | running | self._failed.keys()
        if now_s >= self._next_sweep_s:
            await self._sweep()
        if self._is_reported:
            self._is_reported = False
            for known in self._decided.values():
                self._measure(known.speculator)
            self._announce()

    def _grant(self) -> None:
        """Hand the trainers' demand out to the pods."""
        for name, demand in self._trainers.demands.items():
            self._metrics.set_credits(name, demand=demand, granted=self._fleet.grant(name, demand))

    async def _sweep(self) -> None:
        for name, known in sorted(self._decided.items()):
            in_use, numbers = self._fleet.in_use(name), {version.number for version in known.speculator.versions}
            if self._is_swept and numbers <= versions_to_keep(known.speculator, in_use):
                continue
            try:
                deleted = await self.call(self._delete, name, in_use)
            except UpdraftError as error:
                logger.warning("Old weights not deleted", extra={"speculator": name, "error": str(error)})
                self._is_swept, self._next_sweep_s = False, self._clock.monotonic() + SWEEP_RETRY_S
                return
            self._is_swept = True
            self._metrics.deleted_blobs.inc(deleted)
            self._wake(name)

    def _delete(self, name: str, in_use: Collection[int]) -> int:
        """Read, choose and delete in one job, so that no pin comes in between."""
        speculator = self._archive.catalogue.speculator(name)
        return self._archive.sweep(speculator, versions_to_keep(speculator, in_use))

    def _begin_evicting(
        self, manifest: registry_pb2.Manifest, in_use: Mapping[str, Collection[int]], now_ms: int
    ) -> Upload:
        """Read, choose and delete in one job, so that no pin comes in between. `in_use`: what pods hold, by speculator."""
        if self._clock.monotonic() < self._evicts_from_s:
            try:
                return self._archive.begin(manifest)
            except Exhausted as error:
                raise Exhausted(
                    f"{error}. Or send it again in a minute, when pods have reported what they hold"
                ) from None
        catalogue = self._archive.catalogue
        found = [(name, version) for name in in_use for version in evictable(catalogue.speculator(name), in_use[name])]
        oldest_first = sorted(found, key=lambda entry: entry[1].published_ms)
        evicted = self._archive.make_room(manifest.size_bytes, oldest_first, now_ms)
        if evicted:
            logger.warning("Old weights deleted, because the volume is full", extra={"versions": ", ".join(evicted)})
            self._metrics.evicted_versions.inc(len(evicted))
        return self._archive.begin(manifest)

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _measure(self, speculator: Speculator) -> None:
        name = speculator.name
        self._metrics.update(speculator, self._fleet.connected(name), self._fleet.traffic(name))
        _, canary_state = explain(speculator, self._fleet.pods(name), is_settled=self._is_settled(name))
        self._metrics.set_verdict(name, canary_state.judgement.verdict if canary_state else None)

    def _measure_end(self, speculator: Speculator, before: Rollout | None) -> None:
        name = speculator.name
        if before is not None and before.candidate != number_of(in_canary(speculator.versions)):
            phase = next((v.phase for v in speculator.versions if v.number == before.candidate), Phase.SUPERSEDED)
            self._metrics.count_rollout(name, before, phase)

    def _log(self, name: str, transition: Transition) -> None:
        self._metrics.count_transition(name, transition)
        logger.info(
            "Version changed its phase",
            extra={
                "speculator": name,
                "version": transition.number,
                "phase": transition.after,
                "reason": transition.reason,
                "actor": transition.actor,
            },
        )


def _text(running: Rollout | None) -> str:
    return running.to_json() if running else ""
