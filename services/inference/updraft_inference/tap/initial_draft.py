"""The draft that a server starts with before one is trained: new weights over the lowest token ids.

Servers build the draft's network only once, so the trainer's drafts must have the same shape. The proposals of this draft are
useless, so its config.json is marked, and the plugin drafts nothing until another draft is in place (ADR 0068).
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    """Write the initial draft for `model` into `folder`, atomically. An existing draft of its shape is kept; if it is the
    initial one, as releases wrote it that did not mark it, it is marked.

    Its sizes are those of the published draft with this config.json, or (empty) the chosen ones.

    Raises Conflict if `folder` holds a draft of another shape, because a server may have started with it.
    """
    head = read_head(model)
    config = _published(config_json, head.config) if config_json else head.draft(choice)
    token_ids = vocabulary.choose(
        torch.zeros(config.vocab_size), always=head.config.eos_token_ids, size=config.draft_vocab_size
    )
    initial = partial(initial_network, config, head.embedding, head.rows(token_ids), head.final_norm, token_ids)
    if (folder / checkpoint.CONFIG).exists():
        _keep(folder, config, initial)
    else:
        _place(initial(), folder)
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


def _keep(folder: Path, config: DraftConfig, initial: Callable[[], DraftNetwork]) -> None:
    try:
        existing, tensors = checkpoint.load(folder)
    except UpdraftError as error:
        raise Conflict(f"{folder} does not contain a draft of Updraft ({error}); empty it first") from error
    if existing != config:
        raise Conflict(f"{folder} contains a draft of another shape; empty it first")
    content = json.loads((folder / checkpoint.CONFIG).read_text())
    if UNTRAINED not in content and _are_equal(tensors, initial()):
        with _written(folder) as part:
            _mark(content, part)


def _are_equal(tensors: Mapping[str, Tensor], network: DraftNetwork) -> bool:
    return all(torch.equal(tensors[name], tensor) for name, tensor in checkpoint.checkpoint_tensors(network))


def _place(network: DraftNetwork, folder: Path) -> None:
    """The config is written last, which marks the folder complete."""
    with _written(folder) as part:
        checkpoint.save(network, part)
        _mark(json.loads((part / checkpoint.CONFIG).read_text()), part)


def _mark(config: dict[str, Any], folder: Path) -> None:
    (folder / checkpoint.CONFIG).write_text(json.dumps({**config, UNTRAINED: True}, indent=2, sort_keys=True) + "\n")


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """A folder whose files replace those of `folder` in the end. It is within it, because `folder` may be a volume."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.glob(f"{_PART}*"))
        with tempfile.TemporaryDirectory(prefix=_PART, dir=folder) as part:
            yield Path(part)
            for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
                if (Path(part) / name).exists():
                    (Path(part) / name).replace(folder / name)
    except OSError as error:
        raise InvalidInput(f"cannot write the initial draft to {folder}: {error.strerror}") from error
