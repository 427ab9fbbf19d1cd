"""Versions at rest: weights in the store, facts in the catalogue, brought in together.

Order makes a publication atomic: blob, then document, then row; each appears whole, and the row is the
publication. What a crash leaves of one is harmless (a blob without a row) or finished at the next start (a
document without a row). Documents follow the rows (the catalogue knows which are due), so that a lost catalogue
is rebuilt with phases, pins, policies and history, and what was rejected stays rejected.
"""

import fcntl
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Conflict, Exhausted, InvalidInput, NotFound, Unavailable
from updraft_registry.messages import admission, wire
from updraft_registry.rollout import decision
from updraft_registry.rollout.version import Actor, Rollout, Speculator, Transition, Version
from updraft_registry.storage import checkpoint
from updraft_registry.storage.catalogue import Catalogue, published
from updraft_registry.storage.documents import (
    MAX_EVENTS,
    SPECULATOR,
    read_speculator,
    read_version,
    speculator_document,
    version_document,
)
from updraft_registry.storage.stores.folder import FolderStore
from updraft_registry.storage.stores.port import Store, Upload
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase

logger = logging.getLogger(__name__)

_EXCLUSIVE_PHASES = (Phase.STABLE, Phase.CANARY)
"""No two versions of a speculator are in one of these."""

Act = Callable[[Speculator, Version, str, int], tuple[Transition, ...]]
"""What a person does to a version, with a reason and at a time."""

CATALOGUE = "catalogue.sqlite3"
"""Its file in the data folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What a start found to mend: interrupted uploads deleted, versions added again, versions whose weights are gone."""

    uploads: int
    added: int
    lost: int


