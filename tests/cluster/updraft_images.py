"""Our four images, built by the Dockerfile as it stands, and kept from one run to the next.

Unchanged layers are reused, in the builder's storage and in the layout from which a node loads them. The base is the
stand-in of `debian`.
"""

import fcntl
import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import debian, folders
from tests.cluster.cluster import ClusterError
from tests.cluster.dockerfiles import Builder, ImageError
from tests.cluster.layout import Layout
from tests.cluster.programs import CHECKOUT
from tests.cluster.unpacked import Unpacked

EXTRAS = ("operator", "registry", "trainer", "inference")
VERSION: str = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
REVISION, TAG = "tests", "test"
_TRIES = 6
_BUILD_GB = 8.0
"""Disk for all images as the builder keeps them."""
_LAYOUT_GB = 12.0
"""Disk for the layout, and for unpacking it."""


def reference(extra: str, tag: str = TAG) -> str:
    """The name of an image, on the node too."""
    return f"docker.io/updraft/{extra}:{tag}"


@dataclass(frozen=True, slots=True)
class Images:
    """What was built; get it from `built`."""

    ids: dict[str, str]
    builder: Builder = field(default_factory=debian.builder)

    def inspect(self, extra: str) -> dict[str, Any]:
        """What the image says of itself: config, history, layers."""
        told: dict[str, Any] = json.loads(self.builder.buildah("inspect", "--type=image", self.ids[extra]))
        image: dict[str, Any] = told["OCIv1"]
        return image

    @contextmanager
    def container(self, extra: str) -> Iterator["Container"]:
        """A container of the image, as buildah makes one without any engine."""
        name = self.builder.buildah("from", "--pull=never", self.ids[extra]).strip()
        try:
            yield Container(self.builder, name)
        finally:
            self.builder.buildah("rm", name)

    def layout(self) -> Path:
        """A folder with all images, as a node takes them: two minutes the first time, most of them for torch."""
        with _alone(self.builder):
            return self._layout()

    def give(self, node: Path) -> None:
        """Give all images to a node before its start; pods then use them with `imagePullPolicy: IfNotPresent`.

        Takes seconds; after a change of the images, most of a minute once more.
        """
        with _alone(self.builder):
            self._layout()
            _unpacked(self.builder).give(node)

    def _layout(self) -> Path:
        layout = Layout(self.builder)
        for extra, image_id in self.ids.items():
            layout.put(reference(extra), image_id)
        return layout.folder


@dataclass(frozen=True, slots=True)
class Container:
    """A file system to run commands in, as the image's user or another."""

    builder: Builder
    name: str

    def run(self, *command: str, variables: Sequence[str] = (), user: str = "") -> tuple[int, str]:
        """Run a command; return how it ended and what it printed."""
        given = [*(f"--env={variable}" for variable in variables), *([f"--user={user}"] if user else [])]
        script = '"$@" 2>&1; printf "\\n%s" "$?"'
        words = ("--isolation=chroot", *given, self.name, "--", "sh", "-c", script, "sh", *command)
        # On a busy machine buildah was seen to hand on nothing of what was printed, not even the script's own line.
        for _ in range(_TRIES):
            output, _, code = self.builder.buildah("run", *words).rpartition("\n")
            if code:
                return int(code), output.removesuffix("\n")
        raise ImageError(f"buildah ran {command[0]} {_TRIES} times and told nothing of it")


def built(*extras: str) -> Images:
    """The named images, or all four; the first time takes four minutes, unchanged ones some seconds.

    Raises ClusterError when the disk has no room for them.
    """
    _check_room(Builder(debian.KEPT))
    builder = debian.builder()
    ids = {}
    with _alone(builder):
        for extra in extras or EXTRAS:
            # The base image is made here, so it has no digest that a registry knows.
            arguments = {"EXTRA": extra, "VERSION": VERSION, "REVISION": REVISION, "UNPINNED": "yes"}
            builder.build(CHECKOUT, reference(extra), arguments=arguments)
            ids[extra] = builder.buildah("images", "--quiet", "--no-trunc", reference(extra)).strip()
    return Images(ids, builder)


def _check_room(builder: Builder) -> None:
    """Before minutes of work, not after them."""
    builder.folder.mkdir(parents=True, exist_ok=True)
    with _alone(builder):
        unpacked, layout = _unpacked(builder), Layout(builder)
        unpacked.discard_others()
        if all(layout.has(reference(extra)) for extra in EXTRAS):
            num_gb = unpacked.num_gb()
        else:
            num_gb = _LAYOUT_GB if builder.has(reference(EXTRAS[-1])) else _LAYOUT_GB + _BUILD_GB
        if why := folders.shortage(builder.folder, num_gb, "building the images"):
            raise ClusterError(why)


def _unpacked(builder: Builder) -> Unpacked:
    return Unpacked(Layout(builder).folder, builder.folder / "unpacked")


@contextmanager
def _alone(builder: Builder) -> Iterator[None]:
    """Two that build at once would compile everything twice."""
    with (builder.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
