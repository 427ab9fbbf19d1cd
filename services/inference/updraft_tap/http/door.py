"""The middleware in an engine's own HTTP process: it reads what the sender of a request says, and lets in who has a key.

Pure ASGI, and it changes no byte of a request that it lets in, nor of an answer. What the sender says is kept in a context
variable, which the tasks of a request inherit; an adapter reads it where requests leave the process.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from updraft_tap.http import about
from updraft_tap.http.about import Facts
from updraft_tap.http.holders import Holder
from updraft_tap.http.keys import Keys, RefusedRequestError
from updraft_tap.http.terms import Terms, UnknownTermsError, api_key, first, read_terms

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset(
    {"/health", "/health_generate", "/healthz", "/livez", "/load", "/metrics", "/ping", "/ready", "/readyz", "/version"}
)
"""Probes and metrics need no key. Everything else does, because engines answer prompts on many paths."""

OWN = b"x-updraft-own"
"""The header that identifies a server's requests to itself."""
_COMPRESSED = b"x-body-compressed"
"""The header of SGLang's clients for a compressed body."""

_current: ContextVar[Terms | None] = ContextVar("updraft_terms", default=None)


def current() -> Terms | None:
    """The sender's terms for the request that this task belongs to; None outside of requests."""
    return _current.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Without `keys`, everyone is admitted. `tenant_header`, in lower case, names the tenant of requests without a key or with
    a gateway's; b"": no header does.

    `own` is the secret in OWN of the server's requests to itself, and `admin` gives the key by which its agent swaps drafts:
    such requests need no other key. "": there are none.
    """

    keys: Keys | None = None
    tenant_header: bytes = b""
    own: str = ""
    admin: Callable[[], str] = str


class Door:
    """The middleware."""

    def __init__(self, app: App, rules: Rules, facts: Facts | None = None) -> None:
        """`facts` are served at `about.PATH`; None: nothing is."""
        self._app = app
        self._rules = rules
        self._facts = facts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _is_open(scope) or self._is_own(scope):
            await self._app(scope, receive, send)
            return
        try:
            terms = read_terms(scope["headers"], self._rules.tenant_header)
        except UnknownTermsError as error:
            await _refuse(scope, send, RefusedRequestError(400, str(error)))
            return
        before = _current.set(terms)
        try:
            await self._admit(scope, receive, send, terms)
        finally:
            _current.reset(before)

    def _is_own(self, scope: Scope) -> bool:
        shown = first(scope["headers"], OWN)
        if self._rules.own and hmac.compare_digest(shown, self._rules.own.encode()):
            return True
        admin = self._rules.admin()
        return bool(admin) and hmac.compare_digest(api_key(scope["headers"]).encode(), admin.encode())

    async def _admit(self, scope: Scope, receive: Receive, send: Send, terms: Terms) -> None:
        if self._rules.keys is None:
            await self._pass_on(scope, receive, send)
            return
        inside, key = False, api_key(scope["headers"])
        try:
            with ExitStack() as slot:
                reserve = slot.enter_context(self._rules.keys.admitted(key))
                _current.set(_of_holder(terms, self._rules.keys.holder(key)))
                if self._rules.keys.max_at_once and scope["type"] == "http":
                    _check_is_readable(scope)
                    body, receive = await _read(receive)
                    reserve(choices(body))
                inside = True
                await self._pass_on(scope, receive, releasing(slot, send))
        except RefusedRequestError as refusal:
            if inside:
                raise
            await _refuse(scope, send, refusal)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._facts is not None and about.is_asked(scope, _path(scope)):
            send = about.instead_of_not_found(self._facts, send)
        await self._app(scope, receive, send)


def _of_holder(terms: Terms, holder: Holder) -> Terms:
    """The terms of a request with that holder's key."""
    return replace(
        terms.with_words(holder.words),
        tenant=holder.tenant_of(terms.tenant),
        retention_s=holder.retention_s,
        region=holder.region,
    )


_PROMPTS = ("prompt", "prompt_embeds", "messages", "text", "input_ids")
"""Fields that may hold several prompts, in any engine."""


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
    parameters = asked.get("parameters")
    num = max(_choices_of_each(asked), _choices_of_each(parameters if isinstance(parameters, dict) else {}))
    instances = asked.get("instances")
    several = sum(_several(asked.get(name)) for name in _PROMPTS) + _several_matrices(asked.get("input_embeds"))
    return num * max(several, len(instances) if isinstance(instances, list) else 1, 1)


def _choices_of_each(asked: Mapping[str, Any]) -> int:
    of_sampling = asked.get("sampling_params")
    params = of_sampling if isinstance(of_sampling, list) else [of_sampling]
    return max([_whole(asked.get("n")), *(_whole(one.get("n")) for one in params if isinstance(one, dict))])


def _whole(num: Any) -> int:
    """Servers take "2", "2.0" and 2.0 for 2. One for what is no number: not every server reads every field."""
    try:
        return max(int(float(num or 1)), 1)
    except (ValueError, TypeError, OverflowError):
        return 1


def _several(value: Any) -> int:
    """How many there are if it is a list of prompts or of conversations; 0 if it is one, or none."""
    return len(value) if isinstance(value, list) and value and isinstance(value[0], str | list) else 0


def _several_matrices(value: Any) -> int:
    """The same for a matrix of numbers, or a list of them."""
    is_list = isinstance(value, list) and value and isinstance(value[0], list) and value[0]
    return len(value) if is_list and isinstance(value[0][0], list) else 0


def _check_is_readable(scope: Scope) -> None:
    """Raises RefusedRequestError for a body whose choices cannot be counted."""
    if first(scope["headers"], _COMPRESSED):
        message = "the body cannot be compressed, because the requests of an API key are limited"
        raise RefusedRequestError(400, message)


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


def releasing(slot: ExitStack, send: Send) -> Send:
    """Release the slot before the client sees the end of its answer, because it may send its next request at once."""

    async def release(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            slot.close()
        await send(message)

    return release


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
