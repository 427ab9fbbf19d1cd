"""How many prompt tokens a step reads along with the drafts that it verifies (Agrawal et al. 2024, Sarathi-Serve)."""

from collections.abc import Iterable

from updraft_inference.torch_engine.drafting.lookahead.cost import CostTable
from updraft_inference.torch_engine.scheduler.forward import ForwardChunk
from updraft_inference.torch_engine.sequence import Sequence

MAX_TOKENS, MIN_TOKENS = 256, 16
"""Prompt tokens per forward: at most while no stream waits for it, and at least."""
MAX_SLOWDOWN = 2.0
"""A step that also reads prompts may last so many times as long as one that only decodes."""
STEPS_PER_PAUSE = 32
"""One of so many steps reads no prompt, so that the cost of such steps stays known however many prompts arrive."""


def prefill_budget(step: int, *, batch: int, num_drafts: int, cost: CostTable) -> int:
    """Prompt tokens for a step in which `batch` streams verify `num_drafts` rows."""
    if not num_drafts:
        return MAX_TOKENS
    if step % STEPS_PER_PAUSE == 0:
        return 0
    most_s = MAX_SLOWDOWN * cost.seconds(batch, num_drafts)
    sizes = (size for size in range(MAX_TOKENS, MIN_TOKENS, -MIN_TOKENS) if cost.mixed(num_drafts + size) <= most_s)
    return next(sizes, MIN_TOKENS)


def prompt_chunks(sequences: Iterable[Sequence], budget: int) -> list[ForwardChunk]:
    """The next parts of prompts, first come, first served."""
    chunks = []
    for sequence in sequences:
        ids = sequence.ids[sequence.num_computed_tokens : sequence.num_computed_tokens + budget]
        budget -= len(ids)
        if ids:
            chunks.append(ForwardChunk(sequence=sequence, ids=ids, is_prompt=True))
    return chunks
