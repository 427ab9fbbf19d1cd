"""The parts of a target that a draft needs, read from a Hugging Face folder."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from updraft_artifacts.model_folder import weight_files
from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_draft.config import Family, TargetConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetHead:
    """embedding and head [vocab, D] (the same tensor if tied), final_norm [D]; in the file's dtype, mapped from disk.

    `final_norm` is the effective weight, see `norm_weight`. The embedding is not scaled: a draft norms it anyway.
    """

    config: TargetConfig
    embedding: Tensor
    head: Tensor
    final_norm: Tensor


def read_head(folder: Path) -> TargetHead:
    """Read embedding, head and final norm, but no layers."""
    config = TargetConfig.from_folder(folder)
    names = [EMBEDDING, FINAL_NORM] + ([] if config.is_tied else [HEAD])
    tensors = read_tensors(folder, names)
    return TargetHead(
        config=config,
        embedding=tensors[EMBEDDING],
        head=tensors[EMBEDDING if config.is_tied else HEAD],
        final_norm=norm_weight(tensors[FINAL_NORM], config.family),
    )


def norm_weight(stored: Tensor, family: Family) -> Tensor:
    """The effective weight of a norm: as stored, or float32 if the family adds an offset."""
    return stored.float() + family.norm_offset if family.norm_offset else stored


def read_tensors(folder: Path, names: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors by name (None: all) from the folder's safetensors files, mapped rather than read.

    InvalidInput if a name is missing, Corrupt if a file is damaged or truncated.
    """
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for file in weight_files(folder):
            try:
                handle: Any = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise Corrupt(f"{file} ({file.stat().st_size} bytes) is no whole safetensors file: {error}") from None
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if names is None or name in names:
                    tensors[name] = handle.get_tensor(name)
    missing = set(names or []) - set(tensors)
    if missing:
        raise InvalidInput(f"{folder} lacks the tensors {sorted(missing)}")
    return tensors
