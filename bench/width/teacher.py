"""Where the synthetic engine's answers come from: random rows, or a rule that a draft can learn.

Under the rule, each token follows from the one before by a fixed permutation of 64 tokens. The hidden states contain the
embeddings of a token and of the one that follows, and noise; the teacher is the last state, from which a first draft comes in
closed form. So a draft learns to read the next token out of the states and to apply a permutation, which is far easier than
language: it shows that every part works at this width, and nothing about the quality of drafts.

Random states are packed as by the agent beside a server, which packs them when they arrive.
"""

from pathlib import Path
from typing import Protocol

import torch
from bench.width.traffic import Width
from torch import Tensor

from updraft_draft.target_weights import read_head
from updraft_draft.tensors import SCALE_BYTES, packed
from updraft_inference.engine import GenerationRequest, HiddenStates, TopK

TOKENS = range(97, 97 + 64)
"""Single bytes of the tiny tokenizer."""

_NUM_ROWS = 512
_NOISE = 0.1
_SHARPNESS = 20.0
"""Length of a last state: the logits then favour one token by far."""


class Teacher(Protocol):
    """Completes requests."""

    def answer(self, request: GenerationRequest) -> tuple[int, ...]:
        """The output tokens."""
        ...

    def states(self, request: GenerationRequest, output_ids: tuple[int, ...], first: int) -> HiddenStates:
        """Rows of the positions of prompt ++ `output_ids` from `first` on, except the last one."""
        ...


class RandomTeacher:
    """One token forever, and states copied from a block of random rows: drawing them would cost more than the data path."""

    def __init__(self, width: Width) -> None:
        generator = torch.Generator().manual_seed(0)
        self._aux = torch.randn(_NUM_ROWS, 3 * width.hidden, generator=generator).bfloat16()
        self._ids = torch.arange(width.top_k).repeat(_NUM_ROWS, 1)
        logits = torch.randn(_NUM_ROWS, width.top_k, generator=generator)
        self._log_probs = torch.log_softmax(logits, dim=-1).sort(descending=True).values

    def answer(self, request: GenerationRequest) -> tuple[int, ...]:
        return (TOKENS[0],) * request.max_tokens

    def states(self, request: GenerationRequest, output_ids: tuple[int, ...], first: int) -> HiddenStates:
        num_rows = len(request.prompt_ids) + len(output_ids) - 1 - first
        teacher = TopK(
            ids=_repeated(self._ids, num_rows),
            log_probs=_repeated(self._log_probs, num_rows),
            log_sum_exp=torch.full((num_rows,), 10.0),
        )
        aux = torch.empty(num_rows, self._aux.shape[1] + SCALE_BYTES, dtype=torch.uint8)
        for first_row in range(0, num_rows, _NUM_ROWS):
            block = aux[first_row : first_row + _NUM_ROWS]
            block.copy_(packed(self._aux[: len(block)]))
        return HiddenStates(first_position=first, aux=aux, teacher=teacher)


class RuleTeacher:
    """The rule, in the embeddings of a target. The last states point to the head's row of the token that follows."""

    def __init__(self, target: Path) -> None:
        following = torch.randperm(len(TOKENS), generator=torch.Generator().manual_seed(0))
        self._following = following.tolist()
        weights = read_head(target)
        self._embedding = weights.embedding[TOKENS.start : TOKENS.stop].float()
        head = weights.head[TOKENS.start : TOKENS.stop].float()
        self._last = (_SHARPNESS * head / head.norm(dim=-1, keepdim=True)).bfloat16()

    def answer(self, request: GenerationRequest) -> tuple[int, ...]:
        token, output = request.prompt_ids[-1] - TOKENS.start, []
        for _ in range(request.max_tokens):
            token = self._following[token % len(TOKENS)]
            output.append(token + TOKENS.start)
        return tuple(output)

    def states(self, request: GenerationRequest, output_ids: tuple[int, ...], first: int) -> HiddenStates:
        ids = (torch.tensor([*request.prompt_ids, *output_ids])[first:] - TOKENS.start) % len(TOKENS)
        now, then = self._embedding[ids[:-1]], self._embedding[ids[1:]]
        aux = torch.cat([now, then, torch.randn_like(now) * _NOISE], -1).bfloat16()
        return HiddenStates(first_position=first, aux=aux, teacher=self._last[ids[1:]])


def _repeated(rows: Tensor, num_rows: int) -> Tensor:
    return rows[torch.arange(num_rows) % len(rows)]
