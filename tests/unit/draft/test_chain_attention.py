"""The calls of CUDA's kernels have the right shapes. That attention is right, test_exactness of the trainer shows, on a CPU."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from updraft_draft import chain_attention
from updraft_draft.layout import Span

ROWS, HEADS, KV_HEADS, SIZE = 40, 8, 2, 64


def test_a_gpu_takes_its_own_kernel_and_needs_no_value_from_it() -> None:
    with FakeTensorMode():  # shapes without values: there need not be a GPU
        q, k = (torch.empty(ROWS, n, SIZE, device="cuda", dtype=torch.bfloat16) for n in (HEADS, KV_HEADS))
        spans = (Span(4, 24, 0, 4), Span(24, 40, 0, 10))
        own = [(k[:36], k[:36])] * 2
        out = chain_attention.chain_attention(q[:36], k, k, spans, own)
        assert (out.shape, out.dtype, out.device.type) == ((36, HEADS * SIZE), torch.bfloat16, "cuda")
        lse = torch.empty(20, HEADS, device="cuda")
        gradients = chain_attention._flash_backward(q[:20], q[:20], k[:30], k[:30], q[:20], lse, is_causal=False)
        assert [one.shape for one in gradients] == [(20, HEADS, SIZE), (30, KV_HEADS, SIZE), (30, KV_HEADS, SIZE)]


def test_a_gpu_in_float32_has_no_kernel() -> None:
    with FakeTensorMode():
        q = torch.empty(ROWS, HEADS, SIZE, device="cuda")
        assert not chain_attention._has_kernel(q)
        assert chain_attention.chain_attention(q, q, q, (Span(0, ROWS),)).shape == (ROWS, HEADS * SIZE)
