"""Fetches a version's weights by the cheapest route that works: a delta, the bucket, or the registry's stream.

Delta and bucket may fail in any way, which costs only the attempt: the result is checked against a digest, and the stream
remains as a fallback. An interrupted transfer resumes where it stopped.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from enum import Enum
from typing import TYPE_CHECKING, BinaryIO

import grpc.aio

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import ranged_download
from updraft_artifacts.partial_download import DeltaBase, PartialDownload
from updraft_chassis import rpc
from updraft_chassis.errors import Corrupt, InvalidInput, Unavailable

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

logger = logging.getLogger(__name__)

Call = grpc.aio.UnaryStreamCall[pb.FetchRequest, pb.FetchResponse]

SILENCE_S = 30.0
"""A registry that makes clients wait sends an empty chunk every few seconds; longer silence means that it is gone."""

_QUEUE_S = 900.0
"""The registry limits concurrent fetches, so the last pod of a fleet may wait this long."""

# A slower transfer is ended (and a download resumes), so that a stuck one does not last for hours.
_MIN_BYTES_PER_S = 256 * 1024

GRACE_S = 10.0
"""Allowance for connecting and for the first response."""


def deadline_s(size_bytes: int) -> float:
    return GRACE_S + size_bytes / _MIN_BYTES_PER_S


class _Route(Enum):
    DELTA = "delta"
    BUCKET = "bucket"


async def fetch(stub: "RegistryAsyncStub", request: pb.FetchRequest, partial: PartialDownload) -> None:
    """Download the complete weights without verifying them. After Unavailable the next attempt resumes.

    Each iteration either completes or rules out a route, so there are at most three.
    """
    request, base = deepcopy(request), partial.base
    while partial.num_bytes < partial.manifest.size_bytes:
        if partial.num_bytes:
            base = None  # an interrupted bucket download has saved more than a delta would
        with partial.delta(base) if base else nullcontext() as delta:
            offset = partial.num_bytes if delta is None else delta.tell()
            failed = await _attempt(stub, _resuming(request, base, offset), partial, delta)
        if failed is _Route.BUCKET:
            request.accept_redirect = False
        elif base is not None and failed is _Route.DELTA:
            partial.forget_delta(base)
            base = None


def _resuming(request: pb.FetchRequest, base: DeltaBase | None, offset: int) -> pb.FetchRequest:
    """The request for the rest from `offset` on."""
    request = deepcopy(request)
    request.offset = offset
    if base is not None:
        request.delta_base_version, request.delta_base_digest = base.version, base.digest
    return request


async def _attempt(
    stub: "RegistryAsyncStub", request: pb.FetchRequest, partial: PartialDownload, delta: BinaryIO | None
) -> _Route | None:
    """Follow one response of the registry; return the route that does not work, or None if the weights are complete."""
    try:
        with rpc.errors():
            call = stub.Fetch(request, timeout=_QUEUE_S + deadline_s(partial.manifest.size_bytes))
            try:
                return await _follow(call, request, partial, delta)
            finally:
                call.cancel()  # otherwise the registry would go on sending
    except (Corrupt, InvalidInput) as error:
        if delta is None:
            raise
        logger.warning("Cannot use a delta; fetching the whole draft", extra={"reason": str(error)})
        return _Route.DELTA


async def _follow(
    call: Call, request: pb.FetchRequest, partial: PartialDownload, delta: BinaryIO | None
) -> _Route | None:
    start, manifest = await _start(call), partial.manifest
    is_delta = start.encoding == pb.ENCODING_DELTA_ZSTD
    size_bytes = start.size_bytes if is_delta else manifest.size_bytes
    if start.digest != manifest.digest or size_bytes > manifest.size_bytes:
        raise Corrupt(f"the registry sends ({start}), expected {manifest.digest}")
    if start.redirect_uri and not is_delta and request.accept_redirect:
        return None if await _from_bucket(start.redirect_uri, partial) else _Route.BUCKET
    if start.redirect_uri or (is_delta and delta is None):
        raise Corrupt(f"the registry sends ({start}), which was not requested")
    if is_delta and delta is not None:
        await _take(call, delta.write, delta.tell(), size_bytes)
        await asyncio.to_thread(partial.apply, delta)
    elif delta is not None and request.offset:
        return _Route.DELTA  # the registry no longer has it
    else:
        await _take(call, partial.append, partial.num_bytes, size_bytes)
    return None


async def _start(call: Call) -> pb.FetchResponse.Start:
    """The registry's announcement; until it is ready, it sends empty chunks."""
    while (response := await _next(call)) is not None:
        if response.HasField("start"):
            return response.start
        if response.chunk.data:
            break
    raise Corrupt("the registry sends weights without a start message")


async def _take(call: Call, append: Callable[[bytes], object], offset: int, size_bytes: int) -> None:
    """Append chunks from `offset` on until there are `size_bytes`."""
    while offset < size_bytes and (response := await _next(call)) is not None:
        data = response.chunk.data
        if data and (response.chunk.offset != offset or offset + len(data) > size_bytes):
            raise Corrupt(
                f"the registry sent {len(data)} bytes at {response.chunk.offset}, expected {offset} of {size_bytes}"
            )
        await asyncio.to_thread(append, data)
        offset += len(data)
    if offset < size_bytes:
        raise Unavailable(f"the registry stopped after {offset} of {size_bytes} bytes")


async def _next(call: Call) -> pb.FetchResponse | None:
    """The next message, or None at the end."""
    async with rpc.unavailable_after(SILENCE_S, f"the registry was silent for {SILENCE_S:g} s"):
        response = await call.read()
    return response if isinstance(response, pb.FetchResponse) else None


async def _from_bucket(address: str, partial: PartialDownload) -> bool:
    """Download the rest from a signed address; false if that fails for any reason."""
    begin, end = partial.num_bytes, partial.manifest.size_bytes
    until_s = asyncio.get_running_loop().time() + deadline_s(end - begin)
    if reason := await ranged_download.download(address, begin, end, partial.append, until_s=until_s):
        return _failed(reason)
    if await asyncio.to_thread(partial.is_whole):
        return True
    partial.start_over()
    return _failed("its content has another digest")


def _failed(reason: str) -> bool:
    logger.warning("Cannot fetch a draft from the bucket; fetching it from the registry", extra={"reason": reason})
    return False
