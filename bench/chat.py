"""Greedy chat requests to a server, over the OpenAI API."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class ChatClient:
    http: httpx.AsyncClient
    model: str

    async def complete(self, text: str, max_tokens: int, *, ignore_eos: bool = True) -> dict[str, int]:
        """Send one message, and return the `usage` of the answer."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": ignore_eos,
        }
        response = (await self.http.post("/v1/chat/completions", json=body)).raise_for_status()
        usage: dict[str, int] = response.json()["usage"]
        return usage


@asynccontextmanager
async def chat_client(url: str, *, is_captured: bool = True) -> AsyncIterator[ChatClient]:
    """A client of the model that a server serves."""
    headers = {} if is_captured else {"X-Updraft-Capture": "off"}
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False, headers=headers) as http:
        models = (await http.get("/v1/models")).raise_for_status().json()
        yield ChatClient(http, models["data"][0]["id"])
