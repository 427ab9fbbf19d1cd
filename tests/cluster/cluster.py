"""A whole node of Kubernetes in namespaces of its own: up, in, down. Needs root, and Debian's runc and CNI plugins.

All that a cluster is lives in one folder, one process namespace and one cgroup. Its only opening is a port of the
machine's loopback interface that leads to the API server; its own network reaches nothing.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from tests.cluster import cgroups, control_plane, folders, identities, images, programs
from tests.cluster.access import Api
from tests.cluster.control_plane import LOOPBACK, ControlPlane
from tests.cluster.daemon import Daemon
from tests.support.processes import is_alive
from tests.support.wait import wait_until

GPU = "nvidia.com/gpu"
"""An extended resource that stands in for GPUs: it is counted and scheduled as real ones are."""
GPUS = 4

NODE_GB = 2.0
"""Disk for a node's databases and logs, and for all that its pods write; without room for it, no node starts."""

_FIRST_PROCESS = "first-process.json"
_START_S = 180.0
_NODE = f"/api/v1/nodes/{identities.NODE}"

# Program by the Debian package that has it.
_PACKAGES = {
    "runc": "/usr/sbin/runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "/usr/sbin/iptables",
    "iproute2": "/usr/sbin/ip",
    "buildah": "/usr/bin/buildah",
    "debootstrap": "/usr/sbin/debootstrap",
}


class ClusterError(Exception):
    """A cluster cannot be started here; the message says why."""


def missing_packages() -> list[str]:
    """Debian packages that the node needs and that are not installed."""
    return [package for package, program in _PACKAGES.items() if not Path(program).exists()]


def obstacle() -> str:
    """Why no node can run here, in one sentence; empty when one can."""
    if os.geteuid() != 0:
        return "the node needs root, to make namespaces"
    if packages := missing_packages():
        return f"the node needs Debian packages: apt-get install {' '.join(packages)}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster(ControlPlane):
    """A cluster that runs, known by its folder."""

    def enter(self, *command: str | Path, stdin: IO[bytes] | None = None) -> str:
        """Run a command in the cluster's namespaces, its programs on the PATH; return what it prints."""
        result = subprocess.run(
            self._inside(command),
            env=self._environment(),
            stdin=stdin or subprocess.DEVNULL,
            text=True,
            capture_output=True,
            check=False,
            timeout=600,
        )
        assert result.returncode == 0, f"{command[0]}: {result.stderr or result.stdout}"
        return result.stdout

    def start(self, *command: str | Path) -> "subprocess.Popen[bytes]":
        """Start a command in the cluster's namespaces, in the checkout; the caller ends its process group."""
        return subprocess.Popen(
            self._inside(["env", f"--chdir={programs.CHECKOUT}", *command]),
            env=self._environment(),
            start_new_session=True,
        )

    def _inside(self, command: Sequence[str | Path]) -> list[str | Path]:
        first = _first_process(self.folder)
        assert first is not None, f"the cluster in {self.folder} has ended"
        namespaces = ("--mount", "--net", "--pid", "--ipc", "--uts")
        return ["nsenter", f"--target={first.pid}", *namespaces, "--", *command]

    @staticmethod
    def _environment() -> dict[str, str]:
        return {**os.environ, "PATH": f"{programs.binaries()}:{os.environ['PATH']}"}

    def processes(self) -> list[psutil.Process]:
        """Every process of the cluster, as seen from outside; those of pods too."""
        return _processes(self.folder)

    def load(self, archive: Path) -> None:
        """Give the node the images of a docker or OCI archive; pods then use them with `imagePullPolicy: IfNotPresent`."""
        with archive.open("rb") as content:
            self.enter("ctr", "-n", "k8s.io", "images", "import", "--local", "-", stdin=content)


@contextmanager
def cluster(fill: Callable[[Path], None] | None = None) -> Iterator[Cluster]:
    """A cluster of one's own in a temporary folder, ended with this process; nothing of it is left afterwards.

    `fill` gets the folder before the start.
    """
    make_room()
    with ExitStack() as ending:
        folder = ending.enter_context(folders.owned())
        ending.callback(down, folder)
        if fill is not None:
            fill(folder)
        running, init = up(folder)
        ending.callback(init.kill)
        yield running


