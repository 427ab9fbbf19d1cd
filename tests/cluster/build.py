"""Builds the cluster's programs into the cache, once for each content of `go/`.

A program that is there is never built again, each appears in one rename, and one build at a time holds the lock: a build
that was cut off goes on where it was (Go's own cache keeps what was compiled), and two wait for each other.
Sources come from the Go module proxy as Go is set up here; nothing else is downloaded.
"""

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import programs


class BuildError(Exception):
    """The build cannot go on; the message says what is missing or what failed."""


def find_go() -> str | None:
    """Where Go is; also at its usual place, which is not on everyone's PATH."""
    return shutil.which("go") or shutil.which("/usr/local/go/bin/go")


def build(
    tell: Callable[[str], None],
    *,
    go: str | None,
    folder: Path,
    modules: Sequence[programs.Module] = programs.MODULES,
) -> None:
    """Build into `folder` what is not there, telling each step in a line. Raises BuildError."""
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / "lock", tell):
        wanted = [(module, name) for module in modules for name in module.packages]
        missing = [(module, name) for module, name in wanted if not (folder / name).exists()]
        if not missing:
            return
        if go is None:
            raise BuildError("Go is not installed: the test cluster is built from Go modules (Go 1.26.6 or later)")
        tell(f"Building {len(missing)} programs into {folder} (once; all take 10 to 20 minutes on two cores) ...")
        for number, (module, name) in enumerate(missing, start=1):
            started = time.monotonic()
            _build_one(go, module, name, folder)
            tell(f"  {number}/{len(missing)} {name}: {time.monotonic() - started:.0f} s")


@contextmanager
def _lock(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("Another build of the cluster is under way; waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_one(go: str, module: programs.Module, name: str, folder: Path) -> None:
    part = folder / f".{name}.part"
    part.unlink(missing_ok=True)  # Go replaces no file that it does not take for a program
    result = subprocess.run(
        [go, "build", *module.flags(), "-o", str(part), module.packages[name]],
        cwd=programs.SOURCES / module.name,
        env={**os.environ, "CGO_ENABLED": "0"},
        check=False,
    )
    if result.returncode != 0:
        raise BuildError(f"go build of {name} failed with status {result.returncode}; its words are above")
    part.replace(folder / name)
