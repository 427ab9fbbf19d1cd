"""The catalogue of versions: a SQLite database in WAL mode, with one transaction per change of state.

It is authoritative for phases, desired state and history. Rows outlive weights, so that rejected content stays known.
SQLite enforces the strongest invariant: at most one stable version per speculator. Synchronous, for one thread at a time.
An ORM was refused, because the statements document the schema.
"""

import logging
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput, NotFound
from updraft_chassis.tenants import hashes
from updraft_registry.messages import wire
from updraft_registry.rollout.version import (
    NO_DRAFT,
    Actor,
    DesiredState,
    Rollout,
    Speculator,
    Transition,
    Version,
    name_of,
    with_reason,
)
from updraft_registry.storage.database import Database
from updraft_registry.storage.tenants import TenantRecord, Tenants
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase, Strategy

logger = logging.getLogger(__name__)

History = Mapping[int, Transition]
"""Transitions by number, in order of time; 0: not numbered yet."""


class Catalogue:
    """The database at `path`, created or migrated when opened. `defaults` fills unset fields of policies.

    Exhausted on a full disk, without a change. Corrupt if the file is damaged, Conflict if a newer registry wrote it.
    """

    def __init__(self, path: Path, *, defaults: RolloutPolicy) -> None:
        self.defaults = defaults
        self._database = Database(path)
        self.tenants = Tenants(self._database)
        self._speculators: dict[str, Speculator] = {}
        """Cache, because a canary reads its speculator every second and seldom writes it."""

    def close(self) -> None:
        self._database.close()

    def names(self) -> tuple[str, ...]:
        """All speculators, by name."""
        return tuple(row["name"] for row in self._database.rows("SELECT name FROM speculators ORDER BY name"))

    def speculator(self, name: str) -> Speculator:
        """State of one speculator; empty if it is unknown."""
        known = self._speculators.get(name)
        if known is None:
            known = self._read(name)
            if known.is_known:
                self._speculators[name] = known
        return known

    def _read(self, name: str) -> Speculator:
        row = self._database.row("SELECT * FROM speculators WHERE name = ?", name)
        if row is None:
            return Speculator(name=name, desired=DesiredState(policy=self.defaults), is_known=False)
        versions = self._database.rows("SELECT * FROM versions WHERE speculator = ? AND is_kept ORDER BY number", name)
        return Speculator(
            name=name,
            desired=_desired_state(row, self.defaults),
            target=self._target(name),
            versions=tuple(_parse_version(row)[0] for row in versions),
            rollout=self._rollout(name),
            latest=self._latest(name),
            forgotten_ms=self.tenants.last_ms(name),
        )

    def policy(self, name: str) -> registry_pb2.RolloutPolicy:
        """The policy as it was set; empty if none was set."""
        row = self._database.row("SELECT policy FROM speculators WHERE name = ?", name)
        return registry_pb2.RolloutPolicy.FromString(row["policy"] if row else b"")

    def find(self, name: str, tensors_digest: str) -> Version | None:
        """The version with this content, whether its weights are kept or not."""
        row = self._database.row(
            "SELECT * FROM versions WHERE speculator = ? AND tensors_digest = ?", name, tensors_digest
        )
        return None if row is None else _parse_version(row)[0]

    def has(self, name: str, number: int) -> bool:
        return (
            self._database.row("SELECT 1 FROM versions WHERE speculator = ? AND number = ?", name, number) is not None
        )

    def version(self, name: str, number: int) -> tuple[Version, registry_pb2.Manifest]:
        """A version with its manifest; NotFound if it does not exist."""
        row = self._database.row("SELECT * FROM versions WHERE speculator = ? AND number = ?", name, number)
        if row is None:
            raise NotFound(f"{name} has no version {number}; its newest is {self._latest(name) or 'none yet'}")
        return _parse_version(row)

    def page(
        self, name: str, *, after: tuple[str, int] | None, size: int
    ) -> list[tuple[Version, registry_pb2.Manifest]]:
        """Up to `size` versions of a speculator (empty: all), by name and newest first, after `after`."""
        after_name, after_number = after or ("", 0)
        rows = self._database.rows(
            "SELECT * FROM versions WHERE (? = '' OR speculator = ?) "
            "AND (speculator > ? OR (speculator = ? AND number < ?)) "
            "ORDER BY speculator, number DESC LIMIT ?",
            *(name, name, after_name, after_name, after_number, size),
        )
        return [_parse_version(row) for row in rows]

    def history(self, name: str, limit: int, *, number: int | None = None) -> History:
        """The newest `limit` transitions, newest first; with `number` only those of a version (0: the speculator)."""
        rows = self._database.rows(
            "SELECT * FROM transitions WHERE speculator = ?1 AND (?2 IS NULL OR number = ?2) ORDER BY id DESC LIMIT ?3",
            *(name, number, limit),
        )
        return {row["id"]: parse_transition(row) for row in rows}

    def stale_documents(self) -> list[tuple[str, int]]:
        """Documents that are older than their rows, by speculator and version (0: the speculator's own)."""
        return [(row["speculator"], row["number"]) for row in self._database.rows("SELECT * FROM due ORDER BY 1, 2")]

    def documents(self) -> frozenset[tuple[str, int]]:
        """All documents that must exist. A speculator has its own once its desired state was set."""
        rows = self._database.rows(
            "SELECT speculator, number FROM versions "
            "UNION SELECT speculator, 0 FROM transitions WHERE number = 0 "
            "UNION SELECT name, 0 FROM speculators WHERE pinned IS NOT NULL OR is_paused OR policy <> x'' "
            "OR name IN (SELECT speculator FROM salts)"
        )
        return frozenset((row["speculator"], row["number"]) for row in rows)

    def mark_stale(self, documents: Collection[tuple[str, int]]) -> None:
        if documents:
            with self._transaction():
                for name, number in documents:
                    self._mark_stale(name, number)

    def mark_written(self, written: Sequence[tuple[str, int]]) -> None:
        with self._transaction():
            self._database.execute_many("DELETE FROM due WHERE speculator = ? AND number = ?", written)

    def kept_digests(self) -> frozenset[str]:
        """Blobs that some version needs."""
        return frozenset(
            row["digest"] for row in self._database.rows("SELECT DISTINCT digest FROM versions WHERE is_kept")
        )

    def add(self, version: Version, manifest: registry_pb2.Manifest, history: History | None = None) -> None:
        """Add a version. A restored one has a history."""
        name = manifest.speculator
        with self._transaction():
            self._ensure_speculator(name)
            self._database.execute(
                "INSERT INTO versions (speculator, number, digest, tensors_digest, manifest, phase, reason, "
                "published_ms, since_ms, proven_ms, is_retained, is_kept) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(name, version.number, version.digest, version.tensors_digest, manifest.SerializeToString()),
                    *(version.phase, version.reason, version.published_ms, version.since_ms),
                    *(version.proven_ms, version.is_retained, version.is_kept),
                ),
            )
            self._add_history(name, history or {0: published(version)})

    def restore(self, desired: registry_pb2.SpeculatorState, history: History, tenants: TenantRecord) -> None:
        """Restore the desired state of a speculator, with its history and its tenants: all of it or nothing, because a start
        that finds the speculator here does not read its document again."""
        with self._transaction():
            self._assign(
                desired.speculator,
                history,
                policy=desired.policy.SerializeToString(),
                pinned=desired.pinned if desired.HasField("pinned") else None,
                pin_reason=desired.pin_reason,
                is_paused=desired.paused,
                pause_reason=desired.pause_reason,
            )
            self.tenants.restore(desired.speculator, tenants)

    def restore_tenants(self, name: str, tenants: TenantRecord) -> None:
        """Restore the tenants of a speculator that is known."""
        with self._transaction():
            self.tenants.restore(name, tenants)
            self._mark_stale(name, NO_DRAFT)

    def forget(self, name: str, tenant: int, now_ms: int) -> None:
        """Order a tenant of a speculator, which may be new, to be forgotten. Exhausted if there are too many."""
        with self._transaction():
            self._ensure_speculator(name)
            at_ms = self.tenants.forget(name, tenant, now_ms)
            self._add_history(name, {0: _event(f"tenant {hashes.text(tenant)} is to be forgotten", at_ms)})
            self._mark_stale(name, NO_DRAFT)

    def provenance(self, name: str) -> dict[int, registry_pb2.Provenance]:
        """Where each version of a speculator comes from, in ascending order."""
        rows = self._database.rows("SELECT number, manifest FROM versions WHERE speculator = ? ORDER BY number", name)
        return {row["number"]: registry_pb2.Manifest.FromString(row["manifest"]).provenance for row in rows}

    def record(self, name: str, transitions: Sequence[Transition], rollout: Rollout | None) -> None:
        """Apply transitions in order and store the running canary, atomically."""
        with self._transaction():
            for transition in transitions:
                self._database.execute(
                    "UPDATE versions SET phase = :after, reason = :reason, since_ms = :at_ms, "
                    "proven_ms = coalesce(nullif(:proven_ms, 0), proven_ms) "
                    "WHERE speculator = :name AND number = :number",
                    {"name": name} | asdict(transition),
                )
                self._add_history(name, {0: transition})
            self._database.execute("DELETE FROM rollouts WHERE speculator = ?", (name,))
            if rollout is not None:
                self._database.execute("INSERT INTO rollouts VALUES (?, ?)", (name, rollout.to_json()))

    def pin(self, name: str, number: int | None, reason: str, now_ms: int) -> None:
        """Pin a version (0: no draft), or unpin with None."""
        what = "unpinned" if number is None else f"pinned to {name_of(number)}"
        event = _event(with_reason(what, reason), now_ms, number=number or NO_DRAFT)
        self._set(name, {0: event}, pinned=number, pin_reason="" if number is None else reason)

    def pause(self, name: str, *, is_paused: bool, reason: str, now_ms: int) -> None:
        event = _event(with_reason("paused" if is_paused else "resumed", reason), now_ms)
        self._set(name, {0: event}, is_paused=is_paused, pause_reason=reason if is_paused else "")

    def set_policy(self, name: str, policy: registry_pb2.RolloutPolicy, now_ms: int) -> None:
        """Set the policy of a speculator, which may be new."""
        self._set(name, {0: _event("the policy was set", now_ms)}, policy=policy.SerializeToString())

    def retain(self, name: str, number: int, *, is_retained: bool, now_ms: int) -> None:
        """Exempt the weights of a version from retention, or no longer."""
        what = "retained: its weights are kept" if is_retained else "no longer retained"
        with self._transaction():
            self._database.execute(
                "UPDATE versions SET is_retained = ? WHERE speculator = ? AND number = ?", (is_retained, name, number)
            )
            self._add_history(name, {0: _event(what, now_ms, number=number)})

    def keep(self, name: str, number: int, *, is_kept: bool) -> None:
        """Note whether the weights of a version are in the store."""
        with self._transaction():
            self._database.execute(
                "UPDATE versions SET is_kept = ? WHERE speculator = ? AND number = ?", (is_kept, name, number)
            )

    def evict(self, name: str, number: int, now_ms: int) -> None:
        """Note that the weights of a version had to make room."""
        why = "its weights were deleted, because the volume was full"
        with self._transaction():
            self._database.execute(
                "UPDATE versions SET is_kept = 0 WHERE speculator = ? AND number = ?", (name, number)
            )
            self._add_history(name, {0: replace(_event(why, now_ms, number=number), actor=Actor.REGISTRY)})

    def num_keeping(self, digest: str) -> int:
        """Number of versions that need a blob."""
        row = self._database.row("SELECT count(*) AS num FROM versions WHERE digest = ? AND is_kept", digest)
        return int(row["num"]) if row else 0

    def _set(self, name: str, history: History, **columns: object) -> None:
        """Change the desired state of a speculator, which may be new."""
        with self._transaction():
            self._assign(name, history, **columns)

    def _assign(self, name: str, history: History, **columns: object) -> None:
        """The same within a transaction."""
        assignments = ", ".join(f"{column} = ?" for column in columns)
        self._ensure_speculator(name)
        self._database.execute(
            f"UPDATE speculators SET {assignments} WHERE name = ?",  # noqa: S608 - columns are named in this file
            (*columns.values(), name),
        )
        self._add_history(name, history)
        self._mark_stale(name, NO_DRAFT)

    def _ensure_speculator(self, name: str) -> None:
        self._database.execute("INSERT OR IGNORE INTO speculators (name) VALUES (?)", (name,))
        self._database.execute(
            "INSERT OR IGNORE INTO due SELECT speculator, 0 FROM salts WHERE speculator = ?", (name,)
        )

    def _add_history(self, name: str, history: History) -> None:
        """Add transitions, with their former number if it is free, and mark their documents as stale."""
        for number, transition in sorted(history.items()):
            self._database.execute(
                "INSERT INTO transitions VALUES "
                "((SELECT :id WHERE :id AND NOT EXISTS (SELECT 1 FROM transitions WHERE id = :id)), "
                ":name, :number, :before, :after, :reason, :actor, :at_ms)",
                {"id": number, "name": name} | asdict(transition),
            )
            self._mark_stale(name, transition.number)

    def _mark_stale(self, name: str, number: int) -> None:
        self._database.execute("INSERT OR IGNORE INTO due VALUES (?, ?)", (name, number))

    def _target(self, name: str) -> str:
        """That of the oldest version that was not rejected; empty without one."""
        row = self._database.row(
            "SELECT manifest FROM versions WHERE speculator = ? AND phase <> 'Rejected' ORDER BY number LIMIT 1", name
        )
        return registry_pb2.Manifest.FromString(row["manifest"]).target_fingerprint if row else ""

    def _latest(self, name: str) -> int:
        row = self._database.row("SELECT coalesce(max(number), 0) AS latest FROM versions WHERE speculator = ?", name)
        return int(row["latest"]) if row else 0

    def _rollout(self, name: str) -> Rollout | None:
        row = self._database.row("SELECT state FROM rollouts WHERE speculator = ?", name)
        return None if row is None else Rollout.from_json(row["state"])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._database.transaction():
                yield
        finally:
            self._speculators.clear()


