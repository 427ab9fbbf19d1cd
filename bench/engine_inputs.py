"""Prompts and untrained drafts of the published size, for benchmarks that swap drafts."""

from pathlib import Path

import torch

from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.draft_shape import ShapeChoice
from updraft_cli.prompts import domain_prompts
from updraft_draft import checkpoint
from updraft_draft.network import initial_network
from updraft_draft.target_weights import read_head
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.tap import initial_draft
from updraft_inference.text.tokenization import Tokenizer

DRAFT_VOCAB = 8192
_MAX_PROMPT_TOKENS = 200


def code_prompts(model: Path, count: int, *, seed: int) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.open(model)
    texts = domain_prompts("code", count, seed=seed)
    return [tokenizer.encode(text, add_special_tokens=False)[:_MAX_PROMPT_TOKENS] for text in texts]


def seed_draft(model: Path, folder: Path) -> Path:
    """The draft with which a server with the plugin starts, in this folder; made once."""
    draft = folder / "seed"
    return draft if draft.exists() else initial_draft.write(model, draft, ShapeChoice(draft_vocab_size=DRAFT_VOCAB))


def drafts_like(draft: Path, model: Path, folder: Path) -> list[DraftCheckpoint]:
    """`untrained_drafts` of the vocabulary of this one."""
    _, tensors = checkpoint.load(draft)
    return untrained_drafts(model, folder, torch.arange(DRAFT_VOCAB) + tensors["d2t"])


def untrained_drafts(model: Path, folder: Path, token_ids: torch.Tensor) -> list[DraftCheckpoint]:
    """Versions 1 and 2, with this draft vocabulary. The cost of a swap does not depend on what a draft proposes."""
    head = read_head(model)
    config = head.draft(draft_vocab_size=len(token_ids))
    drafts = []
    for version in (1, 2):
        network = initial_network(
            config, head.embedding.float(), head.rows(token_ids), head.final_norm, token_ids, seed=version
        )
        checkpoint.save(network, folder / str(version))
        digest = tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(network)))
        drafts.append(DraftCheckpoint(version=version, folder=folder / str(version), tensors_digest=digest))
    return drafts
