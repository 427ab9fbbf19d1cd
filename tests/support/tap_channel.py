"""Stands where the channel is, for tests of the hooks that offer messages to it."""

from updraft_tap.channel import PendingMessage


class Collected:
    """Keeps what the hooks offer and report. It stays open after an end, so that a hook is still called then."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.is_open = is_open
        self.items: list[PendingMessage] = []
        self.errors: list[Exception] = []
        self.ends: list[str] = []
        self.restated = 0

    def offer(self, item: PendingMessage) -> None:
        self.items.append(item)

    def failed(self, error: Exception) -> None:
        self.errors.append(error)

    def restate(self) -> None:
        self.restated += 1

    def end(self, problem: str) -> None:
        self.ends.append(problem)
