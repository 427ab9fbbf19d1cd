"""Requests for which the plugin of a server may change no answer, and answers without the names and times in them."""

import json
from typing import Any

import httpx

ASK: dict[str, Any] = {"model": "target", "temperature": 0, "max_tokens": 12}
CHAT = {**ASK, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}
_SCHEMA = {"type": "object", "properties": {"capital": {"enum": ["Paris", "Rome"]}}, "required": ["capital"]}
IN_SCHEMA = {
    **CHAT,
    "max_tokens": 40,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
}
MUST_CALL = {
    **CHAT,
    "max_tokens": 40,
    "tools": [WEATHER],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
}

Bodies = dict[str, tuple[str, dict[str, Any]]]
"""Paths and bodies by name."""

COMMON: Bodies = {
    "text": ("/v1/completions", {**ASK, "prompt": "One, two, three,"}),
    "several prompts": ("/v1/completions", {**ASK, "prompt": ["One, two,", "Red, green,"]}),
    "chat": ("/v1/chat/completions", CHAT),
    "log-probabilities": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3}),
    "nonsense": ("/v1/chat/completions", {**CHAT, "n": "many"}),
    "tools": ("/v1/chat/completions", {**CHAT, "tools": [WEATHER]}),
    "a stream with tools": ("/v1/chat/completions", {**CHAT, "tools": [WEATHER], "stream": True}),
    "an unknown path": ("/v1/nothing", {}),
}


def said(answer: httpx.Response) -> tuple[int, Any]:
    """Status and answer, without the names and times that differ each time; of a stream, its text."""
    is_stream = answer.headers["content-type"].startswith("text/event-stream")
    return answer.status_code, _joined(answer.text) if is_stream else stable(answer.json())


def stable(answer: Any) -> Any:
    """Without the names and times that differ each time."""
    if isinstance(answer, list):
        return [stable(one) for one in answer]
    if isinstance(answer, dict):
        return {name: stable(value) for name, value in answer.items() if name not in ("id", "created")}
    return answer


def _joined(stream: str) -> dict[str, str]:
    """The text of a stream, and its last reason: how it is cut into events depends on the time."""
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    return {
        "content": "".join(delta.get("content") or "" for delta in deltas),
        "calls": "".join((call.get("name") or "") + (call.get("arguments") or "") for call in calls),
        "reason": "".join(choice.get("finish_reason") or "" for choice in choices),
    }
