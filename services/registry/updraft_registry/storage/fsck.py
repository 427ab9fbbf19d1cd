"""Integrity checks of stored data, and repairs.

Blobs are hashed, rows are read, and documents are compared with their rows. A repair deletes corrupt blobs and rewrites
wrong documents, and then does what every start does (`Archive.recover`). Lost weights cannot be restored: their version is
superseded until it is published again, or the file is put back and repaired again.
"""

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from google.protobuf.message import DecodeError

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.digests import tensors_digest
from updraft_chassis.errors import Conflict, Corrupt, InvalidInput, NotFound
from updraft_registry.rollout.version import Version
from updraft_registry.storage.archive import Archive
from updraft_registry.storage.catalogue import Catalogue
from updraft_registry.storage.documents import SPECULATOR, read_speculator, read_version
from updraft_registry.storage.schema import SCHEMA
from updraft_registry.storage.stores.port import Store

_BLOCK_BYTES = 4 * 1024 * 1024
_PAGE = 100

Progress = Callable[[int, int], None]
"""Called with the bytes hashed so far, and the total."""


class Kind(StrEnum):
    """Kinds of findings. The last two are not damage."""

    CATALOGUE = "catalogue"
    FLIPPED = "flipped blob"
    LOST = "lost weights"
    ROW = "missing row"
    DOCUMENT = "document"
    LEFTOVER = "leftover"
    STRAY = "stray blob"
    RETURNED = "returned weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One finding of a check."""

    kind: Kind
    subject: str
    """A blob's digest, "<speculator>/<number>" of a version or its document, or a file."""
    why: str

    @property
    def is_damage(self) -> bool:
        """Whether data is damaged. A stray blob is not: crashes and retention leave some, and the registry deletes them."""
        return self.kind not in (Kind.STRAY, Kind.RETURNED)


def check_catalogue(path: Path, store: Store, *, may_migrate: bool) -> list[Finding]:
    """Damage that makes the catalogue unreadable, so that it must be rebuilt first; Conflict for another schema."""
    if not path.exists():
        is_empty = not any(store.documents())
        return [] if is_empty else [Finding(kind=Kind.CATALOGUE, subject=str(path), why="it is missing")]
    try:
        with closing(sqlite3.connect(path)) as database:
            (schema,) = database.execute("PRAGMA user_version").fetchone()
            (sound,) = database.execute("PRAGMA integrity_check(1)").fetchone()
            orphan = database.execute("PRAGMA foreign_key_check").fetchone()
    except sqlite3.DatabaseError as error:
        return [Finding(kind=Kind.CATALOGUE, subject=str(path), why=str(error))]
    if 0 < schema < SCHEMA and not may_migrate:
        raise Conflict(f"{path} has schema {schema}: start this registry once, or repair, to bring it to {SCHEMA}")
    why = str(sound).partition("\n")[2] or str(sound) if sound != "ok" else ""
    why = why or (f"a row of {orphan[0]} has no speculator" if orphan else "")
    return [Finding(kind=Kind.CATALOGUE, subject=str(path), why=why)] if why else []


def check_rows(catalogue: Catalogue, path: Path) -> list[Finding]:
    """Unreadable or contradictory rows: damage that SQLite does not detect."""
    subject = str(path)
    try:
        for name in catalogue.names():
            subject = name
            catalogue.speculator(name)
            for _ in catalogue.history(name, -1):
                pass
        for version, manifest in versions(catalogue):
            subject = f"{manifest.speculator}/{version.number}"
            if tensors_digest(manifest.tensors) != manifest.tensors_digest:
                return [Finding(kind=Kind.CATALOGUE, subject=subject, why="its manifest contradicts its own digest")]
    except (DecodeError, InvalidInput, Corrupt, ValueError, KeyError, TypeError) as error:
        return [Finding(kind=Kind.CATALOGUE, subject=subject, why=f"its row cannot be read: {error}")]
    return []


