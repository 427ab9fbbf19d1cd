"""Time as an argument, so that rollouts, leases and budgets are tested without waiting."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where a process reads the time."""

    def now(self) -> float:
        """Seconds since 1970 (UTC): for what is stored or shown."""
        ...

    def monotonic(self) -> float:
        """Seconds since some fixed moment, never going back: for durations."""
        ...


class SystemClock:
    """The clock of the machine."""

    def now(self) -> float:
        """Seconds since 1970 (UTC)."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since some fixed moment, never going back."""
        return time.monotonic()
