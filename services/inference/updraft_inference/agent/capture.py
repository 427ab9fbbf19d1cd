"""Sends traces of finished requests to the stream of the trainer, without ever delaying a request.

`offer` puts a request into a queue with limits on entries and bytes, or counts a drop. Encoding runs in its own thread,
and sending waits for Redis with backoff. While Redis is away the queue keeps the oldest traces, so a short outage loses
nothing. Opted-out requests are never queued.
"""

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis.clock import Clock
from updraft_chassis.errors import InvalidInput, UpdraftError
from updraft_chassis.retry import Backoff
from updraft_inference.agent import selection
from updraft_inference.agent.chunks import MAX_CHUNK_BYTES, Chunk, chunks
from updraft_inference.agent.counters import usage
from updraft_inference.agent.credits import Credits
from updraft_inference.agent.selection import CapturePlan, CaptureRates, CaptureTerms, Refusal
from updraft_inference.agent.trace import Encode, Ended, Origin, entry, row_bytes
from updraft_inference.engine import CountedRequest, FinishedRequest
from updraft_inference.metrics import Metrics

logger = logging.getLogger(__name__)


class Drop(StrEnum):
    """Why a trace was dropped that its sender permits; see also `Refusal`."""

    QUEUE_FULL = "queue_full"
    REDIS_UNAVAILABLE = "redis_unavailable"
    TOO_LARGE = "too_large"


_SMALL_QUEUE = (
    "traces were dropped because too many waited for Redis: raise UPDRAFT_INFERENCE_CAPTURE_QUEUE_BYTES and"
    " UPDRAFT_INFERENCE_CAPTURE_QUEUE_ENTRIES, or give Redis more processors"
)
_SMALL_STREAM = (
    "traces that the trainer had not read gave way to newer ones: raise spec.traces.maxSize"
    " (UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES), unless the trainer is only restarting"
)
"""Sentences for losses that a larger setting avoids."""

_NO_SALT = (
    "requests of tenants are not captured, because the registry gives this pod nothing to hash them with: bind its token to the"
    " speculator (serve@NAME in the registry's file of tokens), or see the registry's log"
)

_LATELY_S = 300.0
"""How long `too_small` reports a loss."""


