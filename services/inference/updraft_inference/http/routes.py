"""The HTTP routes: OpenAI's completions, and the probes and metrics of a pod (/healthz, /readyz, /metrics).

A client that disconnects cancels its request, streaming or not. Memory is bounded: a body by its limit, an unread answer by
one event in this process (see connection.py) and max_tokens tokens in the engine. Every error has OpenAI's shape.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from updraft_chassis.errors import UpdraftError
from updraft_inference.agent.selection import CaptureTerms
from updraft_inference.cancellation import Interrupted, run_unless_cancelled_by
from updraft_inference.engine import TokenLogprob
from updraft_inference.http.body import BodyLimits, read_body
from updraft_inference.http.endpoints import CHAT, COMPLETIONS, B, Endpoint, usage
from updraft_inference.http.errors import ApiError, api_error, invalid
from updraft_inference.http.generation import Choice, ServedModel, TextChunk, generate, prepare_choices
from updraft_inference.http.keys import Client, Keys
from updraft_inference.http.readiness import Readiness, ServingPhase
from updraft_inference.http.request_ids import RequestIds
from updraft_inference.http.schema import parse
from updraft_inference.http.streaming import merge_streams
from updraft_inference.metrics import Metrics
from updraft_inference.text.logprobs import Json, Transcript
from updraft_tap.http.door import releasing
from updraft_tap.http.terms import UnknownTermsError, capture_words

CAPTURE_HEADER = "x-updraft-capture"
"""Words, separated by commas. off: nothing about the request leaves the pod."""


def app(
    readiness: Readiness[ServedModel], metrics: Metrics, registry: CollectorRegistry, bodies: BodyLimits, keys: Keys
) -> ASGIApp:
    async def models(request: Request) -> Response:
        with keys.admitted(request.headers), readiness.admitted() as served:
            entry = {"id": served.model, "object": "model", "created": started_s, "owned_by": "updraft"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(_: Request) -> Response:
        return _plain("ok", 200) if is_alive() else _plain("the engine has failed", 503)

    async def ready(_: Request) -> Response:
        return _plain(readiness.phase.value, 200 if readiness.phase is ServingPhase.READY and is_alive() else 503)

    async def scrape(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def is_alive() -> bool:  # if not, only a restart can help
        return readiness.served is None or readiness.served.engine.is_alive

    started_s = int(time.time())
    guards = RequestGuards(readiness=readiness, keys=keys, metrics=metrics, bodies=bodies)
    inner = Starlette(
        routes=[
            Route("/v1/models", models),
            Route(COMPLETIONS.path, _Handler(COMPLETIONS, guards), methods=["POST"]),
            Route(CHAT.path, _Handler(CHAT, guards), methods=["POST"]),
            Route("/healthz", health),
            Route("/readyz", ready),
            Route("/metrics", scrape),
        ],
        exception_handlers=dict.fromkeys((ApiError, UpdraftError, HTTPException, Exception), _error_response),
    )
    return RequestIds(inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestGuards:
    """The checks and limits that a request passes before it is served."""

    readiness: Readiness[ServedModel]
    keys: Keys
    metrics: Metrics
    bodies: BodyLimits


class _Handler(Generic[B]):
    """Serves one endpoint. An ASGI application."""

    def __init__(self, endpoint: Endpoint[B], guards: RequestGuards) -> None:
        self._endpoint = endpoint
        self._guards = guards

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            with ExitStack() as place:
                client = place.enter_context(self._guards.keys.admitted(request.headers))
                await self._serve(request, client, releasing(place, send))
        except Interrupted:
            self._guards.metrics.hang_ups.inc()
        except UpdraftError as error:  # from the guards; those of the engine come as ApiError
            raise self._counted(api_error(error)) from None
        except ApiError as error:
            raise self._counted(error) from error.__cause__

    async def _serve(self, request: Request, client: Client, send: Send) -> None:
        with self._guards.readiness.admitted() as served:
            body = parse(self._endpoint.body, await read_body(request, self._guards.bodies))
            client.reserve(body.n)
            answer = self._answer(served, request, body, client, send)
            await run_unless_cancelled_by(_hung_up(request.receive), answer)

    def _counted(self, refusal: ApiError) -> ApiError:
        self._guards.metrics.refusals.labels(status=str(refusal.status)).inc()
        return refusal

    async def _answer(self, served: ServedModel, request: Request, body: B, client: Client, send: Send) -> None:
        terms = _capture_terms(
            ",".join(request.headers.getlist(CAPTURE_HEADER)), client
        )  # a repeated header is one list
        choices = await prepare_choices(served, self._endpoint, body, client=client.id, terms=terms)
        writer = _Writer(self._endpoint, served, choices, int(time.time()))
        if body.stream:
            await _stream(writer, send, has_usage=body.has_usage_chunk)
        else:
            response = JSONResponse(await _whole(writer), headers=writer.headers)
            await response(request.scope, request.receive, send)


class _Writer(Generic[B]):
    def __init__(self, endpoint: Endpoint[B], served: ServedModel, choices: list[Choice], created_s: int) -> None:
        self.endpoint = endpoint
        self.streams = [generate(served, choice) for choice in choices]
        self.last: dict[int, TextChunk] = {}
        """The latest chunk of each choice."""
        self._model = served.model
        self._choices = choices
        self._created_s = created_s
        self._transcripts = [Transcript(served.tokenizer.bytes_of) for _ in choices]

    @property
    def headers(self) -> dict[str, str]:
        """The id of the answer, which is also the request id of its first choice in traces."""
        return {"X-Request-Id": self._choices[0].id}

    def answer(self, texts: list[str], logprobs: list[list[TokenLogprob]]) -> Json:
        choices = [
            self._choice(index, self.endpoint.choice(text), tokens, self.last[index].finish_reason)
            for index, (text, tokens) in enumerate(zip(texts, logprobs, strict=True))
        ]
        return {**self._head(self.endpoint.answer_object), "choices": choices, "usage": self._usage()}

    def openings(self, **more: object) -> list[str]:
        opening = self.endpoint.opening
        if opening is None:
            return []
        return [self._chunk([self._choice(i, opening, (), None)], **more) for i in range(len(self._choices))]

    def chunk(self, index: int, chunk: TextChunk, **more: object) -> str:
        content = self.endpoint.chunk_choice(chunk.text)
        return self._chunk([self._choice(index, content, chunk.logprobs, chunk.finish_reason)], **more)

    def usage_chunk(self) -> str:
        return self._chunk([], usage=self._usage())

    def _choice(self, index: int, content: Json, tokens: Sequence[TokenLogprob], finish_reason: str | None) -> Json:
        logprobs = self.endpoint.logprobs(self._transcripts[index], tokens) if tokens else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chunk(self, choices: list[Json], **more: object) -> str:
        return _event({**self._head(self.endpoint.chunk_object), "choices": choices, **more})

    def _head(self, kind: str) -> Json:
        return {"id": self._choices[0].id, "object": kind, "created": self._created_s, "model": self._model}

    def _usage(self) -> Json:
        num_output = sum(chunk.num_tokens for chunk in self.last.values())
        finished = [chunk.finished for chunk in self.last.values() if chunk.finished is not None]
        return usage(len(self._choices[0].request.prompt_ids), num_output, finished)


async def _whole(writer: _Writer[B]) -> Json:
    texts: list[str] = [""] * len(writer.streams)
    logprobs: list[list[TokenLogprob]] = [[] for _ in writer.streams]

    async def take(index: int, chunk: TextChunk) -> None:
        writer.last[index] = chunk
        texts[index] += chunk.text
        logprobs[index] += chunk.logprobs

    await merge_streams(writer.streams, take)
    return writer.answer(texts, logprobs)


async def _stream(writer: _Writer[B], send: Send, *, has_usage: bool) -> None:
    more = {"usage": None} if has_usage else {}

    async def take(index: int, chunk: TextChunk) -> None:
        if not writer.last:
            await _start(writer, send)
            await _send(send, *writer.openings(**more))
        writer.last[index] = chunk
        if chunk.text or chunk.logprobs or chunk.finish_reason:
            await _send(send, writer.chunk(index, chunk, **more))

    try:
        await merge_streams(writer.streams, take)
    except ApiError as error:
        if not writer.last:  # before the status line, it can still be a plain error
            raise
        last = _event(error.body)
    else:
        await _send(send, *([writer.usage_chunk()] if has_usage else []))
        last = "data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": last.encode()})


async def _start(writer: _Writer[B], send: Send) -> None:
    headers = {
        **writer.headers,
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
    }
    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw_headers})


async def _send(send: Send, *events: str) -> None:
    for event in events:
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _capture_terms(header: str, client: Client) -> CaptureTerms:
    """Raises ApiError for an unknown word, because a misspelt one must not be ignored."""
    try:
        words = capture_words(header) | client.words
    except UnknownTermsError as error:
        raise invalid(str(error)) from None
    return CaptureTerms(
        is_opted_out="off" in words,
        is_opted_in="on" in words,
        may_train="no-train" not in words,
        may_retain="no-retain" not in words,
        tenant=client.tenant,
        retention_s=client.retention_s,
        region=client.region,
    )


async def _hung_up(receive: Receive) -> None:
    """Return when the client has disconnected; the body was read before, so nothing else can arrive."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _plain(text: str, status: int) -> Response:
    return PlainTextResponse(f"{text}\n", status)


async def _error_response(request: Request, error: Exception) -> Response:
    """Return every error in OpenAI's shape. Starlette raises unknown errors again, so that the server logs them."""
    match error:
        case ApiError():
            refusal = error
        case UpdraftError():
            refusal = api_error(error)
        case HTTPException():
            message = f"{request.method} {request.url.path}: {error.detail}"
            refusal = ApiError(error.status_code, message, code="unknown_url")
        case _:
            refusal = ApiError(500, "Internal server error; see the server log", code="internal_error")
    headers = {**(getattr(error, "headers", None) or {}), **refusal.headers}
    return JSONResponse(refusal.body, refusal.status, headers=headers)
