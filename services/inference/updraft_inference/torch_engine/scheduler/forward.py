"""One forward over pieces of many sequences, drafts to verify and prompts to read, and the target's word on each."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from updraft_inference.torch_engine.model.kv_cache import SlotCache
from updraft_inference.torch_engine.model.target import ForwardOutput, Target
from updraft_inference.torch_engine.sampling.rejection_sampler import FINITE, NOT_FINITE, VerifyResult, verify
from updraft_inference.torch_engine.sequence import Proposal, Sequence

CALL_ROWS = 16
"""Attention of a sequence by itself costs as much more than in a batch as so many rows in the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardChunk:
    """What a step reads of one sequence: its last token and what is proposed to follow, or a part of its prompt."""

    sequence: Sequence
    ids: list[int]
    proposal: Proposal = field(default_factory=Proposal)
    is_of_prompt: bool = False

    @property
    def num_judged(self) -> int:
        """Rows, the last ones, after which a token may be chosen."""
        if not self.is_of_prompt:
            return len(self.ids)
        return int(self.sequence.num_computed_tokens + len(self.ids) == self.sequence.num_prompt)


class ChunkResult(NamedTuple):
    """Of a piece: its rows of the forward, and the verdict; that of a prompt short of its end says only if it is sound."""

    piece: ForwardChunk
    rows: ForwardOutput
    verdict: VerifyResult


def num_rows(pieces: list[ForwardChunk]) -> int:
    """Of all of them."""
    return sum(len(piece.ids) for piece in pieces)


def run_forward(target: Target, cache: SlotCache, pieces: list[ForwardChunk]) -> list[ChunkResult]:
    """Read all pieces, at least one, of as many sequences."""
    bounds = list(pairwise(accumulate((len(piece.ids) for piece in pieces), initial=0)))
    forward = _forward(target, cache, pieces)
    rows = [ForwardOutput(forward.aux[first:end], forward.last[first:end]) for first, end in bounds]
    judged = [piece for piece in pieces if piece.num_judged]
    places = [
        place for piece, (_, end) in zip(pieces, bounds, strict=True) for place in range(end - piece.num_judged, end)
    ]
    verdicts: Iterator[VerifyResult] = iter(())
    if judged:
        logits = target.logits(forward.last if len(places) == len(forward.last) else forward.last[places])
        sequences, proposals = [piece.sequence for piece in judged], [piece.proposal for piece in judged]
        verdicts = iter(verify(sequences, proposals, logits, target.operations))
    return [
        ChunkResult(piece, own, next(verdicts) if piece.num_judged else _unended(own))
        for piece, own in zip(pieces, rows, strict=True)
    ]


class _Span(NamedTuple):
    """Some rows of a piece, from its row `first` on."""

    piece: int
    first: int
    num: int


def _forward(target: Target, cache: SlotCache, pieces: list[ForwardChunk]) -> ForwardOutput:
    """Of all rows, piece by piece."""
    groups = _groups(pieces, pads=target.operations.pads)
    batches = [
        cache.batch(
            [pieces[span.piece].sequence.slot for span in group],
            [pieces[span.piece].sequence.num_computed_tokens + span.first for span in group],
            [span.num for span in group],
        )
        for group in groups
    ]
    spans = [span for group in groups for span in group]
    ids = [token for at, first, num in spans for token in pieces[at].ids[first : first + num]]
    forward = target.forward(torch.tensor(ids, device=target.embedding.device), batches, cache)
    if spans == sorted(spans):
        return forward
    places = [(span.piece, span.first + n) for span in spans for n in range(span.num)]
    order = torch.tensor(sorted(range(len(places)), key=places.__getitem__), device=forward.aux.device)
    return ForwardOutput(forward.aux[order], forward.last[order])


def _groups(pieces: list[ForwardChunk], *, pads: bool) -> list[list[_Span]]:
    """Which rows attend together, by slot. What is read of a prompt attends alone unless it is one row. Where all of a group
    are padded to the one with most and few drafts are long, so does what these have beyond their first row."""
    together = sorted(
        (i for i, piece in enumerate(pieces) if len(piece.ids) == 1 or not piece.is_of_prompt),
        key=lambda i: pieces[i].sequence.slot,
    )
    alone = [[_Span(i, 0, len(pieces[i].ids))] for i in sorted(set(range(len(pieces))) - set(together))]
    if not together:
        return alone
    more = [len(pieces[i].ids) - 1 for i in together]
    if pads and sum(rows + CALL_ROWS for rows in more if rows) < len(together) * max(more):
        tails = [[_Span(i, 1, rows)] for i, rows in zip(together, more, strict=True) if rows]
        return [[_Span(i, 0, 1) for i in together], *tails, *alone]
    return [[_Span(i, 0, 1 + rows) for i, rows in zip(together, more, strict=True)], *alone]


def _unended(rows: ForwardOutput) -> VerifyResult:
    """Of a prompt that is not read to its end; its last row has seen all before it."""
    return FINITE if bool(rows.last[-1].isfinite().all()) else NOT_FINITE
