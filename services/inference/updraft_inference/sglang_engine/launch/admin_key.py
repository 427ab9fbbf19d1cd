"""The key that a server and its agent share in a pod: whoever has it may pause the server and change its weights.

It is written as a file for the server's own `--config`, for an argument can be read in any list of processes. JSON is YAML.
"""

import json
import secrets
from pathlib import Path

from updraft_chassis.credentials import check_token, read_text
from updraft_chassis.errors import InvalidInput

_ARGUMENT = "admin-api-key"
_MODE = 0o640  # a server under another user shares the pod's group


def write(file: Path) -> None:
    """A new random key, whole or not at all; one that is there is left alone. InvalidInput if it cannot be written."""
    if file.exists():
        return
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        part.touch(_MODE, exist_ok=False)
        part.write_text(json.dumps({_ARGUMENT: secrets.token_hex(32)}))
        part.replace(file)
    except OSError as error:
        raise InvalidInput(f"the admin key cannot be written to {file}: {error.strerror}") from error


def read(file: Path) -> str:
    """The key of a file that `write` made. InvalidInput, which never tells what it holds."""
    try:
        key: str = json.loads(read_text(file, "SGLang admin key"))[_ARGUMENT]
        return check_token(key, f"the {_ARGUMENT} in {file}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInput(
            f"{file} holds no {_ARGUMENT}: `updraft-inference prepare-sglang` writes such a file"
        ) from None