class Stream(Protocol):
    """Where entries go: updraft_chassis.streams.ShardedProducer."""

    async def append(self, trace_id: bytes, entry: bytes) -> int:
        """Add an entry; return how many older ones were removed to make room.

        Raises InvalidInput if it is too large, and any other UpdraftError if it cannot be stored now.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sink:
    """Where traces go, and how they are encoded: in chunks of at most `max_chunk_bytes`."""

    stream: Stream
    origin: Origin
    encode: Encode
    max_chunk_bytes: int = MAX_CHUNK_BYTES


class Capture:
    """Selects, queues and sends traces: at most `max_entries` of `max_bytes` wait in memory, or a larger one alone. Everything
    but encoding happens on the event loop."""

    def __init__(
        self, rates: CaptureRates, sink: Sink, *, max_entries: int, max_bytes: int, metrics: Metrics, clock: Clock
    ) -> None:
        self._rates = rates
        self._credits = Credits()
        self._sink = sink
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._clock = clock
        self._queue: asyncio.Queue[Ended] = asyncio.Queue(max_entries)
        self._num_bytes = 0
        self._backoff = Backoff(cap_s=5.0)
        self._is_away = False
        self._reserved: dict[bytes, float] = {}
        """Tokens that running payloads were charged before their sizes are known, by trace id."""
        self._captured = 0
        self._payloads = 0
        self._offered_tokens = 0
        self._captured_tokens = 0
        self._dropped: Counter[str] = Counter()
        self._lost_s: dict[str, float] = {}
        """When a trace was lost last, by the sentence for it."""

    @property
    def counters(self) -> fleet_pb2.CaptureCounters:
        """Since the process started."""
        return fleet_pb2.CaptureCounters(
            captured=self._captured,
            payloads=self._payloads,
            dropped=dict(self._dropped),
            offered_tokens=self._offered_tokens,
            captured_tokens=self._captured_tokens,
            too_small=self._too_small,
        )

    @property
    def problem(self) -> str:
        """Why requests of tenants are lost, if the registry has given this pod no salt."""
        is_lost = self._dropped[Refusal.NO_SALT] and not self._rates.tenant_salt
        return _NO_SALT if is_lost else ""

    @property
    def _too_small(self) -> str:
        since_s = self._clock.monotonic() - _LATELY_S
        return next((why for why in (_SMALL_QUEUE, _SMALL_STREAM) if self._lost_s.get(why, since_s) > since_s), "")

    def follow(self, policy: fleet_pb2.CapturePolicy) -> None:
        """Apply the registry's policy. It holds until the next one, also while the registry is away."""
        granted = policy.payload_tokens_per_second
        self._credits.grant(granted, self._clock.monotonic())
        self._metrics.granted.set(granted)

    def hash_with(self, salt: bytes) -> None:
        """Hash the tenants of later requests with the registry's salt of this speculator."""
        self._rates = replace(self._rates, tenant_salt=salt)

    def plan(self, trace_id: bytes, terms: CaptureTerms) -> CapturePlan:
        """Plan a request that starts now."""
        chance = self._credits.chance(terms.domain, self._clock.monotonic())
        return selection.plan(self._rates, trace_id, terms, chance)

    @property
    def rates(self) -> CaptureRates:
        return self._rates

    @property
    def payload_fraction(self) -> float:
        """Fraction of requests that may have a payload now, for a server that chooses them itself."""
        return min(self._rates.payload_fraction, self._credits.share(self._clock.monotonic()))

    def plan_of_chosen(self, trace_id: bytes, terms: CaptureTerms, probability: float) -> CapturePlan:
        """Plan a request that a server has chosen and served."""
        return selection.plan_of_chosen(self._rates, trace_id, terms, probability=probability)

    def count(self, counted: CountedRequest, plan: CapturePlan) -> None:
        """Learn what this kind of request is like from one that leaves no trace."""
        if plan.refusal is not None:
            self._drop(plan.refusal)
        self._learn(counted, plan)

    def start(self, plan: CapturePlan) -> None:
        """Charge a request that the engine receives now."""
        if plan.params.payload:
            self._reserved[plan.trace_id] = self._credits.reserve()

    def give_back(self, plan: CapturePlan) -> None:
        """Refund the charge of a request that never ends."""
        self._credits.settle(self._reserved.pop(plan.trace_id, 0.0), 0)

    def offer(self, finished: FinishedRequest, plan: CapturePlan) -> None:
        """Queue a finished request if its plan says so. Returns immediately."""
        self._account(finished, plan)
        if not finished.output_ids:
            return
        if plan.refusal is not None:
            self._drop(plan.refusal)
        elif plan.is_captured:
            self._put(Ended(finished=finished, plan=plan, finished_s=self._clock.now()))

    async def run(self) -> None:
        """Send queued traces until cancelled."""
        while True:
            ended = await self._queue.get()
            try:
                await self._send(ended)
            except asyncio.CancelledError:
                self._drop(Drop.REDIS_UNAVAILABLE)
                raise
            finally:
                self._num_bytes -= ended.num_bytes
                self._queue.task_done()

    async def flush(self, timeout_s: float) -> None:
        """Wait until the queue is sent; the traces left after `timeout_s` count as dropped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._queue.join()
        while not self._queue.empty():
            self._queue.get_nowait()
            self._drop(Drop.REDIS_UNAVAILABLE)

    def _account(self, finished: FinishedRequest, plan: CapturePlan) -> None:
        """Charge what was captured, and learn what this kind of request is like."""
        if plan.params.payload:
            self._credits.settle(self._reserved.pop(plan.trace_id, 0.0), finished.num_rows)
        self._learn(finished, plan)

    def _learn(self, finished: FinishedRequest | CountedRequest, plan: CapturePlan) -> None:
        if not plan.may_have_payload or not finished.num_output:
            return
        offered, used = min(finished.num_prompt, self._rates.prompt_rows) + finished.num_output, usage(finished)
        self._offered_tokens += offered
        self._credits.observe(plan.domain, offered=offered, proposed=used.proposed, accepted=used.accepted)

    def _put(self, ended: Ended) -> None:
        is_alone = not self._num_bytes  # a request that is larger than the queue may wait in it alone
        if self._queue.full() or (self._num_bytes + ended.num_bytes > self._max_bytes and not is_alone):
            self._drop(Drop.REDIS_UNAVAILABLE if self._is_away else Drop.QUEUE_FULL)
            return
        self._num_bytes += ended.num_bytes
        self._queue.put_nowait(ended)

    async def _send(self, ended: Ended) -> None:
        """Send a request chunk by chunk, with at most one encoded chunk in memory."""
        finished = ended.finished
        sizes = await asyncio.to_thread(row_bytes, finished, self._sink.encode)
        has_payload = False
        parts = chunks(finished, sizes, max_bytes=self._sink.max_chunk_bytes)
        while (chunk := await asyncio.to_thread(next, parts, None)) is not None:
            has_payload |= await self._send_chunk(ended, chunk)
        self._captured += 1
        self._payloads += has_payload
        self._metrics.captured.labels(kind="payload" if has_payload else "light").inc()

    async def _send_chunk(self, ended: Ended, chunk: Chunk) -> bool:
        """Send a chunk, or what of it is small enough; whether it had hidden states."""
        data = await asyncio.to_thread(self._entry, ended, chunk)
        for delay_s in self._backoff:
            try:
                num_removed = await self._sink.stream.append(ended.plan.trace_id, data)
            except InvalidInput:
                self._drop(Drop.TOO_LARGE)
                return chunk.lighter is not None and await self._send_chunk(ended, chunk.lighter)
            except UpdraftError as error:
                self._note_away(error)
                await asyncio.sleep(delay_s)
            else:
                self._note_sent()
                self._note_evicted(num_removed)
                self._captured_tokens += chunk.num_new_rows
                self._metrics.captured_tokens.inc(chunk.num_new_rows)
                break
        return chunk.has_payload

    def _entry(self, ended: Ended, chunk: Chunk) -> bytes:
        return entry(ended, self._sink.origin, self._sink.encode, chunk)

    def _note_sent(self) -> None:
        if self._is_away:
            logger.info("Traces are stored again")
        self._is_away = False
        self._backoff.reset()

    def _note_away(self, error: UpdraftError) -> None:
        if not self._is_away:
            logger.warning("Traces wait for Redis; a full queue drops them", extra={"reason": str(error)})
        self._is_away = True

    def _note_evicted(self, num_entries: int) -> None:
        """Entries are parts of traces, of any pod, so they do not count among this pod's dropped traces."""
        if num_entries:
            self._lost_s[_SMALL_STREAM] = self._clock.monotonic()
            self._metrics.evicted_entries.inc(num_entries)

    def _drop(self, reason: Drop | Refusal) -> None:
        if reason is Drop.QUEUE_FULL:
            self._lost_s[_SMALL_QUEUE] = self._clock.monotonic()
        self._dropped[reason.value] += 1
        self._metrics.capture_dropped.labels(reason=reason.value).inc()
