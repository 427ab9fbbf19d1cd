"""Floating-point operations that a batch needs, from its shapes: matrix products and attention, each multiplication with its
addition counted as two.

Only what the model needs is counted, as for model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B): nothing that is
computed again to save memory, and of attention only the pairs that are not masked.
"""

from updraft_draft.config import DraftConfig
from updraft_draft.layout import Span
from updraft_trainer.data.teacher import LastHidden
from updraft_trainer.learning.batch import Batch, TrainingRows

_FORWARD, _ONE_GRADIENT, _BOTH_GRADIENTS = 2, 4, 6
"""Operations per weight and row: forward; with a gradient of weights or of inputs; with both."""


def batch_flops(c: DraftConfig, batch: Batch, *, trains_head: bool) -> float:
    """Operations of the forward and the backward pass."""
    num_steps, num_rows, num_unrolled = batch.layout.ids.shape[1], len(batch.aux), batch.layout.num_unrolled
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    projections = 2 * c.hidden_size * (heads + 2 * kv)
    inner = heads * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
    flops = _ONE_GRADIENT * num_rows * c.aux_size * c.hidden_size
    flops += _BOTH_GRADIENTS * projections * (num_rows + (num_steps - 1) * num_unrolled)
    flops += _BOTH_GRADIENTS * inner * num_steps * num_unrolled
    flops += 2 * _BOTH_GRADIENTS * heads * sum(num_pairs(span, num_steps) for span in batch.layout.spans)
    for rows in (batch.text, batch.discarded):
        flops += _head_flops(c, rows, num_steps, trains_head=trains_head)
    return float(flops)


def num_pairs(span: Span, num_steps: int) -> int:
    """Pairs of a query and a key: the context, the span up to itself, and its own rows of later steps."""
    length = len(span)
    context = span.context_end - span.context
    return num_steps * (length * context + length * (length + 1) // 2) + length * num_steps * (num_steps - 1) // 2


def _head_flops(c: DraftConfig, rows: TrainingRows, num_steps: int, *, trains_head: bool) -> int:
    """Operations of the draft's head at each step and of the target's once, also for the rows before a text begins."""
    head = c.hidden_size * c.draft_vocab_size
    num_hidden = sum(len(teacher) for teacher in rows.teachers if isinstance(teacher, LastHidden))
    teacher = c.target_hidden_size * c.draft_vocab_size * num_hidden
    return (_BOTH_GRADIENTS if trains_head else _ONE_GRADIENT) * head * num_steps * len(rows) + _FORWARD * teacher
