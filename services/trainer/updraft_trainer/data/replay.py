"""Durable replay: an admitted trace is on disk before its stream entry is acknowledged, and is never admitted twice.

Traces lie in append-only files (`segments`); SQLite has the index, without blobs. Both are synced before `admit` returns, the
files first, so that the index never points to a trace that is not there. The table `seen` outlives eviction, so that a
redelivered trace is recognised. `retention` decides which samples are kept and `selection` which are used next. Only
`evaluation_batch` returns held-out samples.

One thread admits, any thread reads. Readers see the samples of the last admission that ended and wait for none that is under
way. Space of evicted traces is reclaimed file by file.
"""

import logging
import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np

from updraft_chassis.errors import Conflict, Corrupt, Exhausted, NotFound
from updraft_chassis.tenants import hashes
from updraft_draft.trace_bytes import Data
from updraft_trainer.data import selection
from updraft_trainer.data.clusters import Clusters, Feature
from updraft_trainer.data.retention import Pool, ReplayLimits, Retention, RetentionChanges, SampleEntry, request_of
from updraft_trainer.data.sample import ExpectedTarget, RefusedTrace, Sample, read_sample
from updraft_trainer.data.sample_cache import SampleCache
from updraft_trainer.data.segments import Location, Segments

logger = logging.getLogger(__name__)

INDEX = "index.sqlite"

MAX_SEEN = 200_000
"""Trace ids that are remembered after eviction (about 20 MB): hours of traffic, whereas a redelivery comes within minutes."""

SEGMENT_BYTES = 64 * 1024 * 1024
"""Maximum size of a file of traces; a small replay has sixteen files, so that space is reclaimed in small parts."""

_DECODED_BYTES = 2
"""At most, in memory for each byte of a trace: a teacher of float8 states is decoded when it is read."""

DRAWN_DECAY = 0.95
"""Weight of a batch relative to the next one in the shares of tenants: they hold over about twenty batches."""

_BUSY_TIMEOUT_S = 5.0
"""Only a person's sqlite3 shell can hold the lock; wait for it instead of failing."""

