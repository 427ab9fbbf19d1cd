"""A trace whose rows come first is the same trace, to a reader that knows of it and to one that does not."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from updraft.trace.v1 import trace_pb2
from updraft_draft import trace_bytes

AUX = bytes(range(256))


def light(num_ids: int = 3) -> trace_pb2.Trace:
    """With everything but the data of its rows."""
    trace = trace_pb2.Trace(header=trace_pb2.Header(schema=1), output_ids=range(num_ids))
    trace.payload.aux_hidden.CopyFrom(trace_pb2.Tensor(rows=1, columns=len(AUX), row_scales=b"1234"))
    trace.payload.top_k.k = 7
    return trace


def whole(trace: trace_pb2.Trace, aux: bytes) -> trace_pb2.Trace:
    copy = trace_pb2.Trace.FromString(trace.SerializeToString())
    copy.payload.aux_hidden.data = aux
    return copy


@given(size=st.integers(1, 400) | st.sampled_from([2**7, 2**14 - 9, 2**14, 2**21, 2**21 + 1]))
def test_rows_of_any_size_are_read_where_they_lie_and_by_any_reader(size: int) -> None:
    aux, trace = bytes(size), light()
    data = trace_bytes.serialize(trace, aux)
    parsed = trace_bytes.parse(data)
    assert isinstance(parsed.aux, memoryview)
    assert parsed.aux == aux
    assert parsed.trace == trace
    assert trace_pb2.Trace.FromString(data) == whole(trace, aux)


def test_a_trace_in_the_usual_order_is_read_too() -> None:
    parsed = trace_bytes.parse(whole(light(), AUX).SerializeToString())
    assert parsed.aux == AUX
    assert parsed.trace == whole(light(), AUX)


def test_a_trace_without_rows_has_none() -> None:
    trace = trace_pb2.Trace(header=trace_pb2.Header(schema=1))
    parsed = trace_bytes.parse(trace_bytes.serialize(trace, b""))
    assert parsed.trace == trace
    assert not parsed.trace.HasField("payload")
    assert not parsed.aux


def test_rows_alone_are_a_payload() -> None:
    parsed = trace_bytes.parse(trace_bytes.serialize(trace_pb2.Trace(), AUX))
    assert parsed.trace.HasField("payload")
    assert parsed.aux == AUX


def test_of_rows_that_come_twice_the_last_ones_count_as_in_any_reader() -> None:
    data = (
        trace_bytes.serialize(light(), AUX)
        + trace_pb2.Trace(payload=trace_pb2.Payload(aux_hidden=trace_pb2.Tensor(data=b"last"))).SerializeToString()
    )
    assert trace_bytes.parse(data).aux == b"last" == trace_pb2.Trace.FromString(data).payload.aux_hidden.data


@given(data=st.binary(max_size=64) | st.binary(max_size=64).map(lambda rest: b"\x2a\x0a\x12\x08\x22\x06" + rest))
def test_whatever_the_bytes_both_readers_agree(data: bytes) -> None:
    try:
        expected = trace_pb2.Trace.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            trace_bytes.parse(data)
        return
    parsed = trace_bytes.parse(data)
    assert bytes(parsed.aux) == expected.payload.aux_hidden.data
    assert parsed.trace.HasField("payload") == expected.HasField("payload")


@pytest.mark.parametrize("end", [0, 1, 3, 5, 9, 200])
def test_a_truncated_trace_is_none_or_has_no_rows(end: int) -> None:
    data = trace_bytes.serialize(light(), AUX)[:end]
    if not data:
        assert not trace_bytes.parse(data).aux
        return
    with pytest.raises(DecodeError):
        trace_bytes.parse(data)


COUNTERFACTUALS = trace_pb2.Payload.COUNTERFACTUALS_FIELD_NUMBER << 3 | 2
STEPS = trace_pb2.Trace.STEPS_FIELD_NUMBER << 3 | 2
PAYLOAD = trace_pb2.Trace.PAYLOAD_FIELD_NUMBER << 3 | 2


def empty_messages(tag: int, num: int) -> bytes:
    return bytes([tag, 0]) * num


@pytest.mark.attack(
    boundary="traces",
    attack="a protobuf bomb: a trace of millions of empty steps or rejected rows",
    outcome="refused before it is parsed",
)
@pytest.mark.parametrize("where", ["steps", "payload"])
def test_a_trace_of_more_steps_than_one_has_is_refused_unparsed(where: str) -> None:
    num = trace_bytes.MAX_FIELDS
    inner = empty_messages(COUNTERFACTUALS, num)
    wrapped = bytes([PAYLOAD, *trace_bytes._length(len(inner))]) + inner
    with pytest.raises(DecodeError, match="262144 fields or more"):
        trace_bytes.parse(empty_messages(STEPS, num) if where == "steps" else wrapped)


def test_the_longest_traces_are_read() -> None:
    trace = trace_pb2.Trace(output_ids=range(2**17), steps=[trace_pb2.Step(start=n, accepted=1) for n in range(2**17)])
    assert len(trace_bytes.parse(trace.SerializeToString()).trace.steps) == 2**17


@given(st.binary(max_size=60), st.integers(1, 2**20))
def test_payloads_within_payloads_and_any_bytes_are_counted_to_an_end(data: bytes, depth: int) -> None:
    for hostile in (data, bytes([PAYLOAD, 0x7F]) * (depth % 5000) + data):
        try:
            trace_bytes.parse(hostile)
        except DecodeError:
            continue
