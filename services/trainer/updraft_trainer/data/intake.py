"""Moves traces from the stream of a shard into replay: read, check, store, and only then acknowledge. While a batch is written
to disk, the next one is read and checked.

An entry is settled when its effect is durable: it was stored, is a duplicate, or was rejected and counted. Unreadable entries
go to the dead letters. While Redis is unavailable or the disk is full, entries stay in the stream and training continues.
"""

import asyncio
import logging
import statistics
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta

from updraft.trace.v1 import trace_pb2
from updraft_chassis.clock import Clock
from updraft_chassis.errors import UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_chassis.retry import Backoff
from updraft_chassis.streams import MAX_ENTRY_BYTES, Entry
from updraft_chassis.streams.consumer import Consumer
from updraft_draft.trace_bytes import Data, ParsedTrace
from updraft_trainer.data.demand import IntakeSpeed, storable
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import Pool
from updraft_trainer.data.sample import ExpectedTarget, RefusedTrace, Sample, parse, sample_of
from updraft_trainer.metrics import Metrics

logger = logging.getLogger(__name__)

BATCH_ENTRIES = 8
"""Entries stored at a time, with one sync of the disk; two batches are in memory, one of them read ahead. An entry has at most
8 MiB."""

_HOUR_MS = 3_600_000

MAX_SKEW_MS = 24 * _HOUR_MS
"""Between the end of a request, by its pod's clock, and its arrival in Redis. A pod keeps traces in memory, for minutes."""

_BLOCK = timedelta(seconds=1)

_LAG_S = 60.0
"""After this, the lag of the last entry says nothing of now."""

MAX_SIZE_RATIO = 4.0
"""By which a trace's hidden states may differ in size from the usual one. Over 96 recorded requests of four kinds to
SmolLM2-135M the largest difference is 12 %."""

NUM_SIZES, MIN_SIZES = 256, 32
"""Recent traces of which the usual size is the median, and how many are needed for one."""

SIZED_ROWS = 32
"""Rows at the end of a trace that its size is measured at."""

# Labels of rejections for invalid bytes, as opposed to valid traces that this trainer cannot use.
_UNREADABLE = frozenset({"malformed", "schema"})


@dataclass(frozen=True, slots=True)
class CheckedEntry:
    """An entry, its sample or the reason why it has none, and counts of its trace (empty if it is none): see the metric
    `traffic`."""

    entry: Entry
    result: Sample | RefusedTrace
    traffic: dict[str, int]

    @property
    def num_taught(self) -> int:
        return self.result.num_taught if isinstance(self.result, Sample) else 0

    @property
    def num_rows(self) -> int:
        return self.result.num_rows if isinstance(self.result, Sample) else 0

    @property
    def is_unreadable(self) -> bool:
        return isinstance(self.result, RefusedTrace) and self.result.label in _UNREADABLE


def check(entry: Entry, expected: ExpectedTarget) -> CheckedEntry:
    try:
        parsed = _parse(entry.data)
    except RefusedTrace as refusal:
        return CheckedEntry(entry, refusal, {})
    return CheckedEntry(entry, _checked(entry, parsed, expected), traffic_of(parsed.trace))


def _parse(data: Data) -> ParsedTrace:
    if len(data) > MAX_ENTRY_BYTES:  # no pod has written it
        raise RefusedTrace("malformed", f"an entry of {len(data)} bytes; at most {MAX_ENTRY_BYTES} are read")
    return parse(data)


def _checked(entry: Entry, parsed: ParsedTrace, expected: ExpectedTarget) -> Sample | RefusedTrace:
    try:
        sample = sample_of(parsed, expected)
        _check_clock(entry, sample)
    except RefusedTrace as refusal:
        return refusal
    # A pod's clock may be ahead: then orders and the age limit would reach the request later than they should.
    return replace(sample, finished_unix_ms=min(sample.finished_unix_ms, entry.received_ms))


def _check_clock(entry: Entry, sample: Sample) -> None:
    skew_ms = sample.finished_unix_ms - entry.received_ms  # any int64, which is more than a timedelta holds
    if abs(skew_ms) > MAX_SKEW_MS:
        where = "ahead of" if skew_ms > 0 else "behind"
        hours = abs(skew_ms) / _HOUR_MS
        raise RefusedTrace("wrong_clock", f"the clock of the trace's pod is {hours:.0f} h {where} that of Redis")


