"""Reads request bodies within a limit on bytes and on time."""

import asyncio
from dataclasses import dataclass

from starlette.requests import Request

from updraft_inference.cancellation import Interrupted
from updraft_inference.http.errors import ApiError

# An oversized body is read to its end and discarded, up to this size. Closing while the client is still writing would
# reset the connection before the client reads the error.
_DISCARD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    max_bytes: int
    timeout_s: float


async def read_body(request: Request, limits: BodyLimits) -> bytes:
    """Return the body. Raises ApiError 413 if it is too large, 408 if it is too slow, and Interrupted if the client leaves."""
    declared = int(request.headers.get("content-length", 0))  # uvicorn has validated the number
    is_waiting = "expect" in request.headers  # the client sends nothing before "100 Continue"
    if declared > limits.max_bytes and (is_waiting or declared > _DISCARD_BYTES):
        raise _too_large(declared, limits.max_bytes)
    try:
        async with asyncio.timeout(limits.timeout_s):
            body, num_bytes = await _read(request, limits.max_bytes)
    except TimeoutError:
        raise ApiError(408, f"Request body not received within {limits.timeout_s:g} s", code="body_too_slow") from None
    if num_bytes > limits.max_bytes:
        raise _too_large(max(declared, num_bytes), limits.max_bytes)
    return body


async def _read(request: Request, max_bytes: int) -> tuple[bytes, int]:
    """Return the part of the body that fits, and the number of bytes that arrived."""
    body, num_bytes, is_over = bytearray(), 0, False
    while not is_over and num_bytes <= _DISCARD_BYTES:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Interrupted
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes <= max_bytes:
            body += chunk
        is_over = not message.get("more_body", False)
    return bytes(body), num_bytes


def _too_large(num_bytes: int, max_bytes: int) -> ApiError:
    message = f"Request body has {num_bytes} bytes; the limit is {max_bytes}"
    return ApiError(413, message, code="body_too_large")
