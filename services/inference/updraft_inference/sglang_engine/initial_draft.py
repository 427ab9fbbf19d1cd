"""The draft that a server starts with when none was trained yet: new weights over the lowest token ids.

It is the draft that a trainer with the same UPDRAFT_TRAINER_DRAFT_VOCAB_SIZE, and UPDRAFT_TRAINER_FIRST_SAMPLES=0, begins
with, so whatever is trained from it has the same vocabulary, which SGLang reads once. It proposes poorly and costs no more
than a good one.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from updraft_chassis.errors import Conflict, InvalidInput, UpdraftError
from updraft_draft import checkpoint, vocabulary
from updraft_draft.config import DraftConfig
from updraft_draft.network import DraftNetwork, initial_network
from updraft_draft.target_weights import read_head


def write(model: Path, folder: Path, *, draft_vocab_size: int) -> Path:
    """Write the seed for `model` into `folder`, whole or not at all; one that is there and fits is left alone.

    Conflict if another draft is there: a server may have started with it.
    """
    head = read_head(model)
    config = head.config.draft(draft_vocab_size=min(draft_vocab_size, head.config.vocab_size))
    token_ids = vocabulary.choose(
        (), always=head.config.eos_token_ids, vocab_size=head.config.vocab_size, size=draft_vocab_size
    )
    if (folder / checkpoint.CONFIG).exists():
        _check_same(folder, config, token_ids)
        return folder
    network = initial_network(config, head.embedding, head.head, head.final_norm, token_ids)
    _place(network, folder)
    return folder


def _check_same(folder: Path, config: DraftConfig, token_ids: Tensor) -> None:
    try:
        found, tensors = checkpoint.load(folder)
    except UpdraftError as error:
        raise Conflict(f"{folder} holds what is no draft of ours ({error}); empty it first") from error
    if found != config or not torch.equal(tensors["d2t"] + torch.arange(found.draft_vocab_size), token_ids):
        raise Conflict(f"{folder} holds a draft of another shape or vocabulary; empty it first")


def _place(network: DraftNetwork, folder: Path) -> None:
    """The config comes last, and says that the rest is there. `folder` may be a volume: no other place is written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            checkpoint.save(network, Path(part))
            for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
                (Path(part) / name).replace(folder / name)
    except OSError as error:
        raise InvalidInput(f"the first draft cannot be written to {folder}: {error.strerror}") from error
