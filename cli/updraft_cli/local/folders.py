"""Where Updraft keeps things on one machine: the XDG folders, unless the user says otherwise."""

from collections.abc import Mapping
from pathlib import Path


def data_folder(environ: Mapping[str, str]) -> Path:
    """Return the default data folder: what one would miss (versions, replay, samples to learn)."""
    return _home(environ, "XDG_DATA_HOME", ".local/share") / "updraft"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return the default cache folder: what can be made again (converted models)."""
    return _home(environ, "XDG_CACHE_HOME", ".cache") / "updraft"


def _home(environ: Mapping[str, str], variable: str, otherwise: str) -> Path:
    # The XDG specification: a relative path is invalid and must be ignored.
    chosen = Path(environ.get(variable, ""))
    return chosen if chosen.is_absolute() else Path.home() / otherwise
