"""When the draft model is tried though it is not the choice: ever more rarely, while it shows no better than was thought."""

from collections.abc import Sequence

FIRST_REST, LONGEST_REST = 32, 256
"""Steps without the draft model before a try. They double with each, so that asking again costs ever less."""
STEPS = 2
"""Of a try, on one sequence. Two: the first one after a rest also feeds the draft what it missed, and its time says nothing."""


class Tries:
    """Asked before each step. Sequences are known by what is recorded of them, compared by identity."""

    def __init__(self) -> None:
        self._idle = 0
        """Steps since the draft model was chosen or tried last, of those in which it could have been."""
        self._rest = FIRST_REST
        self._left = 0
        """Steps of the try that is under way."""
        self._turn = 0
        self._tried: object = None
        self._expected = 0.0

    def begin_anew(self) -> None:
        """The draft model is another one."""
        self._idle, self._rest, self._left = 0, FIRST_REST, 0

    def postpone(self) -> None:
        """The draft model is the choice of some sequence, which tells of it too."""
        self._idle, self._left = 0, 0

    def take(self, able: Sequence[object]) -> int | None:
        """Which of these sequences to try in this step, the same one in all steps of a try; None: none of them."""
        if not able:
            return None
        if not self._left:
            self._idle += 1
            if self._idle <= self._rest:
                return None
            self._idle, self._left, self._rest = 0, STEPS, min(2 * self._rest, LONGEST_REST)
            self._turn += 1
            self._tried = able[self._turn % len(able)]
        self._left -= 1
        if not any(each is self._tried for each in able):  # it has ended meanwhile
            self._tried = able[self._turn % len(able)]
        return next(i for i, each in enumerate(able) if each is self._tried)

    def expect(self, kept: float) -> None:
        """So many drafts of the try should be kept, by what is known."""
        self._expected = kept

    def observe(self, sequence: object, kept: int) -> None:
        """So many of its were kept: more than expected, and the next try comes soon."""
        if sequence is self._tried and kept > self._expected:
            self._rest = FIRST_REST
