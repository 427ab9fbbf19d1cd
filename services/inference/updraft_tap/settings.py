"""Settings from the environment, because engines pass no arguments to plugins. Each adapter has a prefix of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    socket: str = field(metadata={"meaning": "Unix socket of the agent; without it the plugin does nothing"})
    top_k: int = field(default=64, metadata={"meaning": "Number of the target's likeliest tokens per captured row"})
    queue_bytes: int = field(
        default=64 << 20,
        metadata={"meaning": "Memory for messages that wait for the agent; further messages are dropped and counted"},
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], prefix: str) -> "Settings | None":
        """None without a socket, which disables the plugin. Raises ValueError if a number is out of range."""
        socket = environment.get(f"{prefix}SOCKET", "")
        if not socket:
            return None
        return cls(
            socket=socket,
            top_k=_number(environment, f"{prefix}TOP_K", 64, 1, 4096),
            queue_bytes=_number(environment, f"{prefix}QUEUE_BYTES", 64 << 20, 1 << 16, 1 << 40),
        )


def _number(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name} is {text!r}, but must be a whole number from {least} to {most}")
    return int(text)
