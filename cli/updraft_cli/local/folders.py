"""Default folders on one machine, by the XDG specification."""

from collections.abc import Mapping
from pathlib import Path


def data_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder for data worth keeping: versions, replay, samples."""
    return _home(environ, "XDG_DATA_HOME", ".local/share") / "updraft"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder for files that can be made again: converted models."""
    return _home(environ, "XDG_CACHE_HOME", ".cache") / "updraft"


def state_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of notes about what runs."""
    return _home(environ, "XDG_STATE_HOME", ".local/state") / "updraft"


def _home(environ: Mapping[str, str], variable: str, otherwise: str) -> Path:
    # The XDG specification: a relative path is invalid and must be ignored.
    chosen = Path(environ.get(variable, ""))
    return chosen if chosen.is_absolute() else Path.home() / otherwise
