"""One forward over chunks of many sequences (drafts to verify, prompts to read), and its verified result per chunk."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from updraft_inference.torch_engine.model.kv_cache import SlotCache
from updraft_inference.torch_engine.model.target import ForwardOutput, Target
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sampling.rejection_sampler import FINITE, NOT_FINITE, VerifyResult, verify
from updraft_inference.torch_engine.sequence import Sequence

CALL_ROWS = 16
"""Attention of a sequence by itself costs as much more as so many rows in a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardChunk:
    """The tokens of one sequence in a forward: its last token and the proposal for the next ones, or a part of its prompt."""

    sequence: Sequence
    ids: list[int]
    proposal: Proposal = field(default_factory=Proposal)
    is_prompt: bool = False

    @property
    def num_verified(self) -> int:
        """Rows, the last ones, after which a token may be chosen."""
        if not self.is_prompt:
            return len(self.ids)
        return int(self.sequence.num_computed_tokens + len(self.ids) == self.sequence.num_prompt)


class ChunkResult(NamedTuple):
    """A chunk, its rows of the forward, and the result. That of an unfinished prompt only shows whether it is finite."""

    chunk: ForwardChunk
    rows: ForwardOutput
    result: VerifyResult


def num_rows(chunks: list[ForwardChunk]) -> int:
    return sum(len(chunk.ids) for chunk in chunks)


def run_forward(target: Target, cache: SlotCache, chunks: list[ForwardChunk]) -> list[ChunkResult]:
    """Compute all chunks, at least one, of as many sequences, and verify their proposals."""
    bounds = list(pairwise(accumulate((len(chunk.ids) for chunk in chunks), initial=0)))
    output = _forward(target, cache, chunks)
    rows = [ForwardOutput(output.aux[first:end], output.last[first:end]) for first, end in bounds]
    verified = [chunk for chunk in chunks if chunk.num_verified]
    places = [
        place for chunk, (_, end) in zip(chunks, bounds, strict=True) for place in range(end - chunk.num_verified, end)
    ]
    results: Iterator[VerifyResult] = iter(())
    if verified:
        logits = target.logits(output.last if len(places) == len(output.last) else output.last[places])
        sequences, proposals = [chunk.sequence for chunk in verified], [chunk.proposal for chunk in verified]
        results = iter(verify(sequences, proposals, logits, target.operations))
    return [
        ChunkResult(chunk, own, next(results) if chunk.num_verified else _unfinished(own))
        for chunk, own in zip(chunks, rows, strict=True)
    ]


class _Span(NamedTuple):
    """`num` rows of a chunk, from its row `first` on."""

    chunk: int
    first: int
    num: int


def _forward(target: Target, cache: SlotCache, chunks: list[ForwardChunk]) -> ForwardOutput:
    """All rows, in the order of the chunks."""
    groups = _groups(chunks, pads=target.operations.pads)
    batches = [
        cache.batch(
            [chunks[span.chunk].sequence.slot for span in group],
            [chunks[span.chunk].sequence.num_computed_tokens + span.first for span in group],
            [span.num for span in group],
        )
        for group in groups
    ]
    spans = [span for group in groups for span in group]
    ids = [token for i, first, num in spans for token in chunks[i].ids[first : first + num]]
    output = target.forward(torch.tensor(ids, device=target.embedding.device), batches, cache)
    if spans == sorted(spans):
        return output
    places = [(span.chunk, span.first + n) for span in spans for n in range(span.num)]
    order = torch.tensor(sorted(range(len(places)), key=places.__getitem__), device=output.aux.device)
    return ForwardOutput(output.aux[order], output.last[order])


def _groups(chunks: list[ForwardChunk], *, pads: bool) -> list[list[_Span]]:
    """Which rows attend together, by slot.

    Prompts attend alone, unless they are one row. Where a group is padded to its longest sequence and only few drafts are
    long, the rows of those beyond the first attend alone too.
    """
    together = sorted(
        (i for i, chunk in enumerate(chunks) if len(chunk.ids) == 1 or not chunk.is_prompt),
        key=lambda i: chunks[i].sequence.slot,
    )
    alone = [[_Span(i, 0, len(chunks[i].ids))] for i in sorted(set(range(len(chunks))) - set(together))]
    if not together:
        return alone
    more = [len(chunks[i].ids) - 1 for i in together]
    if pads and sum(rows + CALL_ROWS for rows in more if rows) < len(together) * max(more):
        tails = [[_Span(i, 1, rows)] for i, rows in zip(together, more, strict=True) if rows]
        return [[_Span(i, 0, 1) for i in together], *tails, *alone]
    return [[_Span(i, 0, 1 + rows) for i, rows in zip(together, more, strict=True)], *alone]


def _unfinished(rows: ForwardOutput) -> VerifyResult:
    """A prompt that is not read to its end. Its last row has attended to all before it."""
    return FINITE if bool(rows.last[-1].isfinite().all()) else NOT_FINITE
