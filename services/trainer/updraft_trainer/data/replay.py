"""Durable replay: an admitted trace is in SQLite before its stream entry is acknowledged, and is never admitted twice.

The file (WAL, synchronous) is authoritative; the in-memory index of samples is rebuilt from it. The table `seen` outlives
eviction, so that a redelivered trace is recognised. `retention` decides which samples are kept and `selection` which are used
next. Only `evaluation_batch` returns held-out samples. Thread-safe.
"""

import logging
import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
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
"""Trace ids that are remembered after eviction (about 20 MB): hours of traffic, whereas a redelivery comes within minutes."""

_DECODED_BYTES = 2
"""In memory for each byte of a trace: hidden states are sent in float8 by default and used in bfloat16."""

_BUSY_TIMEOUT_S = 5.0
"""Only a person's sqlite3 shell can hold the lock; wait for it instead of failing."""

_MAX_JOURNAL_BYTES = 64 * 1024 * 1024
"""Maximum size of the write-ahead log between transactions."""

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
    probability REAL NOT NULL,
    data BLOB NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingTrace:
    """A valid trace, decoded, with its serialized bytes."""

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
        self._cache = SampleCache(cache_bytes)
        self._lock = threading.Lock()
        self._retention = Retention(limits)
        self._clusters = Clusters()
        self.num_held_out = 0
        """Evaluation samples admitted since the start, kept or not; it grows when a new estimate has new evidence."""

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, limits: ReplayLimits, expected: ExpectedTarget, cache_bytes: int) -> Iterator[Self]:
        """Open or create the file. Conflict if it holds another target's samples, Corrupt if it is not a database."""
        with _sqlite_errors(path):
            db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            with _sqlite_errors(path):
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=FULL")  # acknowledged means on disk, even after a power failure
                db.execute(f"PRAGMA journal_size_limit={_MAX_JOURNAL_BYTES}")
                db.executescript(_SCHEMA)
                _claim(db, path, expected.target_fingerprint)
                replay = cls(db, limits=limits, expected=expected, cache_bytes=cache_bytes)
                replay._restore()
            yield replay
        finally:
            db.close()

    def admit(self, traces: Sequence[IncomingTrace]) -> list[Sample]:
        """Store new traces in one durable transaction and return their samples.

        Exhausted if the disk is full: then none was admitted.
        """
        with self._lock:
            try:
                with _sqlite_errors("replay"), self._db:
                    admitted = [trace.sample for trace in traces if self._admit_one(trace)]
                    self._db.execute(
                        "DELETE FROM seen WHERE admitted <= (SELECT MAX(admitted) FROM seen) - ?", (MAX_SEEN,)
                    )
            except (Corrupt, Exhausted):
                self._restore()  # the transaction was rolled back, so the index must be too
                raise
            for sample in admitted:
                self._cache.put(sample)
            self.num_held_out += sum(sample.is_evaluation for sample in admitted)
            return admitted

    def training_batch(
        self, uses: Mapping[str, int], *, count: int, max_uses: int, rng: random.Random, num_waiting: int = 0
    ) -> list[Sample]:
        """Up to `count` samples to train on; see `selection`."""
        with self._lock:
            chosen = selection.training_batch(
                self._training(), uses, count=count, max_uses=max_uses, rng=rng, num_waiting=num_waiting
            )
            return self._read(chosen)

    def untrained_batch(self, uses: Mapping[str, int], *, count: int) -> list[Sample]:
        """The newest samples that may be trained on and were not yet."""
        with self._lock:
            return self._read(selection.untrained_batch(self._training(), uses, count=count))

    def evaluation_batch(self, *, count: int) -> list[Sample]:
        """About `count` held-out samples of kinds that are not forgotten; see `selection`."""
        with self._lock:
            known = selection.outliers_together(selection.remembered(list(self._retention)))
            held_out = [entry for entry in known if entry.pool is Pool.EVALUATION]
            return self._read(selection.evaluation_batch(held_out, count=count))

    def trained_batch(self, uses: Mapping[str, int], *, count: int) -> list[Sample]:
        """The newest samples that were trained on."""
        with self._lock:
            return self._read(selection.trained_batch(self._training(), uses, count=count))

    def closed_form_batch(self, *, count: int, num_held_out: int) -> tuple[list[Sample], list[Sample]]:
        """Samples to fit a draft to, and newer ones to judge it by; see `selection`. More than `num_held_out` are fitted only
        while they take at most half as much memory as the cache."""
        with self._lock:
            fitted, held_out = selection.closed_form_batch(self._training(), count=count, num_held_out=num_held_out)
            sizes = accumulate(_DECODED_BYTES * entry.num_bytes for entry in fitted)
            num_fitted = sum(size <= self._cache.max_bytes // 2 for size in sizes)
            return self._read(fitted[: max(num_held_out, num_fitted)]), self._read(held_out)

    def traffic_mix(self) -> selection.TrafficMix:
        """The kinds of all stored requests, and their shares of today's."""
        with self._lock:
            return selection.traffic_mix(selection.outliers_together(list(self._retention)))

    def cluster_sizes(self) -> dict[str, int]:
        """Number of samples to train on in each cluster."""
        with self._lock:
            return Counter(entry.cluster for entry in self._training())

    def num_samples(self, pool: Pool) -> int:
        with self._lock:
            return self._retention.num_samples(pool)

    def num_bytes(self, pool: Pool) -> int:
        """Bytes of serialized traces."""
        with self._lock:
            return self._retention.num_bytes(pool)

    def training_ids(self) -> list[str]:
        """Trace ids of samples that may be trained on, in order of admission."""
        with self._lock:
            return [entry.trace_id for entry in self._training()]

    def _training(self) -> list[SampleEntry]:
        """In order of admission, so that the same random state chooses the same samples after a restart."""
        entries = (entry for entry in self._retention if entry.pool is not Pool.EVALUATION)
        return sorted(entries, key=lambda entry: entry.order)

    def _admit_one(self, trace: IncomingTrace) -> bool:
        sample = trace.sample
        if sample.trace_id in self._retention:
            return False
        inserted = self._db.execute("INSERT OR IGNORE INTO seen (trace_id) VALUES (?)", (sample.trace_id,))
        if inserted.rowcount == 0:
            return False
        order = int(inserted.lastrowid or 0)
        entry = SampleEntry(
            trace_id=sample.trace_id,
            order=order,
            cluster=self._clusters.assign(sample.domain, sample.ids.tolist(), order=order),
            pool=Pool.EVALUATION if sample.is_evaluation else Pool.WINDOW,
            num_bytes=len(trace.data),
            probability=sample.probability,
        )
        row = (entry.trace_id, entry.order, entry.pool, entry.cluster, sample.domain, sample.finished_unix_ms)
        rest = (entry.num_bytes, entry.probability, trace.data)
        self._db.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, *rest))
        self._apply(self._retention.add(entry))
        self._store_cluster(entry.cluster)
        return True

    def _apply(self, changes: RetentionChanges) -> None:
        """Apply the changes of the index to the file."""
        moved, dropped = [(id_,) for id_ in changes.moved], [(id_,) for id_ in changes.dropped]
        self._db.executemany("UPDATE samples SET place = 'reservoir' WHERE trace_id = ?", moved)
        self._db.executemany("DELETE FROM samples WHERE trace_id = ?", dropped)
        for trace_id in changes.dropped:
            self._cache.discard(trace_id)
        if changes.dropped:
            self._clusters.keep_only(entry.cluster for entry in self._retention)
            self._remove_clusters()

    def _store_cluster(self, name: str) -> None:
        if (total := self._clusters.by_content.get(name)) is not None:
            self._db.execute("INSERT OR REPLACE INTO clusters VALUES (?, ?)", (name, total.tobytes()))
            self._remove_clusters()

    def _remove_clusters(self) -> None:
        """Remove from the file those that gave way or are empty."""
        stored = self._db.execute("SELECT name FROM clusters").fetchall()
        removed = [row for row in stored if row[0] not in self._clusters.by_content]
        self._db.executemany("DELETE FROM clusters WHERE name = ?", removed)

    def _restore(self) -> None:
        """Rebuild the index from the file and enforce the limits, which may be lower than before."""
        rows = self._db.execute(
            "SELECT trace_id, admitted, place, cluster, num_bytes, probability FROM samples ORDER BY admitted"
        ).fetchall()
        self._retention = Retention(
            self._limits,
            (
                SampleEntry(
                    trace_id=id_,
                    order=order,
                    pool=Pool(pool),
                    cluster=cluster,
                    num_bytes=num_bytes,
                    probability=probability,
                )
                for id_, order, pool, cluster, num_bytes, probability in rows
            ),
        )
        totals = self._db.execute("SELECT name, total FROM clusters ORDER BY rowid").fetchall()  # the newest last
        self._clusters = Clusters(
            named={entry.cluster for entry in self._retention if entry.cluster.startswith("domain:")},
            by_content={name: np.frombuffer(total, dtype=np.float32) for name, total in totals},
        )
        with self._db:
            self._apply(self._retention.enforce())

    def _read(self, entries: Iterable[SampleEntry]) -> list[Sample]:
        samples = (self._read_one(entry.trace_id) for entry in entries)
        return [sample for sample in samples if sample is not None]

    def _read_one(self, trace_id: str) -> Sample | None:
        if sample := self._cache.get(trace_id):
            return sample
        with _sqlite_errors("replay"):
            (data,) = self._db.execute("SELECT data FROM samples WHERE trace_id = ?", (trace_id,)).fetchone()
        try:
            sample = read_sample(data, self._expected)
        except RefusedTrace as error:  # it was valid when it was stored, so the disk has damaged it
            logger.warning("Dropped a damaged trace: %s", error, extra={"trace_id": trace_id})
            self._retention.discard(trace_id)
            with _sqlite_errors("replay"), self._db:
                self._apply(RetentionChanges(dropped=[trace_id]))
            return None
        self._cache.put(sample)
        return sample


def _claim(db: sqlite3.Connection, path: Path, fingerprint: str) -> None:
    """Assign a new file to this target; Conflict if it belongs to another one."""
    with db:
        db.execute("INSERT INTO target SELECT ? WHERE NOT EXISTS (SELECT * FROM target)", (fingerprint,))
    (stored,) = db.execute("SELECT fingerprint FROM target").fetchone()
    if stored != fingerprint:
        raise Conflict(
            f"{path} holds samples of the target {stored}, this trainer's is {fingerprint};"
            " set UPDRAFT_TRAINER_DATA_DIR to another folder"
        )


@contextmanager
def _sqlite_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:  # disk full, read-only, locked, no permission: may be temporary
        raise Exhausted(f"{path} cannot be written ({error}); free disk space or fix its permissions") from error
    except sqlite3.DatabaseError as error:
        raise Corrupt(f"{path} is damaged ({error}); move it away to start with an empty replay") from error
