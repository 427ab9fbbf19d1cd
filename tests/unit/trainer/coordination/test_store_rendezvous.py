from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch does not export them

from updraft_trainer.coordination.store_rendezvous import join_store

LIMIT = timedelta(seconds=60)


@pytest.fixture(scope="module")
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def store(server: TCPStore, request: pytest.FixtureRequest) -> Store:
    """An empty part of it."""
    return PrefixStore(request.node.name, server)


def joined(store: Store, size: int) -> list[Store]:
    """The part that each rank has got; rank 0 joins last."""
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(join_store, store, rank, size, LIMIT) for rank in reversed(range(size))]
        return [future.result() for future in futures]


def test_ranks_meet_where_ranks_of_an_earlier_start_have_left_nothing(store: Store) -> None:
    for part in joined(store, 3):
        part.set("address", "of the first start")
    parts = joined(store, 3)
    assert not any(part.check(["address"]) for part in parts)
    parts[0].set("address", "of the second start")
    assert [part.get("address") for part in parts] == [b"of the second start"] * 3


def test_a_rank_that_died_before_all_had_come_does_not_disturb_the_next_start(store: Store) -> None:
    with pytest.raises(TimeoutError, match=r"rank 0 did not come within 0\.1 s"):
        join_store(store, 1, 3, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match=r"rank 1, 2 did not come within 0\.1 s"):
        join_store(store, 0, 3, timedelta(seconds=0.1))
    assert len(joined(store, 3)) == 3


def test_waiting_for_the_others_ends_when_asked(store: Store) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        join_store(store, 0, 2, LIMIT, stop)
