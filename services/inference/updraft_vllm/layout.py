"""Which rows of a step belong to which request. Pure.

vLLM puts chunks of prompts and verify steps into one forward. States have a row for each scheduled token, request after
request; logits have a row for the last token that is not a draft, and one for each draft token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from updraft_tap.policy import CapturedRequests, CaptureOptions, captured_requests
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
class Layout:
    """The captured rows of a step: of verify steps, and of prompts. `roots` are the places in the batch of the former."""

    steps: StepRows | None
    roots: tuple[int, ...]
    spans: tuple[Span, ...]


def layout(batch: Sequence[Scheduled], options: Mapping[str, CaptureOptions]) -> Layout | None:
    """None if no request of the batch is captured."""
    if not any(one.rid in options for one in batch):
        return None
    first_state = _starts([one.tokens for one in batch])
    first_logit = _starts([one.drafts + 1 for one in batch])
    steps = captured_requests([(one.rid, None if one.is_prefill else options.get(one.rid)) for one in batch])
    prefills = captured_requests([(one.rid, options.get(one.rid) if one.is_prefill else None) for one in batch])
    return Layout(
        steps=_step_rows(steps, batch, first_state, first_logit),
        roots=steps.places if steps else (),
        spans=captured_spans(prefills, [_chunk(one) for one in batch], first_logit) if prefills else (),
    )


def _step_rows(
    captured: CapturedRequests | None,
    batch: Sequence[Scheduled],
    first_state: Sequence[int],
    first_logit: Sequence[int],
) -> StepRows | None:
    if captured is None:
        return None
    return StepRows(
        captured=captured,
        logit_rows=tuple(first_logit[place] for place in captured.places),
        state_rows=tuple(first_state[place] for place in captured.places),
        widths=tuple(batch[place].drafts + 1 for place in captured.places),
    )


def _chunk(one: Scheduled) -> PromptChunk:
    return PromptChunk(
        start=one.computed,
        end=one.computed + one.tokens,
        prompt_tokens=one.prompt_tokens,
        total_tokens=one.known_tokens,
        is_first=one.is_first,
    )


def _starts(counts: Sequence[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts[:-1]
