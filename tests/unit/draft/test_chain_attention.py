"""Attention over ranges is that of each row over its own keys, and the calls of CUDA's kernels have the right shapes.

That gradients of a whole draft are exact, test_exactness of the trainer shows.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from updraft_draft import chain_attention
from updraft_draft.layout import Span, slices

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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_rows_attend_to_their_ranges_and_their_own_steps(dtype: torch.dtype, tolerance: float) -> None:
    """In ranges of one row, of none, and of more than the kernel takes in float32; gradients too."""
    spans = (
        Span(10, 310, 0, 10),
        Span(311, 311, 310, 311),
        Span(320, 321, 310, 320),
        Span(321, 323),
        Span(323, 330, 0, 5),
    )
    generator = torch.Generator().manual_seed(0)
    rows = sum(map(len, spans))

    def leaf(count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, SIZE, generator=generator).to(dtype).requires_grad_()

    leaves = [3 * leaf(rows, HEADS).detach(), *(leaf(n, KV_HEADS) for n in (330, 330, rows, rows, rows, rows))]
    leaves[0].requires_grad_()
    exact = [one.detach().double().requires_grad_() for one in leaves]
    q, k, v, *own = leaves
    out = chain_attention.chain_attention(q, k, v, spans, [(own[0], own[1]), (own[2], own[3])])
    expected = torch.cat([_dense(exact, span, rows) for span, rows in zip(spans, slices(spans), strict=True)])
    upstream = torch.randn(out.shape, generator=generator).to(dtype)
    gradients = torch.autograd.grad(out, leaves, upstream)
    exact_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((out, *gradients), (expected, *exact_gradients), strict=True):
        assert ((one - other).norm() / other.norm()).item() < tolerance


def test_a_span_without_rows_has_no_result() -> None:
    q, k = torch.zeros(0, HEADS, SIZE), torch.zeros(5, KV_HEADS, SIZE)
    assert chain_attention.chain_attention(q, k, k, (Span(5, 5, 0, 5),), [(k[:0], k[:0])]).shape == (0, HEADS * SIZE)


def _dense(tensors: list[Tensor], span: Span, rows: slice) -> Tensor:
    """The formula for one span: scores of all its rows at once."""
    q, k, v, *own = [one.repeat_interleave(HEADS // one.shape[1], 1) for one in tensors]
    keys = [*range(span.context, span.context_end), *range(span.first, span.end)]
    hidden = torch.ones(len(span), len(keys), dtype=torch.bool).triu(len(keys) - len(span) + 1)
    scores = torch.einsum("the,she->hts", q[rows], k[keys]).masked_fill(hidden, float("-inf"))
    of_own = [torch.einsum("the,the->ht", q[rows], key[rows]).unsqueeze(-1) for key in own[::2]]
    weights = (torch.cat([scores, *of_own], -1) * SIZE**-0.5).softmax(-1)
    out = torch.einsum("hts,she->the", weights[..., : len(keys)], v[keys])
    for n, value in enumerate(own[1::2]):
        out = out + weights[..., len(keys) + n].T.unsqueeze(-1) * value[rows]
    return out.flatten(1)