class Check:
    """Checks of a store and its catalogue. Nothing is changed."""

    def __init__(self, store: Store, archive: Archive, uploads: Sequence[Path]) -> None:
        self._store = store
        self._archive = archive
        self._uploads = uploads

    def findings(self, flipped: Iterable[Finding]) -> list[Finding]:
        """All findings; `flipped` are the corrupt blobs."""
        bad = list(flipped)
        sound = self._store.digests() - {finding.subject for finding in bad}
        found = [*bad, *self._weights(sound), *self._documents()]
        left = [path for uploads in self._uploads if uploads.is_dir() for path in sorted(uploads.iterdir())]
        return found + [Finding(kind=Kind.LEFTOVER, subject=str(path), why="an upload ended early") for path in left]

    def _weights(self, stored: frozenset[str]) -> Iterator[Finding]:
        needed = set()
        for version, manifest in versions(self._archive.catalogue):
            subject = f"{manifest.speculator}/{version.number}"
            if version.is_kept:
                needed.add(version.digest)
            if version.is_kept and version.digest not in stored:
                yield Finding(kind=Kind.LOST, subject=subject, why=f"blob {version.digest} is gone")
            elif _may_return(version) and version.digest in stored:
                needed.add(version.digest)
                yield Finding(kind=Kind.RETURNED, subject=subject, why=f"blob {version.digest} is there again")
        for digest in sorted(stored - needed):
            yield Finding(kind=Kind.STRAY, subject=digest, why="no version needs it; the registry will delete it")

    def _documents(self) -> Iterator[Finding]:
        catalogue = self._archive.catalogue
        expected, found = catalogue.documents(), set(self._store.documents())
        for name, number in sorted(expected | found):
            subject = f"{name}/{number}"
            content = self._store.read_document(name, number)
            if (name, number) not in expected:
                yield from self._without_row(name, number, content)
            elif not content:
                yield Finding(kind=Kind.DOCUMENT, subject=subject, why="it is missing")
            elif content != self._archive.document(name, number):
                yield Finding(kind=Kind.DOCUMENT, subject=subject, why="it differs from its row")

    def _without_row(self, name: str, number: int, content: bytes) -> Iterator[Finding]:
        subject = f"{name}/{number}"
        try:
            if number != SPECULATOR:
                read_version(content, name, number)
                yield Finding(kind=Kind.ROW, subject=subject, why="its document has no row")
            else:
                read_speculator(content, name)
                if name not in self._archive.catalogue.names():
                    yield Finding(kind=Kind.ROW, subject=subject, why="its document has no row")
        except InvalidInput as error:
            yield Finding(kind=Kind.DOCUMENT, subject=subject, why=f"it has no row and cannot be read: {error}")


def find_flipped(store: Store, catalogue: Catalogue, progress: Progress) -> Iterator[Finding]:
    """Hash all blobs. One that fails is read again, in case the machine is failing."""
    digests = sorted(store.digests())
    sizes = {manifest.digest: manifest.size_bytes for _, manifest in versions(catalogue)}
    total, done = sum(sizes.get(digest, 0) for digest in digests), 0
    for digest in digests:
        progress(done, total)
        why = _fault(store, digest) and _fault(store, digest)
        if why:
            yield Finding(kind=Kind.FLIPPED, subject=digest, why=why)
        done += sizes.get(digest, 0)
    progress(total, total)


def repair(findings: Iterable[Finding], store: Store, archive: Archive, now_ms: int) -> None:
    """Repair what can be repaired. Check again for the rest."""
    documents = []
    for finding in findings:
        name, _, number = finding.subject.rpartition("/")
        if finding.kind is Kind.FLIPPED:
            store.delete(finding.subject)
        elif finding.kind is Kind.DOCUMENT:
            documents.append((name, int(number)))
        elif finding.kind is Kind.RETURNED:
            archive.catalogue.keep(name, int(number), is_kept=True)
    archive.catalogue.mark_stale(archive.catalogue.documents() & set(documents))
    archive.recover(now_ms)


def versions(catalogue: Catalogue) -> Iterator[tuple[Version, registry_pb2.Manifest]]:
    """All rows of versions, a page at a time."""
    after = None
    while page := catalogue.page("", after=after, size=_PAGE):
        yield from page
        version, manifest = page[-1]
        after = (manifest.speculator, version.number)


def _may_return(version: Version) -> bool:
    return not version.is_kept and not version.phase.is_condemned


def _fault(store: Store, digest: str) -> str:
    """Why a blob is corrupt; empty if it is not."""
    sha256 = hashlib.sha256()
    try:
        with store.open(digest) as file:
            while block := file.read(_BLOCK_BYTES):
                sha256.update(block)
    except (OSError, Corrupt, NotFound) as error:
        return str(error)
    return "" if f"sha256:{sha256.hexdigest()}" == digest else f"it hashes to sha256:{sha256.hexdigest()}"
