"""The admin key that a server and its agent share: its holder can pause the server and change its weights.

It is a file for the server's own `--config`, because arguments are visible in process lists. JSON is valid YAML.
"""

import json
import secrets
from pathlib import Path

from updraft_chassis.credentials import check_token, read_text
from updraft_chassis.errors import InvalidInput

_ARGUMENT = "admin-api-key"
_MODE = 0o640  # the server may run as another user of the pod's group


def write(file: Path, key: str = "") -> None:
    """Write the key atomically; without one, a new random one unless the file exists.

    Raises InvalidInput if the key is no token, if SGLang would not read the file, or if it cannot be written.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise InvalidInput(f"{file} must end in .yaml, because SGLang reads its admin key from it by --config")
    if key.startswith("-"):
        raise InvalidInput(f"the {_ARGUMENT} must not begin with -, because SGLang would take it for an argument")
    if key:
        check_token(key, f"the {_ARGUMENT}")
    elif file.exists():
        return
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        part.touch(_MODE, exist_ok=False)
        part.write_text(json.dumps({_ARGUMENT: key or secrets.token_hex(32)}))
        part.replace(file)
    except OSError as error:
        raise InvalidInput(f"cannot write the admin key to {file}: {error.strerror}") from error


def remove(file: Path) -> None:
    """Remove a key that is not used any more. Raises InvalidInput if that fails."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot remove the unused admin key {file}: {error.strerror}") from error


def read(file: Path) -> str:
    """The key in a file that `write` made. Raises InvalidInput, which never contains the key."""
    try:
        key: str = json.loads(read_text(file, "SGLang admin key"))[_ARGUMENT]
        return check_token(key, f"the {_ARGUMENT} in {file}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInput(
            f"{file} has no {_ARGUMENT}; create the file with `updraft-inference prepare-sglang --admin-key-file`"
        ) from None


def of(key: str, file: Path | None) -> str:
    """The key, else the one in the file; "" without either. Raises InvalidInput."""
    return read(file) if not key and file is not None else key
