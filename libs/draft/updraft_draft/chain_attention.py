"""Attention of training-time test: each row attends to its text and to its own draft steps.

The text's part runs in torch's flash kernels, range by range, which return the log-sum-exp of the scores. The few terms of the
row's own steps are then merged in closed form. Nothing of the size rows x rows exists, in forward or backward.

The backward pass needs no other kernel. With the merged output O and the merged log-sum-exp L, the weight of key s is
exp(score_s - L) and the gradient of its score is that weight times (dO . v_s - dO . O), whichever part s belongs to. A flash
kernel computes just this from the O and L that it is given, so it is given the merged ones (as in ring attention, Liu et al.
2023, arXiv 2310.01889).

Tensors: U rows that attend, N rows of the texts, H heads, K key-value heads, G = H / K, E head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from updraft_draft.layout import Span, slices

_ATEN: Any = torch.ops.aten

_SHORT = 256
"""Rows of a span up to which torch's kernel on a CPU runs in float32, in which it is faster for few rows and slower for many:
`make bench-trainer ARGS=--only=costs`."""

_MAX_HEAD = 256

_BLOCK = 512
"""Rows of scores at a time where there is no kernel: 64 MB for 32,768 keys in float32, per head."""


def chain_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...], own: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """q [U, H, E] of the unrolled rows over k and v [N, K, E] of all rows -> [U, H * E]. `own`: k and v [U, K, E] of each of
    the rows' draft steps so far. Computes in the dtype of `v`."""
    flat = [one.to(v.dtype) for pair in own for one in pair]
    with torch.autocast(v.device.type, enabled=False):
        out: Tensor = _ChainAttention.apply(spans, q.to(v.dtype), k.to(v.dtype), v, *flat)  # type: ignore[no-untyped-call]
    return out.flatten(1)


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spans: tuple[Span, ...], q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        out, lse = torch.empty(q.shape, device=q.device), torch.empty(q.shape[:2], device=q.device)
        for span, rows in _parts(spans):
            out[rows], lse[rows] = _text_part(q[rows], k, v, span)
        out, lse = _with_own(out, lse, q, own)
        out = out.to(q.dtype)
        ctx.spans = spans
        ctx.save_for_backward(q, k, v, out, lse, *own)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, out, lse, *own = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(one.shape, device=q.device) for one in (q, k, v))
        for span, rows in _parts(ctx.spans):
            for keys, is_causal in _ranges(span):
                parts = _flash_backward(
                    grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], is_causal=is_causal
                )
                dq[rows] += parts[0]
                dk[keys] += parts[1]
                dv[keys] += parts[2]
        dq_own, d_own = _own_backward(grad, q, out, lse, own)
        return None, dq.add_(dq_own).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *d_own


def _parts(spans: tuple[Span, ...]) -> list[tuple[Span, slice]]:
    """Spans and where their unrolled rows are, without empty ones: torch's kernel on a CPU divides by the number of rows."""
    return [(span, rows) for span, rows in zip(spans, slices(spans), strict=True) if len(span)]


def _ranges(span: Span) -> list[tuple[slice, bool]]:
    """The rows that a span attends to, and whether each of its rows sees them only up to itself."""
    own = (slice(span.first, span.end), True)
    return [own] if span.context == span.context_end else [(slice(span.context, span.context_end), False), own]


