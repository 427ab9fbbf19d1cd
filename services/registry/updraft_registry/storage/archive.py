"""Stored versions: weights in the store and facts in the catalogue, kept consistent.

The order blob, document, row makes a publication atomic: each appears whole, and the row completes it. After a crash, a
blob without a row is harmless, and a document without a row gets its row at the next start. Documents follow the rows, and
the catalogue lists the stale ones. So a lost catalogue can be rebuilt with phases, pins, policies and history, and rejected
versions stay rejected.
"""

import logging
from collections import Counter
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
from updraft_registry.storage.lock import locked, unusable
from updraft_registry.storage.stores.folder import FolderStore
from updraft_registry.storage.stores.port import Store, Upload
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase

logger = logging.getLogger(__name__)

_EXCLUSIVE_PHASES = (Phase.STABLE, Phase.CANARY)
"""Phases that only one version of a speculator can have."""

Action = Callable[[Speculator, Version, str, int], tuple[Transition, ...]]
"""A person's decision on a version, `decision.promote` or `reject`, with a reason and a time."""

CATALOGUE = "catalogue.sqlite3"
"""File name of the catalogue in the data folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Repairs at start: uploads deleted, versions added from documents, versions that lost their weights."""

    uploads: int
    added: int
    lost: int


class Archive:
    """Synchronous. All calls except `begin` and `verify` come from one thread."""

    def __init__(self, store: Store, catalogue: Catalogue, *, max_draft_bytes: int) -> None:
        self.store = store
        self.max_draft_bytes = max_draft_bytes
        self._has_unreadable_documents = False
        self._unreadable: set[str] = set()
        """Speculators whose own document cannot be read. It is not overwritten, because nothing else may have their salt."""
        self._saltless: set[str] = set()
        """Speculators for which the log says that they have no salt."""
        self.catalogue = catalogue

    def recover(self, now_ms: int) -> Recovered:
        """Make store and catalogue consistent after a crash."""
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
        """Check a manifest; return the number of the version with the same content, if any.

        InvalidInput or NotFound if it does not fit its speculator.
        """
        admission.check_length(manifest)
        admission.check_manifest(manifest, max_bytes=self.max_draft_bytes)
        admission.check_speculator(manifest, self.catalogue.speculator(manifest.speculator))
        known = self.catalogue.find(manifest.speculator, manifest.tensors_digest)
        return known.number if known is not None and not _may_return(known, manifest) else None

    def begin(self, manifest: registry_pb2.Manifest) -> Upload:
        """Start the upload of the weights of an admitted manifest; Exhausted if there is no room."""
        return self.store.begin(manifest.size_bytes)

    def make_room(self, size_bytes: int, evictable: Sequence[tuple[str, Version]], now_ms: int) -> tuple[str, ...]:
        """Delete weights for an upload, in this order of (speculator, version), until there is room.

        Returns the deleted versions as "<speculator>/<number>". Exhausted, without a deletion, if all would not be enough.
        """
        counts = Counter(version.digest for _, version in evictable) if self.store.shares_disk else Counter()
        freed = {digest for digest, count in counts.items() if self.catalogue.num_keeping(digest) == count}
        sizes = {version.digest: version.size_bytes for _, version in evictable if version.digest in freed}
        free_bytes = self.store.free_bytes()
        if free_bytes + sum(sizes.values()) < size_bytes:
            raise Exhausted(_no_room(size_bytes, free_bytes, sizes.values(), shares_disk=self.store.shares_disk))
        evicted = []
        for name, version in (entry for entry in evictable if entry[1].digest in freed):
            if self.store.free_bytes() >= size_bytes:
                break
            self._evict(name, version, now_ms)
            evicted.append(f"{name}/{version.number}")
        self.write_stale_documents()
        return tuple(evicted)

    def verify(self, upload: Upload, manifest: registry_pb2.Manifest) -> None:
        """Raise Corrupt or InvalidInput unless the upload is complete and matches its manifest."""
        upload.seal(manifest.digest)
        checkpoint.verify(upload.path, manifest)
        self.store.prepare(upload, manifest.digest)

    def publish(self, upload: Upload, manifest: registry_pb2.Manifest, now_ms: int) -> tuple[int, bool]:
        """Make a verified upload a version; return its number, and whether it existed already."""
        number = self.admit(manifest)  # again, because another upload may have been faster
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
        """Pin a version (0: no draft), or unpin with None; Conflict unless the version is servable."""
        self.require(name)
        if number:
            version, _ = self.catalogue.version(name, number)
            decision.check_servable(name, version)
        self.catalogue.pin(name, number, reason, now_ms)
        self.write_stale_documents()

    def pause(self, name: str, reason: str, *, is_paused: bool, now_ms: int) -> None:
        """Pause or resume the rollout; NotFound for an unknown speculator."""
        self.require(name)
        self.catalogue.pause(name, is_paused=is_paused, reason=reason, now_ms=now_ms)
        self.write_stale_documents()

    def set_policy(self, name: str, policy: registry_pb2.RolloutPolicy, now_ms: int) -> None:
        """Set the policy of a speculator, which may be new; InvalidInput if it breaks a bound."""
        RolloutPolicy.from_proto(policy, self.catalogue.defaults)
        self.catalogue.set_policy(name, policy, now_ms)
        self.write_stale_documents()

    def tenant_salt(self, name: str) -> bytes:
        """The salt for hashes of tenants; empty if a full disk has no room for it, if there are too many speculators, or if
        the former one is in a document that cannot be read."""
        try:
            return self.salt(name)
        except (Exhausted, Conflict) as error:
            if name not in self._saltless:
                self._saltless.add(name)
                facts = {"speculator": name, "error": str(error)}
                logger.warning("Requests of tenants are not captured, because there is no salt for them", extra=facts)
            return b""

    def salt(self, name: str) -> bytes:
        """The salt for hashes of tenants. Exhausted or Conflict if there is none and none can be made."""
        if name in self._unreadable:
            raise Conflict(
                f"the document of {name} in the store cannot be read, and its salt for tenants may be only there: repair the "
                "document, or delete it to give up older hashes, and restart the registry"
            )
        return self.catalogue.tenants.salt(name)

    def forget(self, name: str, tenant: int, now_ms: int) -> None:
        """Order a tenant to be forgotten. NotFound for a speculator that no pod has connected for and nothing is known of,
        Exhausted or Conflict if it has no salt and gets none."""
        if not self.catalogue.tenants.record(name).salt:
            self.require(name)
            self.salt(name)
        self.catalogue.forget(name, tenant, now_ms)
        self.write_stale_documents()

    def retain(self, name: str, number: int, *, is_retained: bool, now_ms: int) -> None:
        """Exempt the weights of a version from retention, or no longer; Conflict if they are gone already."""
        version, _ = self.catalogue.version(name, number)
        if is_retained and not version.is_kept:
            raise Conflict(f"version {number} of {name} is {version.phase}; its weights are no longer kept")
        if is_retained is not version.is_retained:
            self.catalogue.retain(name, number, is_retained=is_retained, now_ms=now_ms)
            self.write_stale_documents()

    def require(self, name: str) -> None:
        """Raise NotFound for an unknown speculator."""
        names = self.catalogue.names()
        if name not in names:
            raise NotFound(f"there is no speculator {name!r}; known speculators: {', '.join(names) or 'none yet'}")

    def act(self, action: Action, name: str, number: int, reason: str, now_ms: int) -> tuple[Transition, ...]:
        """Promote or reject a version; NotFound if it does not exist, Conflict if that is not allowed."""
        version, _ = self.catalogue.version(name, number)
        speculator = self.catalogue.speculator(name)
        transitions = action(speculator, version, reason, now_ms)
        self.record(name, transitions, speculator.rollout)
        return transitions

    def record(self, name: str, transitions: Sequence[Transition], running: Rollout | None) -> None:
        """Store transitions and the running canary atomically, then update the documents."""
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
        """Delete the blob of a failed publication unless it is needed. If that fails, a sweep deletes it later."""
        if not self._has_unreadable_documents and digest not in self.catalogue.kept_digests():
            with suppress(Unavailable):
                self.store.delete(digest)

    def write_stale_documents(self) -> None:
        """Write the stale documents. One that cannot be written now stays stale."""
        stale = self.catalogue.stale_documents()
        due = [key for key in stale if key[1] != SPECULATOR or key[0] not in self._unreadable]
        written = []
        try:
            for name, number in due:
                self.store.write_document(name, number, self.document(name, number))
                written.append((name, number))
        except (Exhausted, Unavailable) as error:
            logger.warning(
                "Documents not written; will retry", extra={"documents": len(due) - len(written), "error": str(error)}
            )
        try:
            if written:
                self.catalogue.mark_written(written)
        except Exhausted as error:
            logger.warning(
                "Documents written, but still listed as stale", extra={"documents": len(written), "error": str(error)}
            )

    def check_documents(self) -> None:
        """Compare all documents with their rows, and rewrite those that differ."""
        expected = self.catalogue.documents()
        self.catalogue.mark_stale([key for key in expected if self.store.read_document(*key) != self.document(*key)])
        self.write_stale_documents()

    def document(self, name: str, number: int) -> bytes:
        """Expected content of the document of a version, or of the speculator's own."""
        history = self.catalogue.history(name, MAX_EVENTS, number=number)
        if number == SPECULATOR:
            desired, tenants = self.catalogue.speculator(name).desired, self.catalogue.tenants.record(name)
            return speculator_document(name, desired, self.catalogue.policy(name), history, tenants)
        version, manifest = self.catalogue.version(name, number)
        return version_document(version, manifest, history)

    def weights(self, name: str, number: int) -> registry_pb2.Manifest:
        """The manifest of a version; NotFound if its weights are not kept."""
        version, manifest = self.catalogue.version(name, number)
        if not version.is_kept:
            raise NotFound(f"version {number} of {name} is {version.phase}; its weights are no longer kept")
        return manifest

    def sweep(self, speculator: Speculator, keep: Collection[int]) -> int:
        """Delete the weights of versions not in `keep`, and unused blobs; return the number of deleted blobs."""
        swept = [version for version in speculator.versions if version.number not in keep]
        for version in swept:
            self.catalogue.keep(speculator.name, version.number, is_kept=False)
        unneeded = self.store.digests() - self.catalogue.kept_digests()
        if self._has_unreadable_documents:  # an unreadable document may belong to a blob that seems unused
            unneeded &= {version.digest for version in swept}
        for digest in unneeded:
            self.store.delete(digest)
        return len(unneeded)

    def _evict(self, name: str, version: Version, now_ms: int) -> None:
        """The blob goes first, because a full disk has no room for the row. After a crash, `recover` misses it."""
        if self.catalogue.num_keeping(version.digest) == 1:
            self.store.delete(version.digest)
        self.catalogue.evict(name, version.number, now_ms)

    def _add_missing(self, stored: frozenset[str]) -> int:
        """Restore rows from documents, and mark missing documents as stale; return the number of restored rows.

        The speculator's own document comes first, then the newest version, so that only the newest stable one stays stable.
        """
        known = set(self.catalogue.names())
        documents = sorted(self.store.documents(), key=lambda entry: (entry[1] != SPECULATOR, entry[0], -entry[1]))
        added = 0
        for name, number in documents:
            try:
                if number != SPECULATOR:
                    added += self._add_version(name, number, stored)
                else:
                    self._add_speculator(name, is_known=name in known)
            except InvalidInput as error:
                self._has_unreadable_documents = True
                self._unreadable |= {name} if number == SPECULATOR else set()
                logger.warning("Document ignored", extra={"speculator": name, "version": number, "error": str(error)})
        self.catalogue.mark_stale(self.catalogue.documents() - set(documents))
        return added

    def _add_speculator(self, name: str, *, is_known: bool) -> None:
        """A known one without a salt may have it in a document that could not be read before."""
        if is_known and self.catalogue.tenants.record(name).salt:
            return
        desired, history, tenants = read_speculator(self.store.read_document(name, SPECULATOR), name)
        if not is_known:
            self.catalogue.restore(desired, history, tenants)
        elif tenants.salt:
            self.catalogue.restore_tenants(name, tenants)

    def _add_version(self, name: str, number: int, stored: frozenset[str]) -> bool:
        if self.catalogue.has(name, number):
            return False
        version, manifest, history = read_version(self.store.read_document(name, number), name, number)
        same = self.catalogue.find(name, version.tensors_digest)
        if same is not None:
            raise InvalidInput(f"version {same.number} has the same content")
        others = self.catalogue.speculator(name).versions
        if version.phase in _EXCLUSIVE_PHASES and any(other.phase is version.phase for other in others):
            version = replace(version, phase=Phase.SUPERSEDED, reason=f"a newer version was {version.phase}")
        # A version that might still serve gets a transition of its own if its weights are gone.
        is_kept = version.digest in stored or not (version.phase.is_condemned or version.phase is Phase.SUPERSEDED)
        self.catalogue.add(replace(version, is_kept=is_kept), manifest, history)
        return True

    def _mark_lost(self, name: str, version: Version, now_ms: int) -> None:
        """Supersede a version whose weights disappeared from the store. It returns if they are published or restored."""
        logger.warning("Weights are missing in the store", extra={"speculator": name, "version": version.number})
        if not version.phase.is_condemned and version.phase is not Phase.SUPERSEDED:
            gone = Transition(
                number=version.number,
                before=version.phase,
                after=Phase.SUPERSEDED,
                reason="its weights are missing in the store",
                actor=Actor.REGISTRY,
                at_ms=now_ms,
            )
            self.record(name, [gone], self.catalogue.speculator(name).rollout)
        self.catalogue.keep(name, version.number, is_kept=False)


