"""Which rows of a step belong to which request. Pure.

vLLM puts chunks of prompts and verify steps into one forward. States have a row for each scheduled token, request after
request; logits have a row for the last token that is not a draft, and one for each draft token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from updraft_tap.policy import CapturedRequests, CaptureOptions
from updraft_tap.prefills import PromptChunk, Span, captured_spans
from updraft_tap.steps import StepRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A request in a step: `tokens` rows of states from position `computed` on, the last `drafts` of which are draft tokens.

    `known_tokens` are its prompt and output so far. A request that was preempted reads both again.
    """

    rid: str
    tokens: int
    drafts: int
    computed: int
    prompt_tokens: int
    known_tokens: int
    is_first: bool

    @property
    def is_prefill(self) -> bool:
        """It reads (a chunk of) its prompt, or of what was known before it was preempted."""
        read = self.tokens - self.drafts
        return self.computed < self.prompt_tokens or read > 1 or self.computed + read < self.known_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The requests of a step, of which most are not captured: what each takes of its rows, and `read`, which gives the request
    at a place."""

    rids: Sequence[str]
    tokens: Sequence[int]
    drafts: Sequence[int]
    read: Callable[[int], Scheduled]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The captured rows of a step: of verify steps, and of prompts. `roots` are the places in the batch of the former."""

    steps: StepRows | None
    roots: tuple[int, ...]
    spans: tuple[Span, ...]


def layout(batch: Batch, options: Mapping[str, CaptureOptions]) -> Layout | None:
    """None if no request of the batch is captured."""
    found = {place: batch.read(place) for place, rid in enumerate(batch.rids) if rid in options}
    if not found:
        return None
    steps, prefills = (
        {place: options[one.rid] for place, one in found.items() if one.is_prefill == is_prefill}
        for is_prefill in (False, True)
    )
    first_state = list(accumulate(batch.tokens, initial=0))
    first_logit = list(accumulate((drafts + 1 for drafts in batch.drafts), initial=0))
    return Layout(
        steps=_step_rows(_captured(batch, steps), batch, first_state, first_logit) if steps else None,
        roots=tuple(steps),
        spans=captured_spans(
            _captured(batch, prefills), {place: _chunk(found[place]) for place in prefills}, first_state, first_logit
        ),
    )


def _captured(batch: Batch, chosen: Mapping[int, CaptureOptions]) -> CapturedRequests:
    return CapturedRequests(
        batch_size=len(batch.rids),
        places=tuple(chosen),
        rids=tuple(batch.rids[place] for place in chosen),
        options=tuple(chosen.values()),
    )


def _step_rows(
    captured: CapturedRequests, batch: Batch, first_state: Sequence[int], first_logit: Sequence[int]
) -> StepRows:
    return StepRows(
        captured=captured,
        logit_rows=tuple(first_logit[place] for place in captured.places),
        state_rows=tuple(first_state[place] for place in captured.places),
        widths=tuple(batch.drafts[place] + 1 for place in captured.places),
    )


def _chunk(one: Scheduled) -> PromptChunk:
    return PromptChunk(
        start=one.computed,
        end=one.computed + one.tokens,
        prompt_tokens=one.prompt_tokens,
        total_tokens=one.known_tokens,
        is_first=one.is_first,
    )
