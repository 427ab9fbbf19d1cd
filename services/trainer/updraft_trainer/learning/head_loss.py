"""The loss of draft states, fused with the head: logits exist for a few rows at a time, in forward and backward.

The forward pass computes the gradients too, as fused kernels on GPUs do (Liger, arXiv 2410.10989): logits and the target's
predictions of a chunk are then computed once, and only gradients of the states are kept.

Tensors: N rows to train on, U unrolled states, J steps, D hidden, V draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_draft.network import Compile, uncompiled
from updraft_trainer.data.teacher import DraftVocabulary
from updraft_trainer.learning.batch import TrainingRows
from updraft_trainer.learning.losses import Loss, Predictions

LOGIT_BYTES = {"cpu": 8 * 1024**2, "cuda": 256 * 1024**2}
"""Size of a float32 tensor of logits; a few exist at a time. A CPU's products need rows: a step of SmolLM2's draft took 238 ms
with 4 MiB, 226 with 8 and 225 with 16 (the least of 3 rounds of 5 batches, two threads). A GPU needs more; no value was tried
there."""

MIN_CHUNK_ROWS = 64
"""Fewer rows read the head's weights more often than they use them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A loss of some rows. `scales`: the weight of each step."""

    rows: TrainingRows
    loss: Loss
    scales: Sequence[float]


def head_loss(
    states: Sequence[Tensor],
    head: Tensor,
    objective: Objective,
    vocabulary: DraftVocabulary,
    compiled: Compile = uncompiled,
) -> Tensor:
    """The weighted sum of the losses, float32 []. `states` [U, D] of each step, after the draft's final norm; `head` [V, D].
    `compiled` is applied to what is computed of logits."""
    with torch.autocast(head.device.type, enabled=False):  # products have the states' dtype, all else is float32
        loss: Tensor = _HeadLoss.apply(compiled, objective, vocabulary, head, *states)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compiled: Compile, objective: Objective, vocabulary: DraftVocabulary, head: Tensor, *states: Tensor
    ) -> Tensor:
        needs_head = ctx.needs_input_grad[3]
        gradients = [torch.zeros_like(state) for state in states]
        d_head = torch.zeros(head.shape, device=head.device) if needs_head else None
        weights = head.to(states[0].dtype)
        total = torch.zeros((), device=head.device)
        for chunk in objective.rows.split(_chunk_rows(head)):
            predictions = compiled(Predictions.of)(chunk.logits(vocabulary))
            for j, state in enumerate(states):
                index, counts = chunk.of_step(j)
                inputs, counts = state.index_select(0, index), counts * objective.scales[j]
                losses, d_logits = compiled(objective.loss)(F.linear(inputs, weights), predictions)
                total += torch.dot(losses, counts)
                d_logits, counts = d_logits.to(inputs.dtype), counts.unsqueeze(-1)
                gradients[j].index_add_(0, index, ((d_logits @ weights) * counts).to(inputs.dtype))
                if d_head is not None:
                    d_head += d_logits.T @ (inputs * counts).to(inputs.dtype)
        ctx.save_for_backward(*gradients, *([] if d_head is None else [d_head.to(head.dtype)]))
        ctx.num_steps = len(states)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        saved = [one.mul_(grad.to(one.dtype)) for one in ctx.saved_tensors]  # a loss has one backward pass
        d_head = saved.pop() if len(saved) > ctx.num_steps else None
        return None, None, None, d_head, *saved


def _chunk_rows(head: Tensor) -> int:
    return max(MIN_CHUNK_ROWS, LOGIT_BYTES[head.device.type] // (4 * len(head)))
