"""A clock that stands still until it is told to move."""

from dataclasses import dataclass


@dataclass
class ManualClock:
    """A `chassis.clock.Clock` under the test's hand."""

    unix_s: float = 1_700_000_000.0
    monotonic_s: float = 0.0

    def now(self) -> float:
        return self.unix_s

    def monotonic(self) -> float:
        return self.monotonic_s

    def advance(self, seconds: float) -> None:
        self.unix_s += seconds
        self.monotonic_s += seconds
