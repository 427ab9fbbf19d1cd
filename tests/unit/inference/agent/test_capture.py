import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.requests import ended, step
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_chassis.tenants import hashes
from updraft_draft import tensors
from updraft_inference.agent.capture import Capture, Sink
from updraft_inference.agent.chunks import MAX_CHUNK_BYTES, chunk_bytes
from updraft_inference.agent.selection import CapturePlan, CaptureRates, CaptureTerms, Permissions, Refusal
from updraft_inference.agent.trace import Origin
from updraft_inference.engine import CaptureParams, CountedRequest, Drafter, FinishReason
from updraft_inference.metrics import Metrics

PLAN = CapturePlan(trace_id=b"0123456789abcdef", is_captured=True, payload_probability=0.5, domain="sql")
ENCODE = partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_FP32)
ORIGIN = Origin(
    speculator="s",
    pod="p",
    engine="fake/1",
    target_fingerprint="sha256:t",
    tokenizer_fingerprint="sha256:k",
    quantization="fp8",
)


class FakeStream:
    """Keeps entries; away or too small on demand."""

    def __init__(self) -> None:
        self.entries: list[trace_pb2.Trace] = []
        self.is_away = False
        self.max_entry_bytes = 10**9
        self.attempts = 0
        self.num_removed = 0
        """Older entries that give way to each new one."""

    async def append(self, trace_id: bytes, entry: bytes) -> int:
        self.attempts += 1
        if self.is_away:
            raise Unavailable("away")
        if len(entry) > self.max_entry_bytes:
            raise InvalidInput("too large")
        self.entries.append(trace_pb2.Trace.FromString(entry))
        assert self.entries[-1].header.trace_id == trace_id
        return self.num_removed


@pytest.fixture
def stream() -> FakeStream:
    return FakeStream()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
async def capture(stream: FakeStream, metrics: Metrics) -> Capture:
    return Capture(
        CaptureRates(),
        Sink(stream=stream, origin=ORIGIN, encode=ENCODE),
        max_entries=3,
        max_bytes=10_000,
        metrics=metrics,
        clock=ManualClock(),
    )


@asynccontextmanager
async def running(capture: Capture) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(capture.run())
        yield
        task.cancel()


def dropped(capture: Capture) -> dict[str, int]:
    return dict(capture.counters.dropped)


async def test_a_trace_tells_all_that_a_trainer_needs(capture: Capture, stream: FakeStream) -> None:
    async with running(capture):
        capture.offer(ended(step(1, 2), rows=5), PLAN)
        await until(lambda: bool(stream.entries))

    trace = stream.entries[0]
    assert trace.header.trace_id == PLAN.trace_id
    assert (trace.header.speculator, trace.header.pod, trace.header.engine) == ("s", "p", "fake/1")
    assert (trace.header.domain, trace.header.payload_probability) == ("sql", 0.5)
    assert trace.header.policy.train
    assert trace.header.last_chunk
    assert trace.header.finish_reason == trace_pb2.FINISH_REASON_LENGTH
    assert (trace.header.time_to_first_token_us, trace.header.duration_us) == (50_000, 500_000)
    assert trace.header.finished_unix_ms == 1_700_000_000_000
    assert not trace.header.sampling.HasField("seed")
    assert list(trace.prompt_ids) == [1, 2, 3]
    assert list(trace.output_ids) == [0, 1, 2, 3]
    assert (trace.steps[0].accepted, list(trace.steps[0].draft_ids)) == (2, [0, 1])
    assert trace.steps[0].drafter == trace_pb2.DRAFTER_EAGLE3
    assert trace.payload.first_position == 1
    assert torch.equal(tensors.decode(trace.payload.aux_hidden), torch.ones(5, 12))
    assert torch.equal(tensors.decode(trace.payload.last_hidden), torch.full((5, 4), 2.0))


