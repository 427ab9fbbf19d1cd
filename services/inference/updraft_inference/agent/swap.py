"""Follows the registry's directives: prefetch, verify, swap, say how it went.

Only the newest directive counts, and it is the whole wish: following it twice changes nothing. A newer one
interrupts a download or a switchback, but never a swap. What the engine refuses is told with its reason, and the old
draft serves on. At the start the registry has a moment to say what serves; then what served last does.
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
from updraft_inference.agent.drafts import DraftFolder, check_target, read_manifest, verified
from updraft_inference.cancellation import Interrupted, run_unless_cancelled_by
from updraft_inference.engine import DraftCheckpoint, Engine
from updraft_inference.metrics import Metrics

logger = logging.getLogger(__name__)

VERIFY_S = 300.0
"""How often the engine hashes what it holds: a second of one core, and most pods live for days."""

_PASSING = (OSError, Unavailable, Exhausted)
"""Troubles of this pod, which say nothing about a version."""

_DAMNING = (InvalidInput, Corrupt)
"""What speaks against a version that cannot be fetched. All else is a trouble of the pod, its network, its token, or the
registry: one that orders what it does not have, or fails, may have it again; a better order, or its next life, ends it."""

Fetch = Callable[[int, str | None], Coroutine[Any, Any, Path]]
"""(version, digest of its weights file if known) -> its folder: updraft_artifacts.transfer.download."""

_Drafts = Mapping[int, DraftCheckpoint | None]
"""Verified, by version; None for version 0."""


class Swapper:
    """Keeps the engine's draft what the newest directive wants. One `run` at a time."""

    def __init__(
        self,
        engine: Engine,
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
        """What is being worked on: what fails now fails for this version."""
        self._due_s: dict[int, float] = {}
        """When downloads may begin, on the monotonic clock: a newer directive must not draw lots again."""
        self._heard = asyncio.Event()
        self._arrived = asyncio.Event()
        self._status = fleet_pb2.DirectiveStatus()
        self._counters = fleet_pb2.SwapCounters()
        self._since_s = clock.now()
        self.retry_s = 5.0
        """Until a directive that failed for the pod's own reasons is followed again."""
        self.contact_s = 3.0
        """How long a start waits for the registry's word; one that is away is mostly known to be at once."""
        self.look_s = 0.5
        """How often a switchback looks at the clock: it may have been set."""
        self.settled = asyncio.Event()
        """Set once what can serve at the start does; a download takes longer, and is not waited for."""

    @property
    def status(self) -> fleet_pb2.DirectiveStatus:
        """How the newest directive is doing."""
        return self._status

    @property
    def counters(self) -> fleet_pb2.SwapCounters:
        """Since the process started."""
        return self._counters

    @property
    def loaded(self) -> fleet_pb2.Loaded:
        """What the engine says it holds, and since when."""
        loaded = self._engine.loaded
        return fleet_pb2.Loaded(
            version=loaded.version,
            tensors_digest=loaded.tensors_digest,
            since_unix_ms=int(self._since_s * 1000),
        )

    @property
    def prefetched(self) -> list[int]:
        """Versions that could be served without the network."""
        return self._drafts.versions

    def accept(self, directive: fleet_pb2.Directive) -> None:
        """Follow this one from now on. One that is known already is not started again."""
        if self._directive is not None and _without_spread(directive) == _without_spread(self._directive):
            return
        self._directive = directive
        self._heard.set()
        self._arrived.set()

    def go_alone(self) -> None:
        """The registry cannot be reached: do not wait for its word."""
        self._heard.set()

    async def restore(self) -> None:
        """Serve with what served before the process started, if it is still whole; needs no registry."""
        version = self._drafts.remembered()
        try:
            draft = None if version == 0 else await asyncio.to_thread(self._verified, version)
            if not self._holds(draft):
                await self._install(draft)
        except (OSError, UpdraftError) as error:
            extra = {"version": version, "reason": str(error)}
            logger.warning("The last draft cannot be restored; serving without", extra=extra)

    async def run(self) -> None:
        """Follow directives, for ever; until the first one, serve what served last."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.contact_s):
                await self._heard.wait()
        self._arrived.set()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            try:
                await self._do(self._directive)
            except Interrupted:
                logger.info("Going on with the newest directive")

    async def watch(self) -> None:
        """From time to time look whether the engine still holds what it loaded, for ever."""
        while True:
            await asyncio.sleep(VERIFY_S)
            await self.verify()

    async def verify(self) -> None:
        """Look once. What has changed in memory is told to the registry, and loaded again from disk.

        A server that does not answer now is asked the next time: it serves on.
        """
        before = self._engine.loaded
        try:
            after = await self._engine.rehash()
        except UpdraftError as error:
            extra = {"version": before.version, "reason": str(error)}
            logger.warning("What the engine holds could not be verified now", extra=extra)
            return
        if after.version == before.version and after.tensors_digest != before.tensors_digest:
            self._metrics.draft_mismatches.inc()
            extra = {"version": before.version, "loaded": before.tensors_digest, "held": after.tensors_digest}
            logger.error("The engine's draft has changed in memory; it is loaded again", extra=extra)
            self._on_change()
            self._arrived.set()

    async def _do(self, directive: fleet_pb2.Directive | None) -> None:
        if directive is not None:
            await self._follow(directive)
        else:
            await self.restore()
            self.settled.set()

    async def _follow(self, directive: fleet_pb2.Directive) -> None:
        self._version = directive.serve_version
        self._tell(directive, fleet_pb2.OUTCOME_PENDING)
        try:
            both = await self._take_over(directive)
            self._tell(directive, fleet_pb2.OUTCOME_ACK)
            await self._prune(directive)
            if both:
                await self._alternate(directive.switchback, both)
        except _PASSING as error:
            await self._postpone(directive, error)
        except UpdraftError as error:
            self._refuse(directive, error)
            await self._prune(directive)

    async def _take_over(self, directive: fleet_pb2.Directive) -> _Drafts:
        """Serve what is ordered and hold the rest ready. The two drafts of a switchback; none without one."""
        plan = directive.switchback
        has_plan = directive.HasField("switchback")
        if not has_plan or self._engine.loaded.version not in (plan.version_a, plan.version_b):
            await self._serve(directive)
        both = {}
        if has_plan:
            for version, digest in ((plan.version_a, plan.digest_a), (plan.version_b, plan.digest_b)):
                both[version] = await self._ready(directive, version, digest)
        for version in sorted(set(directive.prefetch_versions).difference(self._drafts.versions)):
            await self._hold(directive, version, None)
        return both

    async def _serve(self, directive: fleet_pb2.Directive) -> None:
        if not await asyncio.to_thread(self._serves, directive):
            await self._install(await self._ready(directive, directive.serve_version, directive.serve_digest))
        await self._remember(directive.serve_version)

    async def _alternate(self, plan: fleet_pb2.Switchback, both: _Drafts) -> None:
        """Serve each slice's version until a newer directive comes. Where one fails the other one serves on."""
        versions = {"a": plan.version_a, "b": plan.version_b}
        logger.info("A switchback begins", extra=versions)
        try:
            while True:
                now = switchback.current(plan, self._clock.now())
                self._version = now.version
                if not self._holds(both[now.version]):
                    await self._install(both[now.version], level=logging.DEBUG)
                    self._on_change()
                await run_unless_cancelled_by(self._arrived.wait(), asyncio.sleep(min(now.left_s, self.look_s)))
        finally:
            logger.info("The switchback is over", extra=versions)

    def _serves(self, directive: fleet_pb2.Directive) -> bool:
        """The engine holds what is wanted, by digest too: a registry set up anew counts from 1 again."""
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
        wanted = (0, "") if draft is None else (draft.version, draft.tensors_digest)
        return (loaded.version, loaded.tensors_digest) == wanted

    async def _ready(self, directive: fleet_pb2.Directive, version: int, digest: str) -> DraftCheckpoint | None:
        """A version on disk, verified; None for version 0."""
        if version == 0:
            return None
        await self._hold(directive, version, digest or None)
        return await asyncio.to_thread(self._verified, version)

    async def _hold(self, directive: fleet_pb2.Directive, version: int, digest: str | None) -> None:
        """Have a version on disk, however long it takes; Interrupted when a newer directive came."""
        self._version = version
        if await asyncio.to_thread(self._drafts.holds, version, digest):
            return
        self.settled.set()
        await self._await_turn(directive, version)
        self._backoff.reset()
        for delay_s in self._backoff:
            try:
                await run_unless_cancelled_by(self._arrived.wait(), self._fetch(version, digest))
            except _DAMNING:
                raise
            except UpdraftError as error:
                self._tell(directive, fleet_pb2.OUTCOME_PENDING, f"cannot fetch yet: {error}")
                logger.warning("A draft cannot be fetched yet", extra={"version": version, "reason": str(error)})
                await run_unless_cancelled_by(self._arrived.wait(), asyncio.sleep(delay_s))
            else:
                return

    async def _await_turn(self, directive: fleet_pb2.Directive, version: int) -> None:
        """A fleet that is told at once does not come at once."""
        now_s = self._clock.monotonic()
        wait_s = self._rng.uniform(0.0, directive.prefetch_spread_ms / 1000)
        due_s = min(now_s + wait_s, self._due_s.get(version, now_s + wait_s))
        self._due_s = {version: due_s}
        await run_unless_cancelled_by(self._arrived.wait(), asyncio.sleep(max(0.0, due_s - now_s)))

    def _verified(self, version: int) -> DraftCheckpoint:
        folder = self._drafts.path / str(version)
        draft = verified(folder, version)
        manifest = read_manifest(folder)
        if manifest is None:
            raise Corrupt(f"{folder} lost its manifest")
        check_target(manifest, self._engine.info)
        return draft

    async def _install(self, draft: DraftCheckpoint | None, *, level: int = logging.INFO) -> None:
        swapped = await self._engine.swap(draft)
        self._since_s = self._clock.now()
        self._count(swapped.pause_s)
        extra = {"version": swapped.loaded.version, "pause_ms": round(1000 * swapped.pause_s, 1)}
        logger.log(level, "Serving a new draft", extra=extra)

    async def _remember(self, version: int) -> None:
        try:
            await asyncio.to_thread(self._drafts.remember, version)
        except OSError as error:  # a full disk costs the next start its draft, not this one
            logger.warning("The draft in use cannot be noted", extra={"version": version, "reason": str(error)})

    async def _prune(self, directive: fleet_pb2.Directive) -> None:
        plan = directive.switchback
        wanted = {directive.serve_version, plan.version_a, plan.version_b, *directive.prefetch_versions}
        try:
            await asyncio.to_thread(self._drafts.prune, wanted)
        except OSError as error:
            logger.warning("Old drafts cannot be removed", extra={"reason": str(error)})

    def _count(self, pause_s: float) -> None:
        pause_us = round(1e6 * pause_s)
        self._counters.swaps += 1
        self._counters.pause_us_sum += pause_us
        self._counters.pause_us_max = max(self._counters.pause_us_max, pause_us)
        self._metrics.swaps.labels(outcome="swapped").inc()
        self._metrics.swap_pause.observe(pause_s)
        self._metrics.draft_version.set(self._engine.loaded.version)

    async def _postpone(self, directive: fleet_pb2.Directive, error: Exception) -> None:
        """A fault of this pod says nothing about the version: no refusal, the same directive again a little later."""
        self._tell(directive, fleet_pb2.OUTCOME_PENDING, f"not yet: {error}")
        self.settled.set()
        extra = {"version": self._version, "reason": str(error)}
        logger.warning("A draft cannot be taken over yet", extra=extra)
        await run_unless_cancelled_by(self._arrived.wait(), asyncio.sleep(self.retry_s))
        self._arrived.set()

    def _refuse(self, directive: fleet_pb2.Directive, error: UpdraftError) -> None:
        self._counters.failures += 1
        self._metrics.swaps.labels(outcome="refused").inc()
        extra = {"version": self._version, "reason": str(error)}
        logger.error("A draft is refused; the old one serves on", extra=extra)
        self._tell(directive, fleet_pb2.OUTCOME_NACK, str(error))

    def _tell(self, directive: fleet_pb2.Directive, outcome: fleet_pb2.Outcome.ValueType, reason: str = "") -> None:
        """Say how it goes; what goes wrong is of the version that is worked on."""
        self._status = fleet_pb2.DirectiveStatus(
            nonce=directive.nonce, outcome=outcome, version=self._version if reason else 0, reason=reason
        )
        if outcome != fleet_pb2.OUTCOME_PENDING:
            self.settled.set()
        self._on_change()


def _without_spread(directive: fleet_pb2.Directive) -> fleet_pb2.Directive:
    """Without how it may be spread, which depends on how large the fleet is just now."""
    wish = fleet_pb2.Directive()
    wish.CopyFrom(directive)
    wish.ClearField("prefetch_spread_ms")
    return wish
