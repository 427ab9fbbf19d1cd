"""Versions at rest: weights in the store, facts in the catalogue, brought in together.

Order makes a publication atomic: blob, then document, then row; each appears whole, and the row is the
publication. What a crash leaves of one is harmless (a blob without a row) or finished at the next start (a
document without a row). Documents follow the rows, so that a lost catalogue is rebuilt with phases, and what
was rejected stays rejected.
"""

import fcntl
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Conflict, Exhausted, InvalidInput, NotFound
from updraft_registry import admission, checkpoint, wire
from updraft_registry.catalogue import Catalogue
from updraft_registry.stores.folder import FolderStore
from updraft_registry.stores.port import Store, Upload
from updraft_registry.version import Actor, Phase, Policy, Speculator, Transition, Version, stable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What a start found to mend: interrupted uploads deleted, versions added again, versions whose weights are gone."""

    uploads: int
    added: int
    lost: int


class Archive:
    """Synchronous; all calls but `begin` and `verify` come from one thread, and so one after the other."""

    def __init__(self, store: Store, catalogue: Catalogue, *, max_draft_bytes: int) -> None:
        self._store = store
        self._max_draft_bytes = max_draft_bytes
        self.catalogue = catalogue

    def recover(self, now_ms: int) -> Recovered:
        """Bring store and catalogue together after whatever ended the last run."""
        uploads = self._store.clean()
        added = sum(self._add_again(name, number) for name, number in sorted(self._store.documents(), reverse=True))
        stored = self._store.digests()
        lost = 0
        for name in self.catalogue.names():
            for version in self.catalogue.speculator(name).versions:
                if version.digest in stored:
                    self._follow(name, version.number)
                else:
                    self._lose(name, version, now_ms)
                    lost += 1
        return Recovered(uploads=uploads, added=added, lost=lost)

    def admit(self, manifest: registry_pb2.Manifest) -> int | None:
        """Check a manifest before its weights come; return the number of the version with the same content, if any.

        InvalidInput or NotFound if it cannot be a version of its speculator.
        """
        admission.check_manifest(manifest, max_bytes=self._max_draft_bytes)
        admission.check_lineage(manifest, self.catalogue.speculator(manifest.speculator))
        known = self.catalogue.find(manifest.speculator, manifest.tensors_digest)
        return known.number if known is not None and not _may_return(known, manifest) else None

    def begin(self, manifest: registry_pb2.Manifest) -> Upload:
        """Start the upload of the weights of an admitted manifest."""
        return self._store.begin(manifest.size_bytes)

    def verify(self, upload: Upload, manifest: registry_pb2.Manifest) -> None:
        """Raise Corrupt or InvalidInput unless the whole upload arrived and is what the manifest says."""
        upload.seal(manifest.digest)
        checkpoint.verify(upload.path, manifest)

    def publish(self, upload: Upload, manifest: registry_pb2.Manifest, now_ms: int) -> tuple[int, bool]:
        """Make a verified upload a version; return its number, and whether it had been one already."""
        number = self.admit(manifest)  # again: another upload may have been faster
        if number is not None:
            return number, True
        known = self.catalogue.find(manifest.speculator, manifest.tensors_digest)
        self._store.commit(upload, manifest.digest)
        if known is not None:
            self.catalogue.keep(manifest.speculator, known.number, is_kept=True)
            return known.number, True
        version = wire.pending(manifest, self.catalogue.speculator(manifest.speculator).latest + 1, now_ms)
        self._write_document(version, manifest)
        try:
            self.catalogue.add(version, manifest)
        except Exhausted:
            self._store.delete_document(manifest.speculator, version.number)
            raise
        return version.number, False

    def pin(self, name: str, number: int | None, reason: str, now_ms: int) -> None:
        """Pin a kept version that was never condemned (0: no draft), or unpin with None; NotFound or Conflict otherwise."""
        self.require(name)
        if number:
            version, _ = self.catalogue.version(name, number)
            if version.phase.is_condemned:
                raise Conflict(
                    f"version {number} of {name} is {version.phase} and never served again: {version.reason}"
                )
            if not version.is_kept:
                raise Conflict(f"version {number} of {name} is {version.phase}; its weights are no longer kept")
        self.catalogue.pin(name, number, reason, now_ms)

    def pause(self, name: str, *, is_paused: bool, reason: str, now_ms: int) -> None:
        """Pause or resume the rollout; NotFound for a speculator that nobody knows."""
        self.require(name)
        self.catalogue.pause(name, is_paused=is_paused, reason=reason, now_ms=now_ms)

    def require(self, name: str) -> None:
        """Raise NotFound unless something was published to the speculator or wished of it."""
        names = self.catalogue.names()
        if name not in names:
            raise NotFound(f"there is no speculator {name!r}; known are {', '.join(names) or 'none yet'}")

    def record(self, name: str, transitions: Sequence[Transition]) -> None:
        """Apply transitions, all or none.

        The documents follow; one that cannot be written follows at the next start.
        """
        self.catalogue.record(name, transitions)
        for number in sorted({transition.number for transition in transitions}):
            try:
                self._follow(name, number)
            except Exhausted as error:
                logger.warning(
                    "Document left behind", extra={"speculator": name, "version": number, "error": str(error)}
                )

    def open(self, name: str, number: int) -> tuple[BinaryIO, registry_pb2.Manifest]:
        """The weights of a version, to be read and closed by the caller; NotFound if they are not kept."""
        version, manifest = self.catalogue.version(name, number)
        if not version.is_kept:
            raise NotFound(f"version {number} of {name} is {version.phase}; its weights are no longer kept")
        return self._store.open(version.digest), manifest

    def sweep(self, speculator: Speculator, keep: Collection[int]) -> int:
        """Delete the weights of versions that are not in `keep`, and blobs that no version needs; return how many blobs."""
        for version in speculator.versions:
            if version.number not in keep:
                self.catalogue.keep(speculator.name, version.number, is_kept=False)
        unneeded = self._store.digests() - self.catalogue.kept_digests()
        for digest in unneeded:
            self._store.delete(digest)
        return len(unneeded)

    def _add_again(self, name: str, number: int) -> bool:
        """Give a document without a row its row back. Newest first: only the newest stable one stays so."""
        if self.catalogue.has(name, number):
            return False
        try:
            message = self._read_document(name, number)
        except InvalidInput as error:
            logger.warning("Document ignored", extra={"speculator": name, "version": number, "error": str(error)})
            return False
        version = wire.version_from_proto(message)
        if version.phase is Phase.STABLE and stable(self.catalogue.speculator(name).versions) is not None:
            version = replace(version, phase=Phase.SUPERSEDED, reason="a newer version was stable")
        is_kept = version.digest in self._store.digests()
        self.catalogue.add(replace(version, is_kept=is_kept), message.manifest)
        return True

    def _read_document(self, name: str, number: int) -> registry_pb2.Version:
        """A document that can become a row; InvalidInput otherwise."""
        message = _parse(self._store.read_document(name, number), name, number)
        same = self.catalogue.find(name, message.manifest.tensors_digest)
        if same is not None:
            raise InvalidInput(f"version {same.number} has the same content")
        return message

    def _lose(self, name: str, version: Version, now_ms: int) -> None:
        """Weights that vanished from the store cannot be served again."""
        logger.warning("Weights are gone from the store", extra={"speculator": name, "version": version.number})
        if not version.phase.is_condemned:
            gone = Transition(
                number=version.number,
                before=version.phase,
                after=Phase.FAILED,
                reason="its weights are gone from the store",
                actor=Actor.REGISTRY,
                at_ms=now_ms,
            )
            self.record(name, [gone])
        self.catalogue.keep(name, version.number, is_kept=False)

    def _follow(self, name: str, number: int) -> None:
        """Let the document of a version say what its row says."""
        version, manifest = self.catalogue.version(name, number)
        self._write_document(version, manifest)

    def _write_document(self, version: Version, manifest: registry_pb2.Manifest) -> None:
        content = _document(version, manifest)
        if content != self._store.read_document(manifest.speculator, version.number):
            self._store.write_document(manifest.speculator, version.number, content)


@contextmanager
def open_archive(folder: Path, *, defaults: Policy, max_draft_bytes: int) -> Iterator[Archive]:
    """The archive in a folder, created if need be, and this process's alone until the block ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store = FolderStore(folder)
    except OSError as error:
        raise InvalidInput(
            f"cannot use {folder} ({error.strerror}); set UPDRAFT_REGISTRY_DATA_DIR to a folder"
        ) from error
    with _lock(folder), closing(Catalogue(folder / "catalogue.sqlite3", defaults=defaults)) as catalogue:
        yield Archive(store, catalogue, max_draft_bytes=max_draft_bytes)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder for one process: two registries would delete each other's uploads.

    The kernel frees it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another registry works in {folder}; stop it or set another UPDRAFT_REGISTRY_DATA_DIR"
            ) from None
        yield


def _may_return(known: Version, manifest: registry_pb2.Manifest) -> bool:
    """Whether an upload brings back the weights of a version that is remembered but no longer kept."""
    return not known.is_kept and not known.phase.is_condemned and known.digest == manifest.digest


def _document(version: Version, manifest: registry_pb2.Manifest) -> bytes:
    message = wire.version_to_proto(version, manifest)
    return json_format.MessageToJson(message, preserving_proto_field_name=True).encode()


def _parse(content: bytes, name: str, number: int) -> registry_pb2.Version:
    """A document that is whole and in its place; InvalidInput otherwise."""
    message = registry_pb2.Version()
    try:
        json_format.Parse(content, message, ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise InvalidInput(f"it is no document of a version: {error}") from None
    if (message.manifest.speculator, message.version) != (name, number):
        raise InvalidInput(f"it is of version {message.version} of {message.manifest.speculator!r}")
    admission.check_manifest(message.manifest, max_bytes=message.manifest.size_bytes)
    return message
