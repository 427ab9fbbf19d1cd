"""A value that is read from files, and read again when one of them has changed: API keys, a certificate."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""How long files that could not be read are left alone, unless they change. The reason may pass without another change."""

T = TypeVar("T")
Stamps = tuple[tuple[int, int, int] | None, ...]


class ReloadingFiles(Generic[T]):
    """The value that `read` makes of `files`. It raises OSError or ValueError if they are not valid, and the former stays.

    Used by one thread.
    """

    def __init__(
        self,
        files: Sequence[Path],
        read: Callable[[], T],
        *,
        what: str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._read = read
        self._what = what
        self._monotonic = monotonic
        self._stamps = self._look()
        self._value = read()
        self._refused: tuple[Stamps, str] | None = None
        """The files that were not valid, and why."""
        self._retry_at = 0.0

    def get(self) -> T:
        """The newest valid value."""
        stamps = self._look()
        if stamps == self._stamps:
            self._refused = None
        elif self._refused is None or stamps != self._refused[0] or self._monotonic() >= self._retry_at:
            self._reload(stamps)
        return self._value

    def _reload(self, stamps: Stamps) -> None:
        try:
            self._value = self._read()
        except (OSError, ValueError) as error:  # SSLError is an OSError
            refused = stamps, str(error)
            if refused != self._refused:
                log.error("Updraft: the new %s is not valid, the former one stays: %s", self._what, error)
            self._refused, self._retry_at = refused, self._monotonic() + RETRY_S
        else:
            self._stamps, self._refused = stamps, None
            log.info("Updraft reloaded the %s", self._what)

    def _look(self) -> Stamps:
        return tuple(_stamp(file) for file in self._files)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
