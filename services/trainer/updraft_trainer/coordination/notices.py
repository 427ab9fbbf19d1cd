"""What each rank lets the others know, at any time and without waiting for them: notes on the board of torchrun's store.

The collective operations of `ranks` cannot do that, because they belong to training: a step or a fit may take minutes.
"""

import json
import uuid
from dataclasses import asdict, dataclass

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not export them
from torch.distributed.rendezvous import rendezvous

from updraft_chassis.clock import Clock
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.coordination.watch import Phase, Seen
from updraft_trainer.data.demand import RankDemand


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One rank's note. `samples` and `held_out` count the requests that it stores."""

    rank: int
    demand: RankDemand
    samples: int
    held_out: int
    phase: Phase


class Notices:
    """The notes of all ranks but this one, and a place for its own. Not for concurrent use."""

    def __init__(self, ranks: Ranks, clock: Clock) -> None:
        """All ranks do this at the same time."""
        self._ranks = ranks
        self._clock = clock
        self._last: dict[int, tuple[Notice, float]] = {}
        """Of each other rank: the newest note, and when it was first seen."""
        self._store: Store | None = None
        if ranks.size > 1:
            # A connection of its own: one that waits for something blocks all who share it.
            store, _, _ = next(rendezvous("env://", ranks.rank, ranks.size))
            self._store = PrefixStore(ranks.share(uuid.uuid4().hex), store)  # which outlives this start of the ranks

    def post(self, notice: Notice) -> None:
        """Replace this rank's note."""
        if self._store is not None:
            self._store.set(str(self._ranks.rank), json.dumps(asdict(notice)))

    def of_others(self) -> list[Notice]:
        """The notes of the other ranks that have posted one."""
        if self._store is None:
            return []
        for rank in range(self._ranks.size):
            if rank != self._ranks.rank and self._store.check([str(rank)]):
                notice = _read(self._store.get(str(rank)))
                if rank not in self._last or self._last[rank][0] != notice:
                    self._last[rank] = (notice, self._clock.monotonic())
        return [notice for notice, _ in self._last.values()]

    def seen(self) -> list[Seen]:
        """The phases in the notes that `of_others` has returned last."""
        now_s = self._clock.monotonic()
        return [Seen(rank=one.rank, phase=one.phase, silent_s=now_s - at_s) for one, at_s in self._last.values()]


def _read(content: bytes) -> Notice:
    fields = json.loads(content)
    return Notice(**fields | {"demand": RankDemand(**fields["demand"]), "phase": Phase(**fields["phase"])})
