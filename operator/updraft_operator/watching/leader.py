"""Leader election: one of several replicas works at a time, the holder of a Lease, as in client-go.

The holder renews the Lease; a replica that sees no renewal for the Lease's duration, by its own clock, takes over. The
holder stops trusting its Lease earlier than that, counted from before the renewal request, so that two replicas never
write at once unless a write hangs in transit for longer. Refused: the official client's election, which neither releases
the Lease on exit nor bounds a renewal that hangs, and which reads the wall clock.
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
"""Fraction of the Lease's duration for which a renewal is trusted; the rest covers a write in transit."""

_RENEWALS = 5
"""Renewals per Lease duration: a few may be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseName:
    namespace: str
    name: str
    identity: str
    seconds: float


class Lease:
    """A Lease that `run` acquires and renews; check `is_held` before each write."""

    def __init__(self, cluster: Cluster, name: LeaseName, clock: Clock, on_change: Callable[[bool], None]) -> None:
        self._cluster = cluster
        self._name = name
        self._clock = clock
        self._on_change = on_change
        self._valid_until_s = float("-inf")
        self._record: tuple[str, str] = ("", "")
        """Holder and renewal time as last read."""
        self._record_s = float("-inf")
        self._was_held = False

    @property
    def is_held(self) -> bool:
        return self._clock.monotonic() < self._valid_until_s

    def check(self) -> None:
        """Unavailable unless the Lease is held: the guard of every write."""
        if not self.is_held:
            raise Unavailable("this replica does not hold the Lease")

    async def run(self, stop: Stop) -> None:
        """Acquire the Lease, renew it, and release it at the end."""
        period_s = self._name.seconds / _RENEWALS
        while not stop.requested:
            await self._step(period_s)
            self._notify()
            await stop.wait(period_s)
        await self._release()

    async def _step(self, within_s: float) -> None:
        asked_s = self._clock.monotonic()
        try:
            async with asyncio.timeout(within_s):
                if await self._take():
                    self._notify()  # before it is held again: what was to be done while it had lapsed was dropped
                    self._valid_until_s = asked_s + TRUST * self._name.seconds
        except (UpdraftError, TimeoutError) as error:
            logger.warning("Lease renewal failed", extra={"error": str(error) or "timeout"})

    async def _take(self) -> bool:
        """Write our identity into the Lease; False if another replica holds it."""
        name = self._name
        try:
            lease = await self._cluster.get("Lease", name.namespace, name.name)
        except NotFound:
            await self._cluster.create(self._lease({}))
            return True
        spec = lease.get("spec", {})
        holder = str(spec.get("holderIdentity") or "")
        record = (holder, str(spec.get("renewTime") or ""))
        if record != self._record:
            self._record, self._record_s = record, self._clock.monotonic()
        length_s = float(spec.get("leaseDurationSeconds") or name.seconds)
        if holder not in ("", name.identity) and self._clock.monotonic() < self._record_s + length_s:
            return False
        try:
            await self._cluster.replace(self._lease(lease))
        except Conflict:  # another replica was faster
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

    def _notify(self) -> None:
        if self.is_held != self._was_held:
            self._was_held = self.is_held
            logger.info("Became leader" if self.is_held else "Lost leadership")
            self._on_change(self.is_held)

    async def _release(self) -> None:
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
            logger.info("Lease not released; it will expire", extra={"error": str(error)})


class AlwaysLeader:
    """Stands in for a Lease when there is only one process."""

    is_held = True

    def check(self) -> None:
        """Allow every write."""

    async def run(self, stop: Stop) -> None:
        """Nothing to renew."""
