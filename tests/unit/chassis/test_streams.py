"""Shards: every trace has one, and every shard has one rank."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from updraft_chassis.errors import InvalidInput
from updraft_chassis.streams import MAX_SHARDS, keys, node_url, shard_of, shards_of


@given(num_ranks=st.integers(1, MAX_SHARDS), more=st.integers(0, MAX_SHARDS))
def test_every_shard_is_read_by_one_rank_and_no_rank_has_much_more_than_others(num_ranks: int, more: int) -> None:
    num_shards = num_ranks + more
    owned = [list(shards_of(rank, num_ranks, num_shards)) for rank in range(num_ranks)]
    assert sorted(shard for shards in owned for shard in shards) == list(range(num_shards))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 5), (4, 5), (2, 2), (-1, 2), (0, 0)])
def test_a_rank_without_a_shard_is_refused(rank: int, num_ranks: int) -> None:
    with pytest.raises(InvalidInput, match=f"rank {rank} of {num_ranks} cannot read 4 shards"):
        shards_of(rank, num_ranks, 4)


def test_traces_are_spread_evenly_and_always_alike() -> None:
    ids = [number.to_bytes(16) for number in range(8000)]
    counts = Counter(shard_of(trace_id, 8) for trace_id in ids)
    assert set(counts) == set(range(8))
    assert max(counts.values()) < 1.2 * min(counts.values())
    assert [shard_of(trace_id, 8) for trace_id in ids[:4]] == [5, 3, 0, 6]


def test_the_keys_of_a_shard_are_in_one_slot_and_shards_and_speculators_in_others() -> None:
    mine, other = keys("team", "chat", 8), keys("team", "code", 8)
    slots = {key: key_slot(key.encode()) for key in [*mine, *other]}
    assert all(key_slot(f"{key}:dead".encode()) == slot for key, slot in slots.items())
    assert len(set(slots.values())) == 16


@pytest.mark.parametrize(
    ("url", "node"),
    [
        ("redis+cluster://:pass@host:6379", "redis://:pass@host:6379"),
        ("rediss+cluster://host:6379?a=b", "rediss://host:6379?a=b"),
        ("redis://host/0", "redis://host/0"),
        ("unix:///path+cluster", "unix:///path+cluster"),
        ("host", "host"),
    ],
)
def test_a_cluster_is_named_by_one_of_its_nodes(url: str, node: str) -> None:
    assert node_url(url) == node
