"""Where the ranks of one start of a trainer meet.

torchrun keeps its store over restarts, and so what ranks of an earlier start have written: an address that nobody listens to
any more would be taken for that of a rank. Rank 0 therefore makes up a new part of the store for each start, and the others use
it once rank 0 has read their hello of this start. Rejected: a part for each restart count, which differs between machines.
"""

import json
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not export them

_POLL_S = 0.02

_ROUND = "round"
"""Key of the newest part's name, and of the hellos that rank 0 has read."""


def meet(store: Store, rank: int, size: int, timeout: timedelta, check: Callable[[], None] = lambda: None) -> Store:
    """The part of the store that these `size` ranks share, after all have come.

    TimeoutError names the ranks that do not come in time. `check` is called meanwhile and may end this by an exception.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    visitor = _Host(store, size) if rank == 0 else _Guest(store, rank)
    while missing := visitor.missing():
        check()
        if time.monotonic() > deadline_s:
            named = ", ".join(map(str, missing))
            raise TimeoutError(f"rank {named} did not come within {timeout.total_seconds():g} s")
        time.sleep(_POLL_S)
    return PrefixStore(visitor.name, store)


class _Host:
    """Rank 0."""

    def __init__(self, store: Store, size: int) -> None:
        self._store = store
        self._others = range(1, size)
        self._read: dict[str, str] | None = None
        self.name = uuid.uuid4().hex

    def missing(self) -> list[int]:
        """Post the hellos that came so far; return the ranks that do not know the part yet."""
        keys = {str(rank): _hello(rank) for rank in self._others}
        hellos = {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}
        if hellos != self._read:
            self._read = hellos
            self._store.set(_ROUND, json.dumps({"name": self.name, "hellos": hellos}))
        return [rank for rank in self._others if not self._store.check([_here(self.name, rank)])]


class _Guest:
    """Another rank, whose hello is a new one at each start."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._hello = uuid.uuid4().hex
        self.name = ""
        store.set(_hello(rank), self._hello)

    def missing(self) -> list[int]:
        """Rank 0, until it has read the hello of this one."""
        if not self._store.check([_ROUND]):
            return [0]
        posted = json.loads(self._store.get(_ROUND))
        if posted["hellos"].get(str(self._rank)) != self._hello:
            return [0]
        self.name = posted["name"]
        self._store.set(_here(self.name, self._rank), "")
        return []


def _hello(rank: int) -> str:
    return f"hello {rank}"


def _here(name: str, rank: int) -> str:
    return f"{name} {rank}"
