"""Whether requests begin without the draft model: what it reads beside lookups, in case it drafts, its chains have to earn."""

LEAST_STEPS, MEMORY = 64, 256
"""Steps before it is judged, and how many of them count, about."""
FIRST_GAP, LONGEST_GAP = 16, 128
"""While it rests, one request in so many is read all the same, so that what it would earn stays known: ever fewer."""


class Rest:
    """Of a draft model beside lookups: seconds that its chains saved, and seconds that it read. Both fade."""

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """The draft model is another one."""
        self._saved_s = self._read_s = 0.0
        self._num_steps = 0
        self._num_left = 0
        """Requests that began without it since one was read."""
        self._gap = FIRST_GAP

    def count_step(self) -> None:
        """It could have served some sequence of a step."""
        fading = 1.0 - 1.0 / MEMORY
        self._saved_s *= fading
        self._read_s *= fading
        self._num_steps += 1

    def save(self, seconds: float) -> None:
        """Its chains saved so much against lookups alone; below 0, they cost more."""
        self._saved_s += seconds

    def read(self, seconds: float) -> None:
        """It read for so long."""
        self._read_s += seconds

    def admits(self) -> bool:
        """Whether the draft model reads the request that begins now."""
        if self._num_steps < LEAST_STEPS or self._saved_s >= self._read_s:
            self._num_left, self._gap = 0, FIRST_GAP
            return True
        self._num_left += 1
        if self._num_left < self._gap:
            return False
        self._num_left, self._gap = 0, min(2 * self._gap, LONGEST_GAP)
        return True
