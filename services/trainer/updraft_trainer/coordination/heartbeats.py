"""A rank tells the others what it does at any time, without waiting for them: by heartbeats in torchrun's store.

The collective operations of `ranks` cannot do that, because they belong to training: a step or a fit may take minutes.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not export them
from torch.distributed.rendezvous import rendezvous

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Unavailable
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.coordination.watch import Activity, PeerState, Phase
from updraft_trainer.data.demand import RankDemand

_TIMEOUT = timedelta(seconds=10)
"""For an answer of the store, which is another machine's at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """The state of one rank. `samples` and `held_out` count the requests that it stores."""

    rank: int
    demand: RankDemand
    samples: int
    held_out: int
    phase: Phase
    is_stopping: bool = False
    """It was told to stop."""
    may_read: bool = False
    """At rank 0: no other trainer reads the traces, so all ranks may."""
    forgotten: Mapping[str, int] = field(default_factory=dict)
    """At rank 0: the orders to forget tenants; see `data.forgetting`."""
    forgotten_ms: int = 0
    """This rank has carried out all orders up to this time."""


class Heartbeats:
    """Posts this rank's heartbeats and reads those of the others. Calls may block for seconds. Not for concurrent use."""

    def __init__(self, ranks: Ranks, clock: Clock) -> None:
        """All ranks do this at the same time. Unavailable if the store does not answer."""
        self._ranks = ranks
        self._clock = clock
        self._last: dict[int, tuple[Heartbeat, float]] = {}
        """The newest heartbeat of each other rank, and when it was first seen."""
        self._store: Store | None = None
        if ranks.size > 1:
            # A connection of its own: one that waits for something blocks all who share it.
            with self._reaching():
                store, _, _ = next(rendezvous("env://", ranks.rank, ranks.size, timeout=_TIMEOUT))
            name = ranks.broadcast_object(uuid.uuid4().hex)  # the store outlives this start of the ranks
            self._store = PrefixStore(name, store)

    def exchange(self, heartbeat: Heartbeat) -> list[Heartbeat]:
        """Replace this rank's heartbeat; return those of the other ranks. Unavailable if the store does not answer."""
        if self._store is not None:
            with self._reaching():
                self._store.set(str(self._ranks.rank), json.dumps(asdict(heartbeat)))
                self._read_others(self._store)
        return [heartbeat for heartbeat, _ in self._last.values()]

    def peers(self) -> list[PeerState]:
        """The states of the other ranks, by the heartbeats that `exchange` has returned last."""
        now_s = self._clock.monotonic()
        return [PeerState(rank=one.rank, phase=one.phase, silent_s=now_s - at_s) for one, at_s in self._last.values()]

    def _read_others(self, store: Store) -> None:
        for rank in range(self._ranks.size):
            if rank != self._ranks.rank and store.check([str(rank)]):
                heartbeat = _read(store.get(str(rank)))
                if rank not in self._last or self._last[rank][0] != heartbeat:
                    self._last[rank] = (heartbeat, self._clock.monotonic())

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # as all errors of the store
            reason = str(error).splitlines()[0]
            raise Unavailable(f"rank {self._ranks.rank} cannot reach torchrun's store: {reason}") from error


def _read(content: bytes) -> Heartbeat:
    fields = json.loads(content)
    phase = Phase(**fields["phase"] | {"activity": Activity(fields["phase"]["activity"])})
    return Heartbeat(**fields | {"demand": RankDemand(**fields["demand"]), "phase": phase})
