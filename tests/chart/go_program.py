"""A Go program that tests run, built once for each content of its folder, with modules that its go.mod and go.sum pin."""

import fcntl
import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.build import find_go
from tests.cluster.programs import CACHE, FLAGS


@dataclass(frozen=True, slots=True, kw_only=True)
class GoProgram:
    name: str
    folder: Path
    """Its module: go.mod, go.sum and any sources."""
    package: str
    lasts: str
    """How long a build takes, for people."""
    tags: str = ""

    @property
    def binary(self) -> Path:
        """Where it is, or will be."""
        digest = hashlib.sha256(self.tags.encode())
        for path in sorted(path for path in self.folder.iterdir() if path.suffix in {".go", ".mod", ".sum"}):
            digest.update(path.read_bytes())
        return CACHE / f"{self.name}-{digest.hexdigest()[:16]}" / self.name

    def build(self) -> None:
        """Build it unless it is there; another process that builds it is waited for. Without Go there is none."""
        go, wanted = find_go(), self.binary
        if go is None:
            _tell(f"Go is not installed: the tests that need {self.name} are skipped")
            return
        wanted.parent.mkdir(parents=True, exist_ok=True)
        with (wanted.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if wanted.exists():
                return
            _tell(f"Building {self.name} into {wanted.parent} (once; about {self.lasts}) ...")
            part = wanted.parent / ".part"
            part.unlink(missing_ok=True)
            command = [go, "build", *FLAGS, f"-tags={self.tags}", "-ldflags=-s -w", "-o", str(part), self.package]
            subprocess.run(command, cwd=self.folder, env={**os.environ, "CGO_ENABLED": "0"}, check=True)
            part.replace(wanted)


def _tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command, whose output this is


_HERE = Path(__file__).parent

_NO_CLOUDS = "remove_all_sd"  # discovery in twenty clouds is most of Prometheus, and no test needs it

PROMETHEUS, PROMTOOL = (
    GoProgram(
        name=name,
        folder=_HERE / "prometheus",
        package=f"github.com/prometheus/prometheus/cmd/{name}",
        lasts="3 minutes",
        tags=_NO_CLOUDS,
    )
    for name in ("prometheus", "promtool")
)
"""The server answers the queries of dashboards; promtool unit-tests alerts."""

GITOPS = GoProgram(name="gitops", folder=_HERE / "gitops", package=".", lasts="1 minute")
"""Answers what Flux and Helm make of an object, and what any version of Argo CD does with a script."""

ARGOCD = GoProgram(name="argocd", folder=_HERE / "argocd", package=".", lasts="6 minutes")
"""Answers what Argo CD itself makes of an object and its customizations."""

CERT_MANAGER = GoProgram(
    name="certmanager", folder=_HERE.parent / "cluster" / "certmanager", package=".", lasts="2 minutes"
)
"""The controllers of cert-manager that issue certificates."""

KEDA = GoProgram(name="keda", folder=_HERE.parent / "cluster" / "keda", package=".", lasts="5 to 10 minutes")
"""KEDA's controller of ScaledObjects."""


if __name__ == "__main__":
    for program in (PROMTOOL, PROMETHEUS, GITOPS, CERT_MANAGER, ARGOCD, KEDA):
        program.build()
