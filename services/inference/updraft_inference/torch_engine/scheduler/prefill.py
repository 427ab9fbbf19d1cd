"""How much of prompts a step reads beside the drafts that it verifies (Agrawal et al. 2024, Sarathi-Serve). Pure."""

from updraft_inference.torch_engine.drafting.lookahead.cost import CostTable

MOST_READ, LEAST_READ = 256, 16
"""Prompt tokens a forward, at most while nobody waits for it, and at least."""
READING_SHARE = 2.0
"""A step that also reads prompts may last so many of those that only decode."""
READING_RESTS = 32
"""Of so many steps one reads no prompt, so that what such steps take stays known however many prompts come."""


def prefill_budget(step: int, *, batch: int, num_drafts: int, cost: CostTable) -> int:
    """Prompt tokens, such that `batch` running streams, with so many rows of drafts, wait no longer than they may."""
    if not num_drafts:
        return MOST_READ
    if step % READING_RESTS == 0:
        return 0
    most_s = READING_SHARE * cost.seconds(batch, num_drafts)
    sizes = (size for size in range(MOST_READ, LEAST_READ, -LEAST_READ) if cost.mixed(num_drafts + size) <= most_s)
    return next(sizes, LEAST_READ)
