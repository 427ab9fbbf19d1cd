"""What the plugin is told by its environment: SGLang gives its plugins no arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, field

PREFIX = "UPDRAFT_SGLANG_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where to send what is captured, and how much of it."""

    socket: str = field(metadata={"meaning": "the agent's Unix socket; without it the plugin does nothing"})
    top_k: int = field(default=64, metadata={"meaning": "how many of the target's likeliest tokens a captured row has"})
    queue_bytes: int = field(
        default=64 << 20,
        metadata={"meaning": "what waits for the agent in memory at most; what is more is dropped, counted"},
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings | None":
        """None without UPDRAFT_SGLANG_SOCKET: nothing is wanted. ValueError with a sentence if a number is absurd."""
        socket = environment.get(f"{PREFIX}SOCKET", "")
        if not socket:
            return None
        return cls(
            socket=socket,
            top_k=_number(environment, "TOP_K", 64, 1, 4096),
            queue_bytes=_number(environment, "QUEUE_BYTES", 64 << 20, 1 << 16, 1 << 40),
        )


def _number(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environment.get(f"{PREFIX}{name}", str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{PREFIX}{name} is {text!r}; it must be a whole number from {least} to {most}")
    return int(text)
