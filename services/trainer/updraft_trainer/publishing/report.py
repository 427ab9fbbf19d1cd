"""The sentence that status shows for a trainer: the last publication, or the reason why nothing is published."""

from collections.abc import Callable

from updraft.registry.v1 import registry_pb2

_PHASES = {
    registry_pb2.PHASE_STABLE: "was published and serves",
    registry_pb2.PHASE_CANARY: "was published and is in canary",
    registry_pb2.PHASE_REJECTED: "was rejected",
}

MAX_SURPLUS = 1.5
"""Accepted drafts per step on learned requests over those on others, from which on a draft has learned by heart."""


class TrainingReport:
    """Composes the sentence and hands it to `send`."""

    def __init__(self, send: Callable[[str], None]) -> None:
        self._send = send
        self._sentence = ""
        self._outcome = ""
        self._by_heart = ""
        self._published = (0, -1)
        """Version and optimizer step of the last draft that serves."""
        self._tried = (0, -1)
        """The same of a draft in canary; version 0: none is."""

    def busy(self, activity: str) -> None:
        """Work that may take minutes has begun; the next sentence replaces this one."""
        self._send(f"{self._sentence}; {activity}" if self._sentence else activity)

    def done(self) -> None:
        """That work has ended without a decision."""
        self._send(self._sentence)

    def decided(self, sentence: str) -> None:
        """A candidate was judged."""
        self._sentence = sentence
        self._send(sentence)

    def learned(self, trained: float, held_out: float) -> None:
        """Acceptance lengths of the candidate on requests that it was trained on, and on others."""
        lengths = f"{trained:.2f} tokens per step on requests that it learned, {held_out:.2f} on others"
        self._by_heart = f" (learned by heart: {lengths})" if trained - 1 > MAX_SURPLUS * (held_out - 1) else ""

    def withheld(self, sentence: str, why: str) -> None:
        """A candidate that is good enough was not published."""
        self.decided(f"{sentence}; it is not published because {why}")

    def backed_off(self, sentence: str) -> None:
        """A candidate that is good enough waits after the outcome of the last one."""
        self.decided(f"{sentence}; the next version waits a while because {self._outcome}")

    def published(self, version: registry_pb2.Version, step: int) -> None:
        """The registry has a version; its phase says what becomes of it."""
        self._outcome = f"version {version.version} {_PHASES.get(version.phase, 'was published and waits')}"
        if version.phase == registry_pb2.PHASE_STABLE:
            self._published = (version.version, step)
        self._tried = (version.version if version.phase == registry_pb2.PHASE_CANARY else 0, step)
        self.decided(f"{self._outcome}: {version.reason}" if version.reason else self._outcome)

    def follow(self, stable: int, candidate: int) -> None:
        """Note the stable version and the canary of the registry: a canary of ours may have ended."""
        version, _ = self._tried
        if not version or version == candidate:
            return
        if version == stable:
            self._published = self._tried
        self._tried = (0, -1)
        self._outcome = f"version {version} {'serves' if version == stable else 'did not come to serve'}"
        self.decided(self._outcome)

    def refused(self, error: Exception) -> None:
        """The registry did not take a version."""
        self._outcome = "the registry refused the last one"
        self.decided(f"the registry refused a version: {error}")

    def idle(self, step: int) -> None:
        """Every sample has been used as often as it may be, at this optimizer step."""
        version, published_step = self._published
        if step == published_step:
            self._send(f"nothing new was learned since version {version}")
        elif self._sentence:
            self._send(f"{self._sentence}; new requests are needed to learn more{self._by_heart}")
