"""Processes to run and their events: plain data between plan, supervisor and terminal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    name: str
    command: tuple[str, ...]
    is_ready: Callable[[], bool]
    """Whether it serves; called a few times per second, returns within about a second, never raises."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the supervisor's own environment."""
    start_within_s: float = 180.0
    """Loading torch from a cold disk takes a minute on a small machine."""
    stop_within_s: float = 10.0
    """From SIGTERM to SIGKILL."""
    address: str = ""
    """Where to find it, for a person."""


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    process: Process
    state: State
    pid: int | None = None
    after_s: float = 0.0
    """Ready: seconds since its start. Restarting: seconds until its next start."""
    reason: str = ""
    """Restarting and failed: how it ended, e.g. `exited with code 1`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    process: Process
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """One process of a stack, for other programs."""

    name: str
    state: str
    pid: int | None
    restarts: int
    address: str
    log: str


Event = Changed | Line
Listener = Callable[[Event], None]
"""Called from several threads at once; must not raise."""
