"""Learning curves for TensorBoard, in files of bounded size. A disk that is full or gone costs only points of the curves."""

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from updraft_chassis.clock import Clock
from updraft_trainer.publishing import event_file

logger = logging.getLogger(__name__)

EVERY_S = 5.0
"""Time between two points, at least: a row of some 15 scalars has about 600 bytes, so a day takes about 10 MB."""

FILE_BYTES = 8 * 1024**2
MAX_BYTES = 64 * 1024**2
MAX_FILES = 200
"""Bounds of a file and of all of them. Each start has a file of its own. The oldest are removed first."""

_NAME = "events.out.tfevents.{:013d}.updraft"
_NAMES = f"events.out.tfevents.{13 * '[0-9]'}.updraft"


class Curves:
    """Scalars by optimizer step, written into a folder of their own. Not thread-safe."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._file: Path | None = None
        self._values: dict[str, float] = {}
        self._due_s = float("-inf")
        self._has_started = False
        self._is_failing = False

    @property
    def is_due(self) -> bool:
        """The next point may be written."""
        return self._clock.monotonic() >= self._due_s

    def add(self, values: Mapping[str, float]) -> None:
        """Values for the next point."""
        self._values.update(values)

    def write(self, step: int) -> bool:
        """Write a point; false if that is not possible now. Its values are lost then."""
        values, self._values = self._values, {}
        self._due_s = self._clock.monotonic() + EVERY_S
        try:
            self._write(step, values)
        except OSError as error:
            if not self._is_failing:
                logger.warning("Cannot write curves for TensorBoard, training goes on: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False
        return not self._is_failing

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None or not self._file.exists() or self._file.stat().st_size >= FILE_BYTES:
            self._file = self._next_file(step)
        _append(self._file, event_file.row(self._clock.now(), step, values))

    def _next_file(self, step: int) -> Path:
        """A file whose name comes after all others. The first one of a process takes over from points of a later step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._make_room()
        now_s = self._clock.now()
        last = max((int(file.name.split(".")[3]) for file in self._files()), default=0)
        file = self._folder / _NAME.format(max(int(1000 * now_s), last + 1))  # the clock may have been set back
        try:
            _append(file, event_file.head(now_s, first_step=None if self._has_started else step))
        except OSError:
            file.unlink(missing_ok=True)  # it would count as one of the files
            raise
        self._has_started = True
        return file

    def _files(self) -> list[Path]:
        """The oldest first."""
        return sorted(self._folder.glob(_NAMES))

    def _make_room(self) -> None:
        """Remove the oldest files until another one fits."""
        files = self._files()
        total = sum(file.stat().st_size for file in files)
        while files and (total + FILE_BYTES > MAX_BYTES or len(files) >= MAX_FILES):
            oldest = files.pop(0)
            total -= oldest.stat().st_size
            oldest.unlink()


def _append(file: Path, data: bytes) -> None:
    """All or nothing, because readers stop at a record that is cut off."""
    with file.open("ab", buffering=0) as stream:
        size = stream.tell()
        if stream.write(data) != len(data):
            os.ftruncate(stream.fileno(), size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
