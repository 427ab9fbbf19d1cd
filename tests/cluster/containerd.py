"""containerd as a node has it: its start, and its import of images."""

import subprocess
from pathlib import Path

from tests.cluster import private, programs
from tests.cluster.daemon import Daemon

CONFIG = Path(__file__).parent / "config" / "containerd.toml"
ROOT = "containerd"
"""Its folder in a node's, as CONFIG says."""


def start(logs: Path) -> Daemon:
    """Start it in a view of `private`, with the cluster's programs on the PATH; return when it answers."""
    daemon = Daemon("containerd", [programs.path("containerd"), "--config", CONFIG], logs)
    daemon.wait_until(_answers, what="containerd's first answer")
    return daemon


def load(archive: Path) -> None:
    """Import and unpack the images of an archive, or of an OCI layout in a folder."""
    words = ("ctr", "-n", "k8s.io", "images", "import", "--local")
    if not archive.is_dir():
        private.run(*words, archive)
        return
    with subprocess.Popen(["tar", "-C", archive, "-cf", "-", "."], stdout=subprocess.PIPE) as layout:
        subprocess.run([*words, "-"], stdin=layout.stdout, stdout=subprocess.DEVNULL, check=True)
    assert layout.returncode == 0, f"tar ended with {layout.returncode}"


def _answers() -> bool:
    return subprocess.run(("ctr", "version"), capture_output=True, check=False).returncode == 0