@contextmanager
def open_archive(
    folder: Path, *, defaults: RolloutPolicy, max_draft_bytes: int, store: Callable[[Path], Store] = FolderStore
) -> Iterator[Archive]:
    """Open the archive in a folder, which is created if necessary and locked until the block ends.

    `store` opens the store, which may be elsewhere and use the folder as scratch space.
    """
    with locked(folder):
        try:
            blobs = store(folder)
        except OSError as error:
            raise unusable(folder, error) from error
        with closing(Catalogue(folder / CATALOGUE, defaults=defaults)) as catalogue:
            yield Archive(blobs, catalogue, max_draft_bytes=max_draft_bytes)


def _no_room(size_bytes: int, free_bytes: int, evictable: Collection[int], *, shares_disk: bool) -> str:
    missing_bytes = size_bytes - free_bytes - sum(evictable)
    left = f"has {free_bytes} bytes left and the draft needs {size_bytes}"
    if not shares_disk:
        return f"the volume for uploads {left}: expand it by {missing_bytes} bytes or more"
    freed = "all versions are needed"
    if evictable:
        freed = f"the versions that nobody needs would free only {sum(evictable)}"
    return (
        f"the volume {left}, and {freed}; nothing was deleted: expand the volume by {missing_bytes} bytes or more, or "
        "release retained versions"
    )


def _may_return(known: Version, manifest: registry_pb2.Manifest) -> bool:
    """Whether an upload restores the weights of a known version."""
    return not known.is_kept and not known.phase.is_condemned and known.digest == manifest.digest
