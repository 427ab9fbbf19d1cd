"""When a proposer that is not in use is tried again: rarely, and ever more rarely while it proves no better."""

FIRST_GAP, LONGEST_GAP = 16, 128
"""Events between two probes, per event of a probe. They double with each probe."""


class ProbeSchedule:
    """Probes of `size` events each, with at least `gap * size` events between them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._gap = FIRST_GAP
        self._num_events = 0
        """Since the last probe."""

    def reset(self) -> None:
        """Probe often again."""
        self._gap = FIRST_GAP

    def defer(self) -> None:
        """Begin the gap again: the proposer is in use, which shows as much as a probe."""
        self._num_events = 0

    def next(self) -> bool:
        """Count an event, and return whether it belongs to a probe."""
        self._num_events += 1
        num_probed = self._num_events - self._gap * self._size
        if num_probed >= self._size:
            self.defer()
            self._gap = min(2 * self._gap, LONGEST_GAP)
        return num_probed > 0


class DraftModelGate:
    """Turns the draft model off engine-wide while n-gram lookup leaves it too little to do.

    The model reads every token of a request in case it drafts later, which costs 4 to 10 % of a step. While fewer than
    `MIN_SHARE` of the proposals that it could make are chosen, new requests are left to lookup. Now and then a probe opens the
    gate for `MIN_STEPS` steps.
    """

    MIN_SHARE = 0.25
    MIN_STEPS, MEMORY = 64, 256
    """Steps before the share counts, and steps that it remembers."""

    def __init__(self) -> None:
        self.reset()

    @property
    def is_open(self) -> bool:
        """Whether the draft model reads requests that begin now."""
        return self._num_steps < self.MIN_STEPS or self._num_chosen >= self.MIN_SHARE * self._num_possible

    def reset(self) -> None:
        """Another draft model is served."""
        self._probe = ProbeSchedule(1)
        self._num_steps = 0
        self._num_possible = self._num_chosen = 0.0

    def observe(self, num_possible: int, num_chosen: int) -> bool:
        """Count a step with lookup, in which the model could draft for so many sequences and was chosen for so many.

        Returns whether a probe begins: the model is then to be treated as if it were new.
        """
        fade = 1.0 - 1.0 / self.MEMORY
        self._num_steps += 1
        self._num_possible = self._num_possible * fade + num_possible
        self._num_chosen = self._num_chosen * fade + num_chosen
        if self.is_open and self._num_steps > self.MIN_STEPS:
            self._probe.reset()
        is_probe = not self.is_open and self._num_steps % self.MIN_STEPS == 0 and self._probe.next()
        if is_probe:
            self._num_steps = 0
            self._num_possible = self._num_chosen = 0.0
        return is_probe
