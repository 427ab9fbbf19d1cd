"""The stand-in for docker.io/library/python:3.11-slim-bookworm, made of Debian's own packages by debootstrap.

It is not the original: Debian's Python is in /usr and its packages in dist-packages, so that a Dockerfile which copies
site-packages by path differs; one that copies a virtual environment does not.
"""

import fcntl
import shutil
from pathlib import Path

from tests.cluster import programs
from tests.cluster.dockerfiles import Builder
from tests.cluster.private import FOLDER

PYTHON = "docker.io/library/python:3.11-slim-bookworm"

KEPT = programs.CACHE / "cluster-images"
_CONFIG = Path(__file__).parent / "config"
_PACKAGES = ("python3", "python3-pip", "python3-venv", "ca-certificates")

# What the original has not (archives, manuals) or has otherwise (pip installs for the whole system; python is python3).
_ADJUST = """
cd "$1"
rm -rf dev/* var/cache/apt/* var/lib/apt/lists/* usr/share/doc/* usr/share/man/* usr/share/locale/* var/log/*
rm -f usr/lib/python3*/EXTERNALLY-MANAGED
ln -sf /usr/bin/python3 usr/local/bin/python
ln -sf /usr/bin/python3 usr/local/bin/python3
ln -sf /usr/bin/pip3 usr/local/bin/pip
tar --create --file=../context/rootfs.tar --numeric-owner .
"""


def builder() -> Builder:
    """The builder whose images are kept from one run to the next, with PYTHON in it; about two minutes the first time."""
    kept = Builder(KEPT)
    kept.folder.mkdir(parents=True, exist_ok=True)
    with (kept.folder / "base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would make it in one place
        if not kept.has(PYTHON):
            _make(kept)
    return kept


def _make(kept: Builder) -> None:
    rootfs, context = FOLDER / "rootfs", kept.folder / "context"
    for left in (kept.folder / "rootfs", context):  # of a run that was cut off
        shutil.rmtree(left, ignore_errors=True)
    context.mkdir()
    kept.run("debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", "bookworm", rootfs)
    kept.run("sh", "-ec", _ADJUST, "sh", rootfs)
    shutil.copy(_CONFIG / "python-base.Dockerfile", context / "Dockerfile")
    kept.build(context, PYTHON)
    for done in (kept.folder / "rootfs", context):
        shutil.rmtree(done)
