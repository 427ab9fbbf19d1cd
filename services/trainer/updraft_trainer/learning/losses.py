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

Forward KL is computed by a C++ kernel on a CPU: a row of logits stays in the cache of a core, where torch's operations read and
write tensors of logits a dozen times (ADR 0081). The kernels are operators of torch, so that torch knows the shapes of their
results where it computes no values.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from updraft_kernels.loader import Kernels, load_kernels

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

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
        return cls(*_predictions(logits)) if is_native(logits) else cls.by_torch(logits)

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
    if is_native(logits):
        losses, gradients = _forward_kl(logits, *target)
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


class NativeLosses:
    """As `Predictions.of` and `forward_kl` of `losses`, for logits [rows, V] in float32 or bfloat16."""

    def __init__(self, library: Kernels) -> None:
        self._library = library

    def predictions(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """p [rows, V], and the sums of p log p [rows]; float32."""
        function = getattr(self._library, f"predictions_{_DTYPES[logits.dtype]}")
        logits = logits.contiguous()
        p, negentropy = torch.empty(logits.shape, dtype=torch.float32), torch.empty(len(logits), dtype=torch.float32)
        function(logits.data_ptr(), p.data_ptr(), negentropy.data_ptr(), *logits.shape)
        return p, negentropy

    def forward_kl(self, logits: Tensor, p: Tensor, negentropy: Tensor) -> tuple[Tensor, Tensor]:
        """Losses float32 [rows], and gradients [rows, V] in the dtype of the logits."""
        function = getattr(self._library, f"forward_kl_{_DTYPES[logits.dtype]}")
        assert p.shape == logits.shape
        assert p.dtype == negentropy.dtype == torch.float32
        logits, p, negentropy = logits.contiguous(), p.contiguous(), negentropy.contiguous()
        losses, gradients = torch.empty_like(negentropy), torch.empty_like(logits)
        pointers = (one.data_ptr() for one in (logits, p, negentropy, losses, gradients))
        function(*pointers, *logits.shape)
        return losses, gradients


def is_native(logits: Tensor) -> bool:
    """Whether a kernel computes the default loss of such logits. torch.compile makes one of its own."""
    if torch.compiler.is_compiling():
        return False
    return logits.device.type == "cpu" and logits.dtype in _DTYPES and _loaded() is not None


@torch.library.custom_op("updraft::predictions", mutates_args=())
def _predictions(logits: Tensor) -> tuple[Tensor, Tensor]:
    return _native().predictions(logits)


@_predictions.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape, dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("updraft::forward_kl", mutates_args=())
def _forward_kl(logits: Tensor, p: Tensor, negentropy: Tensor) -> tuple[Tensor, Tensor]:
    return _native().forward_kl(logits, p, negentropy)


@_forward_kl.register_fake
def _(logits: Tensor, p: Tensor, negentropy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(negentropy), logits.new_empty(logits.shape)


def _native() -> NativeLosses:
    native = _loaded()
    assert native is not None
    return native


@cache
def _loaded() -> NativeLosses | None:
    library = load_kernels()
    return None if library is None else NativeLosses(library)
