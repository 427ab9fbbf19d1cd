"""Output of a child, kept in a file with one predecessor, so that a year of logs fits on the disk.

A full disk loses lines, and the log later records how many; it must never stop the child that wrote them.
"""

from pathlib import Path
from typing import IO


class LogFile:
    """Appends lines to `path`; a file that would pass `max_bytes` becomes `<name>.1` first."""

    def __init__(self, path: Path, *, max_bytes: int = 10_000_000) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._num_lost = 0
        self._file: IO[bytes] | None = None

    def write(self, line: bytes) -> None:
        """Append one line, or count it as lost if the disk is full."""
        try:
            file = self._opened(len(line))
            if self._num_lost:
                file.write(f"({self._num_lost} lines are missing here: the disk was full)\n".encode())
                self._num_lost = 0
            file.write(line)
        except OSError:
            self._num_lost += 1

    def close(self) -> None:
        """Close the file until something is written again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, num_bytes: int) -> IO[bytes]:
        if self._file is not None and self._file.tell() + num_bytes > self._max_bytes:
            self.close()
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)  # unbuffered: a person follows it with tail -f
        return self._file
