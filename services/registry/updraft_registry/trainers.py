"""One sentence from each speculator's trainer: the last publication, or the reason why nothing is published.

In memory only, because trainers repeat it. A trainer that has been silent for `expiry_s` says nothing any more.
"""

from dataclasses import dataclass

from updraft_chassis.errors import Exhausted

DEFAULT_EXPIRY_S = 45.0
"""Trainers repeat themselves every ten seconds."""

MAX_TRAINERS = 10_000
"""Trainers are heard before their speculator has a version, so their number has a limit of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sentence:
    text: str
    at_s: float


class Trainers:
    """The newest sentence by speculator. Times are monotonic seconds."""

    def __init__(self, *, expiry_s: float = DEFAULT_EXPIRY_S) -> None:
        self._expiry_s = expiry_s
        self._sentences: dict[str, _Sentence] = {}

    def report(self, speculator: str, message: str, now_s: float) -> bool:
        """Keep a sentence; true if it is a new one. Exhausted if there are `MAX_TRAINERS` others."""
        if speculator not in self._sentences and len(self._sentences) >= MAX_TRAINERS:
            raise Exhausted(f"this registry hears {MAX_TRAINERS} trainers already")
        is_new = self.message(speculator) != message
        self._sentences[speculator] = _Sentence(text=message, at_s=now_s)
        return is_new

    def expire(self, now_s: float) -> bool:
        """Forget trainers that have been silent for too long; true if there were any."""
        silent = [name for name, sentence in self._sentences.items() if now_s - sentence.at_s > self._expiry_s]
        for name in silent:
            del self._sentences[name]
        return bool(silent)

    @property
    def speculators(self) -> list[str]:
        """Those whose trainer reports, also if nothing else is known of them yet."""
        return list(self._sentences)

    def message(self, speculator: str) -> str:
        """Empty if no trainer reports."""
        sentence = self._sentences.get(speculator)
        return sentence.text if sentence else ""
