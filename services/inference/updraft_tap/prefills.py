"""A forward over prompts, or chunks of them: the rows to capture, and their message. Pure.

Rows are in batch order, one request after the other. Positions from a cache were not computed and have no row. A
preempted request is computed again with its output after its prompt; those rows are captured too.

Tensors: N rows of the forward, B requests, V vocabulary, H width of the auxiliary states, K tokens of the teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from updraft_tap.distribution import chosen, teacher
from updraft_tap.policy import CapturedRequests, CaptureOptions
from updraft_tap.steps import TEACHER


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """One request in the forward: tokens `start` to `end` of the `total_tokens` of its prompt and output."""

    start: int
    end: int
    prompt_tokens: int
    total_tokens: int
    is_first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The captured rows of one request: `rows` from `position` on, which is row `first_row` of the forward."""

    logit_row: int
    rid: str
    probability: float
    position: int
    cached: int
    rows: int
    first_row: int
    teacher_rows: int

    @property
    def header(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("rid", "probability", "position", "cached", "rows", "teacher_rows")
        }


def captured_spans(
    captured: CapturedRequests, parts: Mapping[int, PromptChunk], first_rows: Sequence[int], logit_rows: Sequence[int]
) -> tuple[Span, ...]:
    """The spans of the requests with payload, in order, by their places in the batch.

    `first_rows` and `logit_rows` are those of each request of the batch: its first row of the forward, and its row of the
    logits.
    """
    return tuple(
        _span(captured.rids[i], captured.options[i], parts[place], first_rows[place], logit_rows[place])
        for i, place in ((i, captured.places[i]) for i in captured.payload)
    )


def _span(rid: str, options: CaptureOptions, part: PromptChunk, first_row: int, logit_row: int) -> Span:
    position = min(part.end, max(part.start, part.prompt_tokens - options.prompt_rows))
    rows = part.end - position
    return Span(
        logit_row=logit_row,
        rid=rid,
        probability=options.probability,
        position=position,
        cached=part.start if part.is_first else 0,
        rows=rows,
        first_row=first_row + position - part.start,
        teacher_rows=int(rows > 0 and part.end == part.total_tokens),
    )


def collect_prefill_rows(
    spans: Sequence[Span], *, logits_BV: Tensor, states: Sequence[Tensor], top_k: int
) -> dict[str, Tensor]:
    """Copies of the captured rows: aux [rows, H], and ids, log_probs, log_sum_exp of those that have a teacher."""
    places = [span.logit_row for span in spans if span.teacher_rows]
    last, num_states = max((span.first_row + span.rows for span in spans), default=0), len(states[0])
    if max(places, default=-1) >= len(logits_BV) or last > num_states:
        raise ValueError(f"{len(spans)} requests do not fit {len(logits_BV)} rows of logits and {num_states} states")
    top = teacher(chosen(logits_BV, places), top_k)
    blocks = [[part[span.first_row : span.first_row + span.rows] for span in spans] or [part[:0]] for part in states]
    return {
        "aux": torch.cat([torch.cat(block) for block in blocks], dim=-1),
        **dict(zip(TEACHER, top, strict=True)),
    }


def header(spans: Sequence[Span]) -> dict[str, Any]:
    return {"kind": "prefill", "requests": [span.header for span in spans]}