def _parse_version(row: sqlite3.Row) -> tuple[Version, registry_pb2.Manifest]:
    manifest = registry_pb2.Manifest.FromString(row["manifest"])
    version = replace(
        wire.pending(manifest, row["number"], row["published_ms"]),
        phase=Phase(row["phase"]),
        reason=row["reason"],
        since_ms=row["since_ms"],
        proven_ms=row["proven_ms"],
        is_retained=bool(row["is_retained"]),
        is_kept=bool(row["is_kept"]),
    )
    return version, manifest


def _policy(row: sqlite3.Row, defaults: RolloutPolicy) -> RolloutPolicy:
    """The policy that was set, or Manual if it has become invalid because the defaults changed."""
    try:
        return RolloutPolicy.from_proto(registry_pb2.RolloutPolicy.FromString(row["policy"]), defaults)
    except InvalidInput as error:
        facts = {"speculator": row["name"], "error": str(error)}
        logger.warning("Policy is invalid; new versions wait for a person until it is replaced", extra=facts)
        return replace(defaults, strategy=Strategy.MANUAL)


def _desired_state(row: sqlite3.Row, defaults: RolloutPolicy) -> DesiredState:
    return DesiredState(
        policy=_policy(row, defaults),
        pinned=row["pinned"],
        pin_reason=row["pin_reason"],
        is_paused=bool(row["is_paused"]),
        pause_reason=row["pause_reason"],
    )


def published(version: Version) -> Transition:
    """First transition of a version."""
    return _event(version.reason, version.published_ms, number=version.number, after=version.phase)


def _event(reason: str, at_ms: int, *, number: int = NO_DRAFT, after: Phase | None = None) -> Transition:
    return Transition(number=number, before=None, after=after, reason=reason, actor=Actor.OPERATOR, at_ms=at_ms)


def parse_transition(row: Mapping[str, Any] | sqlite3.Row) -> Transition:
    """Parse a stored transition, of a row or a document; ValueError or KeyError if it is invalid."""
    return Transition(
        number=int(row["number"]),
        before=None if row["before"] is None else Phase(row["before"]),
        after=None if row["after"] is None else Phase(row["after"]),
        reason=str(row["reason"]),
        actor=Actor(row["actor"]),
        at_ms=int(row["at_ms"]),
    )
