"""The HTTP surface: OpenAI's completions, and what a cluster asks of a pod (/healthz, /readyz, /metrics).

An answer that starts is watched until it ends: a client that hangs up, streaming or not, cancels its request.
Nothing of a request is buffered beyond the limit of its body. Of an answer that nobody reads there is one event in the
process (see connection.py), and in the engine at most max_tokens tokens, which fit the context. Every refusal is
OpenAI-shaped.
"""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from updraft_chassis.errors import UpdraftError
from updraft_inference.body import BodyLimits, read_body
from updraft_inference.dialect import CHAT, COMPLETIONS, B, Dialect, Json, usage
from updraft_inference.gate import Gate, Phase
from updraft_inference.generation import Backend, Job, Piece, job, pieces
from updraft_inference.metrics import Metrics
from updraft_inference.openai_errors import ApiError, api_error
from updraft_inference.openai_schema import parse
from updraft_inference.race import Interrupted, unless

OPT_OUT_HEADER = "x-updraft-capture"
"""`off`: nothing of this request leaves the pod but its answer."""


def app(gate: Gate[Backend], metrics: Metrics, registry: CollectorRegistry, bodies: BodyLimits) -> Starlette:
    """The ASGI application."""

    async def models(_: Request) -> Response:
        with gate.admitted() as backend:
            entry = {"id": backend.model, "object": "model", "created": started_s, "owned_by": "updraft"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(_: Request) -> Response:
        return _plain("ok", 200) if is_alive() else _plain("the engine has failed", 503)

    async def ready(_: Request) -> Response:
        return _plain(gate.phase.value, 200 if gate.phase is Phase.READY and is_alive() else 503)

    async def scrape(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def is_alive() -> bool:  # false: only a restart can help
        return gate.backend is None or gate.backend.engine.is_alive

    started_s = int(time.time())
    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route(COMPLETIONS.path, _Endpoint(COMPLETIONS, gate, metrics, bodies), methods=["POST"]),
            Route(CHAT.path, _Endpoint(CHAT, gate, metrics, bodies), methods=["POST"]),
            Route("/healthz", health),
            Route("/readyz", ready),
            Route("/metrics", scrape),
        ],
        exception_handlers=dict.fromkeys((ApiError, UpdraftError, HTTPException, Exception), _error_response),
    )


class _Endpoint(Generic[B]):
    """One dialect, from the first byte of a request to the last of its answer. An ASGI application."""

    def __init__(self, dialect: Dialect[B], gate: Gate[Backend], metrics: Metrics, bodies: BodyLimits) -> None:
        self._dialect = dialect
        self._gate = gate
        self._metrics = metrics
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            with self._gate.admitted() as backend:
                raw = await read_body(request, self._bodies)
                await unless(_hung_up(receive), self._answer(backend, request, raw, send))
        except Interrupted:
            self._metrics.hang_ups.inc()
        except UpdraftError as error:  # of the gate; those of the engine come as ApiError
            raise self._counted(api_error(error)) from None
        except ApiError as error:
            raise self._counted(error) from error.__cause__

    def _counted(self, refusal: ApiError) -> ApiError:
        self._metrics.refusals.labels(status=str(refusal.status)).inc()
        return refusal

    async def _answer(self, backend: Backend, request: Request, raw: bytes, send: Send) -> None:
        body = parse(self._dialect.body, raw)
        is_opted_out = request.headers.get(OPT_OUT_HEADER, "").strip().lower() == "off"
        todo = await job(backend, self._dialect, body, is_opted_out=is_opted_out)
        writer = _Writer(self._dialect, backend.model, todo, int(time.time()))
        async with aclosing(pieces(backend, todo)) as parts:
            if body.stream:
                await _stream(writer, parts, send, has_usage=body.has_usage_chunk)
            else:
                response = JSONResponse(await _whole(writer, parts), headers=writer.headers)
                await response(request.scope, request.receive, send)


@dataclass(frozen=True, slots=True)
class _Writer(Generic[B]):
    """The JSON of one answer."""

    dialect: Dialect[B]
    model: str
    job: Job
    created_s: int

    @property
    def headers(self) -> dict[str, str]:
        """The id under which logs and traces know the request."""
        return {"X-Request-Id": self.job.id}

    def answer(self, text: str, last: Piece) -> Json:
        """The whole answer."""
        choice = self.dialect.choice(text, last.finish_reason)
        return {**self._head(self.dialect.answer_object), "choices": [choice], "usage": self._usage(last)}

    def chunk(self, choice: Json | None, **more: object) -> str:
        """One event of a stream."""
        choices = [] if choice is None else [choice]
        return _event({**self._head(self.dialect.chunk_object), "choices": choices, **more})

    def usage_chunk(self, last: Piece) -> str:
        """The event after the last text, when asked for."""
        return self.chunk(None, usage=self._usage(last))

    def _head(self, kind: str) -> Json:
        return {"id": self.job.id, "object": kind, "created": self.created_s, "model": self.model}

    def _usage(self, last: Piece) -> Json:
        return usage(len(self.job.request.prompt_ids), last.num_tokens, last.finished)


async def _whole(writer: _Writer[B], parts: AsyncGenerator[Piece, None]) -> Json:
    all_pieces = [piece async for piece in parts]
    return writer.answer("".join(piece.text for piece in all_pieces), all_pieces[-1])


async def _stream(writer: _Writer[B], parts: AsyncGenerator[Piece, None], send: Send, *, has_usage: bool) -> None:
    first = await anext(parts)  # before the status line: what the engine refuses is still a plain error
    headers = {
        **writer.headers,
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
    }
    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
    async with aclosing(_events(writer, first, parts, has_usage=has_usage)) as events:
        async for event in events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _events(
    writer: _Writer[B], first: Piece, parts: AsyncGenerator[Piece, None], *, has_usage: bool
) -> AsyncGenerator[str, None]:
    dialect, more = writer.dialect, {"usage": None} if has_usage else {}
    if dialect.opening is not None:
        yield writer.chunk(dialect.opening, **more)
    last = first
    try:
        async for piece in _from(first, parts):
            last = piece
            if piece.text or piece.finish_reason:
                yield writer.chunk(dialect.chunk_choice(piece.text, piece.finish_reason), **more)
    except ApiError as error:
        yield _event(error.body)
        return
    if has_usage:
        yield writer.usage_chunk(last)
    yield "data: [DONE]\n\n"


async def _from(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _hung_up(receive: Receive) -> None:
    """Return when the client has closed its connection; the body was read before, so nothing else comes."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _plain(text: str, status: int) -> Response:
    return PlainTextResponse(f"{text}\n", status)


async def _error_response(request: Request, error: Exception) -> Response:
    """Every failure in OpenAI's shape. Starlette raises unknown ones again, so that the server logs them."""
    match error:
        case ApiError():
            refusal = error
        case UpdraftError():
            refusal = api_error(error)
        case HTTPException():
            message = f"{request.method} {request.url.path}: {error.detail}"
            refusal = ApiError(error.status_code, message, code="unknown_url")
        case _:
            refusal = ApiError(500, "The server failed; its log says why", code="internal_error")
    headers = {**(getattr(error, "headers", None) or {}), **refusal.headers}
    return JSONResponse(refusal.body, refusal.status, headers=headers)
