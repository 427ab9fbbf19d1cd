"""The level-triggered loop: whatever changed, look at everything, decide, write, and only then tell the pods.

One task decides for all speculators, so decisions never race; calls write their wish, mark the speculator and
wait until it was decided on. Blocking work runs on one thread (the archive's) or, where it is long and
touches no state, on any. What cannot be written (a full disk) is not told either: the pods keep their orders,
and the decision is tried again.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.clock import Clock
from updraft_chassis.errors import UpdraftError
from updraft_registry import wire
from updraft_registry.archive import Archive
from updraft_registry.fleet import Fleet, Session
from updraft_registry.metrics import Metrics
from updraft_registry.retention import keepers
from updraft_registry.rollout import Decision, Pod, decide
from updraft_registry.version import NO_DRAFT, Speculator, Transition, newest_proven, stable

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

TICK_S = 1.0
"""How often silent pods are looked for, failed decisions are tried again, and watchers hear of traffic."""

SWEEP_GRACE_S = 60.0
"""After a start no weights are deleted for this long: the pods have not yet said what they hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """One speculator after its last decision."""

    speculator: Speculator
    policy: registry_pb2.RolloutPolicy
    message: str = "nothing is published yet"


class Control:
    """Owns the state in memory: what the catalogue said last, and the fleet.

    Everything but `run` may be called at any time.
    """

    def __init__(self, archive: Archive, fleet: Fleet, clock: Clock, metrics: Metrics) -> None:
        self._archive = archive
        self._fleet = fleet
        self._clock = clock
        self._metrics = metrics
        self._started_s = clock.monotonic()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="archive")
        self._known: dict[str, _Known] = {}
        self._marked: set[str] = set()
        self._failed: set[str] = set()
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._is_reported = False
        self.is_ready = False
        self.is_closed = False

    async def run(self) -> None:
        """Decide until cancelled. The first round covers all speculators of the catalogue."""
        for name in await self.call(self._archive.catalogue.names):
            await self._decide(name)
        self.is_ready = True
        loop, next_tick_s = asyncio.get_running_loop(), 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            if loop.time() >= next_tick_s:
                next_tick_s = loop.time() + TICK_S
                await self._tick()
            marked, self._marked = self._marked, set()
            for name in sorted(marked):
                await self._decide(name)

    def join(self) -> None:
        """Wait for the archive's thread; nothing may be called afterwards."""
        self._thread.shutdown()

    def close(self) -> None:
        """End all streams and watches; what else runs goes on to its end."""
        self.is_closed = True
        self.is_ready = False
        self._fleet.close()
        self._announce()

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run something of the archive on its thread."""
        return await asyncio.wrap_future(self._thread.submit(function, *args, **kwargs))

    async def change(self, name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a change on the archive's thread, then decide on the speculator; returns once that is done.

        A caller that goes away in between does not stop the decision.
        """
        loop = asyncio.get_running_loop()
        job = self._thread.submit(function, *args, **kwargs)
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._mark, name))
        result = await asyncio.wrap_future(job)
        await self._settled(name)
        return result

    def report(self, session: Session, report: fleet_pb2.PodReport) -> None:
        """Take a pod's report; InvalidInput for one that cannot be."""
        self._metrics.reports.inc()
        self._is_reported = True
        if self._fleet.report(session, report, self._clock.monotonic()):
            self._mark(report.identity.speculator)

    def disconnect(self, session: Session) -> None:
        """Note that a pod's stream ended."""
        self._fleet.disconnect(session)
        if session.owner is not None:
            self._mark(session.owner[0])

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return int(self._clock.now() * 1000)

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of any state; take it before reading the state."""
        return self._changed

    async def state(self, name: str) -> registry_pb2.SpeculatorState:
        """The whole state of a speculator; of one that nobody knows, an empty one."""
        known = self._known.get(name)
        if known is None:
            known = await self.call(self._read, name)
        speculator = known.speculator
        serving = stable(speculator.versions)
        number = serving.number if serving else NO_DRAFT
        previous = newest_proven(speculator.versions, other_than=number)
        lineage = speculator.lineage
        return registry_pb2.SpeculatorState(
            speculator=name,
            stable=number,
            previous=previous.number if previous else NO_DRAFT,
            latest=speculator.latest,
            pinned=speculator.wish.pinned,
            paused=speculator.wish.is_paused,
            policy=wire.policy_to_proto(speculator.wish.policy, known.policy),
            pods=self._fleet.count(name, number),
            traffic=self._fleet.traffic(name),
            message=known.message,
            target_fingerprint=lineage.target_fingerprint if lineage else "",
            draft_vocabulary_fingerprint=lineage.draft_vocabulary_fingerprint if lineage else "",
        )

    def _mark(self, name: str) -> None:
        self._marked.add(name)
        self._wake.set()

    async def _settled(self, name: str) -> None:
        """Wait until the speculator has been decided on, with everything that is known now."""
        decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append(decided)
        self._mark(name)
        await decided

    async def _decide(self, name: str) -> None:
        waiting = [future for future in self._waiting.pop(name, []) if not future.done()]
        known = self._known.get(name)
        self._fleet.refuse_foreign(name, known.speculator.lineage if known else None)
        try:
            decided, decision = await self.call(self._settle, name, self._fleet.pods(name), self.now_ms())
        except UpdraftError as error:
            logger.warning("Decision not written; the old state holds", extra={"speculator": name, "error": str(error)})
            self._metrics.failed_decisions.inc()
            self._failed.add(name)
            for future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        self._remember(decided, decision)
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _settle(self, name: str, pods: tuple[Pod, ...], now_ms: int) -> tuple[_Known, Decision]:
        """Read, decide, write: one job of the archive's thread, so that no wish changes in between."""
        known = self._read(name)
        decision = decide(known.speculator.wish, known.speculator.versions, pods, now_ms)
        if decision.transitions:
            self._archive.record(name, decision.transitions)
        speculator = replace(known.speculator, versions=decision.versions)
        return _Known(speculator=speculator, policy=known.policy, message=decision.message), decision

    def _read(self, name: str) -> _Known:
        catalogue = self._archive.catalogue
        return _Known(speculator=catalogue.speculator(name), policy=catalogue.policy(name))

    def _remember(self, known: _Known, decision: Decision) -> None:
        """The decision is written: tell everyone."""
        name = known.speculator.name
        self._fleet.refuse_foreign(name, known.speculator.lineage)
        self._fleet.send(name, decision.orders)
        if known.speculator.is_known:
            self._known[name] = known
            self._measure(known.speculator)
        for transition in decision.transitions:
            self._log(name, transition)
        self._announce()

    async def _tick(self) -> None:
        self._marked |= self._fleet.expire(self._clock.monotonic()) | self._failed
        self._failed.clear()
        if self._clock.monotonic() - self._started_s >= SWEEP_GRACE_S:
            for name in sorted(self._known):
                await self._sweep(name)
        if self._is_reported:
            self._is_reported = False
            self._announce()

    async def _sweep(self, name: str) -> None:
        in_use = self._fleet.in_use(name)
        speculator = self._known[name].speculator
        if {version.number for version in speculator.versions} <= keepers(speculator, in_use):
            return
        try:
            deleted = await self.call(self._delete, name, in_use)
        except UpdraftError as error:
            logger.warning("Old weights not deleted", extra={"speculator": name, "error": str(error)})
            return
        self._metrics.deleted_blobs.inc(deleted)
        self._mark(name)

    def _delete(self, name: str, in_use: Collection[int]) -> int:
        """Read, choose, delete: one job, so that no pin falls in between."""
        speculator = self._archive.catalogue.speculator(name)
        return self._archive.sweep(speculator, keepers(speculator, in_use))

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _measure(self, speculator: Speculator) -> None:
        name, serving = speculator.name, stable(speculator.versions)
        number = serving.number if serving else NO_DRAFT
        self._metrics.version.labels(name, "stable").set(number)
        self._metrics.version.labels(name, "latest").set(speculator.latest)
        pods = self._fleet.count(name, number)
        for state in ("connected", "serving_stable", "failed"):
            self._metrics.pods.labels(name, state).set(getattr(pods, state))

    def _log(self, name: str, transition: Transition) -> None:
        self._metrics.transitions.labels(name, transition.after, transition.actor).inc()
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
