"""Reading a request's body within a limit of bytes and of time."""

import asyncio
from dataclasses import dataclass

from starlette.requests import Request

from updraft_inference.cancellation import Interrupted
from updraft_inference.http.errors import ApiError

# A body that is too large is read to its end and thrown away, up to here: closing on a client that still
# writes would reset the connection before it reads why.
_DISCARD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """What a body may take."""

    max_bytes: int
    timeout_s: float


async def read_body(request: Request, limits: BodyLimits) -> bytes:
    """The body. ApiError 413 with both numbers if too large, 408 if slow; Interrupted if the client left."""
    declared = int(request.headers.get("content-length", 0))  # the server has checked that it is a number
    is_waiting = "expect" in request.headers  # for our word before it sends anything
    if declared > limits.max_bytes and (is_waiting or declared > _DISCARD_BYTES):
        raise _too_large(declared, limits.max_bytes)
    try:
        async with asyncio.timeout(limits.timeout_s):
            body, num_bytes = await _read(request, limits.max_bytes)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {limits.timeout_s:g} s", code="body_too_slow") from None
    if num_bytes > limits.max_bytes:
        raise _too_large(max(declared, num_bytes), limits.max_bytes)
    return body


async def _read(request: Request, max_bytes: int) -> tuple[bytes, int]:
    """What fits of the body, and how much came."""
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
    message = f"The body has {num_bytes} bytes; this server takes at most {max_bytes}"
    return ApiError(413, message, code="body_too_large")
