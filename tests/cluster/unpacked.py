"""Images that were unpacked once, which each new node of this machine takes by hard links rather than importing them.

containerd writes the contents of a layer, packed or unpacked, only once; its containers write to layers of their own. So
nodes can share these files, and one that removes an image removes its own links. Databases are copied.

`python -m tests.cluster.unpacked LAYOUT` unpacks an OCI layout; it runs in a view of `private`.
"""

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import containerd, folders, programs
from tests.cluster.cluster import ClusterError
from tests.cluster.dockerfiles import Builder
from tests.cluster.private import FOLDER

_BLOBS = "io.containerd.content.v1.content/blobs"
_DATABASE = "io.containerd.metadata.v1.bolt/meta.db"
_SHARED = (_BLOBS, "io.containerd.snapshotter.v1.overlayfs/snapshots")
_RATIO = 3.5
"""Bytes that containerd takes for each of a layout, packed and unpacked."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The images of an OCI layout, in a folder that has them for all nodes; of one process at a time."""

    layout: Path
    folder: Path

    def num_gb(self) -> float:
        """What unpacking would take of the disk; 0 when that is done."""
        if self._root().exists() or not self.layout.exists():
            return 0.0
        return _RATIO * _num_gb(self.layout)

    def give(self, node: Path) -> None:
        """Fill the folder of a node that has not started; raise ClusterError when the disk has no room for that."""
        if not self._root().exists():
            self._unpack()
        share(self._root(), node / containerd.ROOT)

    def discard_others(self) -> None:
        """Remove images that have changed since, and what was left by a process that was killed; nodes keep their links."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path != self._root():
                shutil.rmtree(path, ignore_errors=True)

    def _root(self) -> Path:
        """Of these images, as this containerd unpacks them."""
        index = self.layout / "index.json"
        entries = json.loads(index.read_bytes())["manifests"] if index.exists() else []
        known = [sorted(json.dumps(entry, sort_keys=True) for entry in entries), str(programs.binaries())]
        how = containerd.CONFIG.read_bytes() + Path(__file__).read_bytes()
        return self.folder / hashlib.sha256(json.dumps(known).encode() + how).hexdigest()[:16]

    def _unpack(self) -> None:
        self.discard_others()
        if why := folders.shortage(self.folder, self.num_gb(), "unpacking the images"):
            raise ClusterError(why)
        part = self.folder / f"part-{secrets.token_hex(4)}"  # the process of one that was killed may still write
        try:
            Builder(part).run(sys.executable, "-m", __name__, self.layout)
            for blob in (self.layout / "blobs" / "sha256").iterdir():  # the same bytes, which need to be there once
                copy = part / containerd.ROOT / _BLOBS / "sha256" / blob.name
                if copy.exists():
                    copy.unlink()
                    os.link(blob, copy)
            (part / containerd.ROOT).rename(self._root())
        finally:
            shutil.rmtree(part, ignore_errors=True)


def share(root: Path, target: Path) -> None:
    """Give a containerd that has not started what another had at its end: links, or copies on another file system."""
    target.mkdir()
    can_link = _can_link(root, target)
    if not can_link and (why := folders.shortage(target, _num_gb(root), "copying the images")):
        raise ClusterError(why)
    shared = {root / part for part in _SHARED}

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder, name) in shared]

    shutil.copytree(root, target, ignore=ignored, dirs_exist_ok=True)
    for part in _SHARED:
        subprocess.run(["cp", "-a", *(["-l"] if can_link else []), root / part, target / part], check=True)


def _can_link(root: Path, target: Path) -> bool:
    probe = target / "probe"
    try:
        os.link(root / _DATABASE, probe)
    except OSError:
        return False
    probe.unlink()
    return True


def _num_gb(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def main() -> None:
    """Unpack, in FOLDER."""
    os.environ["PATH"] = f"{programs.binaries()}:{os.environ['PATH']}"
    daemon = containerd.start(FOLDER)
    containerd.load(Path(sys.argv[1]))
    daemon.process.terminate()
    assert daemon.process.wait() == 0, daemon.tail()


if __name__ == "__main__":
    main()
