"""Gives every answer an X-Request-Id: the client's own, else the answer's `id`, else a new one.

With its own id a client finds the request in its own logs and proxies. The `id` in the body is always ours, so its
uniqueness never depends on a client.
"""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"

_ACCEPTED = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(HEADER, "") if scope["type"] == "http" else ""

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if _ACCEPTED.fullmatch(given):
                    headers[HEADER] = given
                else:
                    headers.setdefault(HEADER, f"req-{uuid.uuid4().hex}")
            await send(message)

        await self._app(scope, receive, send_with_id)
