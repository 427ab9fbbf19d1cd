"""Images in one OCI layout, in which a layer that several images share, or that a former run has put there, is once.

buildah would read and compress each layer of each image again. It takes a layer for present when there is a file with its
name, so it is shown empty ones, and what it then writes in the manifest is replaced by the layer as we have it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.dockerfiles import Builder
from tests.cluster.private import FOLDER

Json = dict[str, Any]

_NAME = "org.opencontainers.image.ref.name"
_ID = "updraft.dev/image-id"
"""Annotation of an entry that is finished."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A folder of the builder's; of one process at a time."""

    builder: Builder
    name: str = "layout"

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.builder.folder / self.name

    def has(self, reference: str) -> bool:
        """Whether an image of this name is finished."""
        return reference in self._entries()

    def put(self, reference: str, image_id: str) -> None:
        """Write an image that the builder has; nothing if this one is there under its name."""
        here = self._entries()
        if here.get(reference, {}).get("annotations", {}).get(_ID) == image_id:
            return
        known = {digest: layer for entry in here.values() for digest, layer in self._layers(entry)}
        with self._shown(known):
            # By its id: another checkout may have given the name to an image of its own. zstd: a node unpacks it in less time.
            target = f"oci:{FOLDER / self.name}:{reference}"
            self.builder.buildah("push", "--quiet", "--compression-format=zstd", image_id, target)
        written = next(
            entry for entry in self._index()["manifests"] if entry.get("annotations", {}).get(_NAME) == reference
        )
        manifest = self._read(written["digest"])
        manifest["layers"] = [known.get(layer["digest"], layer) for layer in manifest["layers"]]
        digest, size = self._write(manifest)
        finished = {**written, "digest": digest, "size": size, "annotations": {_NAME: reference, _ID: image_id}}
        self._keep({**here, reference: finished})

    def _keep(self, entries: dict[str, Json]) -> None:
        """Let the layout have these entries, and delete what belongs to no one."""
        index = json.dumps({"schemaVersion": 2, "manifests": list(entries.values())})
        _replace(self.folder / "index.json", index.encode())
        used = set()
        for entry in entries.values():
            manifest = self._read(entry["digest"])
            used |= {entry["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])}
        for path in (self.folder / "blobs" / "sha256").iterdir():
            if f"sha256:{path.name}" not in used:
                path.unlink()

    @contextmanager
    def _shown(self, known: dict[str, Json]) -> Iterator[None]:
        """Empty files, named as layers are that are not compressed."""
        paths = [self._blob(digest) for digest in known]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        try:
            yield
        finally:
            for path in paths:
                path.unlink()

    def _entries(self) -> dict[str, Json]:
        """The finished images by name."""
        noted = [(entry.get("annotations", {}), entry) for entry in self._index()["manifests"]]
        return {notes[_NAME]: entry for notes, entry in noted if {_NAME, _ID} <= notes.keys()}

    def _layers(self, entry: Json) -> list[tuple[str, Json]]:
        """The layers of an image by the digest of what they hold."""
        manifest = self._read(entry["digest"])
        held = self._read(manifest["config"]["digest"])["rootfs"]["diff_ids"]
        return list(zip(held, manifest["layers"], strict=True))

    def _index(self) -> Json:
        path = self.folder / "index.json"
        index: Json = json.loads(path.read_text()) if path.exists() else {"manifests": []}
        return index

    def _read(self, digest: str) -> Json:
        content: Json = json.loads(self._blob(digest).read_bytes())
        return content

    def _write(self, content: Json) -> tuple[str, int]:
        data = json.dumps(content).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        _replace(self._blob(digest), data)
        return digest, len(data)

    def _blob(self, digest: str) -> Path:
        return self.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _replace(path: Path, data: bytes) -> None:
    """Write a file anew; nodes may have links to the former one, and a process that is killed leaves that."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