async def test_a_trace_tells_which_tokens_of_a_mixed_chain_were_looked_up(capture: Capture, stream: FakeStream) -> None:
    async with running(capture):
        capture.offer(ended(replace(step(1, 2, version=7), drafter=Drafter.HYBRID, looked_up=(1,))), PLAN)
        await until(lambda: bool(stream.entries))

    (sent,) = stream.entries[0].steps
    assert (sent.drafter, sent.draft_version) == (trace_pb2.DRAFTER_HYBRID, 7)
    assert list(sent.looked_up) == [1]


async def test_rows_after_a_rejection_are_sent_with_their_step(capture: Capture, stream: FakeStream) -> None:
    async with running(capture):
        capture.offer(ended(step(1, 0), rows=5, rejected_rows=2), PLAN)
        await until(lambda: bool(stream.entries))

    (rejected,) = stream.entries[0].payload.counterfactuals
    assert rejected.step == 0
    assert torch.equal(tensors.decode(rejected.aux_hidden), torch.full((2, 12), 3.0))
    assert torch.equal(tensors.decode(rejected.last_hidden), torch.full((2, 4), 4.0))


async def test_the_light_record_has_no_payload(capture: Capture, stream: FakeStream) -> None:
    async with running(capture):
        capture.offer(ended(step(1, 2)), PLAN)
        await until(lambda: capture.counters.captured == 1)

    assert not stream.entries[0].HasField("payload")
    assert capture.counters == fleet_pb2.CaptureCounters(captured=1, offered_tokens=7)


async def test_what_nobody_was_asked_about_is_counted_apart_from_opt_outs(capture: Capture) -> None:
    capture.offer(ended(step(1, 2)), CapturePlan(trace_id=b"x", refusal=Refusal.NOT_ASKED))

    assert capture.counters.dropped == {"not_asked": 1}


async def test_what_opted_out_never_leaves_and_is_counted(capture: Capture, stream: FakeStream) -> None:
    async with running(capture):
        capture.offer(ended(step(1, 2)), CapturePlan(trace_id=b"x", refusal=Refusal.OPTED_OUT))
        capture.offer(ended(step(1, 2)), PLAN)
        await until(lambda: bool(stream.entries))

    assert [entry.header.trace_id for entry in stream.entries] == [PLAN.trace_id]
    assert dropped(capture) == {"opted_out": 1}


async def test_a_request_without_output_teaches_nothing(capture: Capture) -> None:
    capture.offer(ended(num_output=0), PLAN)
    await capture.flush(0)

    assert dropped(capture) == {}


async def test_more_entries_than_the_queue_holds_are_dropped_and_counted(capture: Capture, metrics: Metrics) -> None:
    for _ in range(5):
        capture.offer(ended(step(1, 2)), PLAN)

    assert dropped(capture) == {"queue_full": 2}
    assert metrics.capture_dropped.labels(reason="queue_full")._value.get() == 2


async def test_traces_that_gave_way_in_the_stream_are_counted_and_named_for_five_minutes(
    stream: FakeStream, metrics: Metrics
) -> None:
    clock = ManualClock()
    sink = Sink(stream=stream, origin=ORIGIN, encode=ENCODE)
    capture = Capture(CaptureRates(), sink, max_entries=3, max_bytes=10_000, metrics=metrics, clock=clock)
    async with running(capture):
        capture.offer(ended(step(1, 2)), PLAN)
        await capture.flush(5)
        assert (dropped(capture), capture.counters.too_small) == ({}, "")
        stream.num_removed = 2
        capture.offer(ended(step(1, 2)), PLAN)
        await capture.flush(5)
    assert dropped(capture) == {}, "they are entries, perhaps of another pod, and a long request has several"
    assert metrics.evicted_entries._value.get() == 2
    assert "spec.traces.maxSize" in capture.counters.too_small
    clock.advance(301)
    assert capture.counters.too_small == ""


async def test_more_bytes_than_the_queue_holds_are_dropped_and_freed_when_sent(
    capture: Capture, stream: FakeStream
) -> None:
    capture.offer(ended(step(1, 2), rows=100), PLAN)
    capture.offer(ended(step(1, 2), rows=100), PLAN)
    assert dropped(capture) == {"queue_full": 1}

    async with running(capture):
        await until(lambda: bool(stream.entries))
        capture.offer(ended(step(1, 2), rows=100), PLAN)
        await until(lambda: len(stream.entries) == 2)

    assert dropped(capture) == {"queue_full": 1}


