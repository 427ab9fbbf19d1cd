"""The target's prediction at each row: its last hidden states, or its most likely tokens if the engine exposes no more.

Both become log p over the draft vocabulary, renormalised. From hidden states that is exact. A top-k teacher does not include
the target's other tokens, which count as impossible: their log p is `IMPOSSIBLE`, whose exponential is 0 and which is finite,
so that no loss computes 0 * inf. A row whose top-k has no token of the draft vocabulary cannot be trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput
from updraft_draft.precision import linear
from updraft_draft.tensors import decode, is_finite

IMPOSSIBLE = -110.0
"""Below the logarithm of the smallest positive float32, -103.3, so its exponential is exactly 0."""

_MAX_LOG_SUM = 0.05
"""Maximum log of the sum of a row's probabilities: 0, plus a margin for engines that round to bfloat16."""

_EQUATION_RIDGE = 0.01
"""Relative to the mean square of a row's equations: a token whose logit others explain must not outweigh them."""

_MAX_EQUATIONS = 2**22
"""Coefficients at a time: 16 rows of 64 tokens at D 4096, 16 MB in float32."""

_MAX_LOGIT = 1e4
"""Limit for the size of a logit, so that what a pod made up stays a number."""

_MOST_OF_CAP = 1 - 1e-6
"""The share of the cap up to which capped logits are inverted."""


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """The target's head for the tokens that the draft can propose, [V, D], the draft index of each of the target's tokens,
    int64 [vocab], -1 if it has none, and the scale and the soft cap of the target's logits, if they have one."""

    head: Tensor
    indices: Tensor
    logit_scale: float = 1.0
    logit_cap: float | None = None

    @classmethod
    def of(
        cls,
        head: Tensor,
        token_ids: Tensor,
        *,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """`head` [vocab, D] of the target, without the scale; `token_ids` int64 [V], ascending. `dtype` of the logits."""
        indices = torch.full((len(head),), -1)
        indices[token_ids] = torch.arange(len(token_ids))
        return cls(head[token_ids].to(dtype), indices, logit_scale, logit_cap)

    @classmethod
    def whole(cls, head: Tensor, *, logit_scale: float = 1.0, logit_cap: float | None = None) -> Self:
        """All tokens of the target. A bfloat16 `head` is not copied: it may have more than a gigabyte."""
        return cls(head.bfloat16(), torch.arange(len(head)), logit_scale, logit_cap)

    def to(self, device: torch.device) -> Self:
        return replace(self, head=self.head.to(device), indices=self.indices.to(device))


@dataclass(frozen=True, slots=True)
class LastHidden:
    """states [R, D], after the final norm."""

    states: Tensor

    def __len__(self) -> int:
        return len(self.states)

    @property
    def num_bytes(self) -> int:
        return self.states.nbytes

    def at(self, rows: Tensor | slice) -> "LastHidden":
        return LastHidden(self.states[rows])

    def to(self, device: torch.device) -> "LastHidden":
        return LastHidden(self.states.to(device, non_blocking=True))

    def is_trainable(self, known: Tensor) -> Tensor:
        """bool [R]: rows with a prediction over the tokens in `known`, bool [vocab]. All rows have one."""
        return known.new_ones(len(self))

    def logits(self, vocabulary: DraftVocabulary) -> Tensor:
        """[R, V], in the dtype of products, or float32 if the target scales or caps its logits."""
        logits = linear(self.states, vocabulary.head)
        if vocabulary.logit_scale != 1 or vocabulary.logit_cap is not None:
            logits = logits.float()
        if vocabulary.logit_scale != 1:
            logits = logits * vocabulary.logit_scale
        if vocabulary.logit_cap is not None:
            logits = vocabulary.logit_cap * torch.tanh(logits / vocabulary.logit_cap)
        return logits

    def log_p(self, vocabulary: DraftVocabulary) -> Tensor:
        """float32 [R, V]."""
        return self.logits(vocabulary).float().log_softmax(-1)

    def problem(self, *, hidden_size: int, vocab_size: int) -> str:
        """The first problem with the values, or an empty string."""
        if self.states.shape[1] != hidden_size:
            return f"last hidden states of width {self.states.shape[1]}, expected {hidden_size}"
        return "" if is_finite(self.states) else "last hidden states are not finite"


@dataclass(frozen=True, slots=True)
class TopK:
    """The k most likely tokens per row: ids int64 [R, k], and log_probs float32 [R, k] over the whole vocabulary.

    log_sum_exp float32 [R] of all the target's logits makes them logits; None if it was not sent.
    """

    ids: Tensor
    log_probs: Tensor
    log_sum_exp: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.ids, self.log_probs, self.log_sum_exp) if tensor is not None)

    def at(self, rows: Tensor | slice) -> "TopK":
        sums = None if self.log_sum_exp is None else self.log_sum_exp[rows]
        return TopK(self.ids[rows], self.log_probs[rows], sums)

    def to(self, device: torch.device) -> "TopK":
        sums = None if self.log_sum_exp is None else self.log_sum_exp.to(device, non_blocking=True)
        return TopK(self.ids.to(device, non_blocking=True), self.log_probs.to(device, non_blocking=True), sums)

    def is_trainable(self, known: Tensor) -> Tensor:
        """bool [R]: rows with at least one token in `known`, bool [vocab]."""
        return known[self.ids].any(-1)

    def log_p(self, vocabulary: DraftVocabulary) -> Tensor:
        """float32 [R, V]. Not a distribution in rows without a known token."""
        indices, size = vocabulary.indices[self.ids], len(vocabulary.head)
        is_known = indices >= 0
        renormalised = self.log_probs.masked_fill(~is_known, float("-inf")).log_softmax(-1)
        # Unknown tokens share a column that is cut off. To leave them out, a GPU would have to be asked for their number.
        log_p = torch.full((len(self), size + 1), IMPOSSIBLE, device=indices.device)
        return log_p.scatter_(1, indices.where(is_known, size), renormalised)[:, :size]

    def logits(self, vocabulary: DraftVocabulary) -> Tensor:
        """As `log_p`, which is normalised."""
        return self.log_p(vocabulary)

    def estimate_states(self, vocabulary: DraftVocabulary, norm: Tensor, expected: Tensor) -> Tensor:
        """Last hidden states that explain the logits of known tokens: of all that do, those nearest to `expected`.

        float32 [R, D], as `expected`, before the weight of the final norm, `norm` [D]. There, no state is longer than the norm
        makes it. Logits that are not finite tell nothing. ValueError without log_sum_exp.
        """
        if self.log_sum_exp is None:
            raise ValueError("without their log-sum-exp, log-probabilities are no logits")
        states, num_rows = expected.clone(), max(1, _MAX_EQUATIONS // (self.ids.shape[1] * len(norm)))
        for first in range(0, len(self), num_rows):
            rows = slice(first, first + num_rows)
            states[rows] = _nearest(self.at(rows), vocabulary, norm, expected[rows])
        return states

    def problem(self, *, hidden_size: int, vocab_size: int) -> str:
        """The first problem with the values, or an empty string."""
        if bool(((self.ids < 0) | (self.ids >= vocab_size)).any()):
            return f"a top-k token is outside the vocabulary of {vocab_size}"
        if bool((self.ids.sort(-1).values.diff(dim=-1) == 0).any()):
            return "a row has the same top-k token twice"
        if not is_finite(self.log_probs):
            return "top-k log-probabilities are not finite"
        if self.log_sum_exp is not None and not is_finite(self.log_sum_exp):
            return "top-k log-sum-exps are not finite"
        if bool((self.log_probs.logsumexp(-1) > _MAX_LOG_SUM).any()):
            return "top-k probabilities of a row add up to more than 1"
        return ""


def _nearest(teacher: TopK, vocabulary: DraftVocabulary, norm: Tensor, expected: Tensor) -> Tensor:
    """`TopK.estimate_states` of rows whose equations fit into memory together."""
    assert teacher.log_sum_exp is not None
    logits = teacher.log_probs + teacher.log_sum_exp[:, None]
    indices = vocabulary.indices[teacher.ids]
    is_told = (indices >= 0) & logits.isfinite()
    logits = logits.where(is_told, 0.0).clamp(-_MAX_LOGIT, _MAX_LOGIT)
    if (cap := vocabulary.logit_cap) is not None:
        logits = cap * torch.atanh((logits / cap).clamp(-_MOST_OF_CAP, _MOST_OF_CAP))
    equations = vocabulary.head[indices.clamp(min=0)].float()
    equations *= norm
    equations *= is_told[..., None]
    missing = (logits / vocabulary.logit_scale - torch.einsum("rkd,rd->rk", equations, expected)) * is_told
    products = equations @ equations.mT
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_EQUATION_RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(products.dtype).tiny)
    shares = torch.cholesky_solve(missing[..., None], torch.linalg.cholesky(products))
    states = expected + (equations.mT @ shares)[..., 0]
    return states / states.square().mean(-1, keepdim=True).sqrt().clamp(min=1.0)


