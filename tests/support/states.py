"""A small saved state of a trainer."""

import random

import torch

from updraft_artifacts.rope import Rope
from updraft_draft.config import DraftConfig
from updraft_trainer.states.state import Identity, State, TrainingHistory

IDENTITY = Identity(speculator="default", target_fingerprint="sha256:t", tokenizer_fingerprint="sha256:k")

DRAFT = DraftConfig(
    vocab_size=64,
    draft_vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope=Rope(theta=5e5, kind="llama3", factor=8.0, high_freq_factor=4.0, original_max_position=64),
    max_position=128,
    target_hidden_size=8,
    aux_layers=(2, 4, 5),
    norm_before_residual=True,
)


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
