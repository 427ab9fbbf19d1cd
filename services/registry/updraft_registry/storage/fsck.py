"""Integrity checks of stored data, and repairs.

Blobs are hashed, rows are read, and documents are compared with their rows. A repair deletes corrupt blobs and rewrites
wrong documents, and then does what every start does (`Archive.recover`). Lost weights cannot be restored: their version is
superseded until it is published again, or the file is put back and repaired again.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from google.protobuf.message import DecodeError

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.digests import digest_of, tensors_digest
from updraft_chassis.errors import Conflict, Corrupt, InvalidInput, NotFound
from updraft_registry.rollout.version import Version
from updraft_registry.storage.archive import Archive
from updraft_registry.storage.catalogue import Catalogue
from updraft_registry.storage.documents import SPECULATOR, read_speculator, read_version
from updraft_registry.storage.schema import SCHEMA
from updraft_registry.storage.stores.port import Store

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


def check_archive(archive: Archive, uploads: Sequence[Path], flipped: Sequence[Finding]) -> list[Finding]:
    """All findings in store and catalogue; `flipped` are the corrupt blobs. Nothing is changed."""
    sound = archive.store.digests() - {finding.subject for finding in flipped}
    left = [path for folder in uploads if folder.is_dir() for path in sorted(folder.iterdir())]
    leftovers = [Finding(kind=Kind.LEFTOVER, subject=str(path), why="an upload ended early") for path in left]
    return [*flipped, *_check_weights(archive.catalogue, sound), *_check_documents(archive), *leftovers]


def _check_weights(catalogue: Catalogue, stored: frozenset[str]) -> Iterator[Finding]:
    needed = set()
    for version, manifest in versions(catalogue):
        subject = f"{manifest.speculator}/{version.number}"
        if version.is_kept:
            needed.add(version.digest)
        if version.is_kept and version.digest not in stored:
            yield Finding(kind=Kind.LOST, subject=subject, why=f"blob {version.digest} is gone")
        elif not version.is_kept and not version.phase.is_condemned and version.digest in stored:
            needed.add(version.digest)
            yield Finding(kind=Kind.RETURNED, subject=subject, why=f"blob {version.digest} is there again")
    for digest in sorted(stored - needed):
        yield Finding(kind=Kind.STRAY, subject=digest, why="no version needs it; the registry will delete it")


def _check_documents(archive: Archive) -> Iterator[Finding]:
    expected = archive.catalogue.documents()
    for name, number in sorted(expected.union(archive.store.documents())):
        subject = f"{name}/{number}"
        content = archive.store.read_document(name, number)
        if (name, number) not in expected:
            yield from _check_without_row(archive.catalogue, name, number, content)
        elif not content:
            yield Finding(kind=Kind.DOCUMENT, subject=subject, why="it is missing")
        elif content != archive.document(name, number):
            yield Finding(kind=Kind.DOCUMENT, subject=subject, why="it differs from its row")


def _check_without_row(catalogue: Catalogue, name: str, number: int, content: bytes) -> Iterator[Finding]:
    subject = f"{name}/{number}"
    try:
        if number == SPECULATOR:
            read_speculator(content, name)
        else:
            read_version(content, name, number)
    except InvalidInput as error:
        yield Finding(kind=Kind.DOCUMENT, subject=subject, why=f"it has no row and cannot be read: {error}")
    else:
        if number != SPECULATOR or name not in catalogue.names():
            yield Finding(kind=Kind.ROW, subject=subject, why="its document has no row")


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


def repair(findings: Iterable[Finding], archive: Archive, now_ms: int) -> None:
    documents = []
    for finding in findings:
        name, _, number = finding.subject.rpartition("/")
        if finding.kind is Kind.FLIPPED:
            archive.store.delete(finding.subject)
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


def _fault(store: Store, digest: str) -> str:
    """Why a blob is corrupt; empty if it is not."""
    try:
        with store.open(digest) as file:
            actual = digest_of(file)
    except (OSError, Corrupt, NotFound) as error:
        return str(error)
    return "" if actual == digest else f"it hashes to {actual}"
