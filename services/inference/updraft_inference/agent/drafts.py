"""The drafts on the disk of this pod: a bounded cache, and a record of the version that served last.

With the record, a pod that restarts while the registry is down serves its last draft. It is written by rename after the
engine has loaded the draft, so a crash leaves either the old or the new record. The draft is verified before it is used
again.
"""

import json
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import transfer
from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_inference.engine import DraftCheckpoint, HolderInfo

logger = logging.getLogger(__name__)

_NOTE = "serving.json"

NUM_KEPT = 2
"""Versions kept beyond the needed ones, so that going back to the previous version needs no network."""


class DraftFolder:
    """The cache of one speculator: `path`/<version>/ for each version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recent: list[int] = []

    @property
    def versions(self) -> list[int]:
        """Complete versions, ascending. A download in progress has another name."""
        if not self.path.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.name.isdecimal() and entry.is_dir())

    def holds(self, version: int, digest: str | None) -> bool:
        """Whether a version is cached. With `digest`, its weights file is read and must match."""
        return version in self.versions if digest is None else transfer.is_complete(self.path / str(version), digest)

    def remember(self, version: int) -> None:
        """Record that the engine serves `version` (0: none)."""
        self._recent = [*(v for v in self._recent if v != version), version][-NUM_KEPT:]
        self.path.mkdir(parents=True, exist_ok=True)
        draft = self.path / f"{_NOTE}.new"
        with draft.open("w") as file:
            json.dump({"version": version}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path / _NOTE)

    def remembered(self) -> int:
        """The version that served last; 0 if none did or the record is unreadable."""
        try:
            version = json.loads((self.path / _NOTE).read_text())["version"]
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("The record of the last draft is unreadable", extra={"reason": str(error)})
            return 0
        return version if isinstance(version, int) else 0

    def prune(self, wanted: Collection[int]) -> None:
        """Delete versions and unfinished downloads that are neither in `wanted` nor among the last that served."""
        kept = {*wanted, *self._recent}
        for version in self.versions:
            if version not in kept:
                shutil.rmtree(self.path / str(version))
        for part in self.path.glob("*-*.part"):
            number = part.name.partition("-")[0]
            if number.isdecimal() and int(number) not in kept and part.is_dir():  # leave other files alone
                shutil.rmtree(part)


def verified(folder: Path, version: int, info: HolderInfo) -> DraftCheckpoint:
    """A cached version whose weights match its manifest; reads the whole file. Raises Corrupt if they do not, InvalidInput
    for a draft of another target."""
    manifest = read_manifest(folder)
    if manifest is None or not transfer.is_complete(folder, manifest.digest):
        raise Corrupt(f"{folder} does not match its manifest")
    check_target(manifest, info)
    return DraftCheckpoint(version=version, folder=folder, tensors_digest=manifest.tensors_digest)


def read_manifest(folder: Path) -> registry_pb2.Manifest | None:
    """Read manifest.json in `folder`; None if there is none. Raises Corrupt if it is unreadable."""
    path = folder / transfer.MANIFEST
    if not path.is_file():
        return None
    try:
        return json_format.Parse(path.read_text(), registry_pb2.Manifest(), ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path} is unreadable: {error}") from error


def check_target(manifest: registry_pb2.Manifest, info: HolderInfo) -> None:
    """Raises InvalidInput for a draft of another target or tokenizer. An empty fingerprint is not checked."""
    pairs = {
        "target": (manifest.target_fingerprint, info.target_fingerprint),
        "tokenizer": (manifest.tokenizer_fingerprint, info.tokenizer_fingerprint),
    }
    for part, (expected, actual) in pairs.items():
        if expected and expected != actual:
            raise InvalidInput(f"the draft was trained for the {part} {expected}, but this pod serves {actual}")