def make_room() -> None:
    """Remove nodes whose process was killed; raise ClusterError if there is still too little disk for another."""
    left = ""
    for folder in folders.abandoned():
        try:
            down(folder)
        except (TimeoutError, OSError) as error:  # no reason against a node of our own, if there is room
            left = f"; {folder}, whose process was killed, could not be removed: {error}"
    if why := folders.shortage(Path(tempfile.gettempdir()), NODE_GB, "a node"):
        raise ClusterError(why + left)


def up(folder: Path, *, is_detached: bool = False) -> tuple[Cluster, Daemon]:
    """Start a cluster in a folder that is empty, or has images; return it once its node is Ready, with its first process.

    A detached one outlives this process. Raises ClusterError when none can run here, StartError when it does not start.
    """
    if why := obstacle() or folders.shortage(folder, NODE_GB, "a node"):
        raise ClusterError(why)
    with socket.create_server((LOOPBACK, 0)) as listener:
        _prepare(folder, port=listener.getsockname()[1])
        command: list[str | Path] = [
            *("unshare", "--mount", "--mount-proc", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"),
            *("env", f"--chdir={programs.CHECKOUT}", sys.executable, "-m", "tests.cluster.inside"),
            *(folder, str(listener.fileno()), cgroup(folder)),
        ]
        init = Daemon("init", command, folder, descriptors=[listener.fileno()], is_detached=is_detached)
    running = Cluster(folder=folder, has_controllers=True)
    try:
        init.wait_until(lambda: _note_first_process(folder, init), what="the first process inside")
        init.wait_until((folder / "ready").exists, what="the start of the cluster's programs", timeout_s=_START_S)
        with running.api() as api:
            init.wait_until(lambda: _is_usable(api), what="a node that is Ready")
            api.patch(f"{_NODE}/status", {"status": {"capacity": {GPU: str(GPUS)}}})
    except BaseException:
        init.kill()
        raise
    return running, init


def down(folder: Path) -> None:
    """End the cluster of this folder and remove all that is left of it; without a cluster, do nothing."""
    dying = _processes(folder)
    for process in dying[:1]:  # the kernel ends all others with the first, and may show that as dead before them
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait_until(lambda: not any(is_alive(process.pid) for process in dying), what="the end of the cluster's processes")
    cgroups.remove(cgroup(folder))
    folders.remove(folder)


def is_up(folder: Path) -> bool:
    """Whether the cluster of this folder runs, with a node that was Ready."""
    return (folder / "ready").exists() and _first_process(folder) is not None


def _prepare(folder: Path, *, port: int) -> None:
    """What must be there before the namespaces are: who is who, the image that holds pods, the cgroup of pods."""
    # The same port inside and outside: one kubeconfig serves both.
    service = "kubernetes.default.svc"
    names = ["kubernetes", "kubernetes.default", service, f"{service}.{control_plane.DOMAIN}"]
    hosts = [*names, LOOPBACK, control_plane.API_SERVICE]
    identities.write(folder / "identities", server=f"https://{LOOPBACK}:{port}", hosts=hosts)
    images.pack(folder / "pause.tar", "localhost/pause:1", programs.path("pause"))
    cgroups.make(cgroup(folder))


def _is_usable(api: Api) -> bool:
    """A node that is Ready takes no pod before its namespace has a service account."""
    if not api.exists(_NODE) or not api.exists("/api/v1/namespaces/default/serviceaccounts/default"):
        return False
    conditions = api.get(_NODE)["status"].get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def cgroup(folder: Path) -> str:
    """A name that no other cluster has, and that is known even when its start was cut off."""
    return f"updraft-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


def _note_first_process(folder: Path, init: Daemon) -> bool:
    """Write down which process is the first one inside; False while there is none."""
    children = psutil.Process(init.process.pid).children()
    for child in children:
        note = {"pid": child.pid, "started": child.create_time()}
        (folder / _FIRST_PROCESS).write_text(json.dumps(note))
    return children != []


def _first_process(folder: Path) -> psutil.Process | None:
    """The first process inside, unless it has ended; another that got its number since is not taken for it."""
    try:
        note = json.loads((folder / _FIRST_PROCESS).read_text())
        process = psutil.Process(note["pid"])
        return process if process.create_time() == note["started"] else None
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None


def _processes(folder: Path) -> list[psutil.Process]:
    """The first process inside, then its descendants; none when it has ended."""
    first = _first_process(folder)
    try:
        return [] if first is None else [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
