"""Who may use the console: whoever has its address with the token, from pages of the console itself.

The token is exchanged for a cookie that scripts cannot read and that other sites' requests do not carry. All ports of a host
share their cookies, so the cookie's name has the port. The Host header is checked against other names that lead to 127.0.0.1
(DNS rebinding); Origin and a hidden field of the forms against other sites.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect", "font")),
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)

_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send forms with the Origin null
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

# Not a redirect: with one, a browser that came from another site, such as a terminal in a web page, would not send the cookie.
_GO_ON = """<!doctype html>
<html lang="en"><head><title>Updraft</title><link rel="icon" href="/static/icon.svg" type="image/svg+xml">
<meta http-equiv="refresh" content="0; url=/"></head>
<body><p><a href="/">Open the console</a></p></body></html>
"""

_HTTP_PORT = 80

_SAFE = frozenset({"GET", "HEAD"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The address of one console, and its secret."""

    port: int
    token: str = field(default_factory=secrets.token_urlsafe, repr=False)

    @property
    def origins(self) -> frozenset[str]:
        return frozenset(f"http://{host}" for host in self.hosts)

    @property
    def hosts(self) -> frozenset[str]:
        names = ("127.0.0.1", "localhost")
        bare = names if self.port == _HTTP_PORT else ()  # browsers leave this port out
        return frozenset({*(f"{name}:{self.port}" for name in names), *bare})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/?{urlencode({'token': self.token})}"

    @property
    def cookie(self) -> str:
        """Name of the cookie."""
        return f"updraft-console-{self.port}"

    @property
    def form_secret(self) -> str:
        """Value of the hidden field of every form."""
        return hmac.new(self.token.encode(), b"form", hashlib.sha256).hexdigest()

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())

    def is_form_secret(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.form_secret.encode())


class Guard:
    """Lets only requests of the console's own pages with its cookie reach the application."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end of the application
            await self._app(scope, receive, send)
            return

        # A browser keeps the files of a console, and asks each time whether they are current; it keeps no page.
        cache = "no-cache" if scope["path"].startswith("/static/") else "no-store"

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS | {"Cache-Control": cache})
            await send(message)

        answer = self._answer(Request(scope))
        await (answer or self._app)(scope, receive, guarded)

    def _answer(self, request: Request) -> Response | None:
        """Return the answer to a request that does not reach the application."""
        if problem := self._foreign(request.headers, request.method):
            return _refused(problem)
        if request.url.path == "/" and request.method == "GET" and "token" in request.query_params:
            return self._exchange(request.query_params["token"])
        if not self._access.is_token(request.cookies.get(self._access.cookie, "")):
            return _refused("open the address that `updraft ui` printed, with its token")
        return None

    def _foreign(self, headers: Headers, method: str) -> str:
        """Return why a request does not come from a page of the console; empty if it may."""
        if headers.get("host", "").lower() not in self._access.hosts:
            return "this Host is not the console's address"
        origin = headers.get("origin")
        if origin is None:
            return "" if method in _SAFE else "a request that changes something needs an Origin"
        return "" if origin in self._access.origins else "this Origin is not the console's address"

    def _exchange(self, token: str) -> Response:
        if not self._access.is_token(token):
            return _refused("this is not the token of this console; open the address that `updraft ui` printed last")
        answer = HTMLResponse(_GO_ON)
        answer.set_cookie(self._access.cookie, self._access.token, httponly=True, samesite="strict")
        return answer


def _refused(problem: str) -> Response:
    return PlainTextResponse(f"Refused: {problem}.\n", status_code=403)
