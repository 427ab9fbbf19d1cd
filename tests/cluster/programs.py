"""The cluster's programs: which Go packages at which versions, and where their binaries are.

The go.mod and go.sum files in `go/` pin every byte of the sources; the cache folder is named by a hash of them, so that
another version is another folder and an old checkout still finds its own.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
SOURCES = HERE / "go"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "updraft"
FLAGS = ("-trimpath", "-buildvcs=false", "-mod=readonly")


class MissingProgramError(Exception):
    """A program that is not there; the message says how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One folder of `go/`: the programs built from it, with the linker variables that tell them their version."""

    name: str
    packages: dict[str, str]
    """Package by program."""
    pinned: str = ""
    """The module whose version is stamped."""
    stamps: tuple[str, ...] = ()
    """`variable=value`, where {version}, {major} and {minor} are those of `pinned`."""
    tags: str = ""

    def flags(self) -> list[str]:
        """What `go build` is told besides the package and the output."""
        link = " ".join(["-s -w", *(f"-X {stamp.format(**self._version())}" for stamp in self.stamps)])
        return [*FLAGS, f"-tags={self.tags}", f"-ldflags={link}"]

    def _version(self) -> dict[str, str]:
        found = re.search(rf"{re.escape(self.pinned)} (v(\d+)\.(\d+)\S*)", (SOURCES / self.name / "go.mod").read_text())
        assert found is not None, f"go/{self.name}/go.mod does not name {self.pinned}"
        return {"version": found[1], "major": found[2], "minor": found[3]}


def _commands(prefix: str, *names: str) -> dict[str, str]:
    return {name: f"{prefix}/{name}" for name in names}


_VERSION_OF_KUBERNETES = tuple(
    f"{package}.{variable}"
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    for variable in ("gitVersion={version}", "gitMajor={major}", "gitMinor={minor}")
)

# In the order of the build: the control plane, which needs no root, is there first.
MODULES = (
    Module(name="etcd", packages={"etcd": "go.etcd.io/etcd/server/v3"}),
    Module(
        name="kubernetes",
        packages=_commands(
            "k8s.io/kubernetes/cmd",
            *("kube-apiserver", "kube-controller-manager", "kubectl"),
            *("kube-scheduler", "kube-proxy", "kubelet"),
        ),
        pinned="k8s.io/kubernetes",
        stamps=_VERSION_OF_KUBERNETES,
    ),
    Module(name="pods", packages=_commands(".", "pause", "toy")),
    Module(
        name="containerd",
        packages=_commands("github.com/containerd/containerd/v2/cmd", "containerd", "containerd-shim-runc-v2", "ctr"),
        pinned="github.com/containerd/containerd/v2",
        stamps=("github.com/containerd/containerd/v2/version.Version={version}",),
        tags="no_btrfs,no_devmapper,no_zfs,no_tracing",
    ),
    Module(name="coredns", packages={"coredns": "github.com/coredns/coredns"}),
    Module(
        name="helm",
        packages={"helm": "helm.sh/helm/v4/cmd/helm"},
        pinned="helm.sh/helm/v4",
        stamps=("helm.sh/helm/v4/internal/version.version={version}",),
    ),
)


def binaries() -> Path:
    """The cache's folder for these sources and flags, whether or not it is filled."""
    digest = hashlib.sha256(repr(MODULES).encode() + repr(FLAGS).encode())
    for path in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes())
    return CACHE / f"cluster-{digest.hexdigest()[:16]}" / "bin"


def find(name: str) -> Path | None:
    """Where the program is: in KUBEBUILDER_ASSETS when that has it, else in the cache, else None."""
    return next((folder / name for folder in _folders() if (folder / name).exists()), None)


def path(name: str) -> Path:
    """Like `find`, but raises MissingProgramError with a sentence when there is none."""
    found = find(name)
    if found is None:
        places = " or ".join(map(str, _folders()))
        raise MissingProgramError(f"{name} is not in {places}: run `make cluster-build` (once; 10 minutes or more)")
    return found


def _folders() -> list[Path]:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    return [*([Path(assets)] if assets else []), binaries()]
