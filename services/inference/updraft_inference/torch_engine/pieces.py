"""One forward over pieces of many sequences, drafts to verify and prompts to read, and the target's word on each."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from updraft_inference.torch_engine.kv_cache import SlotCache
from updraft_inference.torch_engine.sequence import Proposal, Sequence
from updraft_inference.torch_engine.target import Forward, Target
from updraft_inference.torch_engine.verify import SOUND, UNSOUND, Verdict, judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
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
        return int(self.sequence.num_read + len(self.ids) == self.sequence.num_prompt)


class Outcome(NamedTuple):
    """Of a piece: its rows of the forward, and the verdict; that of a prompt short of its end says only if it is sound."""

    piece: Piece
    rows: Forward
    verdict: Verdict


def num_rows(pieces: list[Piece]) -> int:
    """Of all of them."""
    return sum(len(piece.ids) for piece in pieces)


def advance(target: Target, cache: SlotCache, drafts: list[Piece], prompts: list[Piece]) -> list[Outcome]:
    """Read all pieces, at least one, those of `drafts` ordered by slot."""
    pieces = [*drafts, *prompts]
    bounds = list(pairwise(accumulate((len(piece.ids) for piece in pieces), initial=0)))
    forward = _forward(target, cache, drafts, prompts)
    rows = [Forward(forward.aux[first:end], forward.last[first:end]) for first, end in bounds]
    judged = [piece for piece in pieces if piece.num_judged]
    places = [
        place for piece, (_, end) in zip(pieces, bounds, strict=True) for place in range(end - piece.num_judged, end)
    ]
    verdicts: Iterator[Verdict] = iter(())
    if judged:
        last = forward.last if len(places) == len(forward.last) else forward.last[places]
        logits = target.logits(last)
        verdicts = iter(judge([piece.sequence for piece in judged], [piece.proposal for piece in judged], logits))
    return [
        Outcome(piece, own, next(verdicts) if piece.num_judged else _unended(own))
        for piece, own in zip(pieces, rows, strict=True)
    ]


def _forward(target: Target, cache: SlotCache, drafts: list[Piece], prompts: list[Piece]) -> Forward:
    """Drafts attend together, prompts each alone: they are much longer."""
    groups = [group for group in (drafts, *([piece] for piece in prompts)) if group]
    batches = [
        cache.batch(
            [piece.sequence.slot for piece in group],
            [piece.sequence.num_read for piece in group],
            [len(piece.ids) for piece in group],
        )
        for group in groups
    ]
    ids = [token for group in groups for piece in group for token in piece.ids]
    return target.forward(torch.tensor(ids, device=target.embedding.device), batches, cache)


def _unended(rows: Forward) -> Verdict:
    """Of a prompt that is not read to its end; its last row has seen all before it."""
    return SOUND if bool(rows.last[-1].isfinite().all()) else UNSOUND
