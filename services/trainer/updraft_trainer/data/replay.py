"""Durable replay: an admitted trace is in SQLite before its stream entry is acknowledged, and is never admitted twice.

The file (WAL, synchronous) is the truth; the index of what is kept lives in memory and is rebuilt from it. `seen`
outlives eviction, so that a redelivered trace stays known. Which samples stay is decided in `retention`, which are used
next in `selection`; held-out samples come out of `evaluation_batch` and nothing else. Safe to use from several threads.
"""

import logging
import random
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from updraft_chassis.errors import Conflict, Corrupt, Exhausted
from updraft_trainer.data import selection
from updraft_trainer.data.clusters import Clusters
from updraft_trainer.data.retention import Pool, ReplayLimits, Retention, RetentionChanges, SampleEntry
from updraft_trainer.data.sample import ExpectedTarget, RefusedTrace, Sample, read_sample
from updraft_trainer.data.sample_cache import SampleCache

logger = logging.getLogger(__name__)

MAX_SEEN = 200_000
"""Trace ids remembered after eviction (about 20 MB): hours of traffic, where a redelivery comes within minutes."""

_BUSY_TIMEOUT_S = 5.0
"""Only an operator's sqlite3 shell can hold the lock; wait for it rather than fail."""

_MAX_JOURNAL_BYTES = 64 * 1024 * 1024
"""What the write-ahead log may keep on disk between transactions."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS target (fingerprint TEXT PRIMARY KEY) STRICT;
CREATE TABLE IF NOT EXISTS seen (admitted INTEGER PRIMARY KEY AUTOINCREMENT, trace_id TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE IF NOT EXISTS clusters (name TEXT PRIMARY KEY, total BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS samples (
    trace_id TEXT PRIMARY KEY,
    admitted INTEGER NOT NULL,
    place TEXT NOT NULL CHECK (place IN ('window', 'reservoir', 'evaluation')),
    cluster TEXT NOT NULL,
    domain TEXT NOT NULL,
    finished_unix_ms INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    data BLOB NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingTrace:
    """A trace that passed its checks, decoded, and the bytes it came in."""

    sample: Sample
    data: bytes


class Replay:
    """The samples of one target, in one file."""

    def __init__(
        self, connection: sqlite3.Connection, *, limits: ReplayLimits, expected: ExpectedTarget, cache_bytes: int
    ) -> None:
        self._db = connection
        self._limits = limits
        self._expected = expected
        self._decoded = SampleCache(cache_bytes)
        self._lock = threading.Lock()
        self._retention = Retention(limits)
        self._clusters = Clusters()
        self.num_held_out = 0
        """Evaluation samples admitted since the start, kept or not: tells that an estimate has new evidence."""

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, limits: ReplayLimits, expected: ExpectedTarget, cache_bytes: int) -> Iterator[Self]:
        """Open or create the file. Conflict if it holds another target's samples, Corrupt if it is no database."""
        with _sqlite_errors(path):
            db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            with _sqlite_errors(path):
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=FULL")  # acknowledged means on disk, also when the power fails
                db.execute(f"PRAGMA journal_size_limit={_MAX_JOURNAL_BYTES}")
                db.executescript(_SCHEMA)
                _claim(db, path, expected.target_fingerprint)
                replay = cls(db, limits=limits, expected=expected, cache_bytes=cache_bytes)
                replay._restore()
            yield replay
        finally:
            db.close()

    def admit(self, arrivals: Sequence[IncomingTrace]) -> list[Sample]:
        """Store those that were never seen, in one durable transaction, and return them.

        Exhausted when the disk is full: then nothing was admitted.
        """
        with self._lock:
            try:
                with _sqlite_errors("replay"), self._db:
                    admitted = [arrival.sample for arrival in arrivals if self._admit_one(arrival)]
                    self._db.execute(
                        "DELETE FROM seen WHERE admitted <= (SELECT MAX(admitted) FROM seen) - ?", (MAX_SEEN,)
                    )
            except (Corrupt, Exhausted):
                self._restore()  # the transaction took its changes back; the index has to follow
                raise
            for sample in admitted:
                self._decoded.put(sample)
            self.num_held_out += sum(sample.is_evaluation for sample in admitted)
            return admitted

    def training_batch(self, uses: Mapping[str, int], *, count: int, max_uses: int, rng: random.Random) -> list[Sample]:
        """Choose up to `count` samples to train on; see `selection`."""
        with self._lock:
            chosen = selection.training_batch(self._training(), uses, count=count, max_uses=max_uses, rng=rng)
            return self._read(chosen)

    def evaluation_batch(self, *, count: int) -> list[Sample]:
        """Choose up to `count` held-out samples; see `selection`."""
        with self._lock:
            held_out = [one for one in self._retention if one.place is Pool.EVALUATION]
            return self._read(selection.evaluation_batch(held_out, count=count))

    def num_samples(self, place: Pool) -> int:
        """Samples kept in a place."""
        with self._lock:
            return self._retention.num_samples(place)

    def num_bytes(self, place: Pool) -> int:
        """Bytes of the serialized traces kept in a place."""
        with self._lock:
            return self._retention.num_bytes(place)

    def training_ids(self) -> list[str]:
        """Trace ids of the samples that may be trained on, in order of admission."""
        with self._lock:
            return [one.trace_id for one in self._training()]

    def _training(self) -> list[SampleEntry]:
        """In order of admission, so that the same randomness chooses the same samples after a restart."""
        kept = (one for one in self._retention if one.place is not Pool.EVALUATION)
        return sorted(kept, key=lambda one: one.order)

    def _admit_one(self, arrival: IncomingTrace) -> bool:
        sample = arrival.sample
        if sample.trace_id in self._retention:
            return False
        inserted = self._db.execute("INSERT OR IGNORE INTO seen (trace_id) VALUES (?)", (sample.trace_id,))
        if inserted.rowcount == 0:
            return False
        one = SampleEntry(
            trace_id=sample.trace_id,
            order=int(inserted.lastrowid or 0),
            cluster=self._clusters.assign(sample.domain, sample.ids.tolist()),
            place=Pool.EVALUATION if sample.is_evaluation else Pool.WINDOW,
            num_bytes=len(arrival.data),
        )
        self._db.execute(
            "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                one.trace_id,
                one.order,
                one.place,
                one.cluster,
                sample.domain,
                sample.finished_unix_ms,
                one.num_bytes,
                arrival.data,
            ),
        )
        self._apply(self._retention.add(one))
        self._store_cluster(one.cluster)
        return True

    def _apply(self, changes: RetentionChanges) -> None:
        """Repeat in the file what retention did to its index."""
        moved, dropped = [(id_,) for id_ in changes.moved], [(id_,) for id_ in changes.dropped]
        self._db.executemany("UPDATE samples SET place = 'reservoir' WHERE trace_id = ?", moved)
        self._db.executemany("DELETE FROM samples WHERE trace_id = ?", dropped)
        for trace_id in changes.dropped:
            self._decoded.discard(trace_id)
        if changes.dropped:
            self._forget_empty_clusters()

    def _store_cluster(self, name: str) -> None:
        if (total := self._clusters.found.get(name)) is not None:
            self._db.execute("INSERT OR REPLACE INTO clusters VALUES (?, ?)", (name, total.tobytes()))

    def _forget_empty_clusters(self) -> None:
        before = set(self._clusters.found)
        self._clusters.forget(one.cluster for one in self._retention)
        gone = [(name,) for name in before - set(self._clusters.found)]
        self._db.executemany("DELETE FROM clusters WHERE name = ?", gone)

    def _restore(self) -> None:
        """Rebuild the index from the file, and apply limits that may have shrunk since."""
        rows = self._db.execute(
            "SELECT trace_id, admitted, place, cluster, num_bytes FROM samples ORDER BY admitted"
        ).fetchall()
        self._retention = Retention(
            self._limits,
            (
                SampleEntry(trace_id=id_, order=order, place=Pool(place), cluster=cluster, num_bytes=num_bytes)
                for id_, order, place, cluster, num_bytes in rows
            ),
        )
        totals = self._db.execute("SELECT name, total FROM clusters").fetchall()
        self._clusters = Clusters(
            named={one.cluster for one in self._retention if one.cluster.startswith("domain:")},
            found={name: np.frombuffer(total, dtype=np.float32) for name, total in totals},
        )
        with self._db:
            self._apply(self._retention.enforce())

    def _read(self, chosen: Iterable[SampleEntry]) -> list[Sample]:
        samples = (self._read_one(one.trace_id) for one in chosen)
        return [sample for sample in samples if sample is not None]

    def _read_one(self, trace_id: str) -> Sample | None:
        if sample := self._decoded.get(trace_id):
            return sample
        with _sqlite_errors("replay"):
            (data,) = self._db.execute("SELECT data FROM samples WHERE trace_id = ?", (trace_id,)).fetchone()
        try:
            sample = read_sample(data, self._expected)
        except RefusedTrace as error:  # it was readable when it came: the disk changed it
            logger.warning("Dropped a stored trace: %s", error, extra={"trace_id": trace_id})
            self._retention.discard(trace_id)
            with _sqlite_errors("replay"), self._db:
                self._apply(RetentionChanges(dropped=[trace_id]))
            return None
        self._decoded.put(sample)
        return sample


def _claim(db: sqlite3.Connection, path: Path, fingerprint: str) -> None:
    """Make the file this target's, or refuse it."""
    with db:
        db.execute("INSERT INTO target SELECT ? WHERE NOT EXISTS (SELECT * FROM target)", (fingerprint,))
    (found,) = db.execute("SELECT fingerprint FROM target").fetchone()
    if found != fingerprint:
        raise Conflict(
            f"{path} holds samples of the target {found}, this trainer's is {fingerprint};"
            " set UPDRAFT_TRAINER_DATA_DIR to another folder"
        )


@contextmanager
def _sqlite_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:  # disk full, read-only, locked, no permission: may pass
        raise Exhausted(f"{path} cannot be written ({error}); free disk space or fix its permissions") from error
    except sqlite3.DatabaseError as error:
        raise Corrupt(f"{path} is damaged ({error}); move it away to start with an empty replay") from error
