"""A download over HTTP in ranges, several at the same time, that arrives in order.

One connection to a bucket is slow, and several are as fast as the network. Ranges wait in memory for their turn, so the file
is whole up to its end, which makes resuming simple. A range that breaks off goes on where it stopped.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

RANGE_BYTES = 8 * 1024 * 1024
"""Large enough to make the cost of a request negligible."""

_NUM_PARALLEL = 4

_TIMEOUT = httpx.Timeout(10.0, connect=5.0)


@dataclass(slots=True)
class _Range:
    """The bytes from `begin` to `end`, as far as they have arrived."""

    begin: int
    end: int
    data: bytearray = field(default_factory=bytearray)

    @property
    def missing(self) -> int:
        return self.end - self.begin - len(self.data)


async def download(address: str, begin: int, end: int, append: Callable[[bytearray], None], *, until_s: float) -> str:
    """Call `append`, on a thread, with the bytes from `begin` to `end`, in order.

    Returns an empty string, or why the rest is missing; `until_s` is on the loop's clock. Raises errors of `append`.
    The reason does not contain the address, which may be signed.
    """
    waiting = deque(_Range(start, min(start + RANGE_BYTES, end)) for start in range(begin, end, RANGE_BYTES))
    running: deque[tuple[_Range, asyncio.Task[str]]] = deque()
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT) as client, asyncio.TaskGroup() as tasks:
            while waiting or running:
                while waiting and len(running) < _NUM_PARALLEL:
                    part = waiting.popleft()
                    running.append((part, tasks.create_task(_fetch(client, address, part, until_s))))
                part, fetching = running.popleft()
                reason = await fetching
                await asyncio.to_thread(append, part.data)
                if reason:
                    for _, other in running:
                        other.cancel()
                    return reason
    except BaseExceptionGroup as group:  # of `append`, or a cancellation
        raise group.exceptions[0] from None
    return ""


async def _fetch(client: httpx.AsyncClient, address: str, part: _Range, until_s: float) -> str:
    """Complete a range, or return why it makes no progress."""
    reason = ""
    while part.missing:
        missing = part.missing
        try:
            async with asyncio.timeout_at(until_s):
                reason = await _receive(client, address, part)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            reason = type(error).__name__
        if reason and part.missing == missing:
            return reason
    return ""


async def _receive(client: httpx.AsyncClient, address: str, part: _Range) -> str:
    """Receive until the range or the response is complete; return what is wrong with the response."""
    headers = {"Range": f"bytes={part.end - part.missing}-{part.end - 1}"}
    async with client.stream("GET", address, headers=headers) as response:
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            return f"status {response.status_code}"
        async for data in response.aiter_raw():
            if len(data) > part.missing:
                return "it sends too many bytes"
            part.data += data
    return "it sends too few bytes" if part.missing else ""
