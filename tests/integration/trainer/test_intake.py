import asyncio
import math
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from tests.support.clock import ManualClock
from tests.support.disk import file_size_limit
from tests.support.likeliest import show_likeliest
from tests.support.redis_server import RedisServer
from tests.support.traces import TraceMaker
from tests.support.trainer import is_settled
from tests.support.wait import LONG_S, until

from updraft.trace.v1 import trace_pb2
from updraft_chassis import streams
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Exhausted, Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_chassis.streams import Entry
from updraft_chassis.streams.consumer import Consumer
from updraft_draft import tensors
from updraft_draft.target_weights import read_head
from updraft_trainer.data import intake
from updraft_trainer.data.demand import HEADROOM
from updraft_trainer.data.intake import (
    BATCH_ENTRIES,
    MAX_SKEW_MS,
    MIN_SIZES,
    NUM_SIZES,
    CheckedEntry,
    Intake,
    Outliers,
    check,
    storable_together,
)
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import Pool, ReplayLimits
from updraft_trainer.data.sample import ExpectedTarget, Sample, read_sample
from updraft_trainer.metrics import Metrics

KEY = "updraft:{default:default:0}:samples:v1"
NUM_OUTPUT = 24
NUM_ROWS = 4 + NUM_OUTPUT - 1


@pytest.fixture
def replay(tmp_path: Path, traces: TraceMaker) -> Iterator[Replay]:
    with Replay.open(
        tmp_path / "replay",
        limits=ReplayLimits.of(10 * 1024**2),
        expected=traces.expected,
        cache_bytes=1024**2,
    ) as replay:
        yield replay


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@asynccontextmanager
async def running(
    client: streams.Client,
    replay: Replay,
    traces: TraceMaker,
    metrics: Metrics,
    *,
    shard: int = 0,
    kind: type[Consumer] = Consumer,
) -> AsyncIterator[None]:
    """Intake as the trainer runs it, until the block ends."""
    # Short: what a dying Redis handed out without our hearing of it comes again only after this time.
    key = streams.keys("default", "default", shard + 1)[shard]
    consumer = kind(client, key, group="trainer", name="trainer-0", claim_idle=timedelta(seconds=2))
    stop = Stop()
    async with asyncio.TaskGroup() as tasks:
        task = Intake(consumer, replay, traces.expected, metrics=metrics, clock=SystemClock(), shard=shard)
        tasks.create_task(task.run(stop))
        try:
            yield
        finally:
            stop.request()


def count(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"updraft_trainer_{name}", labels) or 0.0


async def send(client: streams.Client, *entries: bytes) -> None:
    producer = streams.Producer(client, KEY, max_bytes=64 * 1024**2)
    for entry in entries:
        await producer.append(entry)