Teacher: TypeAlias = LastHidden | TopK


def joined(teachers: Sequence[Teacher]) -> tuple[Teacher, ...]:
    """The same rows in the same order, with adjacent teachers of the same form merged."""
    return tuple(_joined_alike(list(alike)) for _, alike in groupby(teachers, key=_form))


def read_teacher(message: trace_pb2.Payload | trace_pb2.Counterfactual, *, vocab_size: int) -> Teacher | None:
    """The teacher, or None if there is none. InvalidInput if its sizes do not match; `problem` checks its values."""
    form = message.WhichOneof("teacher")
    if form == "last_hidden":
        return LastHidden(decode(message.last_hidden))
    return _read_top_k(message.top_k, vocab_size) if form == "top_k" else None


def _form(teacher: Teacher) -> tuple[type, int]:
    return type(teacher), teacher.ids.shape[1] if isinstance(teacher, TopK) else 0


def _joined_alike(alike: list[Teacher]) -> Teacher:
    hidden = [teacher.states for teacher in alike if isinstance(teacher, LastHidden)]
    if hidden:
        return LastHidden(torch.cat(hidden))
    top_k = [teacher for teacher in alike if isinstance(teacher, TopK)]
    sums = [teacher.log_sum_exp for teacher in top_k if teacher.log_sum_exp is not None]
    return TopK(
        torch.cat([teacher.ids for teacher in top_k]),
        torch.cat([teacher.log_probs for teacher in top_k]),
        torch.cat(sums) if len(sums) == len(top_k) else None,
    )


