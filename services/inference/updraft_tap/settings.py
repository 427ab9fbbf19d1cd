"""Settings from the environment, because engines pass no arguments to plugins. Each adapter has a prefix of its own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    socket: str = field(metadata={"meaning": "Unix socket of the agent; without it nothing is captured"})
    top_k: int = field(default=64, metadata={"meaning": "Number of the target's likeliest tokens per captured row"})
    queue_bytes: int = field(
        default=64 << 20,
        metadata={"meaning": "Memory for messages that wait for the agent; further messages are dropped and counted"},
    )
    drafting: str = field(
        default="auto",
        metadata={
            "meaning": "`auto`: nothing is drafted with the untrained initial draft, and where a trained draft is slower than"
            " none. `trained`: every trained draft is used, and nothing is measured. `always`: the server drafts as it would"
            " without the plugin"
        },
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], prefix: str) -> "Settings | None":
        """None without a socket, which disables the plugin. Raises ValueError for an invalid value."""
        socket = environment.get(f"{prefix}SOCKET", "")
        if not socket:
            return None
        return cls(
            socket=socket,
            top_k=_number(environment, f"{prefix}TOP_K", 64, 1, 4096),
            queue_bytes=_number(environment, f"{prefix}QUEUE_BYTES", 64 << 20, 1 << 16, 1 << 40),
            drafting=_choice(environment, f"{prefix}DRAFTING", ("auto", "trained", "always")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorSettings:
    """Settings of the middleware in the engine's HTTP process."""

    api_keys_file: Path | None = field(
        default=None,
        metadata={
            "meaning": "File with the API keys of clients, one per line; read again when it changes. Without it, the plugin"
            " requires no key"
        },
    )
    max_requests_per_key: int = field(
        default=0,
        metadata={
            "meaning": "Maximum concurrent requests per API key; each choice of `n` counts. Further requests get status 429."
            " 0: no limit"
        },
    )
    tenant_header: str = field(
        default="",
        metadata={
            "meaning": "Header that names the tenant of a request, set by a gateway that you trust. With keys, it counts only"
            " for a key with the word gateway"
        },
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], prefix: str) -> "DoorSettings":
        """Raises ValueError for an invalid value."""
        file = environment.get(f"{prefix}API_KEYS_FILE", "")
        most = _number(environment, f"{prefix}MAX_REQUESTS_PER_KEY", 0, 0, 1 << 30)
        if most and not file:
            raise ValueError(f"{prefix}MAX_REQUESTS_PER_KEY requires {prefix}API_KEYS_FILE")
        header = environment.get(f"{prefix}TENANT_HEADER", "")
        if not re.fullmatch(r"[A-Za-z0-9-]*", header):
            raise ValueError(f"{prefix}TENANT_HEADER is {header!r}, but must be the name of a header")
        return cls(api_keys_file=Path(file) if file else None, max_requests_per_key=most, tenant_header=header)


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """The first choice is the default."""
    text = environment.get(name, choices[0])
    if text not in choices:
        raise ValueError(f"{name} is {text!r}, but must be {' or '.join(choices)}")
    return text


def _number(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name} is {text!r}, but must be a whole number from {least} to {most}")
    return int(text)
