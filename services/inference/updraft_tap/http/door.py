"""The middleware in an engine's own HTTP process: it reads what the sender of a request says, and lets in who has a key.

Pure ASGI, and it changes no byte of a request that it lets in, nor of an answer. What the sender says is kept in a context
variable, which the tasks of a request inherit; an adapter reads it where requests leave the process.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from updraft_tap.http import about
from updraft_tap.http.about import Facts
from updraft_tap.http.keys import Keys, RefusedRequestError
from updraft_tap.http.terms import Terms, UnknownTermsError, api_key, read_terms

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset(
    {"/health", "/health_generate", "/healthz", "/livez", "/load", "/metrics", "/ping", "/readyz", "/version"}
)
"""Probes and metrics need no key. Everything else does, because engines answer prompts on many paths."""

_current: ContextVar[Terms | None] = ContextVar("updraft_terms", default=None)


def current() -> Terms | None:
    """The sender's terms for the request that this task belongs to; None outside of requests."""
    return _current.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Without `keys` everybody is let in. `tenant_header` names a tenant, in lower case; b"": the API key does."""

    keys: Keys | None = None
    tenant_header: bytes = b""


class Door:
    """The middleware."""

    def __init__(self, app: App, rules: Rules, facts: Facts | None = None) -> None:
        """`facts` are what the plugin says of its server at `about.PATH`; None: nothing."""
        self._app = app
        self._rules = rules
        self._facts = facts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _is_open(scope):
            await self._app(scope, receive, send)
            return
        try:
            terms = read_terms(scope["headers"], self._rules.tenant_header)
        except UnknownTermsError as error:
            await _refuse(scope, send, RefusedRequestError(400, str(error)))
            return
        before = _current.set(terms)
        try:
            await self._admit(scope, receive, send)
        finally:
            _current.reset(before)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._rules.keys is None:
            await self._pass_on(scope, receive, send)
            return
        inside = False
        try:
            with self._rules.keys.admitted(api_key(scope["headers"])) as reserve:
                if self._rules.keys.max_at_once and scope["type"] == "http":
                    body, receive = await _read(receive)
                    reserve(choices(body))
                inside = True
                await self._pass_on(scope, receive, send)
        except RefusedRequestError as refusal:
            if inside:
                raise
            await _refuse(scope, send, refusal)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._facts is not None and about.is_asked(scope, _path(scope)):
            await about.answer(self._facts, send)
        else:
            await self._app(scope, receive, send)


def choices(body: bytes) -> int:
    """How many answers a request asks for: `n` to each of its prompts or conversations. A field without a valid value counts
    as one, and so does a body that is no JSON object.

    Raises RefusedRequestError for an answer in the background, which would keep running after its slot is
    released.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return 1
    if not isinstance(asked, dict):
        return 1
    if asked.get("background"):
        raise RefusedRequestError(400, "background cannot be true, because the requests of an API key are limited")
    of_sampling = asked.get("sampling_params")
    num = max(_whole(asked.get("n")), _whole(of_sampling.get("n") if isinstance(of_sampling, dict) else None))
    several = sum(map(_several, (asked.get("prompt"), asked.get("prompt_embeds"), asked.get("messages"))))
    return num * max(several, 1)


def _whole(num: Any) -> int:
    """Servers take "2", "2.0" and 2.0 for 2. One for what is no number: not every server reads every field."""
    try:
        return max(int(float(num or 1)), 1)
    except (ValueError, TypeError, OverflowError):
        return 1


def _several(value: Any) -> int:
    """How many there are if it is a list of prompts or of conversations; 0 if it is one, or none."""
    return len(value) if isinstance(value, list) and value and isinstance(value[0], str | list) else 0


def _is_open(scope: Scope) -> bool:
    return scope.get("method") == "OPTIONS" or _path(scope) in OPEN_PATHS


def _path(scope: Scope) -> str:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/") or "/"


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The body, and what gives it to the server once more."""
    messages = []
    while True:
        messages.append(await receive())
        if messages[-1]["type"] != "http.request" or not messages[-1].get("more_body"):
            break
    waiting = iter(messages)

    async def again() -> Message:
        message = next(waiting, None)
        return await receive() if message is None else message

    return b"".join(message.get("body", b"") for message in messages), again


async def _refuse(scope: Scope, send: Send, refusal: RefusedRequestError) -> None:
    """Answer as OpenAI does; a websocket is closed before it opens, which is status 403."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.message[:100]})
        return
    kind = "rate_limit_error" if refusal.status == 429 else "invalid_request_error"
    error = {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    elif refusal.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
