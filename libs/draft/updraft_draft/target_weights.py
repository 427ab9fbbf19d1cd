"""The parts of a target that a draft needs, read from a Hugging Face folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.model_folder import describe, weight_files
from updraft_artifacts.target_description import TargetDescription
from updraft_chassis.errors import Corrupt
from updraft_draft.config import DraftConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetHead:
    """embedding and head [vocab, D] (the same tensor if tied), final_norm [D]; in the file's dtype, mapped from disk.

    `final_norm` is the effective weight, see `norm_weight`. `head` does not contain the scale of the logits, because a scaled
    copy of it would be in memory. The embedding is not scaled either: a draft norms it anyway.
    """

    config: TargetDescription
    embedding: Tensor
    head: Tensor
    final_norm: Tensor

    def rows(self, token_ids: Tensor) -> Tensor:
        """The head's rows of tokens for a draft's head, [V, D]: times the scale of the logits, then float32."""
        rows, scale = self.head[token_ids], self.config.logit_scale
        return rows if scale == 1 else rows.float() * scale

    def draft(self, choice: ShapeChoice | None = None, *, draft_vocab_size: int | None = None) -> DraftConfig:
        """A draft for this target, of the default shape but for what is chosen."""
        choice = choice or ShapeChoice()
        if draft_vocab_size is not None:
            choice = replace(choice, draft_vocab_size=draft_vocab_size)
        return DraftConfig.of_target(self.config, choice)


def read_head(folder: Path) -> TargetHead:
    """Read embedding, head and final norm, but no layers. InvalidInput or Corrupt if they or config.json make no sense."""
    config = describe(folder)
    places, size = config.places, config.vocab_size  # rows above it are padding
    tensors: dict[str, Tensor] = {}
    for file in {place.file for place in places.all}:
        tensors |= _read(folder / file, [place.name for place in places.all if place.file == file])
    embedding = tensors[places.embedding.name][:size]
    head = embedding if places.head is None else tensors[places.head.name][:size]
    return TargetHead(
        config=config,
        embedding=embedding,
        head=head,
        final_norm=norm_weight(tensors[places.final_norm.name], config.norm_offset),
    )


def norm_weight(stored: Tensor, offset: float) -> Tensor:
    """The effective weight of a norm: as stored, or float32 if the family adds an offset."""
    return stored.float() + offset if offset else stored


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by name from the folder's safetensors files, mapped rather than read.

    InvalidInput if there are no files, Corrupt if one is damaged or truncated.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= _read(file)
    return tensors


def _read(file: Path, names: Sequence[str] | None = None) -> Mapping[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            opened: Any = handle
            return {name: opened.get_tensor(name) for name in names or opened.keys()}
    except SafetensorError as error:
        raise Corrupt(f"{file} ({file.stat().st_size} bytes) is no whole safetensors file: {error}") from None