async def test_every_trace_is_stored_once_and_then_leaves_the_stream(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    await send(redis, *(traces.data(seed, evaluation=seed % 4 == 0) for seed in range(40)))
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    assert replay.num_samples(Pool.WINDOW) == 30
    assert replay.num_samples(Pool.EVALUATION) == 10
    assert count(metrics, "samples_admitted_total", split="train") == 30
    assert count(metrics, "samples_admitted_total", split="evaluation") == 10
    assert count(metrics, "stored_tokens_total", split="train") == 30 * NUM_OUTPUT
    assert count(metrics, "stored_tokens_total", split="evaluation") == 10 * NUM_OUTPUT
    assert count(metrics, "stream_up", shard="0") == 1


class ReadAhead(Consumer):
    """Notes when a second batch has been read."""

    num_batches = 0
    has_two = threading.Event()

    async def read(self, *, count: int, block: timedelta) -> list[Entry]:
        entries = await super().read(count=count, block=block)
        self.num_batches += bool(entries)
        if self.num_batches == 2:
            self.has_two.set()
        return entries


async def test_an_entry_that_breaks_the_check_ends_the_process_also_if_it_was_read_ahead(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it is delivered again, and at last becomes a dead letter."""
    last, check_ = traces.data(BATCH_ENTRIES), intake.check

    def broken(entry: Entry, expected: ExpectedTarget) -> CheckedEntry:
        if entry.data == last:
            raise RuntimeError("torch cannot read it")
        return check_(entry, expected)

    monkeypatch.setattr(intake, "check", broken)
    await send(redis, *map(traces.data, range(BATCH_ENTRIES)), last)
    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.timeout(LONG_S), running(redis, replay, traces, metrics):
            await asyncio.Event().wait()
    assert raised.group_contains(RuntimeError, match="torch cannot read it")
    await redis.flushall()  # nobody reads it again here


async def test_the_next_batch_is_read_while_one_is_stored(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = replay.admit
    monkeypatch.setattr(replay, "admit", lambda batch: admit(batch) if ReadAhead.has_two.wait(LONG_S) else [])
    await send(redis, *(traces.data(seed) for seed in range(2 * BATCH_ENTRIES)))
    async with running(redis, replay, traces, metrics, kind=ReadAhead):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    assert replay.num_samples(Pool.WINDOW) == 2 * BATCH_ENTRIES


async def test_what_is_sent_twice_is_stored_once(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    await send(redis, *(traces.data(seed % 5) for seed in range(15)))
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    assert replay.num_samples(Pool.WINDOW) == 5
    assert count(metrics, "samples_refused_total", reason="duplicate") == 10


def not_finite(traces: TraceMaker) -> trace_pb2.Trace:
    trace = traces.trace(1)
    trace.payload.last_hidden.data = b"\xc0\x7f" * (len(trace.payload.last_hidden.data) // 2)
    return trace


def of_another_width(traces: TraceMaker) -> trace_pb2.Trace:
    """A trace of a pod whose model has half the hidden size."""
    trace = traces.trace(2)
    for tensor in (trace.payload.aux_hidden, trace.payload.last_hidden):
        tensor.columns //= 2
        tensor.data = tensor.data[: len(tensor.data) // 2]
    return trace


def changed(traces: TraceMaker, **header: str | int) -> trace_pb2.Trace:
    trace = traces.trace(1)
    for name, value in header.items():
        setattr(trace.header, name, value)
    return trace


@pytest.mark.parametrize("light", [True, False])
async def test_a_trace_without_payload_is_counted_and_leaves_the_stream(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics, *, light: bool
) -> None:
    await send(redis, traces.data(1, payload=not light))
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    assert count(metrics, "samples_refused_total", reason="no_payload") == light
    assert count(metrics, "traffic_total", what="tokens") == 24
    assert count(metrics, "traffic_total", what="steps") == 23
    assert count(metrics, "traffic_total", what="proposed") == 23
    assert replay.num_samples(Pool.WINDOW) == (not light)


async def test_a_trace_of_another_target_is_counted_and_leaves_the_stream(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    await send(redis, changed(traces, target_fingerprint="sha256:other").SerializeToString())
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    assert count(metrics, "samples_refused_total", reason="other_target") == 1
    assert not await redis.exists(f"{KEY}:dead")


async def test_likeliest_tokens_are_stored_and_what_says_too_little_is_counted(
    redis: Redis, replay: Replay, traces: TraceMaker, tiny_target: Path, metrics: Metrics
) -> None:
    head = read_head(tiny_target).head
    silent, short = traces.trace(2), traces.trace(3)
    silent.payload.ClearField("teacher")
    short.payload.missing_rows.extend(range(0, 27, 2))
    good = [show_likeliest(traces.trace(seed, evaluation=seed > 10), head, k=8) for seed in (1, 11)]
    await send(redis, *(one.SerializeToString() for one in [*good, silent, short]))
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    assert (replay.num_samples(Pool.WINDOW), replay.num_samples(Pool.EVALUATION)) == (1, 1)
    assert count(metrics, "samples_refused_total", reason="no_teacher") == 1
    assert count(metrics, "samples_refused_total", reason="too_few_rows") == 1
    assert not await redis.exists(f"{KEY}:dead"), "nothing is wrong with them"


@pytest.mark.attack(
    boundary="traces",
    attack="traces from the future or the distant past",
    outcome="refused; others are stored",
)
@pytest.mark.parametrize(
    ("days", "skew"),
    [
        (2, "48 h ahead of"),
        (-40, "960 h behind"),
        (10**11 - 20_000, r"\d{13} h ahead of"),
        (-(10**11), r"\d{13} h behind"),
    ],
)
async def test_traces_of_a_pod_whose_clock_is_wrong_are_refused_and_others_are_not(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics, days: int, skew: str
) -> None:
    wrong = traces.trace(1)
    wrong.header.finished_unix_ms += days * 86_400_000
    await send(redis, wrong.SerializeToString(), traces.data(2))
    rows: Any = await redis.xrange(KEY)
    checked = check(Entry(id=rows[0][0].decode(), data=rows[0][1][b"t"], deliveries=1), traces.expected)
    assert re.fullmatch(f"the clock of the trace's pod is {skew} that of Redis", str(checked.result))
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    assert count(metrics, "samples_refused_total", reason="wrong_clock") == 1
    assert replay.num_samples(Pool.WINDOW) == 1
    assert not await redis.exists(f"{KEY}:dead")


async def test_shards_fill_one_replay_and_a_trace_in_two_of_them_is_admitted_once(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    keys = streams.keys("default", "default", 3)
    for shard, key in enumerate(keys):
        producer = streams.Producer(redis, key, max_bytes=1 << 24)
        for seed in (0, *range(10 * shard + 1, 10 * shard + 6)):
            await producer.append(traces.data(seed))
    async with AsyncExitStack() as stack:
        for shard in range(3):
            await stack.enter_async_context(running(redis, replay, traces, metrics, shard=shard))
        await until(lambda: replay.num_samples(Pool.WINDOW) == 16)
        await until(lambda: count(metrics, "samples_refused_total", reason="duplicate") == 2)
        await until(lambda: [count(metrics, "stream_up", shard=str(shard)) for shard in range(3)] == [1, 1, 1])
    assert [await redis.xlen(key) for key in keys] == [0, 0, 0]


async def test_a_damaged_trace_counts_once_with_any_number_of_shards(
    redis: Redis, replay: Replay, tmp_path: Path, traces: TraceMaker, metrics: Metrics
) -> None:
    keys = streams.keys("default", "default", 2)

    async def send_to_each(seed: int) -> None:
        for shard, key in enumerate(keys):
            await streams.Producer(redis, key, max_bytes=1 << 24).append(traces.data(seed + shard))

    await send_to_each(0)
    async with AsyncExitStack() as stack:
        for shard in range(2):
            await stack.enter_async_context(running(redis, replay, traces, metrics, shard=shard))
        await until(lambda: replay.num_samples(Pool.WINDOW) == 2)
        replay._note_damaged(replay.training_ids()[0], "as a reader finds it")
        await send_to_each(2)
        await until(lambda: replay.num_samples(Pool.WINDOW) == 3)
        await send_to_each(4)
        await until(lambda: replay.num_samples(Pool.WINDOW) == 5)
    assert count(metrics, "replay_damaged_total") == 1


@pytest.mark.attack(
    boundary="traces",
    attack="entries that are no trace, or of another schema or width, or not finite",
    outcome="dead letters with the reason; the next trace is stored",
)
async def test_what_nobody_can_read_becomes_a_dead_letter_with_its_reason(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    await send(
        redis,
        b"\xff\xff no trace",
        not_finite(traces).SerializeToString(),
        changed(traces, schema=99).SerializeToString(),
        of_another_width(traces).SerializeToString(),
        traces.data(7),
    )
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    letters: list[tuple[bytes, dict[bytes, bytes]]] = await redis.xrange(f"{KEY}:dead")  # type: ignore[assignment] # redis-py's types cover all protocols
    assert [fields[b"reason"].decode().split(":")[0] for _, fields in letters] == [
        "not a trace",
        "last hidden states are not finite",
        "the trace has schema 99, this trainer reads 1",
        "auxiliary hidden states of width 96, expected 192",
    ]
    assert count(metrics, "samples_refused_total", reason="malformed") == 3
    assert count(metrics, "samples_refused_total", reason="schema") == 1
    assert replay.num_samples(Pool.WINDOW) == 1


@pytest.mark.attack(
    boundary="traces",
    attack="entries that no pod of ours writes: too large, of other fields, or small with millions of steps",
    outcome="dead letters, cut to the size of a trace; the next trace is stored",
)
async def test_hostile_entries_become_dead_letters_and_the_next_trace_is_stored(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    steps = bytes([trace_pb2.Trace.STEPS_FIELD_NUMBER << 3 | 2, 0])
    await redis.xadd(KEY, {"t": bytes(20 * 1024**2)})
    await redis.xadd(KEY, {"t": steps * 2**21})
    await redis.xadd(KEY, {"another": "field", "\x1b[2J": "\n"})
    await redis.xadd(KEY, {"t": traces.data(7), "more": "fields"})
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    letters: list[tuple[bytes, dict[bytes, bytes]]] = await redis.xrange(f"{KEY}:dead")  # type: ignore[assignment] # redis-py's types cover all protocols
    assert [fields[b"reason"].decode() for _, fields in letters] == [
        "an entry of 20971520 bytes; at most 8388608 are read",
        "not a trace: it has 262144 fields or more",
        "the trace has schema 0, this trainer reads 1",
    ]
    assert max(len(fields[b"t"]) for _, fields in letters) == streams.MAX_ENTRY_BYTES
    assert replay.num_samples(Pool.WINDOW) == 1


async def test_redis_absent_at_the_start_and_killed_later_costs_no_trace(
    short_tmp_path: Path, replay: Replay, traces: TraceMaker, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(short_tmp_path, durable=True)
    async with streams.connect(server.url) as client, running(client, replay, traces, metrics):
        await until(lambda: "Cannot read or store traces" in caplog.text)
        with server:
            for start in (0, 20, 40):
                await send(client, *(traces.data(seed) for seed in range(start, start + 20)))
                # In a thread: the loop goes on, and so notices which connections are closed.
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            await until(lambda: is_settled(client, KEY), what="an empty stream")
    assert replay.num_samples(Pool.WINDOW) == 60
    assert count(metrics, "samples_admitted_total", split="train") == 60


async def test_with_a_full_disk_traces_wait_in_the_stream(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    async with running(redis, replay, traces, metrics):
        await until(lambda: count(metrics, "stream_up", shard="0") == 1)
        with file_size_limit(100_000):
            await send(redis, *(traces.data(seed, num_output=200) for seed in range(20)))
            await until(lambda: count(metrics, "stream_up", shard="0") == 0)
            stored = replay.num_samples(Pool.WINDOW)
            assert stored + await redis.xlen(KEY) == 20
            assert stored < 20
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
    assert replay.num_samples(Pool.WINDOW) == 20


async def test_intake_takes_as_much_as_it_stores_and_nothing_while_half_of_its_stream_waits(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = Consumer(redis, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
    await consumer.open()
    clock = ManualClock()
    intake = Intake(consumer, replay, traces.expected, metrics=metrics, clock=clock)
    admit = replay.admit

    def admit_slowly(batch: Sequence[IncomingTrace]) -> list[Sample]:
        clock.advance(seconds=2.0)
        return admit(batch)

    monkeypatch.setattr(replay, "admit", admit_slowly)
    entries = [traces.data(seed) for seed in range(2 * BATCH_ENTRIES + 4)]
    waiting = 4 * (len(entries[0]) + 64)
    assert await storable_together([intake], waiting) == math.inf, "nothing is known of its speed"
    await send(redis, *entries)
    await intake.store_batch()  # and the next batch is read
    speed = BATCH_ENTRIES * NUM_ROWS / 2.0
    assert await storable_together([intake], 100 * waiting) == pytest.approx(HEADROOM * speed * 0.98, rel=0.05)
    assert await storable_together([intake, intake], 8 * waiting) == pytest.approx(HEADROOM * speed, rel=0.05)
    assert await storable_together([intake], waiting) == 0.0
    await intake.store_batch()
    await intake.store_batch()
    assert await storable_together([intake], waiting) == pytest.approx(HEADROOM * speed, rel=0.2), "nothing waits"
    assert intake.lag_s is not None
    clock.advance(seconds=61.0)
    assert intake.lag_s is None, "nothing came for a minute"


async def test_neither_an_outage_nor_traces_without_hidden_states_lower_what_intake_takes(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = Consumer(redis, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
    clock, stop = ManualClock(), Stop()
    intake = Intake(consumer, replay, traces.expected, metrics=metrics, clock=clock)
    admit, outages = replay.admit, iter([3600.0])

    def admit_after_an_outage(batch: Sequence[IncomingTrace]) -> list[Sample]:
        if outage_s := next(outages, 0.0):
            clock.advance(outage_s)
            raise Unavailable("the disk cannot be written")
        clock.advance(2.0)
        return admit(batch)

    monkeypatch.setattr(replay, "admit", admit_after_an_outage)
    light = [traces.data(seed, payload=False) for seed in range(100, 100 + 4 * BATCH_ENTRIES)]
    await send(redis, *(traces.data(seed) for seed in range(3 * BATCH_ENTRIES)), *light)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(intake.run(stop))
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
        stop.request()
    speed = BATCH_ENTRIES * NUM_ROWS / 2.0
    assert await storable_together([intake], 1 << 30) == pytest.approx(HEADROOM * speed, rel=0.01)


def sized(traces: TraceMaker, seed: int, factor: float) -> bytes:
    """A trace whose hidden states are so many times as large."""
    trace = traces.trace(seed)
    aux = factor * tensors.decode(trace.payload.aux_hidden)
    trace.payload.aux_hidden.CopyFrom(tensors.encode(aux, trace_pb2.TENSOR_ENCODING_BF16))
    return trace.SerializeToString()


@pytest.fixture
def of_size(traces: TraceMaker) -> Callable[[float], Sample]:
    return lambda factor: read_sample(sized(traces, 0, factor), traces.expected)


def test_traces_whose_hidden_states_are_far_off_are_refused_until_all_are_so(
    of_size: Callable[[float], Sample],
) -> None:
    outliers, huge = Outliers(), of_size(100.0)
    assert all(outliers.observe(of_size(1.0 + n % 2)) for n in range(MIN_SIZES))
    accepted = [outliers.observe(of_size(factor)) for factor in (3.0, 0.5, 100.0, 0.01, 0.0)]
    assert accepted == [True, True, False, False, False]
    assert not any(outliers.observe(huge) for _ in range(NUM_SIZES - 3))
    assert outliers.observe(huge), "it is usual now"


def test_many_refused_traces_do_not_shift_what_is_usual(of_size: Callable[[float], Sample]) -> None:
    outliers, usual, huge = Outliers(), of_size(1.0), of_size(100.0)
    assert all(outliers.observe(usual) for _ in range(MIN_SIZES))
    for _ in range(4):
        assert not any(outliers.observe(huge) for _ in range(NUM_SIZES - 1))
        assert outliers.observe(usual)


async def test_a_trace_is_measured_once_however_often_it_cannot_be_stored(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    consumer = Consumer(redis, KEY, group="trainer", name="trainer-0", claim_idle=timedelta(hours=1))
    task = Intake(consumer, replay, traces.expected, metrics=metrics, clock=SystemClock())
    await consumer.open()
    await send(redis, *(traces.data(seed) for seed in range(4)))
    with file_size_limit(0):
        for _ in range(MIN_SIZES):
            with pytest.raises(Exhausted):
                await task.store_batch()
    await task.store_batch()
    await send(redis, sized(traces, 4, 100.0))
    await task.store_batch()

    assert len(replay.training_ids()) == 5, "four traces are too few to say what is usual"


async def test_a_trace_ended_no_later_than_redis_received_it(traces: TraceMaker) -> None:
    data = traces.data(1, finished_ms=MAX_SKEW_MS)
    for received_ms, ended_ms in ((1, 1), (MAX_SKEW_MS + 5, MAX_SKEW_MS)):
        result = check(Entry(id=f"{received_ms}-0", data=data, deliveries=1), traces.expected).result
        assert isinstance(result, Sample)
        assert result.finished_unix_ms == ended_ms


async def test_an_outlier_is_counted_and_leaves_the_stream(
    redis: Redis, replay: Replay, traces: TraceMaker, metrics: Metrics
) -> None:
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    for seed in range(MIN_SIZES + 8):
        trace = traces.trace(seed)
        if seed == MIN_SIZES + 4:
            aux = 1000 * tensors.decode(trace.payload.aux_hidden)
            trace.payload.aux_hidden.CopyFrom(tensors.encode(aux, trace_pb2.TENSOR_ENCODING_BF16))
        await producer.append(trace.SerializeToString())
    async with running(redis, replay, traces, metrics):
        await until(lambda: is_settled(redis, KEY), what="an empty stream")

    assert len(replay.training_ids()) == MIN_SIZES + 7
    assert metrics.registry.get_sample_value("updraft_trainer_samples_refused_total", {"reason": "outlier"}) == 1
