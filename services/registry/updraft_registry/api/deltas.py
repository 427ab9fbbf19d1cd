"""Deltas from versions that readers hold to versions that they need, computed once and kept in a bounded folder.

All readers of a new version need the same delta at the same time, and wait for one computation. Deltas are computed one
at a time on their own thread, so a fleet costs the CPU and memory of one. A delta that failed, or is no smaller than the
weights, is not tried again.
"""

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from updraft_artifacts import delta
from updraft_chassis.errors import Corrupt, Unavailable, UpdraftError
from updraft_registry.metrics import Metrics
from updraft_registry.storage.stores.cache import Cache
from updraft_registry.storage.stores.port import Store

logger = logging.getLogger(__name__)


class Deltas:
    """Deltas between blobs of `store`, in `folder`. If `max_bytes` is 0 there are none."""

    def __init__(self, folder: Path, store: Store, *, max_bytes: int, metrics: Metrics) -> None:
        self._cache = Cache(folder, max_bytes=max_bytes)
        self._store = store
        self._is_on = max_bytes > 0
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deltas")
        self._making: dict[str, Future[None]] = {}
        self._useless: set[str] = set()

    def make(self, base: str, result: str) -> "asyncio.Future[None]":
        """Compute the delta between two blobs. The future completes once `open` has the answer, and may be cancelled."""
        name = _name(base, result)
        if not self._is_on or name in self._useless:
            return _done()
        making = self._making.get(name)
        if making is None:
            making = self._making[name] = self._thread.submit(self._make, name, base, result)
            making.add_done_callback(lambda _: self._making.pop(name, None))
        return asyncio.shield(asyncio.wrap_future(making))

    def open(self, base: str, result: str) -> BinaryIO | None:
        """Open a delta; None if there is no useful one. The caller closes it."""
        return self._cache.open(_name(base, result))

    def clear(self) -> None:
        """Delete all deltas, to make room on the disk. They are computed again when they are needed."""
        self._cache.delete(lambda _: True)

    def close(self) -> None:
        """Wait for the delta in progress."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, name: str, base: str, result: str) -> None:
        file = self._cache.open(name)
        if file is not None:
            file.close()
            return
        try:
            self._encode(name, base, result)
        except _NotSmallerError:
            self._useless.add(name)
            self._metrics.deltas.labels("useless").inc()
        except UpdraftError as error:
            if not isinstance(error, Unavailable):
                self._useless.add(name)
            self._metrics.deltas.labels("failed").inc()
            logger.warning("Delta failed; sending the version whole", extra={"error": str(error)})
        else:
            self._metrics.deltas.labels("made").inc()

    def _encode(self, name: str, base: str, result: str) -> None:
        self._clean()
        with self._store.open(base) as old, self._store.open(result) as new, self._cache.create(name) as file:
            header = delta.encode(old, new, file)
            if (header.base_digest, header.result_digest) != (base, result):
                raise Corrupt(f"the weights {base} or {result} are damaged where they are stored")
            if file.tell() >= header.result_bytes:
                raise _NotSmallerError

    def _clean(self) -> None:
        """Delete deltas whose weights were deleted."""
        stored = {_short(digest) for digest in self._store.digests()}
        self._cache.delete(lambda name: not stored.issuperset(name.split("-")))


class _NotSmallerError(Exception):
    """The delta has as many bytes as the weights."""


def _name(base: str, result: str) -> str:
    return f"{_short(base)}-{_short(result)}"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:32]


def _done() -> "asyncio.Future[None]":
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done
