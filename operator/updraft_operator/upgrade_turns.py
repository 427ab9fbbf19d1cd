"""Whose turn it is: few resources at a time get another runtime, and none while one does not come back.

Nothing here has to be kept. Another process asks every resource how far it is before it begins anything, and those that one
before it began say so themselves.
"""

from collections import Counter
from collections.abc import Callable, Collection

from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.planning.runtime.upgrade import APPLYING, Stage, Upgrade


class UpgradeTurns:
    """Not thread-safe."""

    def __init__(
        self, most: int, keys: Callable[[], Collection[Key]], notify: Callable[[Key], None], metrics: Metrics
    ) -> None:
        """`most` resources are updated at the same time, of all `keys`; `notify` is told who has to look again."""
        self._most = most
        self._keys = keys
        self._notify = notify
        self._metrics = metrics
        self._stages: dict[Key, Stage] = {}
        self._turns: set[Key] = set()
        """Turns that may have begun: they count until the resource says that it is not about to begin any more."""

    def has_turn(self, key: Key) -> bool:
        """Whether its pods may get another runtime now: it is its turn, or its update is under way."""
        return key in self._turns or self._stages.get(key) in APPLYING

    def stops(self, key: Key) -> str:
        """The resource that does not come back, so that `key` waits; empty if none. Tenants learn no names of others."""
        failed = self._failed()
        if own := sorted(each.name for each in failed if each.namespace == key.namespace):
            return own[0]
        return "a resource of another namespace" if failed else ""

    def report(self, key: Key, upgrade: Upgrade) -> None:
        """How far a resource is."""
        had_turn = self.has_turn(key)
        self._enter(key, upgrade.stage)
        if upgrade.may_apply and self.has_turn(key) and not had_turn:
            self._notify(key)  # one that another process began

    def began(self, key: Key) -> None:
        """A workload got the turn: whatever happens now, the update is under way."""
        if key in self._turns:
            self._enter(key, Stage.UPDATING)

    def cannot_say(self, key: Key) -> None:
        """An error, or nothing was decided: its pods keep what they have. It does not use its turn, and others need not wait
        for it, but an update that is under way stays so, and a failed one stays failed."""
        stage = self._stages.get(key, Stage.READY)
        if key in self._stages or key in self._keys():
            self._enter(key, Stage.WAITING if stage is Stage.READY else stage)

    def leave(self, key: Key) -> None:
        """The resource is being deleted."""
        self._enter(key, Stage.CURRENT)

    def forget(self, key: Key) -> None:
        """The resource is gone."""
        if key in self._stages:
            self._enter(key, None)

    def start_over(self) -> None:
        """Another process may work meanwhile."""
        self._stages.clear()
        self._turns.clear()
        self._show()

    def _failed(self) -> set[Key]:
        return {key for key, stage in self._stages.items() if stage is Stage.FAILED}

    def _enter(self, key: Key, stage: Stage | None) -> None:
        failed = self._failed()
        if stage is None:
            del self._stages[key]
        else:
            self._stages[key] = stage
        if stage is Stage.FAILED:
            self._turns.clear()
        elif stage is not Stage.READY:
            self._turns.discard(key)
        if failed != self._failed():
            for other in self._ready():
                self._notify(other)  # its status says what it waits for
        self._begin()

    def _ready(self) -> list[Key]:
        return sorted(key for key, stage in self._stages.items() if stage is Stage.READY and key not in self._turns)

    def _begin(self) -> None:
        counts = self._show()
        if not counts[Stage.READY] or counts[Stage.FAILED] or not self._stages.keys() >= set(self._keys()):
            return
        free = self._most - counts[Stage.UPDATING] - len(self._turns)
        for key in self._ready()[: max(0, free)]:
            self._turns.add(key)
            self._notify(key)

    def _show(self) -> Counter[Stage]:
        counts = Counter(self._stages.values())
        for stage in Stage:
            self._metrics.upgrades.labels(stage).set(counts[stage])
        return counts
