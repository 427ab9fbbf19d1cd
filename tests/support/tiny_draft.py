"""A draft of a few hundred random weights, for tests that need no target."""

from pathlib import Path

import torch

from updraft_artifacts.rope import Rope
from updraft_draft import checkpoint
from updraft_draft.config import DraftConfig
from updraft_draft.network import initial_network

CONFIG = DraftConfig(
    vocab_size=24,
    draft_vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope=Rope(theta=10000.0),
    max_position=64,
    target_hidden_size=8,
    aux_layers=(2, 4, 5),
)
TOKEN_IDS = torch.arange(0, 20, 2)


def write_tiny_draft(folder: Path) -> Path:
    """Write the checkpoint, the same each time; return the folder."""
    size = CONFIG.target_hidden_size
    embedding = torch.randn(CONFIG.vocab_size, size, generator=torch.Generator().manual_seed(0))
    checkpoint.save(initial_network(CONFIG, embedding, embedding[TOKEN_IDS], torch.ones(size), TOKEN_IDS), folder)
    return folder
