"""Writes the folder that adds Updraft's plugin to a stock SGLang: a PYTHONPATH entry with the metadata that pip would write.

SGLang finds plugins by entry point, so the package alone is not enough. Nothing is installed into the server's image or
environment.
"""

import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from updraft_chassis.errors import InvalidInput
from updraft_chassis.leftovers import remove_stale
from updraft_tap import __version__

_TAP = "updraft_tap"
_NAME = "updraft_sglang"
_PACKAGES = (_TAP, _NAME)
_PART = ".part-"
_ENTRY_POINTS = f"[sglang.srt.plugins]\nupdraft = {_NAME}.plugin:register\n"
_METADATA = f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {__version__}\n"


def write(folder: Path) -> Path:
    """Write the plugin to `folder` unless it is up to date. It may be a volume, so nothing is written outside it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.glob(f"{_PART}*"))
        with tempfile.TemporaryDirectory(prefix=_PART, dir=folder) as part:
            fresh = Path(part)
            _fill(fresh)
            if _contents(fresh) != _contents(folder):
                for old in _ours(folder):
                    shutil.rmtree(old)
                for new in fresh.iterdir():
                    new.rename(folder / new.name)
    except OSError as error:
        raise InvalidInput(f"cannot write the SGLang plugin to {folder}: {error}") from error
    return folder


def _fill(folder: Path) -> None:
    for name in _PACKAGES:
        with as_file(files(name)) as package:
            shutil.copytree(package, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    dist_info = folder / f"{_NAME}-{__version__}.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(_METADATA)
    (dist_info / "entry_points.txt").write_text(_ENTRY_POINTS)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in _ours(folder)
        for path in part.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _ours(folder: Path) -> list[Path]:
    return [path for name in _PACKAGES for path in folder.glob(f"{name}*")]
