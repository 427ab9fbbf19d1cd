"""The target's own distribution at temperature 1, as far as it is sent: its k likeliest tokens and the log-sum-exp.

Always computed before the engine samples, because sampling changes the logits in place (temperature, penalties, grammar,
soft-max). Nothing here waits for a device.

Tensors: N rows, V vocabulary, K tokens, B requests of a batch, P chosen ones.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 256
"""Rows that are judged at a time, which bounds the memory besides the logits."""


class Teacher(NamedTuple):
    """ids int32 [N, K], log_probs float32 [N, K], log_sum_exp float32 [N]."""

    ids: Tensor
    log_probs: Tensor
    log_sum_exp: Tensor


def log_probs(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """float32 [N]: the log-probability of one token per row."""
    found = [_log_softmax(logits).gather(-1, ids[:, None])[:, 0] for logits, ids in _blocks(logits_NV, ids_N)]
    return torch.cat(found)


def judged(logits_NV: Tensor, ids_N: Tensor, top_k: int) -> tuple[Tensor, Teacher]:
    """`log_probs` and `teacher` in one."""
    blocks = [_judged(logits, ids, top_k) for logits, ids in _blocks(logits_NV, ids_N)]
    log_p, *top = blocks[0] if len(blocks) == 1 else map(torch.cat, zip(*blocks, strict=True))
    return log_p, Teacher(*top)


def teacher(logits_NV: Tensor, top_k: int) -> Teacher:
    """The likeliest tokens of each row; fewer than `top_k` if the vocabulary is smaller."""
    _, top = judged(logits_NV, logits_NV.new_zeros(len(logits_NV), dtype=torch.int64), top_k)
    return top


def _blocks(logits_NV: Tensor, ids_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """At least one, which may be empty."""
    for first in range(0, max(len(logits_NV), 1), _ROWS):
        yield logits_NV[first : first + _ROWS], ids_N[first : first + _ROWS]


def _judged(logits: Tensor, ids: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of `ids`, and a Teacher. The log-sum-exp is what a logit loses, which costs half of computing it."""
    all_log_probs = _log_softmax(logits)
    values, top_ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    top = all_log_probs.gather(-1, top_ids)
    return all_log_probs.gather(-1, ids[:, None])[:, 0], top_ids.int(), top, values[:, 0].float() - top[:, 0]


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32)


def chosen(values: Tensor, places: Sequence[int]) -> Tensor:
    """Entries `places` of the first dimension; a view, not a copy, if these follow one another."""
    first = places[0] if places else 0
    if list(places) == list(range(first, first + len(places))):
        return values[first : first + len(places)]
    index = torch.tensor(places, dtype=torch.int64)
    if values.is_cuda:
        index = index.pin_memory().to(values.device, non_blocking=True)
    return values.index_select(0, index)


def joined_rows(states: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Copies of these rows of auxiliary states that an engine holds in parts, side by side: [rows, widths together]."""
    parts = [chosen(part, rows) for part in states]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0].clone()