_MAX_JOURNAL_BYTES = 4 * 1024 * 1024
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
    segment INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    probability REAL NOT NULL,
    num_tokens INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    expires_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS forgotten (tenant TEXT PRIMARY KEY, at_ms INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS searched (stream TEXT PRIMARY KEY, order_ms INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS dropped (segment INTEGER, tenant TEXT, PRIMARY KEY (segment, tenant)) STRICT;
CREATE TABLE IF NOT EXISTS erased (segment INTEGER PRIMARY KEY) STRICT;
"""
"""`forgotten`: orders to refuse a tenant's requests that ended up to a time. `searched`: up to which order a stream was
searched. `dropped`: whose traces were dropped from the index and may still be in a file. `erased`: files with bytes that must
go from the disk, of traces that are not in the index any more."""

_ANYBODY = "*"
"""In `dropped`: a file whose end may have traces that never were in the index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingTrace:
    """A valid trace with its serialized bytes."""

    sample: Sample
    data: Data


class Replay:
    """The samples of one target, in one folder."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        segments: Segments,
        *,
        limits: ReplayLimits,
        expected: ExpectedTarget,
        cache_bytes: int,
        fitted_bytes: int,
    ) -> None:
        self._db = connection
        self._segments = segments
        self._limits = limits
        self._expected = expected
        self._cache = SampleCache(cache_bytes)
        self._fitted_bytes = fitted_bytes
        self._admitting = threading.Lock()
        self._retention = Retention(limits)
        self._clusters = Clusters()
        self._is_stale = False
        """Whether an admission has failed since retention and clusters were read from the index."""
        self._stored: Sequence[SampleEntry] = ()
        """In order of admission; replaced after each admission, never changed."""
        self._locations: dict[str, Location] = {}
        self._damaged: set[str] = set()
        """Found by readers; the next admission drops them."""
        self._num_damaged = 0
        self._counting = threading.Lock()
        self.num_held_out = 0
        """Held-out requests admitted since the start, kept or not; it grows when a new estimate has new evidence."""
        self._found: frozenset[str] = frozenset()
        """Trace ids that were stored when this process opened the folder."""
        self._forgotten: Mapping[str, int] = {}
        self._drawn: Mapping[str, float] = {}
        """Tokens by tenant in the last training batches; older ones count less."""

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: Path,
        *,
        limits: ReplayLimits,
        expected: ExpectedTarget,
        cache_bytes: int,
        fitted_bytes: int = 0,
    ) -> Iterator[Self]:
        """Open or create the folder. `cache_bytes` is the memory for samples, `fitted_bytes` that of the samples of a
        closed form. Conflict if it holds another target's samples, Corrupt if its index is no database."""
        index = folder / INDEX
        segments = Segments(folder, max_bytes=min(SEGMENT_BYTES, limits.total_bytes // 16))
        with _sqlite_errors(index):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Exhausted(f"{folder} cannot be written ({error.strerror})") from error
            db = sqlite3.connect(index, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            with _sqlite_errors(index):
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=FULL")  # acknowledged means on disk, even after a power failure
                db.execute(f"PRAGMA journal_size_limit={_MAX_JOURNAL_BYTES}")
                db.executescript(_SCHEMA)
                if not db.execute("SELECT 1 FROM pragma_table_info('samples') WHERE name = 'expires_ms'").fetchone():
                    raise Corrupt(f"{index} is of an earlier Updraft; move it away to start with an empty replay")
                _claim(db, folder, expected.target_fingerprint)
                replay = cls(
                    db, segments, limits=limits, expected=expected, cache_bytes=cache_bytes, fitted_bytes=fitted_bytes
                )
                replay._restore()
                replay._finish_erasing()
                replay._found = frozenset(entry.trace_id for entry in replay._stored)
            yield replay
        finally:
            segments.close()
            db.close()

    def admit(self, traces: Sequence[IncomingTrace]) -> list[Sample]:
        """Store new traces durably, all or none, and return their samples. Exhausted if the disk is full: then none is."""
        with self._admitting:
            known = {entry.request for entry in self._stored}
            with _sqlite_errors(INDEX):
                if self._is_stale:
                    self._restore()
                self._is_stale = True  # if it fails: the transaction is rolled back, and what is in memory must be too
                new = self._unseen([trace for trace in traces if not self.is_forgotten(trace.sample)])
                self._store(new)
                self._is_stale = False
            self._reclaim()
            held_out = {request_of(trace.sample.trace_id) for trace in new if trace.sample.is_evaluation}
            self.num_held_out += len(held_out - known)
            return [trace.sample for trace in new]

    def is_forgotten(self, sample: Sample) -> bool:
        """Whether its tenant was ordered to be forgotten after the request ended."""
        return sample.finished_unix_ms <= self.forgotten_until_ms(hashes.text(sample.tenant))

    def forgotten_until_ms(self, tenant: str) -> int:
        """Requests of this tenant are refused that ended up to this time; -1 without an order."""
        return self._forgotten.get(tenant, -1)

    def forget(self, orders: Mapping[str, int]) -> int:
        """Delete the samples of tenants that ended up to these times, from the disk too, and refuse such from now on. Return
        how many there were. Orders are kept. Exhausted if that cannot be written, or a file not be read or deleted: it can be
        repeated."""
        with self._changing():
            new = {tenant: at_ms for tenant, at_ms in orders.items() if at_ms > self._forgotten.get(tenant, -1)}
            self._forgotten = {**self._forgotten, **new}
            num_samples = self._drop(self._is_unwanted, files=self._files_with(new), orders=new) if new else 0
        self._erase_files()
        return num_samples

    @property
    def has_expiring(self) -> bool:
        """Whether some sample's tenant wants it deleted at some age."""
        return any(entry.expires_ms for entry in self._stored)

    def expire(self, now_ms: int, *, before_ms: int = 0) -> int:
        """Delete the samples that their tenants want deleted by now, and those of requests that ended before the other time,
        from the disk too; return how many there were. Exhausted as for `forget`."""
        with self._changing():
            over = {entry.tenant for entry in self._retention if 0 < entry.expires_ms <= now_ms}
            files = self._files_with(over) if over else set()
            files |= set(self._segments.with_dropped_records(before_s=before_ms / 1000))
            num_samples = self._drop(
                lambda entry: entry.finished_ms < before_ms or 0 < entry.expires_ms <= now_ms, files=files
            )
        self._erase_files()
        return num_samples

    def searched_ms(self, stream: str) -> int:
        """The time of the newest order that this stream was searched for; 0: none."""
        with self._admitting, _sqlite_errors(INDEX):
            row = self._db.execute("SELECT order_ms FROM searched WHERE stream = ?", (stream,)).fetchone()
        return int(row[0]) if row else 0

    def set_searched(self, stream: str, order_ms: int) -> None:
        with self._admitting, _sqlite_errors(INDEX), self._db:
            self._db.execute("INSERT OR REPLACE INTO searched VALUES (?, ?)", (stream, order_ms))

    def tenants(self, trace_ids: Iterable[str]) -> set[str]:
        """The tenants of stored samples."""
        wanted = set(trace_ids)
        return {entry.tenant for entry in self._entries() if entry.trace_id in wanted and entry.tenant}

    def training_batch(
        self,
        uses: Mapping[str, int],
        *,
        max_uses: int,
        rng: random.Random,
        num_tokens: int | None = None,
        num_waiting: int = 0,
    ) -> list[Sample]:
        """Samples of about `num_tokens` captured tokens to train on; see `selection`."""
        chosen = selection.training_batch(
            self._training(),
            uses,
            num_tokens=num_tokens,
            max_uses=max_uses,
            rng=rng,
            num_waiting=num_waiting,
            max_share=self._max_share,
            drawn=self._drawn,
        )
        before = {tenant: DRAWN_DECAY * tokens for tenant, tokens in self._drawn.items() if tokens >= 1.0}
        self._drawn = selection.tokens_by_tenant(chosen, before)
        return self._read(chosen)

    def first_batch(self, *, count: int, rng: random.Random) -> list[Sample]:
        """One sample of each of up to `count` requests that may be trained on; see `selection`."""
        return self._read(selection.first_batch(self._training(), count=count, rng=rng, max_share=self._max_share))

    def untrained_batch(self, uses: Mapping[str, int], *, count: int) -> list[Sample]:
        """One sample of each of the newest requests that may be trained on and were not yet."""
        chosen = selection.untrained_batch(self._training(), uses, count=count, max_share=self._max_share)
        return self._read(chosen)

    def evaluation_batch(self, *, count: int) -> list[Sample]:
        """About `count` held-out samples of kinds that are not forgotten; see `selection`."""
        known = selection.outliers_together(selection.remembered(self._present()))
        held_out = [entry for entry in known if entry.pool is Pool.EVALUATION]
        return self._read(selection.evaluation_batch(held_out, count=count, max_share=self._max_share))

    def trained_batch(self, uses: Mapping[str, int], *, count: int) -> list[Sample]:
        """The newest samples that were trained on, one of each request."""
        return self._read(selection.trained_batch(self._training(), uses, count=count))

    def closed_form_batch(self, *, count: int, min_count: int, num_held_out: int) -> tuple[list[Sample], list[Sample]]:
        """Samples to fit a draft to, and newer ones to judge it by; see `selection`. More than `min_count` are fitted only
        while they take at most `fitted_bytes` of memory."""
        fitted, held_out = selection.closed_form_batch(
            self._training(), count=count, num_held_out=num_held_out, max_share=self._max_share
        )
        sizes = accumulate(_DECODED_BYTES * entry.num_bytes for entry in fitted)
        num_fitted = sum(size <= self._fitted_bytes for size in sizes)
        return self._read(fitted[: max(min_count, num_fitted)]), self._read(held_out)

    def traffic_mix(self) -> selection.TrafficMix:
        """The kinds of all stored requests, and their shares of today's."""
        return selection.traffic_mix(selection.outliers_together(self._present()), max_share=self._max_share)

    def cluster_sizes(self) -> dict[str, int]:
        """Number of stored requests in each cluster, with held-out ones."""
        return Counter(entry.cluster for entry in selection.one_per_request(self._entries()))

    def cluster_means(self) -> dict[str, Feature]:
        """The mean of each cluster by content, of length 1."""
        totals = dict(self._clusters.by_content)  # at once, because another thread may admit
        return {name: total / max(float(np.linalg.norm(total)), 1e-12) for name, total in totals.items()}

    def entries(self) -> list[SampleEntry]:
        """The stored samples, in order of admission."""
        return list(self._entries())

    def num_samples(self, pool: Pool) -> int:
        return sum(entry.pool is pool for entry in self._entries())

    def num_requests(self, *pools: Pool) -> int:
        """Requests of which at least one chunk is stored in these pools."""
        return len({entry.request for entry in self._entries() if entry.pool in pools})

    def num_bytes(self, pool: Pool) -> int:
        """Bytes of serialized traces."""
        return sum(entry.num_bytes for entry in self._entries() if entry.pool is pool)

    @property
    def num_file_bytes(self) -> int:
        """Bytes of all files of traces, with those of dropped traces whose space is not reclaimed yet."""
        return self._segments.num_bytes

    def take_damaged(self) -> int:
        """Number of traces that were found damaged since the last call: one of several callers counts each."""
        with self._counting:
            num_damaged, self._num_damaged = self._num_damaged, 0
        return num_damaged

    def training_ids(self) -> list[str]:
        """Trace ids of samples that may be trained on, in order of admission."""
        return [entry.trace_id for entry in self._training()]

    def found_training_ids(self) -> list[str]:
        """Those of them that this process did not admit itself."""
        return [id_ for id_ in self.training_ids() if id_ in self._found]

    @property
    def _max_share(self) -> float:
        return self._limits.max_tenant_share

    def _entries(self) -> list[SampleEntry]:
        """In order of admission, so that the same random state chooses the same samples after a restart."""
        return [entry for entry in self._stored if entry.trace_id not in self._damaged]

    def _training(self) -> list[SampleEntry]:
        return [entry for entry in self._present() if entry.pool is not Pool.EVALUATION]

    def _present(self) -> Sequence[SampleEntry]:
        """For `selection`: samples of absent tenants count as another's."""
        return selection.without_absent(self._entries()) if self._max_share < 1 else self._entries()

    def _unseen(self, traces: Sequence[IncomingTrace]) -> list[IncomingTrace]:
        """Each trace once, without those that were admitted before."""
        new: dict[str, IncomingTrace] = {}
        for trace in traces:
            new.setdefault(trace.sample.trace_id, trace)
        query = "SELECT 1 FROM seen WHERE trace_id = ? UNION SELECT 1 FROM samples WHERE trace_id = ?"
        return [trace for id_, trace in new.items() if not self._db.execute(query, (id_, id_)).fetchone()]

    def _store(self, traces: Sequence[IncomingTrace]) -> None:
        """Append traces and commit their index; readers see them afterwards."""
        dropped: list[str] = []
        with self._segments.appended([trace.data for trace in traces]) as locations, self._db:
            dropped += self._drop_damaged()
            for trace, location in zip(traces, locations, strict=True):
                dropped += self._index(trace.sample, location)
            self._db.execute("DELETE FROM seen WHERE admitted <= (SELECT MAX(admitted) FROM seen) - ?", (MAX_SEEN,))
        self._locations |= zip((trace.sample.trace_id for trace in traces), locations, strict=True)
        self._show(dropped)

    def _index(self, sample: Sample, location: Location) -> list[str]:
        """Add a sample to the index; return the ids of those that made room for it."""
        inserted = self._db.execute("INSERT INTO seen (trace_id) VALUES (?)", (sample.trace_id,))
        order = int(inserted.lastrowid or 0)
        entry = SampleEntry(
            trace_id=sample.trace_id,
            order=order,
            cluster=self._clusters.assign(sample.domain, sample.ids.tolist(), order=order),
            pool=Pool.EVALUATION if sample.is_evaluation else Pool.WINDOW,
            num_bytes=location.num_bytes,
            num_tokens=sample.num_rows,
            probability=sample.probability,
            tenant=hashes.text(sample.tenant),
            finished_ms=sample.finished_unix_ms,
            expires_ms=sample.expires_ms,
        )
        row = (entry.trace_id, entry.order, entry.pool, entry.cluster, sample.domain, sample.finished_unix_ms)
        place = (location.segment, location.offset, location.num_bytes, location.crc)
        self._db.execute(
            "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, *place, entry.probability, entry.num_tokens, entry.tenant, entry.expires_ms),
        )
        changes = self._retention.add(entry)
        self._apply(changes)
        self._store_cluster(entry.cluster)
        return changes.dropped

    def _apply(self, changes: RetentionChanges) -> None:
        """Apply changes of `retention` to the index."""
        moved, dropped = [(id_,) for id_ in changes.moved], [(id_,) for id_ in changes.dropped]
        self._db.executemany("UPDATE samples SET place = 'reservoir' WHERE trace_id = ?", moved)
        note = "INSERT OR IGNORE INTO dropped SELECT segment, tenant FROM samples WHERE trace_id = ? AND tenant != ''"
        self._db.executemany(note, dropped)
        self._db.executemany("DELETE FROM samples WHERE trace_id = ?", dropped)
        if changes.dropped:
            self._clusters.keep_only(self._retention.clusters)
            self._remove_clusters()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """As in an admission: if the block fails, what is in memory is read from the index again."""
        with self._admitting, _sqlite_errors(INDEX):
            if self._is_stale:
                self._restore()
            self._is_stale = True
            yield
            self._is_stale = False

    def _is_unwanted(self, entry: SampleEntry) -> bool:
        return entry.finished_ms <= self._forgotten.get(entry.tenant, -1)

    def _files_with(self, tenants: Iterable[str]) -> set[int]:
        """Those that may still have traces of these tenants that were dropped before."""
        query = "SELECT segment FROM dropped WHERE tenant = ?"
        return {number for tenant in (*tenants, _ANYBODY) for (number,) in self._db.execute(query, (tenant,))}

    def _drop(
        self, is_unwanted: Callable[[SampleEntry], bool], *, files: Iterable[int], orders: Mapping[str, int] = {}
    ) -> int:
        """Drop samples, and note that their files and these have to go from the disk."""
        unwanted = [entry.trace_id for entry in self._retention if is_unwanted(entry)]
        erased = {self._locations[trace_id].segment for trace_id in unwanted}.union(files)
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", orders.items())
            self._db.executemany("INSERT OR IGNORE INTO erased VALUES (?)", [(number,) for number in erased])
            self._retention.discard(unwanted)
            self._apply(RetentionChanges(dropped=unwanted))
        self._show(unwanted)
        return len(unwanted)

    def _erase_files(self) -> None:
        """Delete the files with erased bytes, after copying what is kept of each: one at a time, so that admissions go on in
        between. Exhausted as long as one is there."""
        for number in self._erased():
            with self._changing():
                self._erase_file(number)
        if left := self._erased():
            raise Exhausted(
                f"{len(left)} files of {self._segments.folder} with deleted traces cannot be read or deleted"
            )

    def _erased(self) -> list[int]:
        with self._admitting, _sqlite_errors(INDEX):
            return [number for (number,) in self._db.execute("SELECT segment FROM erased ORDER BY segment")]

    def _erase_file(self, number: int) -> None:
        self._segments.seal(number)
        self._move([id_ for id_, location in self._locations.items() if location.segment == number])
        with self._db:
            damaged = self._drop_damaged()
        if damaged:
            self._show(damaged)
        self._segments.remove_unused()
        self._forget_files()

    def _forget_files(self) -> None:
        """Remove files that are gone from the index: a new one may get the same number after a restart."""
        numbers = set(self._segments.numbers)
        with self._db:
            for table in ("dropped", "erased"):
                noted = self._db.execute(f"SELECT DISTINCT segment FROM {table}").fetchall()  # noqa: S608 - a constant
                gone = [row for row in noted if row[0] not in numbers]
                self._db.executemany(f"DELETE FROM {table} WHERE segment = ?", gone)  # noqa: S608

    def _finish_erasing(self) -> None:
        """Erase what an interruption has left."""
        try:
            self._erase_files()
        except (Corrupt, Exhausted) as error:
            logger.warning("Cannot erase deleted traces from the disk now", extra={"reason": str(error)})

    def _drop_damaged(self) -> list[str]:
        """Drop from the index what readers found damaged."""
        damaged = [id_ for id_ in list(self._damaged) if id_ in self._retention]
        self._retention.discard(damaged)
        self._apply(RetentionChanges(dropped=damaged))
        return damaged

    def _show(self, dropped: Iterable[str]) -> None:
        """Let readers see what is stored now. `dropped` were committed to be so."""
        self._stored = sorted(self._retention, key=lambda entry: entry.order)
        for trace_id in dropped:
            self._cache.discard(trace_id)
            self._segments.release(self._locations.pop(trace_id))
        self._damaged.intersection_update(self._locations)

    def _reclaim(self) -> None:
        """Delete files of dropped traces, after copying the others of one file to the end if too few of its bytes are used."""
        self._segments.remove_unused()
        number = self._segments.wasteful()
        if number is None:
            return
        try:
            self._move([id_ for id_, location in self._locations.items() if location.segment == number])
        except (Corrupt, Exhausted) as error:
            logger.warning("Cannot reclaim space of dropped traces now; trying again", extra={"reason": str(error)})

    def _move(self, trace_ids: Sequence[str]) -> None:
        """Copy traces to the end, and delete files that nothing is left of."""
        found = {id_: data for id_ in trace_ids if (data := self._data(id_)) is not None}
        with _sqlite_errors(INDEX), self._segments.appended([*found.values()]) as locations, self._db:
            places = zip(found, locations, strict=True)
            rows = [(location.segment, location.offset, trace_id) for trace_id, location in places]
            self._db.executemany("UPDATE samples SET segment = ?, offset = ? WHERE trace_id = ?", rows)
        for trace_id, location in zip(found, locations, strict=True):
            self._segments.release(self._locations[trace_id])
            self._locations[trace_id] = location
        self._segments.remove_unused()

    def _store_cluster(self, name: str) -> None:
        if (total := self._clusters.by_content.get(name)) is not None:
            self._db.execute("INSERT OR REPLACE INTO clusters VALUES (?, ?)", (name, total.tobytes()))
            self._remove_clusters()

    def _remove_clusters(self) -> None:
        """Remove from the index those that gave way or are empty."""
        stored = self._db.execute("SELECT name FROM clusters").fetchall()
        removed = [row for row in stored if row[0] not in self._clusters.by_content]
        self._db.executemany("DELETE FROM clusters WHERE name = ?", removed)

    def _restore(self) -> None:
        """Rebuild what is in memory from the index and enforce the limits, which may be lower than before."""
        query = (
            "SELECT trace_id, admitted, place, cluster, probability, num_tokens, tenant, finished_unix_ms, expires_ms,"
            " segment, offset, num_bytes, crc FROM samples ORDER BY admitted"
        )
        rows = self._db.execute(query).fetchall()
        self._retention = Retention(
            self._limits,
            (
                SampleEntry(
                    trace_id=id_,
                    order=order,
                    pool=Pool(pool),
                    cluster=cluster,
                    num_bytes=location[2],
                    num_tokens=num_tokens,
                    probability=probability,
                    tenant=tenant,
                    finished_ms=finished_ms,
                    expires_ms=expires_ms,
                )
                for id_, order, pool, cluster, probability, num_tokens, tenant, finished_ms, expires_ms, *location in rows
            ),
        )
        totals = self._db.execute("SELECT name, total FROM clusters ORDER BY rowid").fetchall()  # the newest last
        self._clusters = Clusters(
            named={cluster for cluster in self._retention.clusters if cluster.startswith("domain:")},
            by_content={name: np.frombuffer(total, dtype=np.float32) for name, total in totals},
        )
        self._locations = {row[0]: Location(*row[9:]) for row in rows}
        lost = set(self._segments.restore(self._locations.values()))
        missing = [id_ for id_, location in self._locations.items() if location in lost]
        for trace_id in missing:
            self._note_damaged(trace_id, "the end of its file is missing")
            del self._locations[trace_id]
        self._retention.discard(missing)
        self._forget_files()
        self._note_unknown_end()
        with self._db:
            self._apply(RetentionChanges(dropped=missing))
            changes = self._retention.enforce()
            self._apply(changes)
        self._show(changes.dropped)
        self._segments.remove_unused()
        self._forgotten = dict(self._db.execute("SELECT tenant, at_ms FROM forgotten"))

    def _note_unknown_end(self) -> None:
        """An interrupted admission may have left traces at the end of the newest file."""
        newest = self._segments.numbers[-1:]
        unknown = set(newest).intersection(self._segments.with_dropped_records())
        with self._db:
            rows = [(number, _ANYBODY) for number in unknown]
            self._db.executemany("INSERT OR IGNORE INTO dropped VALUES (?, ?)", rows)

    def _read(self, entries: Iterable[SampleEntry]) -> list[Sample]:
        samples = (self._read_one(entry.trace_id) for entry in entries)
        return [sample for sample in samples if sample is not None]

    def _read_one(self, trace_id: str) -> Sample | None:
        if sample := self._cache.get(trace_id):
            return sample
        data = self._data(trace_id)
        if data is None:
            return None
        try:
            sample = read_sample(data, self._expected, is_checked=True)
        except RefusedTrace as error:
            self._note_damaged(trace_id, str(error))
            return None
        self._cache.put(sample)
        return sample

    def _data(self, trace_id: str) -> bytes | None:
        """The stored bytes; None if the trace was dropped meanwhile, is damaged, or cannot be read now."""
        while (location := self._locations.get(trace_id)) is not None:
            try:
                return self._segments.read(location)
            except Corrupt as error:
                self._note_damaged(trace_id, str(error))
                return None
            except Exhausted as error:
                logger.warning("Cannot read a trace now: %s", error, extra={"trace_id": trace_id})
                return None
            except NotFound as error:
                if self._locations.get(trace_id) == location:  # else it was moved or dropped in between
                    self._note_damaged(trace_id, str(error))
                    return None
        return None

    def _note_damaged(self, trace_id: str, reason: str) -> None:
        logger.warning("Dropped a damaged trace: %s", reason, extra={"trace_id": trace_id})
        self._damaged.add(trace_id)
        with self._counting:
            self._num_damaged += 1


def _claim(db: sqlite3.Connection, folder: Path, fingerprint: str) -> None:
    """Assign a new folder to this target; Conflict if it belongs to another one."""
    with db:
        db.execute("INSERT INTO target SELECT ? WHERE NOT EXISTS (SELECT * FROM target)", (fingerprint,))
    (stored,) = db.execute("SELECT fingerprint FROM target").fetchone()
    if stored != fingerprint:
        raise Conflict(
            f"{folder} holds samples of the target {stored}, this trainer's is {fingerprint};"
            " set UPDRAFT_TRAINER_DATA_DIR to another folder"
        )


@contextmanager
def _sqlite_errors(index: Path | str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:  # disk full, read-only, locked, no permission: may be temporary
        raise Exhausted(f"{index} cannot be written ({error}); free disk space or fix its permissions") from error
    except sqlite3.DatabaseError as error:
        raise Corrupt(f"{index} is damaged ({error}); move it away to start with an empty replay") from error