async def test_rows_after_rejections_count_towards_the_bytes_that_may_wait(capture: Capture) -> None:
    capture.offer(ended(step(1, 0), rows=80), PLAN)
    capture.offer(ended(step(1, 0), rows=30, rejected_rows=20), PLAN)
    assert dropped(capture) == {}
    capture.offer(ended(step(1, 0), rows=30, rejected_rows=20), PLAN)
    assert dropped(capture) == {"queue_full": 1}
    await capture.flush(0)


async def test_while_redis_is_away_the_oldest_wait_and_the_rest_are_counted(
    capture: Capture, stream: FakeStream
) -> None:
    stream.is_away = True
    async with running(capture):
        capture.offer(ended(step(1, 2), num_output=1), PLAN)
        await until(lambda: stream.attempts > 0)
        for num_output in range(2, 7):
            capture.offer(ended(step(1, 2), num_output=num_output), PLAN)
        assert dropped(capture) == {"redis_unavailable": 2}

        stream.is_away = False
        await until(lambda: len(stream.entries) == 4)

    assert [len(entry.output_ids) for entry in stream.entries] == [1, 2, 3, 4]
    assert dropped(capture) == {"redis_unavailable": 2}


async def test_a_long_request_is_sent_in_chunks_and_counts_once(capture: Capture, stream: FakeStream) -> None:
    finished = ended(*(step(start, 0) for start in range(1, 70_000)), rows=70_002)
    async with running(capture):
        capture.offer(finished, PLAN)
        await until(lambda: capture.counters.captured == 1)

    assert len(stream.entries) > 2
    assert all(entry.ByteSize() <= MAX_CHUNK_BYTES for entry in stream.entries)
    assert [entry.header.last_chunk for entry in stream.entries] == [False] * (len(stream.entries) - 1) + [True]
    starts = [0, *accumulate(len(entry.output_ids) for entry in stream.entries)]
    assert [entry.header.chunk for entry in stream.entries] == starts[:-1]
    assert starts[-1] == 70_000
    assert dropped(capture) == {}, "a request that is larger than the queue waits alone"
    assert capture.counters.payloads == 1
    assert capture.counters.captured_tokens == 70_001, "rows that chunks have in common count once"


async def test_chunks_fit_into_the_entries_of_small_streams(metrics: Metrics) -> None:
    """As with many shards."""
    stream = FakeStream()
    stream.max_entry_bytes = 20_000
    sink = Sink(stream=stream, origin=ORIGIN, encode=ENCODE, max_chunk_bytes=chunk_bytes(stream.max_entry_bytes))
    capture = Capture(CaptureRates(), sink, max_entries=3, max_bytes=10_000, metrics=metrics, clock=ManualClock())
    async with running(capture):
        capture.offer(ended(*(step(start, 0) for start in range(1, 1000)), rows=1001), PLAN)
        await until(lambda: capture.counters.captured == 1)

    assert dropped(capture) == {}
    assert sum(len(entry.output_ids) for entry in stream.entries) == 1000
    assert all(entry.HasField("payload") for entry in stream.entries)
    assert chunk_bytes(8 << 20) == chunk_bytes(1 << 30) == MAX_CHUNK_BYTES


async def test_a_payload_that_is_too_large_leaves_the_light_record(capture: Capture, stream: FakeStream) -> None:
    stream.max_entry_bytes = 1000
    async with running(capture):
        capture.offer(ended(step(1, 2), rows=100), PLAN)
        await until(lambda: bool(stream.entries))

    assert not stream.entries[0].HasField("payload")
    assert dropped(capture) == {"too_large": 1}
    assert (capture.counters.captured, capture.counters.payloads) == (1, 0)


