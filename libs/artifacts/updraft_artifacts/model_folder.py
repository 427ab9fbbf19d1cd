"""A model folder in Hugging Face layout, read without torch: its config, weight files, description and fingerprints.

A folder may hold only the parts that are read without running the model: config, tokenizer, embedding, head and final norm.
Then `updraft-target.json` states the fingerprint of the model that they are from.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from updraft_artifacts import model_files, target_description
from updraft_artifacts.model_files import CONFIG
from updraft_artifacts.sizing import CapturedTraffic, DraftSizes, Sizing, sizing, usual
from updraft_artifacts.target_description import TargetDescription
from updraft_chassis.errors import Corrupt, InvalidInput

__all__ = [
    "CONFIG",
    "PART_OF",
    "FolderFiles",
    "describe",
    "quantization",
    "read_json",
    "sizes",
    "target_fingerprint",
    "tokenizer_fingerprint",
    "weight_files",
]

PART_OF = "updraft-target.json"


class FolderFiles:
    """The files of a folder, as `ModelFiles`; none if there is no such folder."""

    def __init__(self, folder: Path) -> None:
        found = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        self._folder = folder
        self.place = str(folder)
        self.sizes: Mapping[str, int] = {path.name: path.stat().st_size for path in found}

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return exactly these bytes; Corrupt if the file became shorter."""
        with (self._folder / name).open("rb") as file:
            file.seek(begin)
            content = file.read(end - begin)
        if len(content) != end - begin:
            raise Corrupt(f"{self._folder / name} became shorter while it was read")
        return content


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; InvalidInput if the file is missing, too large, or holds anything else."""
    try:
        model_files.check_json_size(path.stat().st_size, str(path))
        return model_files.parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in order; InvalidInput if there are none, or one that the index names is missing."""
    return [folder / name for name in model_files.weight_names(FolderFiles(folder))]


def describe(folder: Path) -> TargetDescription:
    """Describe the target in a folder. InvalidInput or Corrupt, in one sentence, if it or its tensors make no sense."""
    return model_files.examine(FolderFiles(folder))[0]


def target_fingerprint(folder: Path) -> str:
    """The fingerprint of the whole model, see `model_files.fingerprint`, also if the folder holds only a part of it."""
    if (folder / PART_OF).exists():
        stated = read_json(folder / PART_OF).get("fingerprint")
        if not isinstance(stated, str):
            raise InvalidInput(f"{folder / PART_OF} states no fingerprint: remove {folder}, and pull again")
        return stated
    return model_files.fingerprint(FolderFiles(folder))


def tokenizer_fingerprint(folder: Path) -> str:
    """ "sha256:..." of tokenizer.json, or of no bytes if the folder has none."""
    file = folder / "tokenizer.json"
    return f"sha256:{hashlib.sha256(file.read_bytes() if file.exists() else b'').hexdigest()}"


def quantization(folder: Path) -> str:
    """How the weights of the target are quantized, see `target_description.quantization`."""
    return target_description.quantization(read_json(folder / CONFIG))


def sizes(folder: Path, traffic: CapturedTraffic) -> Sizing:
    """The sizes for the default draft of this target, or for an 8B one if it cannot be described: who runs it says why."""
    try:
        target = describe(folder)
    except (Corrupt, InvalidInput):
        return usual(traffic)
    return sizing(target, DraftSizes.of(target), traffic)
