"""Writes the folder that adds Updraft's plugin to a stock engine: a PYTHONPATH entry with the metadata that pip would write.

Engines find plugins by entry point, so the packages alone are not enough. Nothing is installed into the server's image or
environment.
"""

import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from updraft_chassis.errors import InvalidInput
from updraft_chassis.leftovers import remove_stale
from updraft_inference.tap.server_kind import SGLANG, ServerKind
from updraft_tap import __version__

_TAP = "updraft_tap"
_PART = ".part-"


def write(folder: Path, kind: ServerKind = SGLANG) -> Path:
    """Write the plugin to `folder` unless it is up to date. It may be a volume, so nothing is written outside it.

    A folder is for one engine: each has its own copy of what both share.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.glob(f"{_PART}*"))
        with tempfile.TemporaryDirectory(prefix=_PART, dir=folder) as part:
            fresh = Path(part)
            _fill(fresh, kind)
            if _contents(fresh, kind) != _contents(folder, kind):
                for old in _ours(folder, kind):
                    shutil.rmtree(old)
                for new in fresh.iterdir():
                    new.rename(folder / new.name)
    except OSError as error:
        raise InvalidInput(f"cannot write the {kind.engine} plugin to {folder}: {error}") from error
    return folder


def _fill(folder: Path, kind: ServerKind) -> None:
    for name in (_TAP, kind.package):
        with as_file(files(name)) as source:
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = kind.package
    dist_info = folder / f"{package}-{__version__}.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {__version__}\n")
    (dist_info / "entry_points.txt").write_text(f"[{kind.group}]\nupdraft = {package}.plugin:register\n")


def _contents(folder: Path, kind: ServerKind) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in _ours(folder, kind)
        for path in part.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _ours(folder: Path, kind: ServerKind) -> list[Path]:
    return [path for name in (_TAP, kind.package) for path in folder.glob(f"{name}*")]
