"""When a proposer that is not in use is tried again: rarely, and ever more rarely while it proves no better."""

FIRST_GAP, LONGEST_GAP = 16, 128
"""Events between two probes, per event of a probe. They double with each probe."""


class ProbeSchedule:
    """Probes of `size` events each, with at least `gap * size` events between them."""

    def __init__(self) -> None:
        self._gap = FIRST_GAP
        self._size = 0
        """Largest size asked for since the last probe."""
        self._num_events = 0
        """Since the last probe."""

    def reset(self) -> None:
        """Probe often again."""
        self._gap = FIRST_GAP

    def defer(self) -> None:
        """Begin the gap again: the proposer is in use, which shows as much as a probe."""
        self._num_events = self._size = 0

    def next(self, size: int) -> bool:
        """Count an event, and return whether it belongs to a probe."""
        self._num_events += 1
        self._size = max(self._size, size)
        num_probed = self._num_events - self._gap * self._size
        if num_probed >= self._size:
            self.defer()
            self._gap = min(2 * self._gap, LONGEST_GAP)
        return num_probed > 0


class DraftModelGate:
    """Turns the draft model off engine-wide while it does not pay next to n-gram lookup.

    Its balance is the seconds that its chains saved minus the seconds that it read. While that is negative, new requests are
    left to lookup, except for probes of as many requests as run at once (a single chain costs nearly as much as all of them).
    """

    MIN_STEPS, MEMORY = 64, 256
    """Steps before the balance counts, and steps that it remembers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Another draft model is served: begin without an opinion."""
        self._balance_s = 0.0
        self._num_steps = 0
        self._probe = ProbeSchedule()

    def count_step(self) -> None:
        """The model could have drafted in a step."""
        self._balance_s *= 1.0 - 1.0 / self.MEMORY
        self._num_steps += 1

    def add(self, saved_s: float) -> None:
        """The model saved so many seconds against lookup alone; negative: it spent them."""
        self._balance_s += saved_s

    def admits(self, num_at_once: int) -> bool:
        """Whether the draft model reads a request that begins now, as one of `num_at_once` that run at once."""
        if self._num_steps < self.MIN_STEPS or self._balance_s >= 0:
            self._probe = ProbeSchedule()
            return True
        return self._probe.next(num_at_once)