def _read_top_k(message: trace_pb2.TopK, vocab_size: int) -> TopK:
    k, num_ids, num_log_probs = message.k, len(message.ids), len(message.log_probs)
    if not 1 <= k <= vocab_size:
        raise InvalidInput(f"a top-k teacher with k = {k} for a vocabulary of {vocab_size}")
    if num_ids % k or num_log_probs != num_ids:
        raise InvalidInput(f"a top-k teacher with k = {k} has {num_ids} ids and {num_log_probs} log-probabilities")
    if len(message.log_sum_exp) not in (0, num_ids // k):
        raise InvalidInput(f"a top-k teacher of {num_ids // k} rows has {len(message.log_sum_exp)} log-sum-exps")
    arrays = trace_pb2.PackedTopK.FromString(message.SerializeToString())
    ids = np.frombuffer(arrays.ids, dtype="<u4").astype(np.int64)
    log_probs = np.frombuffer(arrays.log_probs, dtype="<f4").astype(np.float32)  # a copy that may be written to
    sums = np.frombuffer(arrays.log_sum_exp, dtype="<f4").astype(np.float32)
    log_sum_exp = torch.from_numpy(sums) if len(sums) or not len(ids) else None
    return TopK(torch.from_numpy(ids).view(-1, k), torch.from_numpy(log_probs).view(-1, k), log_sum_exp)
