"""Whether requests begin without the draft model: what it reads beside lookups, in case it drafts, its chains have to earn."""

LEAST_STEPS, MEMORY = 64, 256
"""Steps before it is judged, and how many of them count, about."""
FIRST_GAP, LONGEST_GAP = 16, 128
"""While it rests, as many requests as run at once are read all the same after so many times as many, ever more: what it would
earn stays known. Not one alone, whose chains would cost nearly as much as those of all."""


class Rest:
    """Of a draft model beside lookups: seconds that its chains saved, and seconds that it read. Both fade."""

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """The draft model is another one."""
        self._saved_s = self._read_s = 0.0
        self._num_steps = 0
        self._gap = FIRST_GAP
        self._num_begun = self._num_at_once = 0
        """Requests since it was tried last, and the most at once of them."""

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

    def admits(self, num_at_once: int) -> bool:
        """Whether the draft model reads the request that begins now, as one of so many that run at once."""
        if self._num_steps < LEAST_STEPS or self._saved_s >= self._read_s:
            self._num_begun, self._num_at_once, self._gap = 0, 0, FIRST_GAP
            return True
        self._num_begun += 1
        self._num_at_once = max(self._num_at_once, num_at_once)
        num_tried = self._num_begun - self._gap * self._num_at_once
        if num_tried >= self._num_at_once:
            self._num_begun, self._num_at_once, self._gap = 0, 0, min(2 * self._gap, LONGEST_GAP)
        return num_tried > 0
