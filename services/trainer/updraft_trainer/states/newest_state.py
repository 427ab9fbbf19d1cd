"""The newest state of all ranks, at rank 0.

Rank 0 saves to its own disk, and the next start may give another process its place. So at a start rank 0 copies the newest
state to its disk, if another rank has it, and goes on from there: with any number of ranks, because a state is that of all of
them. Each state has a higher number than all before it, whoever saved it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from updraft_chassis.errors import Corrupt, UpdraftError
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.states.state import Identity, SavedState, State, States

CHUNK_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class _Offer:
    """A rank's newest intact state, with the sizes of its files; or why it has none."""

    saved: SavedState | None
    files: dict[str, int]
    error: UpdraftError | None = None


def load_newest(states: States, identity: Identity, ranks: Ranks) -> State | None:
    """At rank 0 the newest intact state that a rank has, None if none has one. Elsewhere None. All ranks call it.

    Conflict everywhere if the newest states of a rank have another identity. Corrupt everywhere if a rank has damaged states
    only, and none has an intact one. Exhausted if rank 0 has no room for a state of another rank.
    """
    offers = ranks.gather(_offer(states, identity))
    source, offer = ranks.broadcast_object(_choice(offers) if ranks.leads else None)
    if offer.error is not None:
        raise offer.error
    if offer.saved is None:
        return None
    if source:
        _transfer(states, offer.saved, offer.files, ranks, source)
    return states.read(offer.saved) if ranks.leads else None


def _offer(states: States, identity: Identity) -> _Offer:
    try:
        saved = states.newest(identity)
    except UpdraftError as error:
        return _Offer(None, {}, error)
    paths = sorted(states.path(saved).iterdir()) if saved else []
    return _Offer(saved, {path.name: path.stat().st_size for path in paths})


def _choice(offers: list[_Offer]) -> tuple[int, _Offer]:
    """The rank with the newest state, and its offer, or an offer with an error. The lowest rank if several have that state."""
    errors = [(rank, offer) for rank, offer in enumerate(offers) if offer.error is not None]
    conflicts = [(rank, offer) for rank, offer in errors if not isinstance(offer.error, Corrupt)]
    intact = [(-rank, offer.saved) for rank, offer in enumerate(offers) if offer.saved is not None]
    if conflicts or (errors and not intact):
        return (conflicts or errors)[0]
    if not intact:
        return 0, offers[0]
    rank = -max(intact, key=lambda one: (one[1], one[0]))[0]
    return rank, offers[rank]


def _transfer(states: States, saved: SavedState, files: dict[str, int], ranks: Ranks, source: int) -> None:
    """Copy a state from the rank `source` to rank 0. The other ranks get the bytes too, and drop them."""
    if ranks.leads:
        with states.receiving(saved) as part:
            _exchange(part, files, ranks, source)
    else:
        _exchange(states.path(saved), files, ranks, source)


def _exchange(folder: Path, files: dict[str, int], ranks: Ranks, source: int) -> None:
    has_it = ranks.rank == source
    for name, num_bytes in files.items():
        path = folder / name if has_it or ranks.leads else Path(os.devnull)
        with path.open("rb" if has_it else "wb") as file:
            for start in range(0, num_bytes, CHUNK_BYTES):
                chunk = torch.empty(min(CHUNK_BYTES, num_bytes - start), dtype=torch.uint8)
                if has_it:
                    file.readinto(chunk.numpy())  # type: ignore[attr-defined]  # a file opened in this mode has it
                ranks.broadcast([chunk], source=source)
                if not has_it:
                    file.write(chunk.numpy().data)
