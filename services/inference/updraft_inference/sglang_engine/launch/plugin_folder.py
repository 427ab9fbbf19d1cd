"""The folder that puts Updraft's plugin into a stock SGLang: on its PYTHONPATH, with what pip would have written.

SGLang finds plugins by entry point, so the package alone would not do. Nothing is installed into the server's image or
environment, which stay as they came.
"""

import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from updraft_chassis.errors import InvalidInput
from updraft_sglang import __version__

_NAME = "updraft_sglang"
_ENTRY_POINTS = f"[sglang.srt.plugins]\nupdraft = {_NAME}.plugin:register\n"
_METADATA = f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {__version__}\n"


def write(folder: Path) -> Path:
    """Make `folder` hold the plugin; one that is right stays as it is. It may be a volume: no other place is written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            fresh = Path(part)
            _fill(fresh)
            if _contents(fresh) != _contents(folder):
                for old in folder.glob(f"{_NAME}*"):
                    shutil.rmtree(old)
                for new in fresh.iterdir():
                    new.rename(folder / new.name)
    except OSError as error:
        raise InvalidInput(f"the plugin for SGLang cannot be written to {folder}: {error}") from error
    return folder


def _fill(folder: Path) -> None:
    with as_file(files(_NAME)) as package:
        shutil.copytree(package, folder / _NAME, ignore=shutil.ignore_patterns("__pycache__"))
    about = folder / f"{_NAME}-{__version__}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(_METADATA)
    (about / "entry_points.txt").write_text(_ENTRY_POINTS)


def _contents(folder: Path) -> dict[str, bytes]:
    """What the plugin's files hold, by their names below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in folder.glob(f"{_NAME}*")
        for path in part.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