async def test_a_payload_that_is_too_large_first_loses_the_rows_after_rejections(
    capture: Capture, stream: FakeStream
) -> None:
    stream.max_entry_bytes = 5000
    async with running(capture):
        capture.offer(ended(step(1, 0), rows=60, rejected_rows=60), PLAN)
        await until(lambda: capture.counters.captured == 1)

    assert stream.entries[0].payload.aux_hidden.rows == 60
    assert not stream.entries[0].payload.counterfactuals
    assert dropped(capture) == {"too_large": 1}
    assert capture.counters.payloads == 1


async def test_flushing_sends_what_waits(capture: Capture, stream: FakeStream) -> None:
    for _ in range(3):
        capture.offer(ended(step(1, 2)), PLAN)

    async with running(capture):
        await capture.flush(5)
        assert len(stream.entries) == 3


async def test_what_cannot_be_flushed_in_time_is_counted(capture: Capture, stream: FakeStream) -> None:
    stream.is_away = True
    async with running(capture):
        for _ in range(3):
            capture.offer(ended(step(1, 2)), PLAN)
        await capture.flush(0.05)

    assert dropped(capture) == {"redis_unavailable": 3}


async def test_a_trace_tells_what_its_sender_permits(capture: Capture, stream: FakeStream) -> None:
    permissions = Permissions(train=False, retain=True, region="eu")
    async with running(capture):
        capture.offer(ended(step(1, 2)), replace(PLAN, permissions=permissions))
        await until(lambda: bool(stream.entries))

    assert stream.entries[0].header.policy == trace_pb2.Policy(train=False, retain=True, region="eu")


async def test_a_trace_tells_that_a_grammar_masked_tokens(capture: Capture, stream: FakeStream) -> None:
    free = ended(step(1, 2))
    async with running(capture):
        capture.offer(free, PLAN)
        capture.offer(replace(free, request=replace(free.request, json_schema='{"type":"object"}')), PLAN)
        await until(lambda: len(stream.entries) == 2)

    assert [entry.header.sampling.constrained for entry in stream.entries] == [False, True]


async def test_a_trace_tells_how_the_target_is_quantized_and_what_of_its_prompt_was_cached(
    capture: Capture, stream: FakeStream
) -> None:
    async with running(capture):
        capture.offer(replace(ended(step(1, 2)), num_cached=2), PLAN)
        await until(lambda: bool(stream.entries))

    (entry,) = stream.entries
    assert (entry.header.quantization, entry.header.cached_prefix_tokens) == ("fp8", 2)


async def test_a_pod_counts_the_tokens_that_it_could_and_that_it_did_capture(
    capture: Capture, stream: FakeStream, metrics: Metrics
) -> None:
    async with running(capture):
        capture.offer(ended(step(1, 2), rows=5), PLAN)
        capture.offer(ended(step(1, 2)), PLAN)
        capture.offer(ended(step(1, 2)), replace(PLAN, permissions=Permissions(train=False)))
        await until(lambda: len(stream.entries) == 3)

    assert capture.counters.offered_tokens == 2 * (3 + 4), "three of the prompt and four of the output"
    assert capture.counters.captured_tokens == 5
    assert metrics.captured_tokens._value.get() == 5


async def test_a_pod_captures_to_its_grant_and_goes_on_without_the_registry(capture: Capture, metrics: Metrics) -> None:
    def chances() -> set[float]:
        return {capture.plan(bytes([n]), CaptureTerms()).payload_probability for n in range(200)}

    assert chances() == {1.0}
    capture.follow(fleet_pb2.CapturePolicy(payload_tokens_per_second=0.0))
    assert chances() == {0.0}
    assert metrics.granted._value.get() == 0.0


async def test_captured_payloads_lower_the_chance_of_the_next_ones(capture: Capture) -> None:
    capture.follow(fleet_pb2.CapturePolicy(payload_tokens_per_second=0.5))
    plan = next(p for n in range(99) if not (p := capture.plan(bytes([n]), CaptureTerms())).is_evaluation)
    assert plan.payload_probability == 1.0
    capture.start(plan)
    capture.offer(ended(step(1, 2), rows=15), plan)
    await capture.flush(0)
    after = next(p for n in range(99) if not (p := capture.plan(bytes([n]), CaptureTerms())).is_evaluation)
    assert after.payload_probability == pytest.approx(0.5)


