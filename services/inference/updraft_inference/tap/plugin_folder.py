"""Writes the folder that adds Updraft's plugin to a stock engine: a PYTHONPATH entry with the metadata that pip would write.

Engines find plugins by entry point, so the packages alone are not enough. Nothing is installed into the server's image or
environment.
"""

import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from updraft_chassis.errors import InvalidInput
from updraft_chassis.leftovers import remove_stale
from updraft_tap import __version__

_TAP = "updraft_tap"
_PART = ".part-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A package of Updraft that runs inside an engine, and the entry points in which the engine looks for it."""

    package: str
    group: str
    engine: str

    @property
    def packages(self) -> tuple[str, str]:
        return _TAP, self.package


SGLANG = Adapter(package="updraft_sglang", group="sglang.srt.plugins", engine="SGLang")
VLLM = Adapter(package="updraft_vllm", group="vllm.general_plugins", engine="vLLM")


def write(folder: Path, adapter: Adapter = SGLANG) -> Path:
    """Write the plugin to `folder` unless it is up to date. It may be a volume, so nothing is written outside it.

    A folder is for one engine: each has its own copy of what both share.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.glob(f"{_PART}*"))
        with tempfile.TemporaryDirectory(prefix=_PART, dir=folder) as part:
            fresh = Path(part)
            _fill(fresh, adapter)
            if _contents(fresh, adapter) != _contents(folder, adapter):
                for old in _ours(folder, adapter):
                    shutil.rmtree(old)
                for new in fresh.iterdir():
                    new.rename(folder / new.name)
    except OSError as error:
        raise InvalidInput(f"cannot write the {adapter.engine} plugin to {folder}: {error}") from error
    return folder


def _fill(folder: Path, adapter: Adapter) -> None:
    for name in adapter.packages:
        with as_file(files(name)) as source:
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = adapter.package
    dist_info = folder / f"{package}-{__version__}.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {__version__}\n")
    (dist_info / "entry_points.txt").write_text(f"[{adapter.group}]\nupdraft = {package}.plugin:register\n")


def _contents(folder: Path, adapter: Adapter) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in _ours(folder, adapter)
        for path in part.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _ours(folder: Path, adapter: Adapter) -> list[Path]:
    return [path for name in adapter.packages for path in folder.glob(f"{name}*")]
