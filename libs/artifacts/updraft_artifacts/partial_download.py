"""A version being downloaded: a `.part` folder that is renamed when it is complete and verified.

<version>-<digest>.part/model.safetensors    the weights so far
<version>-<digest>.part/<base>.delta         or the delta so far, to a local version
"""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import delta
from updraft_chassis.errors import Corrupt, Unavailable, full_disk_as_exhausted

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "manifest.json"

_BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBase:
    """A local version that looks complete by its manifest and size. The open file keeps its data from being deleted."""

    version: int
    digest: str
    size_bytes: int
    file: BinaryIO


class PartialDownload:
    """An exclusively locked `.part` folder, see `open_partial`."""

    def __init__(self, part: Path, manifest: pb.Manifest, weights: BinaryIO, base: DeltaBase | None) -> None:
        self._part = part
        self.manifest = manifest
        self._weights = weights
        self.base = base
        self._sha256 = hashlib.sha256()
        self._num_hashed = 0
        self._is_verified = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights so far."""
        return self._weights.tell()

    def append(self, data: bytes | bytearray) -> None:
        """Add to the weights. They are hashed as they arrive, so that they need not be read again at the end."""
        self._hash_rest()
        self._weights.write(data)
        self._sha256.update(data)
        self._num_hashed += len(data)

    @contextmanager
    def delta(self, base: DeltaBase) -> Iterator[BinaryIO]:
        """The delta to `base` downloaded so far, positioned at its end."""
        with (self._part / f"{base.version}.delta").open("a+b") as file:
            yield file

    def apply(self, file: BinaryIO) -> None:
        """Build the weights from a complete delta; Corrupt, and no weights, if the result does not match."""
        assert self.base is not None
        expected = delta.Header(
            base_bytes=self.base.size_bytes,
            result_bytes=self.manifest.size_bytes,
            base_digest=self.base.digest,
            result_digest=self.manifest.digest,
        )
        file.seek(0)
        try:
            delta.decode(file, self.base.file, self._weights, expected)
        except (Corrupt, OSError):
            self.start_over()
            raise
        self._is_verified = True

    def start_over(self) -> None:
        """Discard the weights downloaded so far."""
        self._weights.seek(0)
        self._weights.truncate()
        self._sha256, self._num_hashed = hashlib.sha256(), 0

    def forget_delta(self, base: DeltaBase) -> None:
        (self._part / f"{base.version}.delta").unlink(missing_ok=True)

    def is_whole(self) -> bool:
        """Whether the weights match the manifest. Reads the part that an earlier attempt downloaded."""
        return self._is_verified or self._digest() == self.manifest.digest

    def finish(self, final: Path) -> None:
        """Verify, then rename to `final`, after everything is on disk. Corrupt discards the download."""
        self._weights.flush()
        os.fsync(self._weights.fileno())
        if not self.is_whole():
            shutil.rmtree(self._part)
            raise Corrupt(f"the downloaded weights hash to {self._digest()}, expected {self.manifest.digest}")
        _write(self._part / CONFIG, self.manifest.config_json)
        _write(self._part / MANIFEST, json_format.MessageToJson(self.manifest, preserving_proto_field_name=True))
        for used in self._part.glob("*.delta"):
            used.unlink()
        shutil.rmtree(final, ignore_errors=True)  # incomplete or another digest, otherwise it would have been returned
        self._part.rename(final)
        for stale in final.parent.glob(f"{final.name}-*.part"):
            shutil.rmtree(stale)

    def _digest(self) -> str:
        self._hash_rest()
        return f"sha256:{self._sha256.hexdigest()}"

    def _hash_rest(self) -> None:
        """Hash the bytes of an earlier attempt."""
        if self._num_hashed == self.num_bytes:
            return
        self._weights.flush()
        with (self._part / WEIGHTS).open("rb") as file:
            file.seek(self._num_hashed)
            while data := file.read(_BLOCK_BYTES):
                self._sha256.update(data)
                self._num_hashed += len(data)


@contextmanager
def open_partial(folder: Path, version: int, manifest: pb.Manifest, prefer: int | None) -> Iterator[PartialDownload]:
    """Lock the version's `.part` folder; Unavailable while another process holds it, Exhausted if the disk is full.

    A version in `folder` becomes the base of a delta: `prefer`, the parent or the newest, in this order of preference.
    """
    part = folder / f"{version}-{manifest.digest.removeprefix('sha256:')[:12]}.part"
    full = f"no space left for {part}: free some; the next attempt resumes the download"
    with full_disk_as_exhausted(full), _exclusive(part / WEIGHTS) as weights:
        base = _base(folder, manifest, prefer) if not weights.tell() else None  # finish a started full download
        try:
            yield PartialDownload(part, manifest, weights, base)
        finally:
            if base is not None:
                base.file.close()


def _base(folder: Path, manifest: pb.Manifest, prefer: int | None) -> DeltaBase | None:
    held = sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)
    for version in (prefer, manifest.parent_version, *held):
        if version in held and (base := _open(folder / str(version), version, manifest)):
            return base
    return None


def _open(folder: Path, version: int, manifest: pb.Manifest) -> DeltaBase | None:
    """A version of the same speculator that looks complete. It is not hashed, because the result will be."""
    with suppress(OSError, UnicodeDecodeError, json_format.ParseError):
        base = json_format.Parse((folder / MANIFEST).read_text(), pb.Manifest(), ignore_unknown_fields=True)
        size = (folder / WEIGHTS).stat().st_size
        if base.speculator == manifest.speculator and base.digest != manifest.digest and base.size_bytes == size:
            return DeltaBase(version=version, digest=base.digest, size_bytes=size, file=(folder / WEIGHTS).open("rb"))
    return None


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _exclusive(path: Path) -> Iterator[BinaryIO]:
    """Open `path` at its end and lock it: if two processes appended to one file, both would have to start over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(f"{path} is being downloaded by another process") from error
        yield file
