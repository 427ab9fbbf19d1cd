"""The cgroup that a cluster's pods live in, in every hierarchy of version 1 or in the one of version 2."""

from pathlib import Path

from tests.support.wait import wait_until

_MOUNT = Path("/sys/fs/cgroup")


def make(name: str) -> None:
    """Create it where the kubelet looks for it."""
    for parent in _hierarchies():
        group = parent / name
        group.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # version 1 lets no process into a set that is empty
            if (parent / setting).exists():
                (group / setting).write_text((parent / setting).read_text())


def remove(name: str) -> None:
    """Remove it with all below it, once the last of its processes has left it."""
    wait_until(lambda: all(_is_removed(group) for group in existing(name)), what=f"the end of cgroup {name}")


def existing(name: str) -> list[Path]:
    """Where it still is."""
    return [parent / name for parent in _hierarchies() if (parent / name).exists()]


def _is_removed(group: Path) -> bool:
    try:
        for below in sorted(group.rglob("*/"), reverse=True):  # the deepest first
            below.rmdir()
        group.rmdir()
    except OSError:  # the kernel still counts a process that has just died
        return False
    return True


def _hierarchies() -> list[Path]:
    if (_MOUNT / "cgroup.controllers").exists():
        return [_MOUNT]
    return [path for path in _MOUNT.iterdir() if path.is_dir() and not path.is_symlink()]
