"""Whose turn it is: few resources at a time get another runtime, and none while one does not come back.

Nothing here has to be kept. Another process asks every resource how far it is before it begins anything, and those that one
before it began say so themselves.
"""

from collections import Counter
from collections.abc import Callable, Collection

from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.planning.runtime.upgrade import Stage, Upgrade


class UpgradeTurns:
    """Not thread-safe."""

    def __init__(
        self, most: int, keys: Callable[[], Collection[Key]], notify: Callable[[Key], None], metrics: Metrics
    ) -> None:
        """`most` resources are updated at the same time, of all `keys`; `notify` is told whose turn begins."""
        self._most = most
        self._keys = keys
        self._notify = notify
        self._metrics = metrics
        self._stages: dict[Key, Stage] = {}
        self._turns: set[Key] = set()
        """Turns that may have begun: they count until the resource says that it is not about to begin any more."""

    def has_turn(self, key: Key) -> bool:
        """Whether its pods may get another runtime now: it is its turn, or its update is under way."""
        return key in self._turns or self._stages.get(key) in (Stage.UPDATING, Stage.FAILED)

    @property
    def stopped_by(self) -> Key | None:
        return min((key for key, stage in self._stages.items() if stage is Stage.FAILED), default=None)

    def report(self, key: Key, upgrade: Upgrade | None) -> None:
        """How far a resource is; None if that cannot be said, and its pods keep what they have."""
        had_turn = self.has_turn(key)
        stage = self._stages[key] = Stage.WAITING if upgrade is None else upgrade.stage
        if upgrade is not None and upgrade.may_apply and self.has_turn(key) and not had_turn:
            self._notify(key)  # one that another process began
        if stage is not Stage.READY:
            self._turns.discard(key)
        self._begin()

    def forget(self, key: Key) -> None:
        """The resource is gone."""
        self._turns.discard(key)
        if self._stages.pop(key, None) is not None:
            self._begin()

    def start_over(self) -> None:
        """Another process may work meanwhile."""
        self._stages.clear()
        self._turns.clear()
        self._show()

    def _begin(self) -> None:
        counts = self._show()
        if not counts[Stage.READY] or counts[Stage.FAILED] or not self._stages.keys() >= set(self._keys()):
            return
        free = self._most - counts[Stage.UPDATING] - len(self._turns)
        ready = sorted(key for key, stage in self._stages.items() if stage is Stage.READY and key not in self._turns)
        for key in ready[: max(0, free)]:
            self._turns.add(key)
            self._notify(key)

    def _show(self) -> Counter[Stage]:
        counts = Counter(self._stages.values())
        for stage in Stage:
            self._metrics.upgrades.labels(stage).set(counts[stage])
        return counts
