"""The draft that a server starts with before one is trained: new weights over the lowest token ids.

Servers build the draft's network only once, so the trainer's drafts must have the same shape. The proposals of this draft are
useless, so its config.json is marked, and the plugin drafts nothing until another draft is in place (ADR 0068).
"""

import json
import tempfile
from pathlib import Path

import torch

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.target_description import TargetDescription
from updraft_chassis.errors import Conflict, InvalidInput, UpdraftError
from updraft_chassis.leftovers import remove_stale
from updraft_draft import checkpoint, vocabulary
from updraft_draft.config import DraftConfig, check_fits
from updraft_draft.network import DraftNetwork, initial_network
from updraft_draft.target_weights import read_head
from updraft_tap.drafting.switch import UNTRAINED

_PART = ".part-"


def write(model: Path, folder: Path, choice: ShapeChoice, config_json: str = "") -> Path:
    """Write the initial draft for `model` into `folder`, atomically. An existing one that matches is kept.

    Its sizes are those of the published draft with this config.json, or (empty) the chosen ones.

    Raises Conflict if `folder` holds a draft of another shape, because a server may have started with it.
    """
    head = read_head(model)
    config = _published(config_json, head.config) if config_json else head.draft(choice)
    token_ids = vocabulary.choose(
        torch.zeros(config.vocab_size), always=head.config.eos_token_ids, size=config.draft_vocab_size
    )
    if (folder / checkpoint.CONFIG).exists():
        _check_same(folder, config)
        return folder
    network = initial_network(config, head.embedding, head.rows(token_ids), head.final_norm, token_ids)
    _place(network, folder)
    return folder


def _published(config_json: str, target: TargetDescription) -> DraftConfig:
    """The config of a published draft. InvalidInput unless a server of this target can serve such drafts."""
    try:
        content = json.loads(config_json)
    except ValueError as error:
        raise InvalidInput(f"UPDRAFT_INFERENCE_DRAFT_CONFIG is not JSON: {error}") from None
    config = DraftConfig.from_dict(content)
    reason = check_fits(config, target)
    if reason is not None or config.norm_before_residual:
        raise InvalidInput(f"UPDRAFT_INFERENCE_DRAFT_CONFIG does not fit: {reason or 'it has norm_before_residual'}")
    return config


def _check_same(folder: Path, config: DraftConfig) -> None:
    try:
        existing, _ = checkpoint.load(folder)
    except UpdraftError as error:
        raise Conflict(f"{folder} does not contain a draft of Updraft ({error}); empty it first") from error
    if existing != config:
        raise Conflict(f"{folder} contains a draft of another shape; empty it first")


def _place(network: DraftNetwork, folder: Path) -> None:
    """The config is written last, which marks the folder complete. `folder` may be a volume, so nothing is written
    outside it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.glob(f"{_PART}*"))
        with tempfile.TemporaryDirectory(prefix=_PART, dir=folder) as part:
            checkpoint.save(network, Path(part))
            config = Path(part) / checkpoint.CONFIG
            config.write_text(
                json.dumps({**json.loads(config.read_text()), UNTRAINED: True}, indent=2, sort_keys=True) + "\n"
            )
            for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
                (Path(part) / name).replace(folder / name)
    except OSError as error:
        raise InvalidInput(f"cannot write the initial draft to {folder}: {error.strerror}") from error
