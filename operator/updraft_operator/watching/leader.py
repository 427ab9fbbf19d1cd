"""One of several replicas works at a time: the holder of a Lease, as client-go does it.

The holder renews; who has seen no renewal for the Lease's length, on its own clock, takes over. The holder itself
stops to believe in it earlier than that, counted from before it asked, so that two never write at once unless a
write that was sent hangs on its way for longer. Refused: the official client's election, which neither gives the
Lease back at its end nor bounds a renewal that hangs, and reads the wall clock.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Conflict, NotFound, Unavailable, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.watching.cluster import Cluster

logger = logging.getLogger(__name__)

TRUST = 0.7
"""Part of the Lease's length for which a renewal is believed in; the rest is for a write that is on its way."""

_RENEWALS = 5
"""In the Lease's length: a few may be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseName:
    """Which Lease, and who we are."""

    namespace: str
    name: str
    identity: str
    seconds: float


class Lease:
    """Run `run`; ask `is_held` before each write."""

    def __init__(self, cluster: Cluster, name: LeaseName, clock: Clock, on_change: Callable[[bool], None]) -> None:
        self._cluster = cluster
        self._name = name
        self._clock = clock
        self._on_change = on_change
        self._valid_until_s = float("-inf")
        self._seen: tuple[str, str] = ("", "")
        """Holder and time of renewal as read last."""
        self._seen_s = float("-inf")
        self._was_held = False

    @property
    def is_held(self) -> bool:
        """Whether this process may write now."""
        return self._clock.monotonic() < self._valid_until_s

    def check(self) -> None:
        """Unavailable unless the Lease is held: the guard of every write."""
        if not self.is_held:
            raise Unavailable("this replica does not hold the Lease (any more)")

    async def run(self, stop: Stop) -> None:
        """Try to get it, keep it, and give it back at the end."""
        period_s = self._name.seconds / _RENEWALS
        while not stop.requested:
            await self._step(period_s)
            self._tell()
            await stop.wait(period_s)
        await self._give_back()

    async def _step(self, within_s: float) -> None:
        asked_s = self._clock.monotonic()
        try:
            async with asyncio.timeout(within_s):
                if await self._take():
                    self._valid_until_s = asked_s + TRUST * self._name.seconds
        except (UpdraftError, TimeoutError) as error:
            logger.warning("The Lease could not be renewed", extra={"error": str(error) or "no answer in time"})

    async def _take(self) -> bool:
        """Write our name into the Lease if we may; false if another holds it."""
        name = self._name
        try:
            lease = await self._cluster.get("Lease", name.namespace, name.name)
        except NotFound:
            await self._cluster.create(self._lease({}))
            return True
        spec = lease.get("spec", {})
        holder = str(spec.get("holderIdentity") or "")
        seen = (holder, str(spec.get("renewTime") or ""))
        if seen != self._seen:
            self._seen, self._seen_s = seen, self._clock.monotonic()
        length_s = float(spec.get("leaseDurationSeconds") or name.seconds)
        if holder not in ("", name.identity) and self._clock.monotonic() < self._seen_s + length_s:
            return False
        try:
            await self._cluster.replace(self._lease(lease))
        except Conflict:  # another one was faster
            return False
        return True

    def _lease(self, before: Manifest) -> Manifest:
        name, spec = self._name, before.get("spec", {})
        now = datetime.fromtimestamp(self._clock.now(), UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        is_ours = spec.get("holderIdentity") == name.identity
        taken: dict[str, Any] = {
            "holderIdentity": name.identity,
            "leaseDurationSeconds": max(1, round(name.seconds)),
            "acquireTime": spec.get("acquireTime", now) if is_ours else now,
            "renewTime": now,
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if is_ours else 1),
        }
        metadata = before.get("metadata") or {"name": name.name, "namespace": name.namespace}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": taken}

    def _tell(self) -> None:
        if self.is_held != self._was_held:
            self._was_held = self.is_held
            logger.info("This replica leads" if self.is_held else "This replica stands by")
            self._on_change(self.is_held)

    async def _give_back(self) -> None:
        """So that the next one need not wait; what cannot be given back runs out."""
        if not self.is_held:
            return
        self._valid_until_s = float("-inf")
        name = self._name
        try:
            async with asyncio.timeout(2.0):
                lease = await self._cluster.get("Lease", name.namespace, name.name)
                if lease.get("spec", {}).get("holderIdentity") == name.identity:
                    lease["spec"]["holderIdentity"] = ""
                    lease["spec"]["leaseDurationSeconds"] = 1
                    await self._cluster.replace(lease)
        except (UpdraftError, TimeoutError) as error:
            logger.info("The Lease runs out by itself", extra={"error": str(error)})


class Always:
    """What stands in for a Lease where there is one process only."""

    is_held = True

    def check(self) -> None:
        """Every write is allowed."""
