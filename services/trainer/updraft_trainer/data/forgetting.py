"""Deletes traces before their size would: those of tenants who asked for it, and those beyond the age that is allowed.

An order is first written into replay, which deletes what it has and refuses what arrives from then on. Then the streams are
searched, and their dead letters. Each part can be repeated, so an order that was interrupted is simply carried out again.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from google.protobuf.message import DecodeError

from updraft_chassis import streams
from updraft_chassis.clock import Clock
from updraft_chassis.errors import UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_chassis.tenants import hashes
from updraft_draft import trace_bytes
from updraft_trainer.data.replay import Replay
from updraft_trainer.metrics import Metrics

logger = logging.getLogger(__name__)

SKEW_MS = 60_000
"""By which a pod's clock may differ from the registry's: requests that ended so long after an order are taken to have ended
before it."""

_TURN_S = 2.0
_EXPIRE_S = 60.0


class Forgetting:
    """The orders and the age limit for one rank: its streams, with these keys, and its replay. Without `retention_s`, age does
    not matter."""

    def __init__(
        self,
        client: streams.Client,
        keys: Sequence[str],
        replay: Replay,
        *,
        retention_s: int | None,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._client = client
        self._keys = keys
        self._replay = replay
        self._retention_s = retention_s
        self._metrics = metrics
        self._clock = clock
        self._next_expiry_s = 0.0
        self._is_failing = False
        self.orders: Mapping[str, int] = {}
        """When each tenant was ordered to be forgotten, in Unix milliseconds. Replaced, never changed."""
        self.done_ms = 0
        """All orders up to this time are carried out."""

    async def run(self, stop: Stop) -> None:
        """Carry out what is due until `stop`; retries after every UpdraftError."""
        while not stop.requested:
            try:
                await self.turn()
            except UpdraftError as error:
                if not self._is_failing:
                    logger.warning("Traces cannot be deleted now; trying again", extra={"reason": str(error)})
                self._is_failing = True
            else:
                self._is_failing = False
            await stop.wait(_TURN_S)

    async def turn(self) -> None:
        """Carry out what is due now."""
        if max(self.orders.values(), default=0) > self.done_ms:
            await self._forget(self.orders)
        if self._retention_s is not None and self._clock.monotonic() >= self._next_expiry_s:
            await self._expire(self._retention_s)
            self._next_expiry_s = self._clock.monotonic() + _EXPIRE_S

    async def _forget(self, orders: Mapping[str, int]) -> None:
        until = {tenant: at_ms + SKEW_MS for tenant, at_ms in orders.items()}
        num_samples = await asyncio.to_thread(self._replay.forget, until)
        num_entries = 0
        for key in self._keys:
            num_entries += await streams.delete_entries(self._client, key, lambda data: _is_forgotten(data, until))
        self.done_ms = max(orders.values())
        self._metrics.deleted.labels("forgotten").inc(num_samples + num_entries)
        facts = {"tenants": len(orders), "samples": num_samples, "entries": num_entries}
        logger.info("Deleted the traces of forgotten tenants", extra=facts)

    async def _expire(self, retention_s: int) -> None:
        before_ms = int(1000 * (self._clock.now() - retention_s))
        self._metrics.deleted.labels("expired").inc(await asyncio.to_thread(self._replay.expire, before_ms))
        for key in self._keys:
            await streams.expire(self._client, key, retention_s)


def _is_forgotten(data: bytes, until: Mapping[str, int]) -> bool:
    try:
        header = trace_bytes.parse(data).trace.header
    except DecodeError:  # nobody knows whose it is
        return True
    return header.finished_unix_ms <= until.get(hashes.text(header.tenant_hash), -1)
