"""The bytes of a version, by the cheapest way that works: a delta to what is here, the bucket, or the registry's stream.

The shorter ways may fail in any manner, and cost no more than the attempt: what they bring is proven by a digest, and the
stream is always left. Whatever breaks off is resumed from what has arrived.
"""

import asyncio
import logging
from contextlib import nullcontext
from enum import Enum
from typing import TYPE_CHECKING, BinaryIO

import grpc.aio
import httpx

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts.partial_download import DeltaBase, PartialDownload
from updraft_chassis import rpc
from updraft_chassis.errors import Corrupt, InvalidInput, Unavailable

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

logger = logging.getLogger(__name__)

Call = grpc.aio.UnaryStreamCall[pb.FetchRequest, pb.FetchResponse]

SILENCE_S = 30.0
"""A registry that lets us wait says so every few seconds; one silent for longer has gone."""

_QUEUE_S = 900.0
"""A fleet that fetches at once is served one after the other: the last one's turn may come late."""

# A transfer slower than this ends (and a download resumes): a stuck one must not last for hours.
_MIN_BYTES_PER_S = 256 * 1024

GRACE_S = 10.0
"""What a transfer may take besides: connecting, and a peer's first answer."""

_BUCKET_TIMEOUT = httpx.Timeout(10.0, connect=5.0)


def deadline_s(size_bytes: int) -> float:
    """How long a transfer of that size may take."""
    return GRACE_S + size_bytes / _MIN_BYTES_PER_S


class _Way(Enum):
    """A short way to the weights that turned out to lead nowhere."""

    DELTA = "delta"
    BUCKET = "bucket"


async def fetch(stub: "RegistryAsyncStub", request: pb.FetchRequest, partial: PartialDownload) -> None:
    """Let the weights arrive whole, not yet verified. Unavailable leaves what arrived for the next attempt.

    Each round brings them or rules out a way, so there are three at most.
    """
    request, base = _copy(request), partial.base
    while partial.weights.tell() < partial.manifest.size_bytes:
        if partial.weights.tell():
            base = None  # a bucket that broke off gave more than a delta would save
        with partial.delta(base) if base else nullcontext() as delta:
            failed = await _attempt(stub, _asking(request, base, delta or partial.weights), partial, delta)
        if failed is _Way.BUCKET:
            request.accept_redirect = False
        elif base is not None and failed is _Way.DELTA:
            partial.forget_delta(base)
            base = None


def _asking(request: pb.FetchRequest, base: DeltaBase | None, file: BinaryIO) -> pb.FetchRequest:
    """The request for what `file` lacks."""
    asking = _copy(request)
    asking.offset = file.tell()
    if base is not None:
        asking.delta_base_version, asking.delta_base_digest = base.version, base.digest
    return asking


def _copy(request: pb.FetchRequest) -> pb.FetchRequest:
    copy = pb.FetchRequest()
    copy.CopyFrom(request)
    return copy


async def _attempt(
    stub: "RegistryAsyncStub", request: pb.FetchRequest, partial: PartialDownload, delta: BinaryIO | None
) -> _Way | None:
    """Follow one answer of the registry; return the way that does not work, or None when the weights are here."""
    try:
        with rpc.errors():
            call = stub.Fetch(request, timeout=_QUEUE_S + deadline_s(partial.manifest.size_bytes))
            try:
                return await _follow(call, request, partial, delta)
            finally:
                call.cancel()  # a reader that gives up must not leave the registry sending
    except (Corrupt, InvalidInput) as error:
        if delta is None:
            raise
        logger.warning("A delta is of no use; the draft is fetched whole", extra={"reason": str(error)})
        return _Way.DELTA


async def _follow(
    call: Call, request: pb.FetchRequest, partial: PartialDownload, delta: BinaryIO | None
) -> _Way | None:
    start, manifest = await _start(call), partial.manifest
    is_delta = start.encoding == pb.ENCODING_DELTA_ZSTD
    size_bytes = start.size_bytes if is_delta else manifest.size_bytes
    if start.digest != manifest.digest or size_bytes > manifest.size_bytes:
        raise Corrupt(f"the registry announces ({start}), expected {manifest.digest}")
    if start.redirect_uri and not is_delta and request.accept_redirect:
        return None if await _from_bucket(start.redirect_uri, partial) else _Way.BUCKET
    if start.redirect_uri or (is_delta and delta is None):
        raise Corrupt(f"the registry announces ({start}), which nobody asked for")
    if is_delta and delta is not None:
        await _take(call, delta, size_bytes)
        await asyncio.to_thread(partial.apply, delta)
    elif delta is not None and request.offset:
        return _Way.DELTA  # there was one once
    else:
        await _take(call, partial.weights, size_bytes)
    return None


async def _start(call: Call) -> pb.FetchResponse.Start:
    """What the registry will send; until it knows, it sends empty chunks."""
    while (response := await _next(call)) is not None:
        if response.HasField("start"):
            return response.start
        if response.chunk.data:
            break
    raise Corrupt("the registry sends weights without saying which")


async def _take(call: Call, file: BinaryIO, size_bytes: int) -> None:
    """Append to `file` what it lacks of `size_bytes`."""
    while file.tell() < size_bytes and (response := await _next(call)) is not None:
        chunk = response.chunk
        if chunk.data and (chunk.offset != file.tell() or chunk.offset + len(chunk.data) > size_bytes):
            raise Corrupt(
                f"the registry sent {len(chunk.data)} bytes at {chunk.offset}, expected {file.tell()} of {size_bytes}"
            )
        await asyncio.to_thread(file.write, chunk.data)
    if file.tell() < size_bytes:
        raise Unavailable(f"the registry stopped after {file.tell()} of {size_bytes} bytes")


async def _next(call: Call) -> pb.FetchResponse | None:
    """The next message, None at the end."""
    try:
        async with asyncio.timeout(SILENCE_S):
            response = await call.read()
    except TimeoutError:
        raise Unavailable(f"the registry was silent for {SILENCE_S:g} s") from None
    return response if isinstance(response, pb.FetchResponse) else None


async def _from_bucket(address: str, partial: PartialDownload) -> bool:
    """Take what is missing from a signed address; False if it does not give the weights, whatever the reason."""
    weights, size_bytes = partial.weights, partial.manifest.size_bytes
    headers, expected = ({"Range": f"bytes={weights.tell()}-"}, 206) if weights.tell() else ({}, 200)
    until_s = asyncio.get_running_loop().time() + deadline_s(size_bytes - weights.tell())
    try:
        async with (
            asyncio.timeout_at(until_s) as limit,
            httpx.AsyncClient(timeout=_BUCKET_TIMEOUT) as client,
            client.stream("GET", address, headers=headers) as response,
        ):
            if response.status_code != expected:
                return _refused(f"it answers {response.status_code}")
            async for data in response.aiter_raw():
                if weights.tell() + len(data) > size_bytes:
                    return _refused("it goes on after the end")
                limit.reschedule(None)  # a thread that writes cannot be stopped
                await asyncio.to_thread(weights.write, data)
                limit.reschedule(until_s)
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        return _refused(type(error).__name__)  # its text may hold the address, and that the signature
    if weights.tell() < size_bytes:
        return _refused(f"it stopped after {weights.tell()} of {size_bytes} bytes")
    if await asyncio.to_thread(partial.is_whole):
        return True
    partial.start_over()
    return _refused("it gives something else")


def _refused(reason: str) -> bool:
    logger.warning("The bucket does not give a draft; the registry is asked for it", extra={"reason": reason})
    return False
