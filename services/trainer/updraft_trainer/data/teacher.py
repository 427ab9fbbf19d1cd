"""What the target thought at each row: its last hidden states, or its likeliest tokens where an engine shows no more.

Either becomes log p over the draft vocabulary, renormalised there. From hidden states that is exact. Of a top-k teacher
the target's other tokens are unknown and count as impossible: their log p is `IMPOSSIBLE`, whose exponential is 0 and which
is finite, so that no loss meets 0 * inf. A teacher that knows no token of the draft vocabulary at some row has no lesson there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput
from updraft_draft.tensors import decode

IMPOSSIBLE = -110.0
"""Below ln of the least positive float32, -103.3: its exponential is exactly 0."""

_MAX_LOG_SUM = 0.05
"""Log of the sum of a row's probabilities: 0 at most, and somewhat above it where an engine rounds to bfloat16."""


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """The target's tokens that the draft can propose: the target's head for them [V, D], and the place of each of the
    target's tokens among them, int64 [vocab], -1 for one that is not there."""

    head: Tensor
    places: Tensor

    @classmethod
    def of(cls, head: Tensor, token_ids: Tensor) -> Self:
        """`head` [vocab, D] of the target; `token_ids` int64 [V], ascending."""
        places = torch.full((len(head),), -1)
        places[token_ids] = torch.arange(len(token_ids))
        return cls(head[token_ids].bfloat16(), places)


@dataclass(frozen=True, slots=True)
class LastHidden:
    """states [R, D], after the final norm."""

    states: Tensor

    def __len__(self) -> int:
        return len(self.states)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return self.states.nbytes

    def at(self, rows: Tensor | slice) -> "LastHidden":
        """Some of the rows."""
        return LastHidden(self.states[rows])

    def has_lesson(self, known: Tensor) -> Tensor:
        """bool [R]: rows that say something of the tokens in `known`, bool [vocab]. All do."""
        return known.new_ones(len(self))

    def log_p(self, vocabulary: DraftVocabulary) -> Tensor:
        """float32 [R, V]."""
        return F.linear(self.states, vocabulary.head).float().log_softmax(-1)

    def problem(self, *, hidden_size: int, vocab_size: int) -> str:
        """The first thing wrong with the values; empty if nothing is."""
        if self.states.shape[1] != hidden_size:
            return f"last hidden states of width {self.states.shape[1]} where the target has {hidden_size}"
        return "" if bool(torch.isfinite(self.states).all()) else "last hidden states are not finite"


@dataclass(frozen=True, slots=True)
class TopK:
    """The k likeliest tokens of each row: ids int64 [R, k], and log_probs float32 [R, k] over the whole vocabulary."""

    ids: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return self.ids.nbytes + self.log_probs.nbytes

    def at(self, rows: Tensor | slice) -> "TopK":
        """Some of the rows."""
        return TopK(self.ids[rows], self.log_probs[rows])

    def has_lesson(self, known: Tensor) -> Tensor:
        """bool [R]: rows that name at least one of the tokens in `known`, bool [vocab]."""
        return known[self.ids].any(-1)

    def log_p(self, vocabulary: DraftVocabulary) -> Tensor:
        """float32 [R, V]. Rows without a lesson give no distribution."""
        places = vocabulary.places[self.ids]
        named = self.log_probs.masked_fill(places < 0, float("-inf")).log_softmax(-1)
        log_p = torch.full((len(self), len(vocabulary.head)), IMPOSSIBLE)
        rows, columns = torch.nonzero(places >= 0, as_tuple=True)
        log_p[rows, places[rows, columns]] = named[rows, columns]
        return log_p

    def problem(self, *, hidden_size: int, vocab_size: int) -> str:
        """The first thing wrong with the values; empty if nothing is."""
        if bool(((self.ids < 0) | (self.ids >= vocab_size)).any()):
            return f"one of the likeliest tokens is outside the vocabulary of {vocab_size}"
        if bool((self.ids.sort(-1).values.diff(dim=-1) == 0).any()):
            return "a row names one of its likeliest tokens twice"
        if not bool(torch.isfinite(self.log_probs).all()):
            return "log-probabilities of the likeliest tokens are not finite"
        if bool((self.log_probs.logsumexp(-1) > _MAX_LOG_SUM).any()):
            return "probabilities of a row's likeliest tokens add up to more than 1"
        return ""


Teacher: TypeAlias = LastHidden | TopK


def joined(teachers: Sequence[Teacher]) -> tuple[Teacher, ...]:
    """The same rows in the same order, in as few teachers as their forms allow."""
    return tuple(_joined_alike(list(alike)) for _, alike in groupby(teachers, key=_form))


def read_teacher(message: trace_pb2.Payload | trace_pb2.Counterfactual, *, vocab_size: int) -> Teacher | None:
    """The teacher as it was sent, None if there is none. InvalidInput where its sizes disagree; see `problem` too."""
    form = message.WhichOneof("teacher")
    if form == "last_hidden":
        return LastHidden(decode(message.last_hidden))
    return _read_top_k(message.top_k, vocab_size) if form == "top_k" else None


def _form(teacher: Teacher) -> tuple[type, int]:
    return type(teacher), teacher.ids.shape[1] if isinstance(teacher, TopK) else 0


def _joined_alike(alike: list[Teacher]) -> Teacher:
    hidden = [one.states for one in alike if isinstance(one, LastHidden)]
    if hidden:
        return LastHidden(torch.cat(hidden))
    named = [one for one in alike if isinstance(one, TopK)]
    return TopK(torch.cat([one.ids for one in named]), torch.cat([one.log_probs for one in named]))


def _read_top_k(message: trace_pb2.TopK, vocab_size: int) -> TopK:
    k, num_ids, num_log_probs = message.k, len(message.ids), len(message.log_probs)
    if not 1 <= k <= vocab_size:
        raise InvalidInput(f"a top-k teacher with k = {k} for a vocabulary of {vocab_size}")
    if num_ids % k or num_log_probs != num_ids:
        raise InvalidInput(f"a top-k teacher with k = {k} has {num_ids} ids and {num_log_probs} log-probabilities")
    if len(message.log_sum_exp) not in (0, num_ids // k):
        raise InvalidInput(f"a top-k teacher of {num_ids // k} rows has {len(message.log_sum_exp)} log-sum-exps")
    ids = np.fromiter(message.ids, dtype=np.int64, count=num_ids)
    log_probs = np.fromiter(message.log_probs, dtype=np.float32, count=num_ids)
    return TopK(torch.from_numpy(ids).view(-1, k), torch.from_numpy(log_probs).view(-1, k))
