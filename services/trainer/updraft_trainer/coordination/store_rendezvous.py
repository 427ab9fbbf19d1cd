"""Where the ranks of one start of a trainer meet: a part of torchrun's store.

torchrun keeps its store over restarts, and so what ranks of an earlier start have written: an address that nobody listens to
any more would be taken for that of a rank. Rank 0 therefore makes up a new part of the store for each start, and the others
join it once rank 0 has read their nonce of this start. Rejected: a part for each restart count, which differs between machines.
"""

import json
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not export them

_POLL_S = 0.02

_ROUND = "round"
"""Key of the newest part's name, and of the nonces that rank 0 has read."""


def join_store(
    store: Store, rank: int, size: int, timeout: timedelta, check: Callable[[], None] = lambda: None
) -> Store:
    """The part of the store that these `size` ranks share, after all have joined it.

    TimeoutError names the ranks that do not join in time. `check` is called meanwhile and may end this by an exception.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    member = _Rank0(store, size) if rank == 0 else _OtherRank(store, rank)
    while missing := member.missing():
        check()
        if time.monotonic() > deadline_s:
            named = ", ".join(map(str, missing))
            raise TimeoutError(f"rank {named} did not come within {timeout.total_seconds():g} s")
        time.sleep(_POLL_S)
    return PrefixStore(member.name, store)


class _Rank0:
    """Makes up the part's name."""

    def __init__(self, store: Store, size: int) -> None:
        self._store = store
        self._others = range(1, size)
        self._read: dict[str, str] | None = None
        self.name = uuid.uuid4().hex

    def missing(self) -> list[int]:
        """Post the nonces that were written so far; return the ranks that have not joined yet."""
        keys = {str(rank): _nonce_key(rank) for rank in self._others}
        nonces = {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}
        if nonces != self._read:
            self._read = nonces
            self._store.set(_ROUND, json.dumps({"name": self.name, "nonces": nonces}))
        return [rank for rank in self._others if not self._store.check([_joined_key(self.name, rank)])]


class _OtherRank:
    """Writes a new nonce at each start, and joins the part for which rank 0 has read it."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._nonce = uuid.uuid4().hex
        self.name = ""
        store.set(_nonce_key(rank), self._nonce)

    def missing(self) -> list[int]:
        """Rank 0, until it has read the nonce of this one."""
        if not self._store.check([_ROUND]):
            return [0]
        posted = json.loads(self._store.get(_ROUND))
        if posted["nonces"].get(str(self._rank)) != self._nonce:
            return [0]
        self.name = posted["name"]
        self._store.set(_joined_key(self.name, self._rank), "")
        return []


def _nonce_key(rank: int) -> str:
    return f"nonce {rank}"


def _joined_key(name: str, rank: int) -> str:
    return f"{name} {rank}"
