"""An HTTP proxy in front of an API server that misbehaves as networks and API servers do, until it is told to stop.

Plain HTTP towards the client, TLS with the cluster's own authority towards the API server, the caller's token passed on.
What happens to the nth request follows from the seed; which request is the nth, from the client. Refused: faults inside
the client, which would try the client's own idea of a broken connection.
"""

import asyncio
import base64
import json
import random
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml
from aiohttp import web
from tests.support.wait import LONG_S
from yarl import URL

_PASSED_ON = ("Authorization", "Content-Type", "Accept", "User-Agent")
_PASSED_BACK = ("Content-Type", "Retry-After", "Warning")
_REASONS = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
_WRITES = ("POST", "PUT", "PATCH", "DELETE")
_START_S = 10.0
_TLS_CLOSES_S = 0.25
"""aiohttp closes TLS connections only after a session's `close` has returned ("Graceful shutdown" in its documentation)."""

_Ending = Callable[[web.BaseRequest, web.StreamResponse, aiohttp.ClientResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often (of 1) a request meets what; a watch that was let through ends after a while, one way or another."""

    delayed: float = 0.1
    """Answered late; what else may happen to it happens then."""
    most_delay_s: float = 1.5
    unanswered: float = 0.01
    """The connection is closed; the request was not carried out."""
    lost: float = 0.02
    """The connection is closed; the request was carried out."""
    conflict: float = 0.02
    """409, to writes."""
    gone: float = 0.01
    """410, to listings and watches."""
    busy: float = 0.01
    """429, to come again after a second."""
    broken: float = 0.01
    """500."""
    away: float = 0.01
    """503."""
    watch_s: float = 5.0
    """What a watch lives on average."""
    silence_s: float = 10.0
    """How long a watch that fell silent stays open."""


class FaultProxy:
    """Runs in a thread of its own between `with` and its end; `done` counts what it did to requests, by name."""

    def __init__(self, kubeconfig: Path, faults: Faults, seed: int) -> None:
        cluster = yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._upstream = str(cluster["server"])
        self._tls = ssl.create_default_context(cadata=authority)
        self._faults = faults
        self._rng = random.Random(seed)
        self._is_calm = False
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._runner: web.ServerRunner | None = None
        self.port = 0
        self.done: Counter[str] = Counter()

    def calm(self) -> None:
        """Misbehave no more. What has happened to a connection stays: a watch that fell silent is silent until its end."""
        self._is_calm = True

    def kubeconfig(self, original: Path, folder: Path) -> Path:
        """The same user, through the proxy."""
        config = yaml.safe_load(original.read_text())
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self.port}"}
        written = folder / f"{original.stem}-through-proxy.kubeconfig"
        written.write_text(yaml.safe_dump(config))
        return written

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LONG_S)
        self._loop.close()

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_S)

    async def _start(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=LONG_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        # Who hangs up ends the request at the API server too.
        self._runner = web.ServerRunner(web.Server(self._handle, handler_cancellation=True), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = int(self._runner.addresses[0][1])

    async def _end(self) -> None:
        assert self._runner is not None
        assert self._session is not None
        await self._runner.cleanup()
        await self._session.close()
        await asyncio.sleep(_TLS_CLOSES_S)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        is_watch = "watch" in request.query
        fate = "" if self._is_calm else self._draw(request.method, is_collection=_is_collection(request))
        if not self._is_calm and self._rng.random() < self._faults.delayed:
            self.done["delayed"] += 1
            await asyncio.sleep(self._rng.uniform(0.0, self._faults.most_delay_s))
        if fate:
            self.done[fate] += 1
        if fate == "unanswered":
            return _hang_up(request)
        if fate.isdigit():
            return _status(int(fate))
        async with self._asked(request, body) as answer:
            if fate == "lost":
                return _hang_up(request)
            if is_watch and answer.status == 200:
                with suppress(ConnectionResetError):  # who asked has gone
                    return await self._watch(request, answer)
                return _hang_up(request)
            return web.Response(status=answer.status, body=await answer.read(), headers=_headers(answer))

    def _draw(self, method: str, *, is_collection: bool) -> str:
        """What becomes of a request; empty: nothing."""
        faults = self._faults
        chances = {
            "unanswered": faults.unanswered,
            "lost": faults.lost,
            "409": faults.conflict if method in _WRITES else 0.0,
            "410": faults.gone if method == "GET" and is_collection else 0.0,
            "429": faults.busy,
            "500": faults.broken,
            "503": faults.away,
        }
        drawn = self._rng.random()
        for name, chance in chances.items():
            drawn -= chance
            if drawn < 0.0:
                return name
        return ""

    def _asked(self, request: web.BaseRequest, body: bytes) -> Any:
        assert self._session is not None
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        headers["Accept-Encoding"] = "identity"
        url = URL(f"{self._upstream}{request.raw_path}", encoded=True)
        return self._session.request(request.method, url, data=body or None, headers=headers, allow_redirects=False)

    async def _watch(self, request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """Pass whole lines on until the stream's time is over, if faults are still wished for then."""
        endings: tuple[_Ending, ...] = (self._cut, self._close, self._expire, self._fall_silent)
        ending, until_s = self._rng.choice(endings), self._loop.time() + self._rng.expovariate(1 / self._faults.watch_s)
        response = web.StreamResponse(headers=_headers(answer))
        await response.prepare(request)
        begun = b""
        while True:
            try:
                async with asyncio.timeout_at(None if self._is_calm else until_s):
                    read = await answer.content.readany()
            except TimeoutError:
                if not self._is_calm:
                    await ending(request, response, answer)
                    return response
                continue
            if not read:
                return response
            lines, end, begun = (begun + read).rpartition(b"\n")
            if end:
                await response.write(lines + end)

    async def _cut(
        self, request: web.BaseRequest, response: web.StreamResponse, answer: aiohttp.ClientResponse
    ) -> None:
        """In the middle of a line, if there is one soon."""
        self.done["watch cut"] += 1
        try:
            async with asyncio.timeout(self._faults.watch_s):
                read = await answer.content.readany()
            await response.write(read[: len(read) // 2])
        except TimeoutError:
            pass
        _abort(request)

    async def _close(self, _: web.BaseRequest, response: web.StreamResponse, __: aiohttp.ClientResponse) -> None:
        """As the API server does when a watch was open long enough."""
        self.done["watch ended"] += 1
        await response.write_eof()

    async def _expire(self, _: web.BaseRequest, response: web.StreamResponse, __: aiohttp.ClientResponse) -> None:
        """The version to go on from is not kept any more."""
        self.done["watch expired"] += 1
        event = {"type": "ERROR", "object": _failure(410)}
        await response.write(json.dumps(event).encode() + b"\n")
        await response.write_eof()

    async def _fall_silent(self, request: web.BaseRequest, _: web.StreamResponse, __: aiohttp.ClientResponse) -> None:
        """As behind a router that has forgotten the connection."""
        self.done["watch silent"] += 1
        await asyncio.sleep(self._faults.silence_s)
        _abort(request)


def _is_collection(request: web.BaseRequest) -> bool:
    """A listing or a watch: only those carry on from a version that may be too old."""
    return "resourceVersion" in request.query or "limit" in request.query or "watch" in request.query


def _headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}


def _failure(code: int) -> dict[str, Any]:
    said = {"message": f"{_REASONS[code]}: a fault on purpose", "reason": _REASONS[code], "code": code}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", **said}


def _status(code: int) -> web.Response:
    headers = {"Retry-After": "1"} if code == 429 else {}
    return web.json_response(_failure(code), status=code, headers=headers)


def _hang_up(request: web.BaseRequest) -> web.Response:
    _abort(request)
    return web.Response()


def _abort(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.abort()
