"""One greedy chat request over the OpenAI API, streamed, and the client's measurements."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from updraft_cli.demo.report import Answer

_WITHIN_S = 120.0
"""A request of a hundred tokens that takes longer has failed."""

_NO_CAPTURE = {"X-Updraft-Capture": "off"}


class ChatError(Exception):
    """The server's response is no answer; the message has the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request; `options` is the body's `updraft` field."""

    prompt: int
    text: str
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    is_captured: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatServer:
    http: httpx.AsyncClient
    url: str
    model: str

    async def ask(self, question: Question) -> Answer:
        """Return the answer; a failure is an answer with an error."""
        start_s = time.perf_counter()
        arrivals_s: list[float] = []
        usage: dict[str, Any] = {}
        error = ""
        try:
            async with asyncio.timeout(_WITHIN_S), aclosing(self._events(question)) as events:
                async for event in events:
                    usage = event.get("usage") or usage
                    if has_text(event):
                        arrivals_s.append(time.perf_counter() - start_s)
        except TimeoutError:
            error = f"no answer within {_WITHIN_S:g} s"
        except (httpx.HTTPError, ChatError) as failure:
            error = str(failure) or type(failure).__name__
        if not usage and not error:
            error = "the stream ended without usage"
        return _answer(question, usage, arrivals_s, time.perf_counter() - start_s, error)

    async def _events(self, question: Question) -> AsyncGenerator[dict[str, Any], None]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "updraft": question.options,
        }
        headers = {} if question.is_captured else _NO_CAPTURE
        url = f"{self.url}/v1/chat/completions"
        async with self.http.stream("POST", url, json=body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                raise ChatError(f"HTTP {response.status_code}: {response.text[:300]}")
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ChatError(str(event["error"].get("message", event["error"])))
                    yield event


def has_text(event: dict[str, Any]) -> bool:
    """Whether a chunk has text, and not only a role or the end."""
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))


def _answer(
    question: Question, usage: dict[str, Any], arrivals_s: list[float], duration_s: float, error: str
) -> Answer:
    draft = usage.get("updraft", {})
    gaps = (later - earlier for earlier, later in pairwise(arrivals_s))
    return Answer(
        prompt=question.prompt,
        output_tokens=usage.get("completion_tokens", 0),
        verify_steps=draft.get("verify_steps", 0),
        proposed=draft.get("proposed", 0),
        accepted=draft.get("accepted", 0),
        drafter=draft.get("drafter", ""),
        draft_version=draft.get("draft_version", 0),
        first_token_s=round(arrivals_s[0], 4) if arrivals_s else 0.0,
        duration_s=round(duration_s, 4),
        gaps_s=tuple(round(gap, 4) for gap in gaps),
        error=error,
    )
