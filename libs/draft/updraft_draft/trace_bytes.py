"""A trace as bytes, its hidden states first: they are most of it, and are read where they lie.

Protobuf merges a message that comes twice, so the states' bytes, wrapped in their fields, and the rest of the trace after them
are a trace to every reader. `parse` looks for them at the beginning, and reads any other trace too.
"""

from typing import NamedTuple

from google.protobuf.message import DecodeError

from updraft.trace.v1 import trace_pb2

Data = bytes | memoryview
"""Bytes of a trace or a tensor."""

_FIELDS = (
    trace_pb2.Trace.PAYLOAD_FIELD_NUMBER,
    trace_pb2.Payload.AUX_HIDDEN_FIELD_NUMBER,
    trace_pb2.Tensor.DATA_FIELD_NUMBER,
)
_TAGS = tuple(number << 3 | 2 for number in _FIELDS)
"""A byte each: the number of a field, and that a length follows."""

_MAX_LENGTH_BYTES = 5

MAX_FIELDS = 2**18
"""The limit of a trace and its payload: twice the steps of 128k tokens. An empty step of two bytes takes 100 in memory."""

_FIXED_BYTES = {1: 8, 5: 4}
"""Sizes of fields without a length, by their wire type."""


class ParsedTrace(NamedTuple):
    """A trace without the data of its auxiliary hidden states, and that data."""

    trace: trace_pb2.Trace
    aux: Data


def serialize(trace: trace_pb2.Trace, aux: bytes) -> bytes:
    """The bytes of a trace; `aux` is the data of its auxiliary hidden states, which `trace` must not contain; empty if there
    are none."""
    rest = trace.SerializeToString()
    if not aux:
        return rest
    before = b""
    for tag in reversed(_TAGS):
        before = bytes([tag, *_length(len(before) + len(aux))]) + before
    return b"".join([before, aux, rest])


def parse(data: Data) -> ParsedTrace:
    """Raises google.protobuf's DecodeError for what is no trace, or has more steps than one has."""
    view = memoryview(data)
    if _num_fields(view, MAX_FIELDS) >= MAX_FIELDS:
        raise DecodeError(f"it has {MAX_FIELDS} fields or more")
    first, end = _aux(view)
    trace = trace_pb2.Trace.FromString(view[end:].tobytes() if end or not isinstance(data, bytes) else data)
    if end:
        trace.payload.aux_hidden.SetInParent()
    if trace.payload.aux_hidden.data:  # of two values of a field, the last one counts
        return ParsedTrace(trace, trace.payload.aux_hidden.data)
    return ParsedTrace(trace, view[first:end])


def _aux(view: memoryview) -> tuple[int, int]:
    """Where the data begins and ends; (0, 0) if the trace begins with something else."""
    begin, ends = 0, set[int]()
    for tag in _TAGS:
        if begin >= len(view) or view[begin] != tag:
            return 0, 0
        length, begin = _read_length(view, begin + 1)
        ends.add(begin + length)
    end = ends.pop()
    return (begin, end) if not ends and end <= len(view) else (0, 0)


def _num_fields(view: memoryview, most: int, payload: int = _TAGS[0]) -> int:
    """Fields of a trace, and those of its payload, up to `most`. Whatever is no field ends the count: parsing refuses it."""
    count, begin = 0, 0
    while begin < len(view) and count < most:
        tag, begin = _read_length(view, begin)
        count += 1
        if tag & 7 == 2:
            length, begin = _read_length(view, begin)
            if tag == payload:
                count += _num_fields(view[begin : begin + length], most - count, payload=0)
            begin += length
        elif tag & 7 == 0:
            begin = _varint_end(view, begin)
        else:
            begin += _FIXED_BYTES.get(tag & 7, len(view))
    return count


def _varint_end(view: memoryview, begin: int) -> int:
    while begin < len(view) and view[begin] & 0x80:
        begin += 1
    return begin + 1


def _length(number: int) -> list[int]:
    """As a varint: seven bits per byte, the lowest first."""
    parts = [number & 0x7F]
    while number := number >> 7:
        parts[-1] |= 0x80
        parts.append(number & 0x7F)
    return parts


def _read_length(view: memoryview, begin: int) -> tuple[int, int]:
    """A varint at `begin`, and where it ends."""
    length = 0
    for n, part in enumerate(view[begin : begin + _MAX_LENGTH_BYTES]):
        length |= (part & 0x7F) << 7 * n
        if part < 0x80:
            return length, begin + n + 1
    return len(view), begin  # none: whatever it is, it is not here
