"""Append-only files of records: what replay's index points into.

A record is durable when `appended` enters its block, and is removed again if the block fails, so an index that is committed in
the block never points to a record that is not there. After a kill, what no index points to lies behind the last record or in
a file of its own; a file is never appended to after a restart, so nothing has to be repaired. One thread writes. Others may
read at any time and never wait for it: each read opens its file, and finds the record or that the file is gone.

Files are read, not mapped into memory: a sector that the disk cannot read is then an error of one record and not the signal
SIGBUS, which ends the process (ADR 0038).
"""

import errno
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from updraft_chassis.durable import sync
from updraft_chassis.errors import Corrupt, Exhausted, NotFound
from updraft_draft.trace_bytes import Data

_SUFFIX = ".segment"

MAX_DEAD_SHARE = 0.25
"""Space of dropped records that may wait to be reclaimed, as a share of the live bytes. A smaller share costs more copying."""


@dataclass(frozen=True, slots=True)
class Location:
    """A record's place, and the crc32 of its bytes."""

    segment: int
    offset: int
    num_bytes: int
    crc: int

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


@dataclass(slots=True)
class _Segment:
    """Bytes of a file, and of its records that are in use."""

    size: int = 0
    live: int = 0
    num_live: int = 0

    @property
    def dead(self) -> int:
        return self.size - self.live


@dataclass(slots=True)
class _Writer:
    """The file that is appended to, open from its first record on."""

    number: int
    descriptor: int
    end: int = 0


@dataclass(slots=True)
class Segments:
    """The files of a folder, each of about `max_bytes`."""

    folder: Path
    max_bytes: int
    _segments: dict[int, _Segment] = field(default_factory=dict)
    _writer: _Writer | None = None
    _next: int = 1

    def restore(self, locations: Iterable[Location]) -> list[Location]:
        """Take over what a folder holds: the records in use are at `locations`. Returns those that are not there any more,
        and deletes files without a record in use."""
        self.close()
        self._segments = {_number(path): _Segment(size=path.stat().st_size) for path in self._paths()}
        self._next = max(self._segments, default=0) + 1
        lost = []
        for location in locations:
            segment = self._segments.get(location.segment)
            if segment is None or location.end > segment.size:
                lost.append(location)
            else:
                self._use(location)
        self.remove_unused()
        return lost

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(segment.size for segment in list(self._segments.values()))  # a copy: another thread may be appending

    @contextmanager
    def appended(self, records: Sequence[Data]) -> Iterator[list[Location]]:
        """Append records. They are durable within the block, and removed again if it raises.

        Exhausted if they cannot be written: then none is kept.
        """
        if not records:
            yield []
            return
        try:
            writer = self._writer or self._opened()
            start = writer.end
        except OSError as error:
            raise self._exhausted(error) from error
        try:
            locations = self._written(writer, records)
            yield locations
        except BaseException as error:
            self._undo(writer, start)
            if isinstance(error, OSError):
                raise self._exhausted(error) from error
            raise
        for location in locations:
            self._use(location)
        if writer.end >= self.max_bytes:
            self.close()

    def read(self, location: Location) -> bytes:
        """A record. NotFound if its file is gone, Corrupt if its bytes are not those that were written."""
        path = self._path(location.segment)
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), location.num_bytes, location.offset)
        except FileNotFoundError:
            raise NotFound(f"{path} is gone") from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise Exhausted(f"{path} cannot be read: {error.strerror}") from error
            raise Corrupt(f"{path} cannot be read at {location.offset}: {error.strerror}") from error
        if len(data) != location.num_bytes or zlib.crc32(data) != location.crc:
            raise Corrupt(f"{path} is damaged between {location.offset} and {location.end}")
        return data

    def release(self, location: Location) -> None:
        """The record is not in use any more."""
        segment = self._segments[location.segment]
        segment.live -= location.num_bytes
        segment.num_live -= 1

    def remove_unused(self) -> None:
        """Delete files without a record in use."""
        for number in [number for number, segment in self._segments.items() if not segment.num_live]:
            if self._writer is None or self._writer.number != number:
                with suppress(OSError):  # what is left is deleted the next time
                    self._path(number).unlink(missing_ok=True)
                    del self._segments[number]

    def wasteful(self) -> int | None:
        """The file with the most dead bytes, if dropped records take more space than they may: copy its live records to the
        end and release them, and it can be deleted."""
        dead = sum(segment.dead for segment in self._segments.values())
        live = sum(segment.live for segment in self._segments.values())
        writer = self._writer.number if self._writer is not None else 0
        closed = [number for number, segment in self._segments.items() if segment.num_live and number != writer]
        if dead <= MAX_DEAD_SHARE * live + self.max_bytes or not closed:
            return None
        return max(closed, key=lambda number: self._segments[number].dead)

    def with_dropped_records(self, *, before_s: float | None = None) -> list[int]:
        """The files that still have bytes of dropped records; with `before_s`, a Unix time, those last written before it."""
        found = [number for number, segment in self._segments.items() if segment.dead]
        return found if before_s is None else [number for number in found if self._written_s(number) < before_s]

    @property
    def numbers(self) -> list[int]:
        """The numbers of all files, ascending."""
        return sorted(self._segments)

    def seal(self, number: int) -> None:
        """Append to another file than this one from now on."""
        if self._writer is not None and self._writer.number == number:
            self.close()

    def close(self) -> None:
        """Append to another file from now on."""
        if self._writer is not None:
            os.close(self._writer.descriptor)
            self._writer = None

    def _use(self, location: Location) -> None:
        segment = self._segments[location.segment]
        segment.size = max(segment.size, location.end)
        segment.live += location.num_bytes
        segment.num_live += 1

    def _opened(self) -> _Writer:
        """A new file, whose name is durable."""
        number = self._next
        descriptor = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._next += 1
        try:
            sync(self.folder)
        except OSError:  # the empty file is deleted at the next start
            os.close(descriptor)
            raise
        self._segments[number] = _Segment()
        self._writer = _Writer(number, descriptor)
        return self._writer

    def _written(self, writer: _Writer, records: Sequence[Data]) -> list[Location]:
        locations = []
        for record in records:
            location = Location(writer.number, writer.end, len(record), zlib.crc32(record))
            _write(writer.descriptor, record, writer.end)
            writer.end = location.end
            locations.append(location)
        os.fdatasync(writer.descriptor)
        return locations

    def _undo(self, writer: _Writer, start: int) -> None:
        """Free the space, and leave the file: after an error, what the kernel holds of it may differ from the disk."""
        with suppress(OSError):
            os.ftruncate(writer.descriptor, start)
        self.close()
        self.remove_unused()

    def _exhausted(self, error: OSError) -> Exhausted:
        reason = error.strerror or str(error)
        return Exhausted(f"{self.folder} cannot be written ({reason}); free disk space or fix its permissions")

    def _paths(self) -> list[Path]:
        return [path for path in self.folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal()]

    def _written_s(self, number: int) -> float:
        with suppress(OSError):
            return self._path(number).stat().st_mtime
        return 0.0

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}{_SUFFIX}"


def _write(descriptor: int, data: Data, offset: int) -> None:
    view = memoryview(data)
    while view:
        num = os.pwrite(descriptor, view, offset)
        view, offset = view[num:], offset + num


def _number(path: Path) -> int:
    return int(path.stem)
