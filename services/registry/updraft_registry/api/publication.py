"""One upload: first the manifest, then chunks into a temporary file, then checks, then the version.

One chunk is in memory. Room on the disk is checked before the first one; if there is none, weights that nobody needs are
deleted for it. Every wait for the sender has a timeout, so that a silent sender does not keep its file.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Exhausted, InvalidInput
from updraft_chassis.rpc import unavailable_after
from updraft_registry.api.deltas import Deltas
from updraft_registry.control import Control
from updraft_registry.storage.archive import Archive
from updraft_registry.storage.stores.port import Upload


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadTimeouts:
    """Time limits of an upload: between two messages, and in total, at a rate that any link has."""

    silence_s: float = 60.0
    """A sender on a bad link needs seconds per 1 MiB chunk. One that is silent for a minute is gone."""
    bytes_per_s: float = 64 * 1024

    def total_s(self, num_bytes: int) -> float:
        return self.silence_s + num_bytes / self.bytes_per_s


UPLOAD_TIMEOUTS = UploadTimeouts()


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Version of an upload. `existed`: the registry had the content already."""

    speculator: str
    number: int
    existed: bool
    num_bytes: int


async def publish(
    parts: AsyncIterator[registry_pb2.PublishRequest],
    archive: Archive,
    control: Control,
    timeouts: UploadTimeouts = UPLOAD_TIMEOUTS,
    *,
    deltas: Deltas | None = None,
) -> Published:
    """Receive, check and publish; return once the version was decided on. A failure leaves nothing behind.

    `deltas` are deleted on a full disk, before any weights.
    """
    first = await _next(parts, timeouts)
    if first is None or first.WhichOneof("part") != "manifest":
        raise InvalidInput("the first message of an upload must be its manifest")
    manifest = first.manifest
    existing = await control.call(archive.admit, manifest)
    if existing is not None:
        return Published(speculator=manifest.speculator, number=existing, existed=True, num_bytes=0)
    try:
        upload = await asyncio.to_thread(archive.begin, manifest)
    except Exhausted:
        if deltas is not None:
            await asyncio.to_thread(deltas.clear)
        upload = await control.begin_evicting(manifest)
    try:
        await _receive(parts, upload, timeouts, timeouts.total_s(manifest.size_bytes))
        await asyncio.to_thread(archive.verify, upload, manifest)
        number, existed = await control.change(manifest.speculator, archive.publish, upload, manifest, control.now_ms())
    finally:
        # A call may be cancelled more than once, and a cancelled wait would take the work off the queue of threads.
        await asyncio.shield(asyncio.to_thread(upload.discard))
    return Published(speculator=manifest.speculator, number=number, existed=existed, num_bytes=manifest.size_bytes)


async def _receive(
    parts: AsyncIterator[registry_pb2.PublishRequest], upload: Upload, timeouts: UploadTimeouts, within_s: float
) -> None:
    async with unavailable_after(within_s, f"the upload took longer than {within_s:g} s; send it again"):
        while (part := await _next(parts, timeouts)) is not None:
            if part.WhichOneof("part") != "chunk":
                raise InvalidInput("after its manifest, an upload consists of chunks")
            await asyncio.to_thread(upload.write, part.chunk.offset, part.chunk.data)


async def _next(
    parts: AsyncIterator[registry_pb2.PublishRequest], timeouts: UploadTimeouts
) -> registry_pb2.PublishRequest | None:
    """The next message, or None at the end."""
    silence_s = timeouts.silence_s
    async with unavailable_after(silence_s, f"the sender was silent for {silence_s:g} s; send it again"):
        return await anext(parts, None)
