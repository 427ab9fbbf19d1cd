"""Requests for which the plugin of a server may change no answer, and answers without the names and times in them."""

from typing import Any

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
    "an unknown path": ("/v1/nothing", {}),
}


def stable(answer: Any) -> Any:
    """Without the names and times that differ each time."""
    if isinstance(answer, list):
        return [stable(one) for one in answer]
    if isinstance(answer, dict):
        return {name: stable(value) for name, value in answer.items() if name not in ("id", "created")}
    return answer
