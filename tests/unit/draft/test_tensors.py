"""Trace tensors survive the wire as exactly as their encoding promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput
from updraft_draft.tensors import decode, encode


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


def test_a_tensor_of_the_wrong_size_is_refused() -> None:
    message = encode(torch.zeros(2, 3), trace_pb2.TENSOR_ENCODING_BF16)
    message.rows = 1_000_000
    with pytest.raises(InvalidInput, match="bytes"):
        decode(message)


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(InvalidInput, match="unknown"):
        decode(trace_pb2.Tensor(rows=1, columns=1, data=b"ab"))
