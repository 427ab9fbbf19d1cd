"""A small saved state of a trainer."""

import random
from dataclasses import replace

import torch
from tests.support import tiny_draft

from updraft_artifacts.rope import Rope
from updraft_trainer.states.state import Identity, State, TrainingHistory

IDENTITY = Identity(speculator="default", target_fingerprint="sha256:t", tokenizer_fingerprint="sha256:k")

DRAFT = replace(
    tiny_draft.CONFIG,
    draft_vocab_size=16,
    rope=Rope(theta=5e5, kind="llama3", factor=8.0, high_freq_factor=4.0, original_max_position=64),
    norm_before_residual=True,
)
"""Its rope and its order of norms are not the default ones, so a state that loses them is not equal."""


def make_state(step: int, *, identity: Identity = IDENTITY) -> State:
    """Everything in it follows from the step."""
    rng = random.Random(step)
    rng.random()
    return State(
        identity=identity,
        token_ids=torch.arange(16),
        learner={"network": {"w": torch.full((4, 4), float(step))}, "step": step},
        history=TrainingHistory(uses={"a": step}, num_samples=step, first_trace_id="a", sent_digests=["sha256:x"]),
        rng=rng.getstate(),
        config_digest="sha256:c",
        draft_config=DRAFT,
        taken_s=float(step),
    )
