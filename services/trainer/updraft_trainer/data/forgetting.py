"""Deletes traces before their size would: those of tenants who asked for it, and those beyond the age that is allowed.

An order is first written into replay, which deletes what it has and refuses what arrives from then on. Then the streams are
searched, and their dead letters. Each part can be repeated, so an order that was interrupted is simply carried out again.
Replay also keeps for which orders a stream was searched, so that a start searches none again.

A request ended when its pod says so, or when Redis received it: whatever is earlier, because no request ends later than that.
Who has sent an entry that is no trace is unknown, so it stays as long as any other.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial

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

_MIN_EXPIRE_S = 60.0
_EXPIRE_STEPS = 100
"""Old samples are deleted when so small a part of the allowed age has passed, because files are rewritten for it."""
_TENANTS_EXPIRE_S = 600.0
"""Between two looks for traces that their tenants want deleted at an age of their own, which is an hour or more."""


class Forgetting:
    """The orders and the age limit for one rank: its streams, with these keys, and its replay. Without `retention_s`, age does
    not matter. `unread`: streams that no rank reads, but pods may write to; they are searched again after each start."""

    def __init__(  # noqa: PLR0913 - its streams, its replay, and what every task gets
        self,
        client: streams.Client,
        keys: Sequence[str],
        replay: Replay,
        *,
        unread: Sequence[str] = (),
        retention_s: int | None,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._client = client
        self._keys = keys
        self._unread = unread
        self._replay = replay
        self._retention_s = retention_s
        self._metrics = metrics
        self._clock = clock
        self._next_expiry_s = self._next_tenants_s = 0.0
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
            self._next_expiry_s = self._clock.monotonic() + max(_MIN_EXPIRE_S, self._retention_s / _EXPIRE_STEPS)
        if self._clock.monotonic() >= self._next_tenants_s and await asyncio.to_thread(
            lambda: self._replay.has_expiring
        ):
            await self._expire_of_tenants()
            self._next_tenants_s = self._clock.monotonic() + _TENANTS_EXPIRE_S

    async def _forget(self, orders: Mapping[str, int]) -> None:
        num_samples = await asyncio.to_thread(self._replay.forget, _with_skew(orders))
        num_entries = sum([await self._search(key, orders) for key in self._keys])
        for key in self._unread:
            num_entries += await self._delete(key, orders)
        self.done_ms = max(orders.values())
        self._metrics.deleted.labels("forgotten").inc(num_samples + num_entries)
        facts = {"tenants": len(orders), "samples": num_samples, "entries": num_entries}
        logger.info("The traces of forgotten tenants are deleted", extra=facts)

    async def _search(self, key: str, orders: Mapping[str, int]) -> int:
        """Delete a stream's entries of tenants that it was not searched for yet; return how many."""
        since_ms = await asyncio.to_thread(self._replay.searched_ms, key)
        due = {tenant: at_ms for tenant, at_ms in orders.items() if at_ms > since_ms}
        if not due:
            return 0
        num_entries = await self._delete(key, due)
        await asyncio.to_thread(self._replay.set_searched, key, max(due.values()))
        return num_entries

    async def _delete(self, key: str, orders: Mapping[str, int]) -> int:
        until_ms = _with_skew(orders)

        def is_unwanted(entry: streams.Entry) -> bool:
            tenant, ended_ms = _origin(entry)
            return tenant in until_ms and ended_ms <= until_ms[tenant]

        return await streams.delete_entries(self._client, key, is_unwanted)

    async def _expire(self, retention_s: int) -> None:
        now_ms = int(1000 * self._clock.now())
        expire = partial(self._replay.expire, now_ms, before_ms=now_ms - 1000 * retention_s)
        self._metrics.deleted.labels("expired").inc(await asyncio.to_thread(expire))
        for key in (*self._keys, *self._unread):
            await streams.expire(self._client, key, retention_s)

    async def _expire_of_tenants(self) -> None:
        """Delete what tenants want deleted at an age of their own; the shorter age holds, theirs or that of all."""
        now_ms = int(1000 * self._clock.now())
        num = await asyncio.to_thread(self._replay.expire, now_ms)
        for key in (*self._keys, *self._unread):
            num += await streams.delete_entries(self._client, key, partial(_has_expired, now_ms))
        self._metrics.deleted.labels("expired").inc(num)


def _has_expired(now_ms: int, entry: streams.Entry) -> bool:
    """Whether its tenant wants an entry deleted by now."""
    try:
        header = trace_bytes.parse(entry.data).trace.header
    except DecodeError:
        return False
    age_s = header.policy.retention_seconds
    return age_s > 0 and min(header.finished_unix_ms, entry.received_ms) + 1000 * age_s <= now_ms


def is_forgotten(replay: Replay, entry: streams.Entry) -> bool:
    """Whether the tenant of an entry, which may be no valid trace, was ordered to be forgotten after the request ended."""
    tenant, ended_ms = _origin(entry)
    return ended_ms <= replay.forgotten_until_ms(tenant)


def _origin(entry: streams.Entry) -> tuple[str, int]:
    """Whose request it is, and when it ended; nobody's if nobody knows."""
    try:
        header = trace_bytes.parse(entry.data).trace.header
    except DecodeError:
        return "", entry.received_ms
    return hashes.text(header.tenant_hash), min(header.finished_unix_ms, entry.received_ms)


def _with_skew(orders: Mapping[str, int]) -> dict[str, int]:
    return {tenant: at_ms + SKEW_MS for tenant, at_ms in orders.items()}
