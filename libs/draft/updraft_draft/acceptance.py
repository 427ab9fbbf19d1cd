"""Speculative sampling: accepts or rejects draft tokens so that the output has the target's distribution.

Leviathan et al. 2023 (arXiv 2211.17192, theorem 1): accept draft d with probability min(1, p(d) / q(d)); at the first
rejection draw from max(p - q, 0), normalised; after k accepted draft tokens draw one more token from p. A proposer without a
distribution (n-gram lookup, greedy drafting) is a point mass: q(d) = 1. Randomness is an argument.

Tensors: k drafts, T = k + 1 verified rows, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """For one sequence: the number of accepted draft tokens, and the target's token after them."""

    count: int
    bonus_id: int


def filtered_probs(
    logits_TV: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The distribution to sample from, float32 [T, V]: temperature, then min-p, then top-k, then top-p, as in vLLM.

    `min_p` keeps tokens with at least that fraction of the highest probability. `top_p` keeps the smallest set of most likely
    tokens whose total probability reaches it, and at least one token.
    """
    if temperature <= 0:
        raise ValueError("temperature must be positive: 0 means greedy and needs no distribution")
    logits = logits_TV.float() if temperature == 1.0 else logits_TV.float() / temperature
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), float("-inf"))
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ordered, order = probs.sort(-1, descending=True)
        before = (ordered.cumsum(-1) - ordered)[..., 1:]
        ordered[..., 1:].masked_fill_(before >= top_p, 0.0)  # keeps the first one even if top_p is 0 in float32
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


class TargetProbs(Protocol):
    """The target's distribution per row, float32 [V]: a tensor [T, V], or an object that computes rows on demand."""

    def __getitem__(self, row: int, /) -> Tensor: ...


def accept_sampled(
    p_TV: TargetProbs, draft_ids: list[int], q_kV: Tensor | None, generator: torch.Generator
) -> Acceptance:
    """Accept or reject the drafts of one sequence, drawn from `q_kV` (None: point masses), by speculative sampling.

    It reads each row of `p_TV` at most once, and none after the first rejection.
    """
    k = len(draft_ids)
    uniforms = torch.rand(k, generator=generator).tolist()
    for i, (draft, u) in enumerate(zip(draft_ids, uniforms, strict=True)):
        p_V, q_V = p_TV[i], None if q_kV is None else q_kV[i]
        q = 1.0 if q_V is None else float(q_V[draft])
        if u * q >= float(p_V[draft]):
            return Acceptance(count=i, bonus_id=draw(_residual(p_V, draft, q_V), generator))
    return Acceptance(count=k, bonus_id=draw(p_TV[k], generator))


def _residual(p_V: Tensor, draft: int, q_V: Tensor | None) -> Tensor:
    """max(p - q, 0), normalised: the distribution of the token that replaces a rejected draft token."""
    if q_V is None:
        residual = p_V.clone()
        residual[draft] = 0.0
    else:
        residual = (p_V - q_V).clamp_(min=0.0)
    total = float(residual.sum())
    # p <= q everywhere means p = q up to rounding, so any draw from p is correct.
    return residual / total if total > 0 else p_V


def draw(p_V: Tensor, generator: torch.Generator) -> int:
    """A token drawn from p (float32, on the CPU). RuntimeError if the sum of p is zero or not finite.

    It draws one random number, where torch.multinomial would draw one per token.
    """
    return token_at(p_V, float(torch.rand((), generator=generator, dtype=torch.float64)))


def token_at(p_V: Tensor, share: float) -> int:
    """The token at `share`, 0 to 1, of the cumulative distribution."""
    cumulated = p_V.cumsum(-1, dtype=torch.float64)
    total = cumulated[-1]
    if not bool(total > 0) or not bool(total.isfinite()):
        raise RuntimeError("the probabilities do not form a distribution")
    # The first token beyond the share, but at most the last one with a positive probability.
    beyond = torch.searchsorted(cumulated, share * total, right=True)
    return int(torch.minimum(beyond, torch.searchsorted(cumulated, total)))
