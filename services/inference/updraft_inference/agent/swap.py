"""Follows the registry's directives: download, verify, swap, report the outcome.

Only the newest directive counts. It is the complete desired state, so following it twice changes nothing. A newer one
interrupts a download or a switchback, but never a swap. If the engine refuses a draft, the refusal is reported with its
reason and the old draft keeps serving. A swap that does not end is reported, too, and waited for. At startup the pod waits
briefly for the registry, then serves the last draft.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis.clock import Clock
from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput, Unavailable, UpdraftError
from updraft_chassis.retry import Backoff
from updraft_inference.agent import switchback
from updraft_inference.agent.drafts import DraftFolder, read_manifest, verified
from updraft_inference.agent.late_swap import LateSwap
from updraft_inference.cancellation import Interrupted, run_unless_cancelled_by
from updraft_inference.engine import DraftCheckpoint, DraftHolder, OtherShapeError, TargetChangedError
from updraft_inference.metrics import Metrics

logger = logging.getLogger(__name__)

VERIFY_S = 300.0
"""Interval at which the engine rehashes its draft. It takes a second of one core, and most pods live for days."""

_PASSING = (OSError, Unavailable, Exhausted)
"""Failures of this pod, which say nothing about a version."""

_DAMNING = (InvalidInput, Corrupt)
"""Failures that count against a version that cannot be downloaded. All others are failures of the pod, its network, its
token or the registry, and may pass."""

Fetch = Callable[[int, str | None], Coroutine[Any, Any, Path]]
"""(version, digest of its weights file if known) -> its folder: updraft_artifacts.transfer.download."""

_Drafts = Mapping[int, DraftCheckpoint | None]
"""Verified drafts by version; None for version 0."""


class Swapper:
    """Keeps the engine's draft at what the newest directive asks for. One `run` at a time."""

    def __init__(
        self,
        engine: DraftHolder,
        drafts: DraftFolder,
        fetch: Fetch,
        *,
        metrics: Metrics,
        clock: Clock,
        on_change: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._drafts = drafts
        self._fetch = fetch
        self._metrics = metrics
        self._clock = clock
        self._on_change = on_change
        self._backoff = Backoff()
        self._rng = random.Random()
        self._directive: fleet_pb2.Directive | None = None
        self._version = 0
        """The version that is being processed; failures are reported for it."""
        self._due_s: dict[int, float] = {}
        """When downloads may begin, on the monotonic clock, so that a newer directive does not draw a new delay."""
        self._heard = asyncio.Event()
        self._arrived = asyncio.Event()
        self._status = fleet_pb2.DirectiveStatus()
        self.late = LateSwap(clock, is_there=lambda: bool(engine.device), on_change=on_change)
        self.counters = fleet_pb2.SwapCounters()
        self._since_s = clock.now()
        self.retry_s = 5.0
        """Delay before a directive that failed for reasons of the pod is followed again."""
        self.contact_s = 3.0
        """How long startup waits for the first directive."""
        self.look_s = 0.5
        """How often a switchback checks the clock, which may have been set."""
        self.settled = asyncio.Event()
        """Set once the draft that is available at startup serves; a download is not waited for."""

    @property
    def loaded(self) -> fleet_pb2.Loaded:
        """The draft that the engine holds, and since when."""
        loaded = self._engine.loaded
        return fleet_pb2.Loaded(
            version=loaded.version,
            tensors_digest=loaded.tensors_digest,
            since_unix_ms=int(self._since_s * 1000),
        )

    @property
    def status(self) -> fleet_pb2.DirectiveStatus:
        """The outcome of the directive; pending while a swap does not end."""
        if not self.late.reason:
            return self._status
        return fleet_pb2.DirectiveStatus(
            nonce=self._status.nonce,
            outcome=fleet_pb2.OUTCOME_PENDING,
            version=self._version,
            reason=self.late.reason,
        )

    @property
    def prefetched(self) -> list[int]:
        return self._drafts.versions

    def accept(self, directive: fleet_pb2.Directive) -> None:
        """Follow this directive from now on. One that is already being followed is not restarted."""
        if self._directive is not None and _to_serve(directive) == _to_serve(self._directive):
            return
        self._directive = directive
        self._heard.set()
        self._arrived.set()

    def go_alone(self) -> None:
        """The registry is unreachable; do not wait for a directive."""
        self._heard.set()

    def again(self) -> None:
        """The engine may hold another draft than it did, as a server that was restarted: see to it."""
        self._on_change()
        self._arrived.set()

    async def restore(self) -> None:
        """Serve the draft of the previous process if it is intact. Needs no registry."""
        version = self._drafts.remembered()
        try:
            draft = None if version == 0 else await asyncio.to_thread(self._verified, version)
            if not self._holds(draft):
                await self._install(draft)
        except (OSError, UpdraftError) as error:
            extra = {"version": version, "reason": str(error)}
            logger.warning("The last draft cannot be restored; serving without a draft", extra=extra)

    async def run(self) -> None:
        """Follow directives until cancelled; serve the last draft until the first one arrives."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.contact_s):
                await self._heard.wait()
        self._arrived.set()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            try:
                await self._run_once(self._directive)
            except Interrupted:
                logger.info("Switching to the newest directive")

    async def watch(self) -> None:
        """Check at intervals, until cancelled, that the engine still holds what it loaded."""
        while True:
            await asyncio.sleep(VERIFY_S)
            await self.verify()

    async def verify(self) -> None:
        """Rehash the draft once. If it has changed in memory, report that and load it again from disk.

        An engine that does not answer is checked again at the next interval.
        """
        before = self._engine.loaded
        try:
            after = await self._engine.rehash()
        except UpdraftError as error:
            extra = {"version": before.version, "reason": str(error)}
            logger.warning("The engine's draft cannot be verified now", extra=extra)
            return
        if after.version == before.version and after.tensors_digest != before.tensors_digest:
            self._metrics.draft_mismatches.inc()
            extra = {"version": before.version, "loaded": before.tensors_digest, "held": after.tensors_digest}
            logger.error("The engine's draft has changed in memory and is loaded again", extra=extra)
            self.again()

    async def _run_once(self, directive: fleet_pb2.Directive | None) -> None:
        if directive is not None:
            await self._follow(directive)
        else:
            await self.restore()
            self.settled.set()

    async def _follow(self, directive: fleet_pb2.Directive) -> None:
        self._version = directive.serve_version
        self._set_status(directive, fleet_pb2.OUTCOME_PENDING)
        try:
            drafts = await self._apply(directive)
            self._set_status(directive, fleet_pb2.OUTCOME_ACK)
            await self._prune(directive)
            if drafts:
                await self._alternate(directive.switchback, drafts)
        except _PASSING as error:
            await self._postpone(directive, error)
        except UpdraftError as error:
            self._refuse(directive, error)
            await self._prune(directive)

    async def _apply(self, directive: fleet_pb2.Directive) -> _Drafts:
        """Serve the ordered version and prefetch the others. Returns the two drafts of a switchback, or nothing without one."""
        plan = directive.switchback
        has_plan = directive.HasField("switchback")
        if not has_plan or self._engine.loaded.version not in (plan.version_a, plan.version_b):
            await self._serve(directive)
        drafts = {}
        if has_plan:
            for version, digest in ((plan.version_a, plan.digest_a), (plan.version_b, plan.digest_b)):
                drafts[version] = await self._ready(directive, version, digest)
        for version in sorted(set(directive.prefetch_versions).difference(self._drafts.versions)):
            await self._fetch_version(directive, version, None)
        return drafts

    async def _serve(self, directive: fleet_pb2.Directive) -> None:
        if not await asyncio.to_thread(self._serves, directive):
            await self._install(await self._ready(directive, directive.serve_version, directive.serve_digest))
        await self._remember(directive.serve_version)

    async def _alternate(self, plan: fleet_pb2.Switchback, drafts: _Drafts) -> None:
        """Serve the version of each slice until a newer directive arrives. If one version fails, the other one keeps
        serving."""
        versions = {"a": plan.version_a, "b": plan.version_b}
        logger.info("A switchback begins", extra=versions)
        try:
            while True:
                now = switchback.current(plan, self._clock.now())
                self._version = now.version
                if not self._holds(drafts[now.version]):
                    await self._install(drafts[now.version], level=logging.DEBUG)
                    self._on_change()
                await run_unless_cancelled_by(self._arrived.wait(), asyncio.sleep(min(now.left_s, self.look_s)))
        finally:
            logger.info("The switchback has ended", extra=versions)

    def _serves(self, directive: fleet_pb2.Directive) -> bool:
        """Whether the engine holds the ordered draft, compared by digest too, because a rebuilt registry counts from 1
        again."""
        loaded = self._engine.loaded
        if loaded.version != directive.serve_version:
            return False
        if loaded.version == 0:
            return loaded.tensors_digest == ""
        manifest = read_manifest(self._drafts.path / str(loaded.version))
        return (
            manifest is not None
            and directive.serve_digest in ("", manifest.digest)
            and manifest.tensors_digest == loaded.tensors_digest
        )

    def _holds(self, draft: DraftCheckpoint | None) -> bool:
        loaded = self._engine.loaded
        expected = (0, "") if draft is None else (draft.version, draft.tensors_digest)
        return (loaded.version, loaded.tensors_digest) == expected

    async def _ready(self, directive: fleet_pb2.Directive, version: int, digest: str) -> DraftCheckpoint | None:
        """A verified version on disk; None for version 0."""
        if version == 0:
            return None
        await self._fetch_version(directive, version, digest or None)
        return await asyncio.to_thread(self._verified, version)

    async def _fetch_version(self, directive: fleet_pb2.Directive, version: int, digest: str | None) -> None:
        """Download a version if necessary, retrying without limit. Raises Interrupted when a newer directive arrives."""
        self._version = version
        if await asyncio.to_thread(self._drafts.holds, version, digest):
            return
        self.settled.set()
        await self._wait_for_turn(directive, version)
        self._backoff.reset()
        for delay_s in self._backoff:
            try:
                await run_unless_cancelled_by(self._arrived.wait(), self._fetch(version, digest))
            except _DAMNING:
                raise
            except UpdraftError as error:
                self._set_status(directive, fleet_pb2.OUTCOME_PENDING, f"cannot download yet: {error}")
                logger.warning("A draft cannot be downloaded yet", extra={"version": version, "reason": str(error)})
                await run_unless_cancelled_by(self._arrived.wait(), asyncio.sleep(delay_s))
            else:
                return

    async def _wait_for_turn(self, directive: fleet_pb2.Directive, version: int) -> None:
        """Spread the downloads of a fleet that gets a directive at the same time."""
        now_s = self._clock.monotonic()
        wait_s = self._rng.uniform(0.0, directive.prefetch_spread_ms / 1000)
        due_s = min(now_s + wait_s, self._due_s.get(version, now_s + wait_s))
        self._due_s = {version: due_s}
        await run_unless_cancelled_by(self._arrived.wait(), asyncio.sleep(max(0.0, due_s - now_s)))

    def _verified(self, version: int) -> DraftCheckpoint:
        return verified(self._drafts.path / str(version), version, self._engine.info)

    async def _install(self, draft: DraftCheckpoint | None, *, level: int = logging.INFO) -> None:
        try:
            async with self.late.watching(0 if draft is None else draft.version):
                swapped = await self._engine.swap(draft)
        except TargetChangedError as error:
            self._metrics.target_changes.inc()
            logger.critical("A swap has changed weights of the target", extra={"reason": str(error)})
            raise
        self._since_s = self._clock.now()
        self._count(swapped.pause_s)
        pause_ms = round(1000 * swapped.pause_s, 1)
        extra = {"version": swapped.loaded.version, "pause_ms": pause_ms, "target": swapped.target}
        logger.log(level, "Serving a new draft", extra=extra)

    async def _remember(self, version: int) -> None:
        try:
            await asyncio.to_thread(self._drafts.remember, version)
        except OSError as error:  # with a full disk, the next start has no draft; this one goes on
            logger.warning("The served draft cannot be recorded", extra={"version": version, "reason": str(error)})

    async def _prune(self, directive: fleet_pb2.Directive) -> None:
        plan = directive.switchback
        wanted = {directive.serve_version, plan.version_a, plan.version_b, *directive.prefetch_versions}
        try:
            await asyncio.to_thread(self._drafts.prune, wanted)
        except OSError as error:
            logger.warning("Old drafts cannot be removed", extra={"reason": str(error)})

    def _count(self, pause_s: float) -> None:
        pause_us = round(1e6 * pause_s)
        self.counters.swaps += 1
        self.counters.pause_us_sum += pause_us
        self.counters.pause_us_max = max(self.counters.pause_us_max, pause_us)
        self._metrics.swaps.labels(outcome="swapped").inc()
        self._metrics.swap_pause.observe(pause_s)
        self._metrics.draft_version.set(self._engine.loaded.version)

    async def _postpone(self, directive: fleet_pb2.Directive, error: Exception) -> None:
        """Follow the same directive again later: a failure of this pod is no reason to refuse the version."""
        needs_restart = isinstance(error, OtherShapeError)
        self._set_status(directive, fleet_pb2.OUTCOME_PENDING, f"not yet: {error}", needs_restart=needs_restart)
        self.settled.set()
        extra = {"version": self._version, "reason": str(error)}
        logger.warning("A draft cannot be loaded yet", extra=extra)
        await run_unless_cancelled_by(self._arrived.wait(), asyncio.sleep(self.retry_s))
        self._arrived.set()

    def _refuse(self, directive: fleet_pb2.Directive, error: UpdraftError) -> None:
        self.counters.failures += 1
        self._metrics.swaps.labels(outcome="refused").inc()
        extra = {"version": self._version, "reason": str(error)}
        logger.error("A draft was refused; the old one keeps serving", extra=extra)
        self._set_status(directive, fleet_pb2.OUTCOME_NACK, str(error))

    def _set_status(
        self,
        directive: fleet_pb2.Directive,
        outcome: fleet_pb2.Outcome.ValueType,
        reason: str = "",
        *,
        needs_restart: bool = False,
    ) -> None:
        """Report the status; a reason refers to the version that is being processed."""
        self._status = fleet_pb2.DirectiveStatus(
            nonce=directive.nonce,
            outcome=outcome,
            version=self._version if reason else 0,
            reason=reason,
            needs_restart=needs_restart,
        )
        if outcome != fleet_pb2.OUTCOME_PENDING:
            self.settled.set()
        self._on_change()


def _to_serve(directive: fleet_pb2.Directive) -> fleet_pb2.Directive:
    """The directive without what changes with the fleet and says nothing about drafts: download delay and credits."""
    copy = fleet_pb2.Directive()
    copy.CopyFrom(directive)
    copy.ClearField("prefetch_spread_ms")
    copy.ClearField("capture")
    return copy
