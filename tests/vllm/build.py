"""Builds the virtual environment of stock vLLM into the cache, once for each content of requirements.txt and Python.

`python -m tests.vllm.build`. The pins are complete, so nothing is resolved. A build that was cut off starts anew (pip
replaces no half of a package), and one at a time holds the lock. Refused: to share torch with the project's own environment,
for then a test of stock vLLM would run beside packages that nobody gave it.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "updraft"

_PEAK_BYTES = 10_000_000_000
"""What is unpacked, and pip's downloads beside it until they are."""
_PACKAGES_A_LINE = 40


class BuildError(Exception):
    """The build cannot go on; the message says what is missing or what failed."""


def python() -> Path:
    """The environment's interpreter, there once `is_built`."""
    return _folder() / "bin" / "python"


def is_built() -> bool:
    """Whether everything is installed."""
    return _ready(_folder()).exists()


def build(tell: Callable[[str], None]) -> None:
    """Build it unless it is there, telling each step in a line; another process that builds it is waited for."""
    folder = _folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock"), tell):
        if is_built():
            return
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if free < _PEAK_BYTES:
            raise BuildError(
                f"vLLM needs {_PEAK_BYTES / 1e9:.0f} GB of disk while it installs, {free / 1e9:.1f} GB are free"
            )
        started = time.monotonic()
        tell(f"Installing vLLM into {folder} (once; about 3 minutes, 6 GB, mostly torch) ...")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        _install(tell)
        _ready(folder).touch()
        tell(f"  done in {time.monotonic() - started:.0f} s")


def _folder() -> Path:
    """The cache folder, named by all that decides what is in it."""
    content = REQUIREMENTS.read_text() + sys.version + sys.base_prefix
    return CACHE / f"vllm-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _ready(folder: Path) -> Path:
    return folder / "ready"


def _install(tell: Callable[[str], None]) -> None:
    options = ("--no-deps", "--no-cache-dir", "--no-compile", "--progress-bar=off", "--disable-pip-version-check")
    command = [str(python()), "-m", "pip", "install", *options, "-r", str(REQUIREMENTS)]
    total = sum("==" in line for line in REQUIREMENTS.read_text().splitlines())
    said: deque[str] = deque(maxlen=20)
    done = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            said.append(line)
            if line.startswith("Collecting "):
                done += 1
                if done % _PACKAGES_A_LINE == 0:
                    tell(f"  {done} of {total} packages fetched")
            elif line.startswith("Installing collected packages"):
                tell("  unpacking")
    if pip.returncode != 0:
        raise BuildError(f"pip failed with status {pip.returncode}; it last said:\n{''.join(said)}")


@contextmanager
def _lock(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("Another process installs vLLM; waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command, whose output this is


if __name__ == "__main__":
    try:
        build(_tell)
    except BuildError as error:
        sys.exit(str(error))