def chance(capture: Capture) -> float:
    """The probability that the next request is captured, with a bucket of 30 tokens."""
    return capture.plan(TRAINED.trace_id, CaptureTerms()).payload_probability


TRAINED = CapturePlan(trace_id=b"2", is_captured=True, params=CaptureParams(payload=True))


@pytest.fixture
def granted(capture: Capture) -> Capture:
    """Its bucket has 30 tokens, and a request has 15 on average."""
    capture.follow(fleet_pb2.CapturePolicy(payload_tokens_per_second=0.5))
    capture.offer(ended(num_output=12), PLAN)
    assert chance(capture) == 1.0
    return capture


async def test_a_request_that_the_engine_does_not_finish_costs_nothing(granted: Capture) -> None:
    granted.start(TRAINED)
    assert chance(granted) == pytest.approx(0.5)
    granted.give_back(TRAINED)
    assert chance(granted) == 1.0
    granted.give_back(TRAINED)
    assert chance(granted) == 1.0


async def test_a_plan_alone_costs_nothing(granted: Capture) -> None:
    assert [chance(granted) for _ in range(3)] == [1.0] * 3


async def test_a_server_that_chooses_itself_is_told_the_share_of_traffic_that_credits_allow(granted: Capture) -> None:
    assert granted.payload_fraction == 1.0
    granted.start(TRAINED)
    assert granted.payload_fraction == pytest.approx(0.5)


async def test_a_request_without_a_trace_is_learnt_from_and_an_opted_out_one_is_counted(granted: Capture) -> None:
    counted = CountedRequest(reason=FinishReason.STOP, num_prompt=600, num_output=5, sums=(), duration_s=1.0)

    granted.count(counted, granted.plan_of_chosen(b"0" * 16, CaptureTerms(), 0.0))
    granted.count(counted, granted.plan_of_chosen(b"1" * 16, CaptureTerms(is_opted_out=True), 0.0))

    assert granted.counters.offered_tokens >= 5
    assert granted.counters.dropped == {"opted_out": 1}
    assert granted.counters.captured == 0


async def test_a_pod_without_a_salt_has_no_problem_while_no_request_has_a_tenant(capture: Capture) -> None:
    capture.offer(ended(step(1, 2)), capture.plan(b"0" * 16, CaptureTerms()))
    assert capture.problem == ""


async def test_tenants_are_hashed_with_the_registrys_salt_and_before_it_comes_not_captured(capture: Capture) -> None:
    terms = CaptureTerms(tenant=hashes.digest("acme"))
    capture.offer(ended(step(1, 2)), capture.plan(b"0" * 16, terms))
    assert dropped(capture) == {"no_salt": 1}
    assert capture.problem.startswith("requests of tenants are not captured")

    capture.hash_with(b"salt")

    assert capture.problem == ""
    assert capture.plan(b"0" * 16, terms).tenant == hashes.keyed(hashes.digest("acme"), b"salt")
    assert capture.plan(b"0" * 16, CaptureTerms()).tenant == 0


async def test_a_trace_has_the_hash_of_its_tenant_and_never_its_name(capture: Capture, stream: FakeStream) -> None:
    capture.hash_with(b"salt")
    plan = capture.plan(b"0" * 16, CaptureTerms(tenant=hashes.digest("acme"), may_train=False))
    async with running(capture):
        capture.offer(ended(step(1, 2)), plan)
        await until(lambda: bool(stream.entries))

    (entry,) = stream.entries
    assert entry.header.tenant_hash == hashes.keyed(hashes.digest("acme"), b"salt")
    assert (entry.header.policy.train, entry.header.policy.retain) == (False, True)
    assert hashes.digest("acme").encode() not in entry.SerializeToString()