def traffic_of(trace: trace_pb2.Trace) -> dict[str, int]:
    """Counts of a trace, with or without a payload."""
    return {
        "tokens": len(trace.output_ids),
        "steps": len(trace.steps),
        "proposed": sum(len(step.draft_ids) for step in trace.steps),
        "accepted": sum(step.accepted for step in trace.steps),
    }


class Outliers:
    """Refuses traces whose hidden states are far larger or smaller than those of most.

    The size of a trace is the median over its last rows of their root mean square: the first rows may be attention sinks,
    which are sixty times as large. Of one target it hardly depends on the text, so what is far off comes from a broken engine,
    or is forged. Only accepted traces say what is usual, so that nobody shifts it by sending many. If `NUM_SIZES` are refused
    in a row, the size of all has changed, and the next ones decide.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=NUM_SIZES)
        self._num_refused = 0
        """Since the last one that was accepted."""

    def observe(self, sample: Sample) -> bool:
        """Whether the trace is accepted. To be called once for each."""
        rows = sample.aux[max(0, sample.num_rows - SIZED_ROWS) :].decoded().float()
        size = float(rows.square().mean(-1).sqrt().median())
        usual = statistics.median(self._recent) if len(self._recent) >= MIN_SIZES else None
        if usual is None or usual / MAX_SIZE_RATIO <= size <= usual * MAX_SIZE_RATIO:
            self._recent.append(size)
            self._num_refused = 0
            return True
        self._num_refused += 1
        if self._num_refused == NUM_SIZES:
            self._recent.clear()
            self._num_refused = 0
        return False


class Intake:
    """Not for concurrent use: one task runs it."""

    def __init__(
        self,
        consumer: Consumer,
        replay: Replay,
        expected: ExpectedTarget,
        *,
        metrics: Metrics,
        clock: Clock,
        shard: int = 0,
    ) -> None:
        self._consumer = consumer
        self._replay = replay
        self._expected = expected
        self._metrics = metrics
        self._clock = clock
        self._shard = str(shard)
        self._outliers = Outliers()
        self._unsettled: list[CheckedEntry] = []
        self._next: list[CheckedEntry] = []
        self._busy_since_s: float | None = None
        self._speed = IntakeSpeed()
        self._is_up: bool | None = None
        self._lag_s, self._lag_at_s = 0.0, float("-inf")

    async def run(self, stop: Stop) -> None:
        """Store entries until `stop`; retries after every `UpdraftError`."""
        backoff = Backoff()
        while not stop.requested:
            try:
                if not self._is_up:
                    await self._consumer.open()
                await self.store_batch()
            except UpdraftError as error:
                self._busy_since_s = None  # an outage says nothing about intake's speed
                self._set_up(is_up=False, reason=str(error))
                await stop.wait(next(backoff))
            else:
                self._set_up(is_up=True)
                backoff.reset()

    def wait(self, reason: str) -> None:
        """Log and show that nothing is read before `run`."""
        self._set_up(is_up=False, reason=reason)

    async def storable(self, max_bytes: int) -> float:
        """Captured tokens per second that this shard can take, with a stream of `max_bytes`. May be called at any time.
        Unavailable if Redis is unreachable."""
        return storable(self._speed.tokens_per_s, await self._consumer.fullness(max_bytes))

    async def store_batch(self) -> None:
        """Settle one batch: the previous one if it could not be settled, otherwise what can be read within a second."""
        if not self._unsettled:
            self._unsettled, self._next = self._next or await self._read(_BLOCK), []
        if self._unsettled:
            await self._settle()

    async def _read(self, block: timedelta) -> list[CheckedEntry]:
        entries = await self._consumer.read(count=BATCH_ENTRIES, block=block)
        if entries and self._busy_since_s is None:
            self._busy_since_s = self._clock.monotonic()
        return await asyncio.to_thread(lambda: [self._check(entry) for entry in entries])

    def _check(self, entry: Entry) -> CheckedEntry:
        checked = check(entry, self._expected)
        if isinstance(checked.result, Sample) and 0 < checked.result.expires_ms <= 1000 * self._clock.now():
            return replace(checked, result=RefusedTrace("expired", "its tenant wants it deleted by now"))
        if isinstance(checked.result, Sample) and not self._outliers.observe(checked.result):
            refusal = RefusedTrace("outlier", "its hidden states differ in size from those of most traces")
            return replace(checked, result=refusal)
        return checked

    async def _read_ahead(self) -> None:
        if not self._next:
            with suppress(UpdraftError):  # the next read reports it
                self._next = await self._read(timedelta(0))

    async def _settle(self) -> None:
        traces = [
            IncomingTrace(sample=checked.result, data=checked.entry.data)
            for checked in self._unsettled
            if isinstance(checked.result, Sample)
        ]
        for result in await asyncio.gather(
            asyncio.to_thread(self._store, traces), self._read_ahead(), return_exceptions=True
        ):
            if isinstance(result, BaseException):
                raise result
        await self._consumer.ack(c.entry.id for c in self._unsettled if not c.is_unreadable)
        self._count_settled(self._unsettled)
        self._measure(sum(checked.num_rows for checked in self._unsettled))
        self._unsettled = [checked for checked in self._unsettled if checked.is_unreadable]
        while self._unsettled:
            unreadable = self._unsettled[0]
            await self._consumer.dead_letter(unreadable.entry, str(unreadable.result))
            self._unsettled.pop(0)

    def _store(self, traces: Sequence[IncomingTrace]) -> None:
        replay, metrics = self._replay, self._metrics
        wanted = [trace for trace in traces if not replay.is_forgotten(trace.sample)]
        admitted = replay.admit(wanted)
        for sample in admitted:
            split = "evaluation" if sample.is_evaluation else "train"
            metrics.admitted.labels(split).inc()
            metrics.stored_tokens.labels(split).inc(sample.num_taught)
        metrics.refused.labels("duplicate").inc(len(wanted) - len(admitted))
        metrics.refused.labels("forgotten").inc(len(traces) - len(wanted))
        metrics.replay_damaged.inc(replay.take_damaged())
        metrics.replay_file_bytes.set(replay.num_file_bytes)
        for pool in Pool:
            metrics.replay_samples.labels(pool).set(replay.num_samples(pool))
            metrics.replay_bytes.labels(pool).set(replay.num_bytes(pool))

    def _measure(self, tokens: int) -> None:
        """Entries without hidden states are not measured: they say little about the speed of those with them."""
        now_s = self._clock.monotonic()
        if tokens and self._busy_since_s is not None:
            self._speed.stored(tokens, now_s - self._busy_since_s)
        self._busy_since_s = now_s if self._next else None

    def _count_settled(self, settled: Sequence[CheckedEntry]) -> None:
        for checked in settled:
            if isinstance(checked.result, RefusedTrace):
                self._metrics.refused.labels(checked.result.label).inc()
            for what, count in checked.traffic.items():
                self._metrics.traffic.labels(what).inc(count)
        newest_ms = settled[-1].entry.received_ms
        self._lag_s, self._lag_at_s = max(0.0, self._clock.now() - newest_ms / 1000), self._clock.monotonic()
        self._metrics.stream_lag.labels(self._shard).set(self._lag_s)

    @property
    def lag_s(self) -> float | None:
        """Age of the last entry when it was stored; None if that is more than a minute ago."""
        return self._lag_s if self._clock.monotonic() - self._lag_at_s < _LAG_S else None

    def _set_up(self, *, is_up: bool, reason: str = "") -> None:
        """Log each change once."""
        if is_up is not self._is_up:
            self._metrics.stream_up.labels(self._shard).set(is_up)
            if not is_up:
                logger.warning("Cannot read or store traces; training continues from replay", extra={"reason": reason})
            elif self._is_up is not None:
                logger.info("Receiving traces again")
        self._is_up = is_up


async def storable_together(intakes: Sequence[Intake], stream_bytes: int) -> float:
    """Captured tokens per second that all shards can take, with streams of so many bytes together. Each shard gets the same
    part, so the slowest one decides. Unavailable if Redis is unreachable."""
    return len(intakes) * min([await intake.storable(stream_bytes // len(intakes)) for intake in intakes])