def _text_part(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """Output [rows, H, E] and log-sum-exp [rows, H], both float32."""
    parts = [_flash(q, k[keys], v[keys], is_causal=is_causal) for keys, is_causal in _ranges(span)]
    lse = torch.stack([part[1] for part in parts]).logsumexp(0)
    out = [part.float() * (one - lse).exp().unsqueeze(-1) for part, one in parts]
    return (out[0] + out[1] if len(out) > 1 else parts[0][0].float()), lse


def _products(x: Tensor, one: Tensor) -> Tensor:
    """x [U, H, E] times the one key or value [U, K, E] that each row has, summed over E: float32 [U, H]."""
    products: Tensor = torch.linalg.vecdot(_grouped(x, one), one.float().unsqueeze(2))
    return products.flatten(1)


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """[U, H, E] -> float32 [U, K, G, E]."""
    return x.float().reshape(len(x), key.shape[1], x.shape[1] // key.shape[1], x.shape[-1])


def _factors(x_UH: Tensor, key: Tensor) -> Tensor:
    """One factor per head: [U, H] -> [U, K, G, 1]."""
    return x_UH.reshape(len(x_UH), key.shape[1], x_UH.shape[1] // key.shape[1], 1)


def _with_own(out: Tensor, lse: Tensor, q: Tensor, own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same with the rows' own steps, k and v in turn. Overwrites `out`."""
    if not own:
        return out, lse
    q, scale = q.float(), q.shape[-1] ** -0.5
    scores = [_products(q, key) * scale for key in own[::2]]
    merged = torch.stack([lse, *scores]).logsumexp(0)
    out *= (lse - merged).exp().unsqueeze(-1)
    for score, value in zip(scores, own[1::2], strict=True):
        _grouped(out, value).addcmul_(_factors((score - merged).exp(), value), value.float().unsqueeze(2))
    return out, merged


def _own_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, own: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of q through the rows' own steps, float32 [U, H, E], and those of their k and v in turn."""
    dq, gradients = torch.zeros(q.shape, device=q.device), list[Tensor]()
    if not own:
        return dq, gradients
    grad, q, scale = grad.float(), q.float(), q.shape[-1] ** -0.5
    delta = torch.linalg.vecdot(grad, out.float())
    grad_g, q_g, dq_g = (_grouped(one, own[0]) for one in (grad, q, dq))
    for key, value in zip(own[::2], own[1::2], strict=True):
        weights = (_products(q, key) * scale - lse).exp()
        d_scores = _factors(weights * (_products(grad, value) - delta) * scale, key)
        dq_g.addcmul_(d_scores, key.float().unsqueeze(2))
        dv = (_factors(weights, key) * grad_g).sum(2)
        gradients += [(d_scores * q_g).sum(2).to(key.dtype), dv.to(value.dtype)]
    return dq, gradients


def _flash(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """q [T, H, E] over k and v [S, K, E]: output [T, H, E], log-sum-exp float32 [T, H]."""
    heads = q.shape[1]
    if not _has_kernel(q):
        return _plain(q, _repeated(k, heads), _repeated(v, heads), is_causal=is_causal)
    arguments = [_batched(one) for one in _of_kernel(q, _repeated(k, heads), _repeated(v, heads))]
    if q.is_cuda:
        out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(*arguments, 0.0, is_causal)  # noqa: SLF001
    else:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(*arguments, 0.0, is_causal)  # noqa: SLF001
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _flash_backward(  # noqa: PLR0913 - the kernel's arguments
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, H, E], k and v [S, K, E]; `out` and `lse` may include other keys."""
    K, heads = k.shape[1], q.shape[1]
    k, v = _repeated(k, heads), _repeated(v, heads)
    if not _has_kernel(q):
        dq, dk, dv = _plain_backward(grad, q, k, v, out, lse, is_causal=is_causal)
    else:
        tensors = [_batched(one) for one in _of_kernel(grad, q, k, v, out)]
        dq, dk, dv = (one[0].transpose(0, 1) for one in _kernel_backward(tensors, lse, is_causal=is_causal))
    dk, dv = (one.reshape(len(one), K, heads // K, one.shape[-1]).sum(2) for one in (dk, dv))
    return dq, dk, dv


def _kernel_backward(tensors: Sequence[Tensor], lse: Tensor, *, is_causal: bool) -> Sequence[Tensor]:
    lse_HT = lse.transpose(0, 1)[None]
    if not lse.is_cuda:
        of_cpu: Sequence[Tensor] = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(  # noqa: SLF001
            *tensors, lse_HT, 0.0, is_causal
        )
        return of_cpu
    q, k = tensors[1], tensors[2]
    unused = torch.empty(0, dtype=torch.uint64, device=lse.device)  # the state of a dropout that is off
    of_cuda: Sequence[Tensor] = _ATEN._scaled_dot_product_flash_attention_backward(  # noqa: SLF001
        *tensors, lse_HT.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, is_causal, unused, unused
    )
    return of_cuda


def _has_kernel(q: Tensor) -> bool:
    """CUDA's takes heads of 8 to 256 values in steps of 8, in half precision."""
    if q.is_cuda:
        return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= _MAX_HEAD and q.shape[-1] % 8 == 0
    return q.device.type == "cpu"


def _of_kernel(rows: Tensor, *others: Tensor) -> list[Tensor]:
    """The tensors in the dtype in which the kernel is fastest for so many rows."""
    is_short = rows.device.type == "cpu" and len(rows) <= _SHORT
    return [one.float() if is_short else one for one in (rows, *others)]


def _batched(x_THE: Tensor) -> Tensor:
    return x_THE.transpose(0, 1)[None]


def _repeated(x_SKE: Tensor, heads: int) -> Tensor:
    """Each key-value head for all heads of its group: [S, H, E]. Not every kernel knows groups."""
    return x_SKE if x_SKE.shape[1] == heads else x_SKE.repeat_interleave(heads // x_SKE.shape[1], 1)


def _plain(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """`_flash` without a kernel, `_BLOCK` rows at a time; K = H."""
    outs, lses = [], []
    for rows in _blocks(len(q)):
        scores, seen = _block_scores(q, k, rows, is_causal=is_causal)
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hts,she->the", scores.softmax(-1), v[:seen].float()))
    return torch.cat(outs), torch.cat(lses, 1).transpose(0, 1)


def _plain_backward(  # noqa: PLR0913 - as `_flash_backward`
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(one.shape, device=one.device) for one in (q, k, v))
    delta, scale = (grad.float() * out.float()).sum(-1), q.shape[-1] ** -0.5
    for rows in _blocks(len(q)):
        scores, seen = _block_scores(q, k, rows, is_causal=is_causal)
        weights = (scores - lse[rows].T.unsqueeze(-1)).exp()
        d_weights = torch.einsum("the,she->hts", grad[rows].float(), v[:seen].float())
        d_scores = weights * (d_weights - delta[rows].T.unsqueeze(-1)) * scale
        dq[rows] = torch.einsum("hts,she->the", d_scores, k[:seen].float())
        dk[:seen] += torch.einsum("hts,the->she", d_scores, q[rows].float())
        dv[:seen] += torch.einsum("hts,the->she", weights, grad[rows].float())
    return dq, dk, dv


def _blocks(count: int) -> list[slice]:
    return [slice(first, min(first + _BLOCK, count)) for first in range(0, count, _BLOCK)]


def _block_scores(q: Tensor, k: Tensor, rows: slice, *, is_causal: bool) -> tuple[Tensor, int]:
    """Scores float32 [H, rows, seen] of the keys that any of the rows sees, and their number."""
    seen = rows.stop if is_causal else len(k)
    scores = torch.einsum("the,she->hts", q[rows].float(), k[:seen].float()) * q.shape[-1] ** -0.5
    if is_causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1 + rows.start)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores, seen
