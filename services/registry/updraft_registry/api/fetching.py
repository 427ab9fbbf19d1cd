"""Fetches of weights: whole or as a delta, from any offset, or by redirect to a bucket.

At most `max_fetches` readers are served at the same time, each with one chunk in flight, so memory is bounded. The others
queue in order of arrival and get an empty chunk now and then as a keepalive. A reader that makes no progress loses its
place. If there is no delta, a reader gets the whole weights.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, BinaryIO

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput, NotFound, Unavailable
from updraft_chassis.rpc import CHUNK_BYTES, Context, unavailable_after
from updraft_registry.api.deltas import Deltas
from updraft_registry.api.fair_queue import FairQueue
from updraft_registry.control import Control
from updraft_registry.messages.admission import check_name
from updraft_registry.metrics import Metrics
from updraft_registry.storage.archive import Archive

_OPENERS = 4
"""Threads that may wait for a bucket. A blob is downloaded once for all its readers."""

_LABELS = {pb.ENCODING_IDENTITY: "identity", pb.ENCODING_DELTA_ZSTD: "delta"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many readers are served at the same time, and how long one may make no progress.

    A waiting reader gets an empty chunk every `keepalive_s`; readers wait for a multiple of it (`fetch.SILENCE_S`).
    """

    max_fetches: int
    stall_s: float
    keepalive_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Payload:
    """The bytes to send: a blob, or the delta to it from the blob `base`."""

    encoding: pb.Encoding.ValueType
    size_bytes: int
    digest: str
    base: str = ""


class Fetching:
    """Answers Fetch, within limits."""

    def __init__(self, archive: Archive, control: Control, deltas: Deltas, metrics: Metrics, limits: Limits) -> None:
        self._archive = archive
        self._control = control
        self._deltas = deltas
        self._metrics = metrics
        self._limits = limits
        self._queue = FairQueue(limits.max_fetches)
        self._threads = ThreadPoolExecutor(max_workers=_OPENERS, thread_name_prefix="blobs")
        metrics.waiting_fetches.set_function(lambda: self._queue.num_waiting)

    async def serve(self, request: pb.FetchRequest, context: Context) -> None:
        """Answer a request; Unavailable if the reader makes no progress for too long."""
        stall_s = self._limits.stall_s
        async with aclosing(self._answer(request)) as responses:
            async for response in responses:
                async with unavailable_after(stall_s, f"the reader made no progress for {stall_s:g} s"):
                    await context.write(response)

    def close(self) -> None:
        """Shut down the threads without waiting for their work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, request: pb.FetchRequest) -> AsyncGenerator[pb.FetchResponse, None]:
        manifest, base = await self._control.call(self._find, request)
        store, whole = self._archive.store, _whole(manifest)
        if request.accept_redirect and (address := await asyncio.to_thread(store.link, manifest.digest)):
            self._metrics.fetches.labels("redirect").inc()
            yield _start(whole, address)
            return
        delta: _Payload | None = None
        if base:
            making = self._deltas.make(base, manifest.digest)
            while not await self._finishes_in_time(making):
                yield _chunk(request.offset)
            delta = await asyncio.to_thread(self._delta, base, manifest)
        payload = delta or whole
        if request.offset > payload.size_bytes:
            raise InvalidInput(f"offset {request.offset} is beyond the end, {payload.size_bytes}")
        self._metrics.fetches.labels(_LABELS[payload.encoding]).inc()
        yield _start(payload)
        async with aclosing(self._send(payload, request)) as responses:
            async for response in responses:
                yield response

    async def _send(self, payload: _Payload, request: pb.FetchRequest) -> AsyncGenerator[pb.FetchResponse, None]:
        place = self._queue.acquire()
        try:
            while not await self._finishes_in_time(place):
                yield _chunk(request.offset)
            opening = self._threads.submit(self._open, payload)
            try:
                while not await self._finishes_in_time(asyncio.wrap_future(opening)):
                    yield _chunk(request.offset)
                file, offset = opening.result(), request.offset
                while data := await asyncio.to_thread(os.pread, file.fileno(), CHUNK_BYTES, offset):
                    self._metrics.fetched_bytes.labels(_LABELS[payload.encoding]).inc(len(data))
                    yield _chunk(offset, data)  # a reader that has everything may disconnect at once
                    offset += len(data)
            finally:
                opening.add_done_callback(_close)
        finally:
            self._queue.release(place)

    async def _finishes_in_time(self, waiting: "asyncio.Future[Any]") -> bool:
        """Whether a future completes before the next keepalive is due."""
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # mark the exception as retrieved
        return bool((await asyncio.wait({waiting}, timeout=self._limits.keepalive_s))[0])

    def _find(self, request: pb.FetchRequest) -> tuple[pb.Manifest, str]:
        """The requested manifest, and the digest of the delta base if it is stored here. Runs on the archive's thread."""
        name = check_name(request.speculator)
        manifest = self._archive.weights(name, request.version)
        if not request.HasField("delta_base_version"):
            return manifest, ""
        try:
            base = self._archive.weights(name, request.delta_base_version)
        except NotFound:
            return manifest, ""
        return manifest, base.digest if base.digest == request.delta_base_digest != manifest.digest else ""

    def _delta(self, base: str, manifest: pb.Manifest) -> _Payload | None:
        file = self._deltas.open(base, manifest.digest)
        if file is None:
            return None
        with file:
            return _Payload(
                encoding=pb.ENCODING_DELTA_ZSTD, size_bytes=file.seek(0, 2), digest=manifest.digest, base=base
            )

    def _open(self, payload: _Payload) -> BinaryIO:
        if not payload.base:
            return self._archive.store.open(payload.digest)
        file = self._deltas.open(payload.base, payload.digest)
        if file is None:
            raise Unavailable("the delta was evicted from the cache; fetch again")
        return file


def _whole(manifest: pb.Manifest) -> _Payload:
    return _Payload(encoding=pb.ENCODING_IDENTITY, size_bytes=manifest.size_bytes, digest=manifest.digest)


def _start(payload: _Payload, redirect_uri: str = "") -> pb.FetchResponse:
    start = pb.FetchResponse.Start(
        encoding=payload.encoding, size_bytes=payload.size_bytes, digest=payload.digest, redirect_uri=redirect_uri
    )
    return pb.FetchResponse(start=start)


def _chunk(offset: int, data: bytes = b"") -> pb.FetchResponse:
    return pb.FetchResponse(chunk=pb.Chunk(offset=offset, data=data))


def _close(opening: "Future[BinaryIO]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
