"""Builds the virtual environment of a stock SGLang into the cache: `python -m tests.sglang.build`.

One environment for each content of requirements.txt and standin/, each Python and each torch; it is complete once it holds
the file `ready`. One build at a time has the lock. SGLang's own requirements name CUDA-only packages, so pip gets exact pins
and `--no-deps`.
torch (4.7 GB) is not installed again: its files are linked (hard links) from the environment that runs this. The stand-in
for SGLang's kernels is copied in, so `python -m sglang.launch_server` of this environment starts on a CPU by itself.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

_HERE = Path(__file__).parent
REQUIREMENTS = _HERE / "requirements.txt"
STANDIN = _HERE / "standin"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "updraft"

_SHARED = ("torch", "triton", "nvidia-", "cuda-")
"""How the names of torch's own packages begin (torchvision is among the requirements: no other part needs it)."""


class BuildError(Exception):
    """The build cannot go on; the message says what failed."""


def folder() -> Path:
    """Where the environment is, or will be."""
    digest = hashlib.sha256()
    for path in (REQUIREMENTS, *_standin_files()):
        digest.update(f"{path.relative_to(_HERE)}\0".encode() + path.read_bytes() + b"\0")
    digest.update("\0".join((sys.version, sys.base_prefix, metadata.version("torch"))).encode())
    return CACHE / f"sglang-{digest.hexdigest()[:16]}"


def python() -> Path:
    """The environment's interpreter."""
    return folder() / "bin" / "python"


def is_built() -> bool:
    """Whether tests can start the server."""
    return (folder() / "ready").exists()


def build(tell: Callable[[str], None]) -> Path:
    """Build the environment unless it is there, telling each step in a line; return its folder. Raises BuildError."""
    target = folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f"{target.name}.lock"), tell):
        if is_built():
            return target
        tell(f"Building SGLang's environment into {target} (once; about 1 minute, 0.5 GB) ...")
        shutil.rmtree(target, ignore_errors=True)  # what a build that was cut off left
        steps = (("an empty environment", _create), ("pinned packages", _install), ("torch, linked", _share))
        for name, step in steps:
            started = time.monotonic()
            step(target)
            tell(f"  {name}: {time.monotonic() - started:.0f} s")
        shutil.copytree(STANDIN, _site_packages(target), dirs_exist_ok=True, ignore=_no_bytecode)
        (target / "ready").touch()
    return target


@contextmanager
def _lock(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("Another build of SGLang's environment is under way; waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create(target: Path) -> None:
    _run(sys.executable, "-m", "venv", str(target))


def _install(target: Path) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile")
    _run(str(target / "bin" / "python"), "-m", "pip", "install", *options, "-r", str(REQUIREMENTS))


def _share(target: Path) -> None:
    site = _site_packages(target)
    for distribution in metadata.distributions():
        if not distribution.metadata["Name"].startswith(_SHARED) or distribution.files is None:
            continue
        for file in distribution.files:
            if file.parts[0] != "..":  # programs
                _link(Path(str(file.locate())), site / file)


def _link(source: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        copy.hardlink_to(source)
    except FileNotFoundError:  # bytecode that Python has since thrown away
        return
    except OSError:  # another filesystem
        shutil.copy2(source, copy)


def _run(*command: str) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise BuildError(f"`{' '.join(command)}` failed; its words are above")


def _site_packages(target: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(target)}))


def _standin_files() -> list[Path]:
    return sorted(path for path in STANDIN.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _no_bytecode(_: str, names: list[str]) -> set[str]:
    return {"__pycache__"} & set(names)


if __name__ == "__main__":
    try:
        build(print)
    except BuildError as error:
        sys.exit(str(error))
