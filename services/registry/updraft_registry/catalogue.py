"""What is known about versions: a SQLite database in WAL mode, one transaction per change of state.

The truth about phases, wishes and history; rows of versions outlive their weights, so that a digest that lost
is known for good. SQLite itself holds the strongest invariant: one stable version per speculator at most.
Synchronous, and used from one thread at a time; an ORM was refused, the statements are the schema's
documentation.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Conflict, Corrupt, NotFound
from updraft_registry import wire
from updraft_registry.stores.folder import disk_full
from updraft_registry.version import (
    NO_DRAFT,
    Actor,
    Lineage,
    Phase,
    Policy,
    Speculator,
    Transition,
    Version,
    Wish,
    because,
    call,
)

_MIGRATIONS = (
    """
    CREATE TABLE speculators (
        name TEXT PRIMARY KEY,
        target_fingerprint TEXT,
        draft_vocabulary_fingerprint TEXT,
        policy BLOB NOT NULL DEFAULT x'',
        pinned INTEGER,
        pin_reason TEXT NOT NULL DEFAULT '',
        is_paused INTEGER NOT NULL DEFAULT 0,
        pause_reason TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE TABLE versions (
        speculator TEXT NOT NULL REFERENCES speculators (name),
        number INTEGER NOT NULL CHECK (number > 0),
        digest TEXT NOT NULL,
        tensors_digest TEXT NOT NULL,
        manifest BLOB NOT NULL,
        phase TEXT NOT NULL,
        reason TEXT NOT NULL,
        published_ms INTEGER NOT NULL,
        since_ms INTEGER NOT NULL,
        is_proven INTEGER NOT NULL,
        is_retained INTEGER NOT NULL,
        is_kept INTEGER NOT NULL DEFAULT 1,
        PRIMARY KEY (speculator, number)
    ) STRICT;
    CREATE UNIQUE INDEX one_version_per_content ON versions (speculator, tensors_digest);
    CREATE UNIQUE INDEX one_stable ON versions (speculator) WHERE phase = 'Stable';
    CREATE INDEX kept ON versions (digest) WHERE is_kept;
    CREATE TABLE transitions (
        id INTEGER PRIMARY KEY,
        speculator TEXT NOT NULL REFERENCES speculators (name),
        number INTEGER NOT NULL,
        before TEXT,
        after TEXT,
        reason TEXT NOT NULL,
        actor TEXT NOT NULL,
        at_ms INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX transitions_by_speculator ON transitions (speculator, id);
    """,
)
"""Each brings the schema one number further (`PRAGMA user_version`); never edited, only added to."""


class Catalogue:
    """The database at `path`, created or migrated when opened. `defaults` fills what a policy leaves open.

    Exhausted on a full disk: the state then is what it was. Corrupt if the file is damaged, Conflict if a
    newer registry wrote it.
    """

    def __init__(self, path: Path, *, defaults: Policy) -> None:
        self._path = path
        self.defaults = defaults
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        try:
            with self._errors():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def names(self) -> tuple[str, ...]:
        """All speculators, by name."""
        return tuple(row["name"] for row in self._rows("SELECT name FROM speculators ORDER BY name"))

    def speculator(self, name: str) -> Speculator:
        """The whole state of one; of an unknown one, that nothing is published and nothing wished."""
        row = self._row("SELECT * FROM speculators WHERE name = ?", name)
        if row is None:
            return Speculator(name=name, wish=Wish(policy=self.defaults), is_known=False)
        versions = self._rows("SELECT * FROM versions WHERE speculator = ? AND is_kept ORDER BY number", name)
        return Speculator(
            name=name,
            wish=_wish(row, self.defaults),
            lineage=_lineage(row),
            versions=tuple(_version(version) for version in versions),
            latest=self._latest(name),
        )

    def policy(self, name: str) -> registry_pb2.RolloutPolicy:
        """The policy as it was set; empty if none was."""
        row = self._row("SELECT policy FROM speculators WHERE name = ?", name)
        return registry_pb2.RolloutPolicy.FromString(row["policy"] if row else b"")

    def find(self, name: str, tensors_digest: str) -> Version | None:
        """The version with this content, kept or not."""
        row = self._row("SELECT * FROM versions WHERE speculator = ? AND tensors_digest = ?", name, tensors_digest)
        return None if row is None else _version(row)

    def has(self, name: str, number: int) -> bool:
        """Whether a version was ever published."""
        return self._row("SELECT 1 FROM versions WHERE speculator = ? AND number = ?", name, number) is not None

    def version(self, name: str, number: int) -> tuple[Version, registry_pb2.Manifest]:
        """One version with its manifest, kept or not; NotFound if it was never published."""
        row = self._row("SELECT * FROM versions WHERE speculator = ? AND number = ?", name, number)
        if row is None:
            raise NotFound(f"{name} has no version {number}; its newest is {self._latest(name) or 'none yet'}")
        return _version(row), registry_pb2.Manifest.FromString(row["manifest"])

    def page(
        self, name: str, *, after: tuple[str, int] | None, size: int
    ) -> list[tuple[Version, registry_pb2.Manifest]]:
        """Up to `size` versions of one speculator (empty: of all), by name and newest first, from behind `after` on."""
        after_name, after_number = after or ("", 0)
        rows = self._rows(
            "SELECT * FROM versions WHERE (? = '' OR speculator = ?) "
            "AND (speculator > ? OR (speculator = ? AND number < ?)) "
            "ORDER BY speculator, number DESC LIMIT ?",
            *(name, name, after_name, after_name, after_number, size),
        )
        return [(_version(row), registry_pb2.Manifest.FromString(row["manifest"])) for row in rows]

    def history(self, name: str, limit: int) -> tuple[Transition, ...]:
        """The newest `limit` transitions, newest first."""
        rows = self._rows("SELECT * FROM transitions WHERE speculator = ? ORDER BY id DESC LIMIT ?", name, limit)
        return tuple(_transition(row) for row in rows)

    def kept_digests(self) -> frozenset[str]:
        """Blobs that some version needs."""
        return frozenset(row["digest"] for row in self._rows("SELECT DISTINCT digest FROM versions WHERE is_kept"))

    def add(self, version: Version, manifest: registry_pb2.Manifest) -> None:
        """Add a version, and its lineage with the first one."""
        name = manifest.speculator
        with self._transaction():
            self._know(name)
            self._db.execute(
                "UPDATE speculators SET target_fingerprint = ?, draft_vocabulary_fingerprint = ? "
                "WHERE name = ? AND target_fingerprint IS NULL",
                (manifest.target_fingerprint, manifest.draft_vocabulary_fingerprint, name),
            )
            self._db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(
                        name,
                        version.number,
                        version.digest,
                        version.tensors_digest,
                        manifest.SerializeToString(),
                    ),
                    *(version.phase, version.reason, version.published_ms, version.since_ms),
                    *(version.is_proven, version.is_retained, version.is_kept),
                ),
            )
            self._note(name, _event(version.reason, version.published_ms, number=version.number, after=version.phase))

    def record(self, name: str, transitions: Sequence[Transition]) -> None:
        """Apply transitions in their order, all or none."""
        with self._transaction():
            for transition in transitions:
                self._db.execute(
                    "UPDATE versions SET phase = :after, reason = :reason, since_ms = :at_ms, "
                    "is_proven = is_proven OR :after = 'Stable' "
                    "WHERE speculator = :name AND number = :number",
                    {"name": name} | asdict(transition),
                )
                self._note(name, transition)

    def pin(self, name: str, number: int | None, reason: str, now_ms: int) -> None:
        """Pin a version (0: no draft), or unpin with None."""
        what = "unpinned" if number is None else f"pinned to {call(number)}"
        with self._transaction():
            self._db.execute("UPDATE speculators SET pinned = ?, pin_reason = ? WHERE name = ?", (number, reason, name))
            self._note(name, _event(because(what, reason), now_ms, number=number or NO_DRAFT))

    def pause(self, name: str, *, is_paused: bool, reason: str, now_ms: int) -> None:
        """Pause or resume the rollout."""
        what = "paused" if is_paused else "resumed"
        with self._transaction():
            self._db.execute(
                "UPDATE speculators SET is_paused = ?, pause_reason = ? WHERE name = ?",
                (is_paused, reason, name),
            )
            self._note(name, _event(because(what, reason), now_ms))

    def set_policy(self, name: str, policy: registry_pb2.RolloutPolicy, now_ms: int) -> None:
        """Set the policy, of a speculator that may not exist yet."""
        with self._transaction():
            self._know(name)
            self._db.execute("UPDATE speculators SET policy = ? WHERE name = ?", (policy.SerializeToString(), name))
            self._note(name, _event("the policy was set", now_ms))

    def keep(self, name: str, number: int, *, is_kept: bool) -> None:
        """Note whether the weights of a version are in the store."""
        with self._transaction():
            self._db.execute(
                "UPDATE versions SET is_kept = ? WHERE speculator = ? AND number = ?", (is_kept, name, number)
            )

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        # FULL: an answered transaction survives a power cut; NORMAL only survives a crash of the process.
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (schema,) = self._db.execute("PRAGMA user_version").fetchone()
        if schema > len(_MIGRATIONS):
            raise Conflict(f"{self._path} has schema {schema}, this registry knows {len(_MIGRATIONS)}: use a newer one")
        for number, migration in enumerate(_MIGRATIONS[schema:], start=schema + 1):
            self._db.executescript(f"BEGIN; {migration} PRAGMA user_version = {number}; COMMIT;")

    def _know(self, name: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO speculators (name) VALUES (?)", (name,))

    def _note(self, name: str, transition: Transition) -> None:
        self._db.execute(
            "INSERT INTO transitions (speculator, number, before, after, reason, actor, at_ms) "
            "VALUES (:name, :number, :before, :after, :reason, :actor, :at_ms)",
            {"name": name} | asdict(transition),
        )

    def _latest(self, name: str) -> int:
        row = self._row("SELECT coalesce(max(number), 0) AS latest FROM versions WHERE speculator = ?", name)
        return int(row["latest"]) if row else 0

    def _row(self, statement: str, *values: object) -> sqlite3.Row | None:
        return next(iter(self._rows(statement, *values)), None)

    def _rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        with self._errors(), closing(self._db.execute(statement, values)) as cursor:
            return cursor.fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors (a full disk) have rolled back already
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
                raise disk_full(self._path) from error
            raise
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorname in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
                raise Corrupt(
                    f"{self._path} is damaged ({error}): move it away, "
                    "and it is rebuilt from the documents beside it at the next start"
                ) from error
            raise


def _version(row: sqlite3.Row) -> Version:
    manifest = registry_pb2.Manifest.FromString(row["manifest"])
    return replace(
        wire.pending(manifest, row["number"], row["published_ms"]),
        phase=Phase(row["phase"]),
        reason=row["reason"],
        since_ms=row["since_ms"],
        is_proven=bool(row["is_proven"]),
        is_retained=bool(row["is_retained"]),
        is_kept=bool(row["is_kept"]),
    )


def _wish(row: sqlite3.Row, defaults: Policy) -> Wish:
    return Wish(
        policy=wire.policy_from_proto(registry_pb2.RolloutPolicy.FromString(row["policy"]), defaults),
        pinned=row["pinned"],
        pin_reason=row["pin_reason"],
        is_paused=bool(row["is_paused"]),
        pause_reason=row["pause_reason"],
    )


def _lineage(row: sqlite3.Row) -> Lineage | None:
    if row["target_fingerprint"] is None:
        return None
    return Lineage(
        target_fingerprint=row["target_fingerprint"],
        draft_vocabulary_fingerprint=row["draft_vocabulary_fingerprint"],
    )


def _event(reason: str, at_ms: int, *, number: int = NO_DRAFT, after: Phase | None = None) -> Transition:
    return Transition(number=number, before=None, after=after, reason=reason, actor=Actor.OPERATOR, at_ms=at_ms)


def _transition(row: sqlite3.Row) -> Transition:
    return Transition(
        number=row["number"],
        before=row["before"] and Phase(row["before"]),
        after=row["after"] and Phase(row["after"]),
        reason=row["reason"],
        actor=Actor(row["actor"]),
        at_ms=row["at_ms"],
    )
