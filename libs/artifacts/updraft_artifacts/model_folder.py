"""A model folder in Hugging Face layout, read without torch: its config, weight files and fingerprints."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from updraft_chassis.errors import InvalidInput

CONFIG = "config.json"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; InvalidInput if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"{path} holds no JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in order; InvalidInput if there are none."""
    if not folder.is_dir():
        raise InvalidInput(f"the model folder {folder} does not exist")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InvalidInput(f"{folder} holds no model*.safetensors")
    return files


def target_fingerprint(folder: Path) -> str:
    """ "sha256:..." of config.json and of the name, size, header, and first and last mebibyte of data of every weight file.

    That distinguishes checkpoints; hashing gigabytes at every start would take minutes.
    """
    digest = hashlib.sha256(json.dumps(_identity(read_json(folder / CONFIG)), sort_keys=True).encode())
    for file in weight_files(folder):
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
    """ "sha256:..." of tokenizer.json, or of no bytes if the folder has none."""
    file = folder / "tokenizer.json"
    return f"sha256:{hashlib.sha256(file.read_bytes() if file.exists() else b'').hexdigest()}"


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the keys that change when a model is saved again."""
    return {key: value for key, value in config.items() if key not in {"transformers_version", "_name_or_path"}}
