"""The way of one upload: manifest first, then chunks to a file beside the blobs, then checks, then a version.

Memory is one chunk; the disk is asked before the first one. Every wait for the sender has a limit, so that a
sender that fell silent does not hold its file for ever.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_registry.control import Control
from updraft_registry.storage.archive import Archive
from updraft_registry.storage.stores.port import Upload


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadTimeouts:
    """How long a sender may take: between two messages, and for all of them at a rate that any link has."""

    silence_s: float = 60.0
    """A sender on a bad link needs seconds for a chunk of a mebibyte; one silent for a minute has gone."""
    bytes_per_s: float = 64 * 1024

    def total_s(self, num_bytes: int) -> float:
        """For an upload of this size."""
        return self.silence_s + num_bytes / self.bytes_per_s


UPLOAD_TIMEOUTS = UploadTimeouts()


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The version that an upload became, or had been already (`existed`)."""

    speculator: str
    number: int
    existed: bool
    num_bytes: int


async def publish(
    parts: AsyncIterator[registry_pb2.PublishRequest],
    archive: Archive,
    control: Control,
    timeouts: UploadTimeouts = UPLOAD_TIMEOUTS,
) -> Published:
    """Receive, check, publish; returns once the version was decided on.

    Whatever fails leaves nothing behind.
    """
    first = await _next(parts, timeouts)
    if first is None or first.WhichOneof("part") != "manifest":
        raise InvalidInput("the first message of an upload is its manifest")
    manifest = first.manifest
    known = await control.call(archive.admit, manifest)
    if known is not None:
        return Published(speculator=manifest.speculator, number=known, existed=True, num_bytes=0)
    upload = await asyncio.to_thread(archive.begin, manifest)
    try:
        await _receive(parts, upload, timeouts, timeouts.total_s(manifest.size_bytes))
        await asyncio.to_thread(archive.verify, upload, manifest)
        number, existed = await control.change(manifest.speculator, archive.publish, upload, manifest, control.now_ms())
    finally:
        await asyncio.to_thread(upload.discard)
    return Published(speculator=manifest.speculator, number=number, existed=existed, num_bytes=manifest.size_bytes)


async def _receive(
    parts: AsyncIterator[registry_pb2.PublishRequest], upload: Upload, timeouts: UploadTimeouts, within_s: float
) -> None:
    try:
        async with asyncio.timeout(within_s):
            while (part := await _next(parts, timeouts)) is not None:
                if part.WhichOneof("part") != "chunk":
                    raise InvalidInput("after the manifest of an upload come its chunks")
                await asyncio.to_thread(upload.write, part.chunk.offset, part.chunk.data)
    except TimeoutError:
        raise Unavailable(f"the upload took longer than {within_s:g} s; send it again") from None


async def _next(
    parts: AsyncIterator[registry_pb2.PublishRequest], timeouts: UploadTimeouts
) -> registry_pb2.PublishRequest | None:
    """The next message, or None at the end."""
    try:
        async with asyncio.timeout(timeouts.silence_s):
            return await anext(parts, None)
    except TimeoutError:
        raise Unavailable(f"the sender was silent for {timeouts.silence_s:g} s; send it again") from None
