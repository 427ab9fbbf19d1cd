"""The target's own distribution at temperature 1, as far as it is sent: its k likeliest tokens and the log-sum-exp.

Always computed before the engine samples, because sampling changes the logits in place (temperature, penalties, grammar,
soft-max). Nothing here waits for a device.

Tensors: N rows, V vocabulary, K tokens, B requests of a batch, P chosen ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 256
"""Rows per block of the log-sum-exp, which bounds its memory besides the logits."""


class Teacher(NamedTuple):
    """ids int32 [N, K], log_probs float32 [N, K], log_sum_exp float32 [N]."""

    ids: Tensor
    log_probs: Tensor
    log_sum_exp: Tensor


def log_sum_exp(logits_NV: Tensor) -> Tensor:
    """float32 [N]."""
    blocks = [torch.logsumexp(block.float(), dim=-1) for block in torch.split(logits_NV, _BLOCK)]
    return torch.cat(blocks) if blocks else logits_NV.new_empty(0, dtype=torch.float32)


def teacher(logits_NV: Tensor, log_sum_exp_N: Tensor, top_k: int) -> Teacher:
    """The likeliest tokens of each row; fewer than `top_k` if the vocabulary is smaller."""
    values_NK, ids_NK = logits_NV.topk(min(top_k, logits_NV.shape[-1]), dim=-1)
    return Teacher(ids_NK.int(), values_NK.float() - log_sum_exp_N[:, None], log_sum_exp_N)


def log_probs(logits_NV: Tensor, log_sum_exp_N: Tensor, ids_N: Tensor) -> Tensor:
    """float32 [N]: the log-probability of one token per row."""
    return logits_NV.gather(-1, ids_N[:, None].long())[:, 0].float() - log_sum_exp_N


def chosen(values: Tensor, places: Sequence[int]) -> Tensor:
    """Entries `places` of the first dimension; a view, not a copy, if these are the first ones in order."""
    if all(i == place for i, place in enumerate(places)):
        return values[: len(places)]
    index = torch.tensor(places, dtype=torch.int64)
    if values.is_cuda:
        index = index.pin_memory().to(values.device, non_blocking=True)
    return values.index_select(0, index)


def joined_rows(states: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Copies of these rows of auxiliary states that an engine holds in parts, side by side: [rows, widths together]."""
    parts = [chosen(part, rows) for part in states]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0].clone()
