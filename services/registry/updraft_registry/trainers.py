"""What each speculator's trainer says: the last publication or why there is none, and the captured tokens that it can use.

In memory only, because trainers repeat it. A trainer that has been silent for `expiry_s` says nothing and demands nothing any
more.
"""

from dataclasses import dataclass

from updraft_chassis.errors import Exhausted

DEFAULT_EXPIRY_S = 45.0
"""Trainers repeat themselves every ten seconds."""

MAX_TRAINERS = 10_000
"""Trainers are heard before their speculator has a version, so their number has a limit of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Word:
    message: str
    demand: float | None
    at_s: float


class Trainers:
    """The newest word by speculator. Times are monotonic seconds."""

    def __init__(self, *, expiry_s: float = DEFAULT_EXPIRY_S) -> None:
        self._expiry_s = expiry_s
        self._words: dict[str, _Word] = {}
        self._silent: dict[str, None] = {}
        """Speculators whose trainer stated a demand and went away, in the order in which they did."""

    def report(self, speculator: str, message: str, now_s: float, *, demand: float | None = None) -> bool:
        """Keep a word; true if its message is new. Exhausted if there are `MAX_TRAINERS` others."""
        if speculator not in self._words and len(self._words) >= MAX_TRAINERS:
            raise Exhausted(f"this registry hears {MAX_TRAINERS} trainers already")
        is_new = self.message(speculator) != message
        self._words[speculator] = _Word(message=message, demand=demand, at_s=now_s)
        self._silent.pop(speculator, None)
        return is_new

    def expire(self, now_s: float) -> bool:
        """Forget trainers that have been silent for too long; true if there were any."""
        silent = [name for name, word in self._words.items() if now_s - word.at_s > self._expiry_s]
        for name in silent:
            if self._words.pop(name).demand is not None:
                self._silent[name] = None
        while len(self._silent) > MAX_TRAINERS:
            del self._silent[next(iter(self._silent))]
        return bool(silent)

    @property
    def speculators(self) -> list[str]:
        """Those whose trainer reports, also if nothing else is known of them yet."""
        return list(self._words)

    def message(self, speculator: str) -> str:
        """Empty if no trainer reports."""
        word = self._words.get(speculator)
        return word.message if word else ""

    @property
    def demands(self) -> dict[str, float]:
        """Captured tokens per second that each trainer can use: none after it went away. Without those that never said."""
        stated = {name: word.demand for name, word in self._words.items() if word.demand is not None}
        return dict.fromkeys(self._silent, 0.0) | stated