class Archive:
    """Synchronous; all calls but `begin` and `verify` come from one thread, and so one after the other."""

    def __init__(self, store: Store, catalogue: Catalogue, *, max_draft_bytes: int) -> None:
        self.store = store
        self._max_draft_bytes = max_draft_bytes
        self._has_unreadable_documents = False
        self.catalogue = catalogue

    def recover(self, now_ms: int) -> Recovered:
        """Bring store and catalogue together after whatever ended the last run."""
        uploads, stored, lost = self.store.clean(), self.store.digests(), 0
        added = self._add_missing(stored)
        for name in self.catalogue.names():
            for version in self.catalogue.speculator(name).versions:
                if version.digest not in stored:
                    self._mark_lost(name, version, now_ms)
                    lost += 1
        self.write_stale_documents()
        return Recovered(uploads=uploads, added=added, lost=lost)

    def admit(self, manifest: registry_pb2.Manifest) -> int | None:
        """Check a manifest before its weights come; return the number of the version with the same content, if any.

        InvalidInput or NotFound if it cannot be a version of its speculator.
        """
        admission.check_length(manifest)
        admission.check_manifest(manifest, max_bytes=self._max_draft_bytes)
        admission.check_lineage(manifest, self.catalogue.speculator(manifest.speculator))
        known = self.catalogue.find(manifest.speculator, manifest.tensors_digest)
        return known.number if known is not None and not _may_return(known, manifest) else None

    def begin(self, manifest: registry_pb2.Manifest) -> Upload:
        """Start the upload of the weights of an admitted manifest."""
        return self.store.begin(manifest.size_bytes)

    def verify(self, upload: Upload, manifest: registry_pb2.Manifest) -> None:
        """Raise Corrupt or InvalidInput unless the whole upload arrived and is what the manifest says."""
        upload.seal(manifest.digest)
        checkpoint.verify(upload.path, manifest)
        self.store.prepare(upload, manifest.digest)

    def publish(self, upload: Upload, manifest: registry_pb2.Manifest, now_ms: int) -> tuple[int, bool]:
        """Make a verified upload a version; return its number, and whether it had been one already."""
        number = self.admit(manifest)  # again: another upload may have been faster
        if number is not None:
            return number, True
        known = self.catalogue.find(manifest.speculator, manifest.tensors_digest)
        self.store.commit(upload, manifest.digest)
        try:
            if known is not None:
                self.catalogue.keep(manifest.speculator, known.number, is_kept=True)
                return known.number, True
            return self._add(manifest, now_ms), False
        except (Exhausted, Unavailable):
            self._drop(manifest.digest)
            raise

    def pin(self, name: str, number: int | None, reason: str, now_ms: int) -> None:
        """Pin a kept version that was never condemned (0: no draft), or unpin with None; NotFound or Conflict otherwise."""
        self.require(name)
        if number:
            version, _ = self.catalogue.version(name, number)
            decision.check_servable(name, version)
        self.catalogue.pin(name, number, reason, now_ms)
        self.write_stale_documents()

    def pause(self, name: str, *, is_paused: bool, reason: str, now_ms: int) -> None:
        """Pause or resume the rollout; NotFound for a speculator that nobody knows."""
        self.require(name)
        self.catalogue.pause(name, is_paused=is_paused, reason=reason, now_ms=now_ms)
        self.write_stale_documents()

    def set_policy(self, name: str, policy: registry_pb2.RolloutPolicy, now_ms: int) -> None:
        """Set the policy of a speculator, known or not; InvalidInput for one that this registry cannot follow."""
        RolloutPolicy.from_proto(policy, self.catalogue.defaults)
        self.catalogue.set_policy(name, policy, now_ms)
        self.write_stale_documents()

    def retain(self, name: str, number: int, *, is_retained: bool, now_ms: int) -> None:
        """Keep the weights of a version whatever retention says, or no longer.

        NotFound for one that was never published, Conflict for one whose weights are gone already.
        """
        version, _ = self.catalogue.version(name, number)
        if is_retained and not version.is_kept:
            raise Conflict(f"version {number} of {name} is {version.phase}; its weights are no longer kept")
        if is_retained is not version.is_retained:
            self.catalogue.retain(name, number, is_retained=is_retained, now_ms=now_ms)
            self.write_stale_documents()

    def require(self, name: str) -> None:
        """Raise NotFound unless something was published to the speculator or wished of it."""
        names = self.catalogue.names()
        if name not in names:
            raise NotFound(f"there is no speculator {name!r}; known are {', '.join(names) or 'none yet'}")

    def promote(self, name: str, number: int, reason: str, now_ms: int) -> tuple[Transition, ...]:
        """Make a version stable now, whatever the gates say; NotFound or Conflict if it may not be."""
        return self._act(decision.promote, name, number, reason, now_ms)

    def reject(self, name: str, number: int, reason: str, now_ms: int) -> tuple[Transition, ...]:
        """Never serve a version again; NotFound for one that was never published."""
        return self._act(decision.reject, name, number, reason, now_ms)

    def record(self, name: str, transitions: Sequence[Transition], running: Rollout | None) -> None:
        """Apply transitions and note the canary that runs then, all or nothing; the documents follow."""
        self.catalogue.record(name, transitions, running)
        self.write_stale_documents()

    def _add(self, manifest: registry_pb2.Manifest, now_ms: int) -> int:
        version = wire.pending(manifest, self.catalogue.speculator(manifest.speculator).latest + 1, now_ms)
        content = version_document(version, manifest, {0: published(version)})
        try:
            self.store.write_document(manifest.speculator, version.number, content)
            self.catalogue.add(version, manifest)
        except (Exhausted, Unavailable):
            with suppress(Unavailable):
                self.store.delete_document(manifest.speculator, version.number)
            raise
        return version.number

    def _drop(self, digest: str) -> None:
        """Delete the blob of a publication that failed, unless somebody needs it; a sweep deletes what is left."""
        if not self._has_unreadable_documents and digest not in self.catalogue.kept_digests():
            with suppress(Unavailable):
                self.store.delete(digest)

    def _act(self, act: Act, name: str, number: int, reason: str, now_ms: int) -> tuple[Transition, ...]:
        version, _ = self.catalogue.version(name, number)
        speculator = self.catalogue.speculator(name)
        transitions = act(speculator, version, reason, now_ms)
        self.record(name, transitions, speculator.rollout)
        return transitions

    def write_stale_documents(self) -> None:
        """Let documents say what their rows say; one that cannot be written now follows when this is called again."""
        due = self.catalogue.stale_documents()
        written = []
        try:
            for name, number in due:
                self.store.write_document(name, number, self.document(name, number))
                written.append((name, number))
        except (Exhausted, Unavailable) as error:
            logger.warning("Documents left behind", extra={"documents": len(due) - len(written), "error": str(error)})
        try:
            if written:
                self.catalogue.mark_written(written)
        except Exhausted as error:
            logger.warning("Documents are written again", extra={"documents": len(written), "error": str(error)})

    def check_documents(self) -> None:
        """Read all documents, and write those anew that do not say what their rows say."""
        expected = self.catalogue.documents()
        self.catalogue.mark_stale(
            [each for each in expected if self.store.read_document(*each) != self.document(*each)]
        )
        self.write_stale_documents()

    def document(self, name: str, number: int) -> bytes:
        """What the document of a version, or the speculator's own, has to say."""
        history = self.catalogue.history(name, MAX_EVENTS, number=number)
        if number == SPECULATOR:
            return speculator_document(
                name, self.catalogue.speculator(name).desired, self.catalogue.policy(name), history
            )
        version, manifest = self.catalogue.version(name, number)
        return version_document(version, manifest, history)

    def weights(self, name: str, number: int) -> registry_pb2.Manifest:
        """The manifest of a version whose weights are in the store; NotFound if they are not kept."""
        version, manifest = self.catalogue.version(name, number)
        if not version.is_kept:
            raise NotFound(f"version {number} of {name} is {version.phase}; its weights are no longer kept")
        return manifest

    def sweep(self, speculator: Speculator, keep: Collection[int]) -> int:
        """Delete the weights of versions that are not in `keep`, and blobs that no version needs; return how many blobs."""
        swept = [version for version in speculator.versions if version.number not in keep]
        for version in swept:
            self.catalogue.keep(speculator.name, version.number, is_kept=False)
        unneeded = self.store.digests() - self.catalogue.kept_digests()
        if (
            self._has_unreadable_documents
        ):  # a document that could not be read may be of a blob that seems to be nobody's
            unneeded &= {version.digest for version in swept}
        for digest in unneeded:
            self.store.delete(digest)
        return len(unneeded)

    def _add_missing(self, stored: frozenset[str]) -> int:
        """Give documents without a row their row back, and rows without a document theirs; return how many rows.

        The speculator's own comes first, then the newest: of versions that say stable only the newest stays so.
        """
        known = set(self.catalogue.names())
        documents = sorted(self.store.documents(), key=lambda entry: (entry[1] != SPECULATOR, entry[0], -entry[1]))
        added = 0
        for name, number in documents:
            try:
                if number != SPECULATOR:
                    added += self._add_version(name, number, stored)
                elif name not in known:
                    self._add_desired_state(name)
            except InvalidInput as error:
                self._has_unreadable_documents = True
                logger.warning("Document ignored", extra={"speculator": name, "version": number, "error": str(error)})
        self.catalogue.mark_stale(self.catalogue.documents() - set(documents))
        return added

    def _add_version(self, name: str, number: int, stored: frozenset[str]) -> bool:
        if self.catalogue.has(name, number):
            return False
        document = read_version(self.store.read_document(name, number), name, number)
        version = document.version
        same = self.catalogue.find(name, version.tensors_digest)
        if same is not None:
            raise InvalidInput(f"version {same.number} has the same content")
        others = self.catalogue.speculator(name).versions
        if version.phase in _EXCLUSIVE_PHASES and any(other.phase is version.phase for other in others):
            version = replace(version, phase=Phase.SUPERSEDED, reason=f"a newer version was {version.phase}")
        # What was to serve, or might have been, is lost in a transition of its own if its weights are gone.
        is_kept = version.digest in stored or not (version.phase.is_condemned or version.phase is Phase.SUPERSEDED)
        self.catalogue.add(replace(version, is_kept=is_kept), document.manifest, document.history)
        return True

    def _add_desired_state(self, name: str) -> None:
        document = read_speculator(self.store.read_document(name, SPECULATOR), name)
        self.catalogue.restore(document.desired, document.history)

    def _mark_lost(self, name: str, version: Version, now_ms: int) -> None:
        """Weights that vanished from the store cannot be served before they are published, or put back, again."""
        logger.warning("Weights are gone from the store", extra={"speculator": name, "version": version.number})
        if not version.phase.is_condemned and version.phase is not Phase.SUPERSEDED:
            gone = Transition(
                number=version.number,
                before=version.phase,
                after=Phase.SUPERSEDED,
                reason="its weights are gone from the store",
                actor=Actor.REGISTRY,
                at_ms=now_ms,
            )
            self.record(name, [gone], self.catalogue.speculator(name).rollout)
        self.catalogue.keep(name, version.number, is_kept=False)


@contextmanager
def open_archive(
    folder: Path, *, defaults: RolloutPolicy, max_draft_bytes: int, store: Callable[[Path], Store] = FolderStore
) -> Iterator[Archive]:
    """The archive in a folder, created if need be, and this process's alone until the block ends.

    `store` opens its store, which may be elsewhere and use the folder as scratch space.
    """
    with locked(folder):
        try:
            blobs = store(folder)
        except OSError as error:
            raise _unusable(folder, error) from error
        with closing(Catalogue(folder / CATALOGUE, defaults=defaults)) as catalogue:
            yield Archive(blobs, catalogue, max_draft_bytes=max_draft_bytes)


def _unusable(folder: Path, error: OSError) -> InvalidInput:
    return InvalidInput(f"cannot use {folder} ({error.strerror}); set UPDRAFT_REGISTRY_DATA_DIR to a folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one process: two registries would delete each other's uploads.

    The kernel frees it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise _unusable(folder, error) from error
    with file:
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
