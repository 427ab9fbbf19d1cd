"""A bad network and a bad day of the API server, between it and the operator: drawn at random from a seed.

Plain HTTP on the operator's side, so that its requests are seen; what is let through is passed on as it is.
"""

import asyncio
import base64
import json
import random
import ssl
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import yaml
from aiohttp import web
from tests.support.ports import free_port

_STATUSES = (429, 500, 503)
_HOP = {"transfer-encoding", "content-encoding", "content-length", "connection", "host"}
_GONE = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410, "message": "gone"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Odds:
    """How often what happens to a request: parts of 1, and seconds."""

    refused: float = 0.06
    """It is answered with 409 (a write), 410 (a list), 429, 500 or 503, and never reaches the API server."""
    unanswered: float = 0.03
    """It reaches the API server, and its answer is lost."""
    delayed: float = 0.1
    delay_s: float = 0.5
    watch_s: float = 3.0
    """A watch lives for up to twice this."""
    expired: float = 0.3
    """Watches that end with 410 rather than with a broken connection."""


@dataclass(slots=True)
class FaultyApi:
    """A proxy in a thread of its own; use it in a with block."""

    kubeconfig: Path
    """The operator's own, to where the API server is."""
    folder: Path
    seed: int
    odds: Odds = field(default_factory=Odds)
    told: Counter[str] = field(default_factory=Counter)
    """What was done, by its name."""
    port: int = field(default_factory=free_port)
    _thread: threading.Thread | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _end: asyncio.Event | None = None
    _random: random.Random = field(default_factory=random.Random)

    @property
    def front(self) -> Path:
        """The kubeconfig that leads here."""
        return self.folder / "faulty.kubeconfig"

    def __enter__(self) -> Self:
        self._random.seed(self.seed)
        config = yaml.safe_load(self.kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        authority = ssl.create_default_context(cadata=_decoded(cluster["certificate-authority-data"]))
        server = cluster["server"]
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self.port}"}
        self.front.write_text(yaml.safe_dump(config))
        is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(server, authority, is_up)))
        self._thread.start()
        assert is_up.wait(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None
        assert self._end is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _serve(self, server: str, authority: ssl.SSLContext, is_up: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        connector = aiohttp.TCPConnector(ssl=authority, limit=0)
        async with aiohttp.ClientSession(server, connector=connector, auto_decompress=False) as upstream:
            app = web.Application(client_max_size=16 * 1024 * 1024)

            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._handle(request, upstream)

            app.router.add_route("*", "/{path:.*}", handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            is_up.set()
            await self._end.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request, upstream: aiohttp.ClientSession) -> web.StreamResponse:
        odds, drawn = self.odds, self._random.random()
        if self._random.random() < odds.delayed:
            self.told["delayed"] += 1
            await asyncio.sleep(self._random.uniform(0, odds.delay_s))
        if drawn < odds.refused:
            status = self._random.choice([*_STATUSES, *_of_its_kind(request)])
            self.told[f"answered {status}"] += 1
            headers = {"Retry-After": "1"} if status == 429 else {}
            return web.json_response({**_GONE, "code": status, "reason": "Fault"}, status=status, headers=headers)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        body = await request.read()
        try:
            async with upstream.request(request.method, request.rel_url, headers=headers, data=body or None) as answer:
                if "watch" in request.query:
                    return await self._watch(request, answer)
                content = await answer.read()
        except aiohttp.ClientError:
            return web.Response(status=502)
        if drawn < odds.refused + odds.unanswered:
            self.told["answer lost"] += 1
            _cut(request)
        kept = {
            name: value for name, value in answer.headers.items() if name.lower() not in _HOP - {"content-encoding"}
        }
        return web.Response(body=content, status=answer.status, headers=kept)

    async def _watch(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """Pass a watch on for a while; its end may come in the middle of an event."""
        passed = web.StreamResponse(status=answer.status, headers={"Content-Type": "application/json"})
        await passed.prepare(request)
        try:
            async with asyncio.timeout(self._random.uniform(0, 2 * self.odds.watch_s)):
                async for chunk in answer.content.iter_any():
                    await passed.write(chunk)
        except TimeoutError:
            self.told["watch cut"] += 1
            if self._random.random() < self.odds.expired:
                await passed.write(json.dumps({"type": "ERROR", "object": _GONE}).encode() + b"\n")
            else:
                _cut(request)
        except (ConnectionError, aiohttp.ClientError):
            pass  # the operator went away, or the API server did
        return passed


def _of_its_kind(request: web.Request) -> list[int]:
    """What only some requests are answered with: the next page of a list may be gone; a watch says so in its stream."""
    if request.method != "GET":
        return [409]
    is_list = "continue" in request.query or "PartialObjectMetadataList" in request.headers.get("Accept", "")
    return [410] if is_list else []


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _decoded(data: str) -> str:
    return base64.b64decode(data).decode()
