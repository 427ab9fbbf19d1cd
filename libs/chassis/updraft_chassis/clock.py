"""Time as an argument, so that tests of rollouts, leases and budgets need not wait."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since 1970 (UTC), for timestamps that are stored or shown."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment, never decreasing, for durations."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
