"""What the agent says of a server that is away."""

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.tap_plugin import AUX, finished, hello, prefill, step
from tests.support.wait import LONG_S, until

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput
from updraft_draft import tensors
from updraft_inference import pod
from updraft_inference.agent.capture import Capture, Sink
from updraft_inference.agent.chunks import MAX_CHUNK_BYTES
from updraft_inference.agent.selection import CaptureRates
from updraft_inference.agent.trace import Origin
from updraft_inference.metrics import Metrics
from updraft_inference.settings import InferenceSettings
from updraft_inference.sidecar import composition
from updraft_inference.sidecar.assembly import PATIENCE_S, Assembler
from updraft_inference.sidecar.attached import Known
from updraft_inference.sidecar.hello import Hello
from updraft_inference.tap.server_kind import VLLM
from updraft_trainer.data.sample import ExpectedTarget, read_sample

EXPECTED = ExpectedTarget(
    target_fingerprint="sha256:t", tokenizer_fingerprint="sha256:k", aux_size=AUX, hidden_size=AUX // 3, vocab_size=100
)


@pytest.mark.parametrize(("has_been_there", "level"), [(False, logging.WARNING), (True, logging.ERROR)])
async def test_a_server_that_is_away_is_an_error_only_if_it_has_been_there(
    short_tmp_path: Path, caplog: pytest.LogCaptureFixture, level: int, *, has_been_there: bool
) -> None:
    agent, clock = beside_a_server(short_tmp_path)
    if has_been_there:
        agent.server.hear(Hello.of(hello("worker"), VLLM))
    clock.advance(25)

    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(agent.watch())
        await until(lambda: bool(caplog.records), what="the news of it")
        watching.cancel()

    (record,) = caplog.records
    assert (record.getMessage(), record.levelno) == ("The draft does not learn from the server", level)


async def test_an_agent_waits_for_the_registrys_authorities_and_does_not_exit(
    short_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a container of a pod that serves."""
    authorities = short_tmp_path / "ca.crt"
    more = {"registry_address": "registry.team.svc:50051", "registry_ca_file": authorities}
    agent, _ = beside_a_server(short_tmp_path, **more)
    agent.server.hear(Hello.of(hello("worker"), VLLM))

    ended = pytest.RaisesExc(InvalidInput, match="holds no certificates")
    with pytest.RaisesGroup(ended, flatten_subgroups=True):
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(agent.run())
            await until(lambda: "Waiting for the registry's CAs" in caplog.messages, what="the news of it")
            assert not running.done()
            await asyncio.to_thread(authorities.write_text, "no certificate")


async def test_the_plugin_of_a_server_that_still_starts_is_not_missed(
    short_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent, clock = beside_a_server(short_tmp_path)
    clock.advance(25)
    num_looks = 0

    def is_starting() -> bool:
        nonlocal num_looks
        assert not caplog.records
        num_looks += 1
        return num_looks < 3

    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(agent.watch(is_starting))
        await until(lambda: bool(caplog.records), what="the news of it")
        watching.cancel()

    assert num_looks == 3


@pytest.mark.parametrize(("fraction", "num_traces"), [(0.0, 0), (1.0, 1)])
async def test_a_request_that_may_not_be_trained_on_leaves_no_text_unless_it_is_held_out(
    short_tmp_path: Path, fraction: float, num_traces: int
) -> None:
    agent, clock = beside_a_server(short_tmp_path)
    stream = Stream()
    agent._capture = capture = capturing(stream, clock, evaluation_fraction=fraction)
    assembler = Assembler(max_bytes=1 << 20)
    told = [*assembler.take(*finished("a", 4, 3, train=False), 0.0), *assembler.due(PATIENCE_S)]
    assert len(told) == 1
    for ended in told:
        agent._take(ended)
    await sent_all(capture)

    assert len(stream.entries) == num_traces, capture.counters


@pytest.mark.parametrize(
    ("encoding", "waiting", "sent"),
    [
        ("fp8", torch.uint8, trace_pb2.TENSOR_ENCODING_FP8_E4M3),
        ("bf16", torch.float32, trace_pb2.TENSOR_ENCODING_BF16),
    ],
)
async def test_rows_wait_in_float8_if_they_are_sent_in_it_and_reach_the_trainer_in_chunks(
    short_tmp_path: Path, encoding: str, waiting: torch.dtype, sent: trace_pb2.TensorEncoding.ValueType
) -> None:
    agent, clock = beside_a_server(short_tmp_path, capture_encoding=encoding)
    stream = Stream()
    agent._capture = capture = capturing(stream, clock, encoding=sent, max_chunk_bytes=4_000)
    steps = [step("a", position, 2) for position in range(4, 94, 3)]
    for header, rows in (prefill("a", 4), *steps, finished("a", 4, 91)):
        for ended in agent.link._assembler.take(header, rows, 0.0):
            assert ended.finished is not None
            assert ended.finished.hidden is not None
            assert ended.finished.hidden.aux[:1].dtype == waiting
            agent._take(ended)
    await sent_all(capture)

    samples = [read_sample(entry, EXPECTED) for entry in stream.entries]
    assert len(samples) > 2
    assert {trace_pb2.Trace.FromString(entry).payload.aux_hidden.encoding for entry in stream.entries} == {sent}
    assert sum(sample.num_taught for sample in samples) == 91
    for sample in samples:  # each row says its position, which is its token
        assert sample.aux.decoded().long().equal(sample.ids[:-1, None].expand(-1, AUX))


class Stream:
    """Keeps what it is given."""

    max_entry_bytes = 1 << 20

    def __init__(self) -> None:
        self.entries: list[bytes] = []

    async def append(self, trace_id: bytes, entry: bytes) -> int:
        del trace_id
        self.entries.append(entry)
        return 0


def capturing(
    stream: Stream,
    clock: ManualClock,
    *,
    evaluation_fraction: float = 0.0,
    encoding: trace_pb2.TensorEncoding.ValueType = trace_pb2.TENSOR_ENCODING_FP32,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> Capture:
    origin = Origin(
        speculator="s", pod="p", engine="vllm", target_fingerprint="sha256:t", tokenizer_fingerprint="sha256:k"
    )
    encode = partial(tensors.encode, encoding=encoding)
    return Capture(
        CaptureRates(evaluation_fraction=evaluation_fraction),
        Sink(stream=stream, origin=origin, encode=encode, max_chunk_bytes=max_chunk_bytes),
        max_entries=9,
        max_bytes=1 << 20,
        metrics=Metrics(CollectorRegistry()),
        clock=clock,
    )


async def sent_all(capture: Capture) -> None:
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(capture.run())
        await capture.flush(LONG_S)
        sending.cancel()


def beside_a_server(folder: Path, **more: Any) -> tuple[composition._Agent, ManualClock]:
    """An agent beside a server that has not connected, and its clock."""
    clock = ManualClock()
    settings = InferenceSettings(model=folder, engine="vllm", data_dir=folder, **more)
    tools = pod.Tools(settings=settings, metrics=Metrics(CollectorRegistry()), clock=clock)
    return composition._Agent(tools, Known(fingerprints=("sha256:t", "sha256:k"))), clock
