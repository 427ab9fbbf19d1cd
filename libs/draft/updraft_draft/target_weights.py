"""The parts of a target that a draft is built on, read from a Hugging Face folder, and the target's fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from updraft_chassis.errors import InvalidInput
from updraft_draft.config import TargetConfig, read_json

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetHead:
    """embedding and head [vocab, D] (the same tensor when tied), final_norm [D]; in the file's dtype, mapped from disk."""

    config: TargetConfig
    embedding: Tensor
    head: Tensor
    final_norm: Tensor


def read_head(folder: Path) -> TargetHead:
    """What the trainer needs of the target: no layer of it."""
    config = TargetConfig.from_folder(folder)
    names = [EMBEDDING, FINAL_NORM] + ([] if config.is_tied else [HEAD])
    tensors = read_tensors(folder, names)
    return TargetHead(
        config=config,
        embedding=tensors[EMBEDDING],
        head=tensors[EMBEDDING if config.is_tied else HEAD],
        final_norm=tensors[FINAL_NORM],
    )


def read_tensors(folder: Path, names: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors by name (None: all) from the folder's one or many safetensors files, mapped rather than read."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for file in _weight_files(folder):
            handle: Any = stack.enter_context(safe_open(file, framework="pt"))
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no dict)
                if names is None or name in names:
                    found[name] = handle.get_tensor(name)
    missing = set(names or []) - set(found)
    if missing:
        raise InvalidInput(f"{folder} lacks the tensors {sorted(missing)}")
    return found


def target_fingerprint(folder: Path) -> str:
    """ "sha256:..." of config.json's sizes and of the names, shapes and bytes at the ends of every weight file.

    Hashing gigabytes at each start would cost minutes; the header with all offsets, the size, and the first and last
    mebibyte of data tell checkpoints apart.
    """
    digest = hashlib.sha256(json.dumps(_identity(read_json(folder / "config.json")), sort_keys=True).encode())
    for file in _weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header, size)))
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return f"sha256:{digest.hexdigest()}"


def tokenizer_fingerprint(folder: Path) -> str:
    """ "sha256:..." of tokenizer.json; of nothing where the folder has none."""
    file = folder / "tokenizer.json"
    return f"sha256:{hashlib.sha256(file.read_bytes() if file.exists() else b'').hexdigest()}"


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what a resave changes."""
    return {key: value for key, value in config.items() if key not in {"transformers_version", "_name_or_path"}}


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InvalidInput(f"the model folder {folder} does not exist")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InvalidInput(f"{folder} holds no model*.safetensors")
    return files
