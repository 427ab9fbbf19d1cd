"""Folders of recorded traces: what `draft train` recorded, and the replay of a trainer. Nothing is written to them."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from updraft_chassis.errors import Conflict, Corrupt, InvalidInput
from updraft_draft import recordings
from updraft_trainer.data.replay import INDEX
from updraft_trainer.data.segments import Location, Segments

_REPLAY = ("", "replay", "trainer/replay")
"""Where a replay is in its own folder, in its trainer's, and in that of `updraft up`."""


class StoredTrace(Protocol):
    """One trace in a folder."""

    def read(self) -> bytes:
        """Its bytes. Corrupt if they are damaged, NotFound if it was removed meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class Recording:
    folder: Path
    name: str
    target_fingerprint: str

    def read(self) -> bytes:
        data = recordings.read(self.folder, self.name, target_fingerprint=self.target_fingerprint)
        if data is None:
            raise Corrupt(f"{recordings.path(self.folder, self.name)} is damaged")
        return data


@dataclass(frozen=True, slots=True)
class ReplayedTrace:
    segments: Segments
    location: Location

    def read(self) -> bytes:
        return self.segments.read(self.location)


def stored_traces(folder: Path, *, target_fingerprint: str) -> Iterator[StoredTrace]:
    """All traces of a folder, in the same order each time. InvalidInput if it holds none, Conflict if they are of another
    target, Corrupt if its index is damaged."""
    replay = next((folder / part for part in _REPLAY if (folder / part / INDEX).is_file()), None)
    if replay is not None:
        yield from _replayed(replay, target_fingerprint)
        return
    names = sorted(recordings.names(folder))
    if not names:
        raise InvalidInput(f"{folder} holds no traces: name a folder of recordings, or the data folder of a trainer")
    for name in names:
        yield Recording(folder, name, target_fingerprint)


def _replayed(folder: Path, target_fingerprint: str) -> Iterator[StoredTrace]:
    try:
        with closing(_opened(folder / INDEX)) as db:
            stored = db.execute("SELECT fingerprint FROM target").fetchone()
            rows = db.execute("SELECT segment, offset, num_bytes, crc FROM samples ORDER BY admitted").fetchall()
    except sqlite3.Error as error:
        raise Corrupt(f"{folder / INDEX} cannot be read: {error}") from error
    if stored is not None and stored[0] != target_fingerprint:
        raise Conflict(f"{folder} holds traces of the target {stored[0]}, not of {target_fingerprint}")
    segments = Segments(folder, max_bytes=0)
    yield from (ReplayedTrace(segments, Location(*row)) for row in rows)


def _opened(index: Path) -> sqlite3.Connection:
    """Without the log of a running trainer, the file alone is the index; then also a folder that is read-only can be read."""
    is_alone = not index.with_name(f"{index.name}-wal").exists()
    return sqlite3.connect(f"file:{quote(str(index))}?mode=ro{'&immutable=1' if is_alone else ''}", uri=True)
