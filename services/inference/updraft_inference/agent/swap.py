"""Follows the registry's directives: prefetch, verify, swap, say how it went.

Only the newest directive counts, and it is the whole wish: following it twice changes nothing. A newer one
interrupts a download but never a swap. What the engine refuses is told with its reason, and the old draft
serves on.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis.clock import Clock
from updraft_chassis.errors import Corrupt, Exhausted, Unavailable, UpdraftError
from updraft_chassis.retry import Backoff
from updraft_inference.agent.drafts import DraftFolder, check_target, read_manifest, verified
from updraft_inference.engine.port import Engine
from updraft_inference.metrics import Metrics
from updraft_inference.race import Interrupted, unless

logger = logging.getLogger(__name__)

_RETRY_S = 5.0
"""Until a directive that failed for the pod's own reasons is followed again."""

Fetch = Callable[[int, str | None], Coroutine[Any, Any, Path]]
"""(version, digest of its weights file if known) -> its folder: updraft_chassis.transfer.download."""


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
        self._directive = fleet_pb2.Directive()
        self._arrived = asyncio.Event()
        self._status = fleet_pb2.DirectiveStatus()
        self._counters = fleet_pb2.SwapCounters()
        self._since_s = clock.now()

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
        if directive == self._directive:
            return
        self._directive = directive
        self._arrived.set()

    async def restore(self) -> None:
        """Serve with what served before the process started, if it is still whole; needs no registry."""
        version = self._drafts.remembered()
        if version == 0:
            return
        try:
            await self._swap(version)
        except UpdraftError as error:
            extra = {"version": version, "reason": str(error)}
            logger.warning("The last draft cannot be restored; serving without", extra=extra)

    async def run(self) -> None:
        """Follow directives, for ever."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            try:
                await self._follow(self._directive)
            except Interrupted:
                logger.info("A newer directive came", extra={"nonce": self._directive.nonce})

    async def _follow(self, directive: fleet_pb2.Directive) -> None:
        version = directive.serve_version
        self._tell(directive, fleet_pb2.OUTCOME_PENDING)
        try:
            if not await self._serves(directive):
                if version:
                    await self._hold(directive, version, directive.serve_digest or None)
                await self._swap(version)
            for version in sorted(set(directive.prefetch_versions).difference(self._drafts.versions)):
                await self._hold(directive, version, None)
        except (OSError, Unavailable, Exhausted) as error:
            await self._postpone(directive, version, error)
            return
        except UpdraftError as error:
            self._refuse(directive, version, error)
        else:
            self._tell(directive, fleet_pb2.OUTCOME_ACK)
        try:
            await asyncio.to_thread(self._drafts.prune, {directive.serve_version, *directive.prefetch_versions})
        except OSError as error:
            logger.warning("Old drafts cannot be removed", extra={"reason": str(error)})

    async def _serves(self, directive: fleet_pb2.Directive) -> bool:
        """The engine holds what is wanted, by digest too: a registry set up anew counts from 1 again."""
        loaded = self._engine.loaded
        if loaded.version != directive.serve_version:
            return False
        if loaded.version == 0 or not directive.serve_digest:
            return True
        manifest = read_manifest(self._drafts.path / str(loaded.version))
        return (
            manifest is not None
            and manifest.digest == directive.serve_digest
            and manifest.tensors_digest == loaded.tensors_digest
        )

    async def _hold(self, directive: fleet_pb2.Directive, version: int, digest: str | None) -> None:
        """Have a version on disk, however long it takes; Interrupted when a newer directive came."""
        self._backoff.reset()
        for delay_s in self._backoff:
            try:
                await unless(self._arrived.wait(), self._fetch(version, digest))
            except (Unavailable, Exhausted) as error:
                self._tell(directive, fleet_pb2.OUTCOME_PENDING, version, f"cannot fetch yet: {error}")
                logger.warning("A draft cannot be fetched yet", extra={"version": version, "reason": str(error)})
                await unless(self._arrived.wait(), asyncio.sleep(delay_s))
            else:
                return

    async def _swap(self, version: int) -> None:
        folder = self._drafts.path / str(version)
        draft = None
        if version:
            draft = await asyncio.to_thread(verified, folder, version)
            manifest = read_manifest(folder)
            if manifest is None:
                raise Corrupt(f"{folder} lost its manifest")
            check_target(manifest, self._engine.info)
        swapped = await self._engine.swap(draft)
        self._since_s = self._clock.now()
        self._count(swapped.pause_s)
        await self._remember(version)
        logger.info("Serving a new draft", extra={"version": version, "pause_ms": round(1000 * swapped.pause_s, 1)})

    async def _remember(self, version: int) -> None:
        try:
            await asyncio.to_thread(self._drafts.remember, version)
        except OSError as error:  # a full disk costs the next start its draft, not this one
            logger.warning("The draft in use cannot be noted", extra={"version": version, "reason": str(error)})

    def _count(self, pause_s: float) -> None:
        pause_us = round(1e6 * pause_s)
        self._counters.swaps += 1
        self._counters.pause_us_sum += pause_us
        self._counters.pause_us_max = max(self._counters.pause_us_max, pause_us)
        self._metrics.swaps.labels(outcome="swapped").inc()
        self._metrics.swap_pause.observe(pause_s)
        self._metrics.draft_version.set(self._engine.loaded.version)

    async def _postpone(self, directive: fleet_pb2.Directive, version: int, error: Exception) -> None:
        """A fault of this pod says nothing about the version: no refusal, the same directive again a little later."""
        self._tell(directive, fleet_pb2.OUTCOME_PENDING, version, f"not yet: {error}")
        logger.warning("A draft cannot be taken over yet", extra={"version": version, "reason": str(error)})
        await unless(self._arrived.wait(), asyncio.sleep(_RETRY_S))
        self._arrived.set()

    def _refuse(self, directive: fleet_pb2.Directive, version: int, error: UpdraftError) -> None:
        self._counters.failures += 1
        self._metrics.swaps.labels(outcome="refused").inc()
        extra = {"version": version, "reason": str(error)}
        logger.error("A draft is refused; the old one serves on", extra=extra)
        self._tell(directive, fleet_pb2.OUTCOME_NACK, version, str(error))

    def _tell(
        self,
        directive: fleet_pb2.Directive,
        outcome: fleet_pb2.Outcome.ValueType,
        version: int = 0,
        reason: str = "",
    ) -> None:
        self._status = fleet_pb2.DirectiveStatus(nonce=directive.nonce, outcome=outcome, version=version, reason=reason)
        self._on_change()
