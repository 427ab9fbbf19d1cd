"""Trace tensors survive the wire as exactly as their encoding promises."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput
from updraft_draft.tensors import EncodedRows, decode, decoded, encode, is_finite, packed


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_bf16_is_exact(rows: int, columns: int, seed: int) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert torch.equal(decode(encode(values, trace_pb2.TENSOR_ENCODING_BF16)), values)


def test_fp32_is_exact() -> None:
    values = torch.randn(3, 4)
    assert torch.equal(decode(encode(values, trace_pb2.TENSOR_ENCODING_FP32)), values)


@settings(max_examples=40, deadline=None)
@given(scale=st.floats(1e-3, 1e4), seed=st.integers(0, 99))
def test_fp8_is_within_a_sixteenth_of_the_largest_values_whatever_their_scale(scale: float, seed: int) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * scale
    error = (decode(encode(values, trace_pb2.TENSOR_ENCODING_FP8_E4M3)).float() - values).abs()
    assert bool((error <= values.abs() / 15 + values.abs().amax(-1, keepdim=True) / 400).all())


def test_fp8_rows_do_not_depend_on_the_rows_around_them() -> None:
    values = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(100)[:, None]
    together = encode(values, trace_pb2.TENSOR_ENCODING_FP8_E4M3)
    alone = [encode(row[None], trace_pb2.TENSOR_ENCODING_FP8_E4M3) for row in values]
    assert together.data == b"".join(row.data for row in alone)
    assert together.row_scales == b"".join(row.row_scales for row in alone)


@pytest.mark.parametrize("num_rows", [0, 1, 100])
@pytest.mark.parametrize("encoding", [trace_pb2.TENSOR_ENCODING_FP8_E4M3, trace_pb2.TENSOR_ENCODING_BF16])
def test_packed_rows_take_half_the_memory_and_are_sent_as_float8(
    num_rows: int, encoding: trace_pb2.TensorEncoding.ValueType
) -> None:
    rows = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    in_memory = packed(rows)
    assert in_memory.nbytes == rows.nbytes / 2 + 4 * num_rows
    for part in (slice(None), slice(1, 40)):
        assert encode(in_memory[part], encoding) == encode(rows[part], trace_pb2.TENSOR_ENCODING_FP8_E4M3)


@pytest.mark.parametrize("scale", [1e-30, 0.37, 1e30])
@pytest.mark.parametrize("has_nan", [False, True])
def test_each_float8_decodes_to_its_value_times_the_scale(*, scale: float, has_nan: bool) -> None:
    values = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    if not has_nan:
        values[(values & 0x7F) == 0x7F] = 1
    scales = torch.full((40, 1), scale)
    message = trace_pb2.Tensor(encoding=trace_pb2.TENSOR_ENCODING_FP8_E4M3, rows=40, columns=256)
    message.data, message.row_scales = values.numpy().tobytes(), scales.numpy().tobytes()
    expected = (values.view(torch.float8_e4m3fn).float() * scales).bfloat16()
    assert torch.equal(decode(message).nan_to_num(7), expected.nan_to_num(7))
    assert is_finite(decode(message)) is not has_nan


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_value_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    values = torch.ones(3, 1000, dtype=dtype)
    assert is_finite(values)
    assert is_finite(values[:0])
    values[1, 517] = value
    assert not is_finite(values)


def test_a_tensor_of_the_wrong_size_is_refused() -> None:
    message = encode(torch.zeros(2, 3), trace_pb2.TENSOR_ENCODING_BF16)
    message.rows = 1_000_000
    with pytest.raises(InvalidInput, match="bytes"):
        decode(message)


ENCODINGS = [
    trace_pb2.TENSOR_ENCODING_BF16,
    trace_pb2.TENSOR_ENCODING_FP32,
    trace_pb2.TENSOR_ENCODING_FP8_E4M3,
]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_that_stay_encoded_are_the_same_rows_in_any_parts(encoding: trace_pb2.TensorEncoding.ValueType) -> None:
    message = encode(torch.randn(70, 7), encoding)
    whole, rows = decode(message), EncodedRows.read(message)
    assert (len(rows), rows.num_columns, rows.dtype) == (70, 7, whole.dtype)
    assert torch.equal(decoded([rows[:3], rows[3:3], rows[3:]]), whole)
    assert torch.equal(rows[2:60][5:].decoded(), whole[7:60])
    assert torch.equal(EncodedRows.of(whole).decoded(), whole)
    assert len(pickle.dumps(rows)) < rows.num_bytes + 1_000, "ranks send them as they are"


def test_rows_of_several_encodings_are_decoded_to_what_holds_them_all() -> None:
    values = torch.randn(4, 3)
    parts = [EncodedRows.read(encode(values, encoding)) for encoding in ENCODINGS]
    together = decoded(parts)
    assert together.dtype == torch.float32
    assert torch.equal(together[4:8], values)
    assert torch.equal(together[:4], values.bfloat16().float())


@given(
    encoding=st.sampled_from(ENCODINGS),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    at=st.integers(0, 4),
    rows=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_encoded_rows_are_finite_where_decoded_ones_are(
    encoding: trace_pb2.TensorEncoding.ValueType, bad: float, at: int, rows: tuple[int, int]
) -> None:
    values = torch.randn(5, 7)
    values[at, 3] = bad
    message = encode(values, encoding)
    assert EncodedRows.read(message)[slice(*rows)].is_finite() == is_finite(decode(message)[slice(*rows)])


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(InvalidInput, match="unknown"):
        decode(trace_pb2.Tensor(rows=1, columns=1, data=b"ab"))
