"""Builds Prometheus and its promtool with Go, once a content of go.mod and go.sum: five minutes of one core.

`python -m tests.chart.prometheus.build`. Without Go there is none, and the tests of alerts and dashboards are skipped.
"""

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

from tests.cluster.build import find_go
from tests.cluster.programs import CACHE, FLAGS

_HERE = Path(__file__).parent
_PACKAGE = "github.com/prometheus/prometheus/cmd"
_PROGRAMS = ("promtool", "prometheus")
_TAGS = "remove_all_sd"  # discovery in twenty clouds is most of it, and no test needs it


def binary(name: str) -> Path:
    """Where a program is, or will be."""
    digest = hashlib.sha256(_TAGS.encode())
    for file in ("go.mod", "go.sum"):
        digest.update((_HERE / file).read_bytes())
    return CACHE / f"prometheus-{digest.hexdigest()[:16]}" / name


def build() -> None:
    """Build what is not there; another process that builds is waited for."""
    go, folder = find_go(), binary("lock").parent
    if go is None:
        _tell("Go is not installed: the tests of alerts and dashboards are skipped")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in _PROGRAMS:
            if not binary(name).exists():
                _tell(f"Building {name} into {folder} (once; about 3 minutes) ...")
                _build_one(go, name)


def _build_one(go: str, name: str) -> None:
    part = binary(".part")
    part.unlink(missing_ok=True)
    command = [go, "build", *FLAGS, f"-tags={_TAGS}", "-ldflags=-s -w", "-o", str(part), f"{_PACKAGE}/{name}"]
    subprocess.run(command, cwd=_HERE, env={**os.environ, "CGO_ENABLED": "0"}, check=True)
    part.replace(binary(name))


def _tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command, whose output this is


if __name__ == "__main__":
    build()
