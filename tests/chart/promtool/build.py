"""Builds promtool, which unit-tests alerts, with Go, once a content of go.mod and go.sum: three minutes of one core.

`python -m tests.chart.promtool.build`. Without Go there is none, and those tests are skipped.
"""

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

from tests.cluster.build import find_go
from tests.cluster.programs import CACHE, FLAGS

_HERE = Path(__file__).parent
_PACKAGE = "github.com/prometheus/prometheus/cmd/promtool"
_TAGS = "remove_all_sd"  # discovery in twenty clouds is most of it, and no rule needs it


def binary() -> Path:
    """Where it is, or will be."""
    digest = hashlib.sha256(_TAGS.encode())
    for name in ("go.mod", "go.sum"):
        digest.update((_HERE / name).read_bytes())
    return CACHE / f"promtool-{digest.hexdigest()[:16]}" / "promtool"


def build() -> None:
    """Build it unless it is there; another process that builds it is waited for."""
    go, wanted = find_go(), binary()
    if go is None:
        _tell("Go is not installed: the alerts' unit tests are skipped")
        return
    wanted.parent.mkdir(parents=True, exist_ok=True)
    with (wanted.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if wanted.exists():
            return
        _tell(f"Building promtool into {wanted.parent} (once; about 3 minutes) ...")
        part = wanted.parent / ".part"
        part.unlink(missing_ok=True)
        command = [go, "build", *FLAGS, f"-tags={_TAGS}", "-ldflags=-s -w", "-o", str(part), _PACKAGE]
        subprocess.run(command, cwd=_HERE, env={**os.environ, "CGO_ENABLED": "0"}, check=True)
        part.replace(wanted)


def _tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command, whose output this is


if __name__ == "__main__":
    build()
