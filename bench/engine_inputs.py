"""Prompts and untrained drafts of the published size, for benchmarks that swap drafts."""

from pathlib import Path

import torch

from updraft_artifacts.digests import tensors_digest
from updraft_cli.prompts import domain_prompts
from updraft_draft import checkpoint
from updraft_draft.network import initial_network
from updraft_draft.target_weights import read_head
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.text.tokenization import Tokenizer

_MAX_PROMPT_TOKENS = 200


def code_prompts(model: Path, count: int, *, seed: int) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.open(model)
    texts = domain_prompts("code", count, seed=seed)
    return [tokenizer.encode(text, add_special_tokens=False)[:_MAX_PROMPT_TOKENS] for text in texts]


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
