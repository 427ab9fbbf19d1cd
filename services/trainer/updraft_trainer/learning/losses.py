"""Losses per row of the draft, and their gradients.

Each takes the draft's logits [rows, V] over the draft vocabulary, and the target's predictions over the same tokens. It
returns the losses float32 [rows] and their gradients with respect to the logits [rows, V], because the loss is fused with the
head (see `head_loss`): autograd would keep, and pass over, several more tensors of this size. Whatever the dtype of logits,
losses are computed in float32; gradients are float32, or of the logits' dtype where a kernel computes them.

Forward KL is the default (EAGLE-3, Aurora). The acceptance loss is the objective itself, because a draft drawn from q is
accepted with probability sum of min(p, q) (Leviathan et al. 2023, theorem 3.5). They are combined as in Aurora
(arXiv 2602.06932): E over accepted rows of loss(p, q) + lambda * E over discarded rows of KL(p || q). A discarded row follows a
rejected draft token, which both p and q have read (see `batch`). Expect little gain when drafts are short: the row at the
rejection point is already in the training set and holds the correct token.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from updraft_trainer.learning import native_losses

LEAST_LOG_P = -20.0
"""Lower bound of log p in reverse KL: a probability of 2e-9. For a top-k teacher all other tokens are impossible (-110, see
`teacher`), and so large a penalty for each of them dominates training. On a rule of 64 tokens, with k = 4, the acceptance
length after 80 steps was 1.26 without this bound and 2.04 with it; from last hidden states it was 2.09 either way."""


class Predictions(NamedTuple):
    """The target's predictions: p [rows, V], and the sums of p log p [rows]; float32."""

    p: Tensor
    negentropy: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Self:
        """Predictions from logits [rows, V], normalised or not."""
        return cls(*native_losses.predictions(logits)) if native_losses.is_native(logits) else cls.by_torch(logits)

    @classmethod
    def by_torch(cls, logits: Tensor) -> Self:
        """The same without the kernel. p by softmax: `exp` takes ten times as long for values that underflow (20 ms for
        228 x 8192), and most values of a top-k teacher do."""
        logits = _widened(logits)
        p, log_sum = _softmax(logits)
        return cls(p, torch.linalg.vecdot(p, logits) - log_sum)


Loss = Callable[[Tensor, Predictions], tuple[Tensor, Tensor]]


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [rows, V] and the log-sum-exp [rows], of one pass of exponentials: the largest probability is
    exp(largest logit - log-sum-exp)."""
    probabilities = logits.softmax(-1)
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def forward_kl(logits: Tensor, target: Predictions) -> tuple[Tensor, Tensor]:
    """KL(p || q): the draft covers everything that the target may generate."""
    if native_losses.is_native(logits):
        losses, gradients = native_losses.forward_kl(logits, *target)
        return losses, gradients
    return forward_kl_by_torch(logits, target)


def forward_kl_by_torch(logits: Tensor, target: Predictions) -> tuple[Tensor, Tensor]:
    """The same without the kernel."""
    logits = _widened(logits)
    q, log_sum = _softmax(logits)
    losses = target.negentropy - torch.linalg.vecdot(target.p, logits) + log_sum
    return losses, q.sub_(target.p)


def reverse_kl(logits: Tensor, target: Predictions) -> tuple[Tensor, Tensor]:
    """KL(q || p): the draft proposes only what the target would generate."""
    logits = _widened(logits)
    q, log_sum = _softmax(logits)
    differences = logits - log_sum.unsqueeze(-1) - target.p.log().clamp(min=LEAST_LOG_P)
    losses = torch.linalg.vecdot(q, differences)
    return losses, q * (differences - losses.unsqueeze(-1))


def acceptance(logits: Tensor, target: Predictions) -> tuple[Tensor, Tensor]:
    """1 - sum of min(p, q): the probability that a draft is rejected, and the total variation distance of p and q."""
    q = _widened(logits).softmax(-1)
    below = q * (q < target.p)  # where more of q would be accepted
    return 1.0 - target.p.minimum(q).sum(-1), q * below.sum(-1, keepdim=True) - below


@cache
def combined(loss: Loss, other: Loss, weight: float) -> Loss:
    """loss + weight * other; the same function for the same arguments, so that it is compiled once."""

    def both(logits: Tensor, target: Predictions) -> tuple[Tensor, Tensor]:
        losses, gradients = loss(logits, target)
        more, gradients_of_more = other(logits, target)
        return losses + weight * more, torch.add(gradients, gradients_of_more, alpha=weight)

    return both


LOSSES: dict[str, Loss] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "acceptance": acceptance}


def text_loss(name: str, acceptance_weight: float) -> Loss:
    """The loss of this name, with so much of the acceptance loss added."""
    return combined(LOSSES[name], acceptance, acceptance_weight) if acceptance_weight else LOSSES[name]
