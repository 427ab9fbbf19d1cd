import statistics
import uuid
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_trainer.data.retention import MAX_KINDS, PRESENT, Pool, ReplayLimits, Retention, SampleEntry

LIMITS = ReplayLimits(window_bytes=50, reservoir_bytes=40, evaluation_bytes=20)


def kept(order: int, *, cluster: str = "a", pool: Pool = Pool.WINDOW, num_bytes: int = 10) -> SampleEntry:
    return SampleEntry(
        trace_id=uuid.UUID(int=order * 2**64 + 1).hex,
        order=order,
        cluster=cluster,
        pool=pool,
        num_bytes=num_bytes,
        num_tokens=1,
    )


ARRIVALS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([Pool.WINDOW, Pool.EVALUATION]), st.integers(1, 60)),
    max_size=60,
)


@given(ARRIVALS)
def test_no_place_ever_exceeds_its_bytes(arrivals: list[tuple[str, Pool, int]]) -> None:
    retention = Retention(LIMITS)
    for order, (cluster, pool, num_bytes) in enumerate(arrivals):
        retention.add(kept(order, cluster=cluster, pool=pool, num_bytes=num_bytes))
        assert retention.num_bytes(Pool.WINDOW) <= 50
        assert retention.num_bytes(Pool.RESERVOIR) <= 40
        assert retention.num_bytes(Pool.EVALUATION) <= 20
    for pool in Pool:
        assert retention.num_bytes(pool) == sum(one.num_bytes for one in retention if one.pool is pool)


@given(ARRIVALS)
def test_what_changes_say_is_what_the_index_does(arrivals: list[tuple[str, Pool, int]]) -> None:
    retention, mirror = Retention(LIMITS), dict[str, Pool]()
    for order, (cluster, pool, num_bytes) in enumerate(arrivals):
        one = kept(order, cluster=cluster, pool=pool, num_bytes=num_bytes)
        mirror[one.trace_id] = pool
        changes = retention.add(one)
        mirror |= dict.fromkeys(changes.moved, Pool.RESERVOIR)
        for trace_id in changes.dropped:
            del mirror[trace_id]
        assert mirror == {one.trace_id: one.pool for one in retention}


@given(ARRIVALS)
def test_held_out_samples_never_become_others(arrivals: list[tuple[str, Pool, int]]) -> None:
    retention, held_out = Retention(LIMITS), set[str]()
    for order, (cluster, pool, num_bytes) in enumerate(arrivals):
        one = kept(order, cluster=cluster, pool=pool, num_bytes=num_bytes)
        held_out |= {one.trace_id} if pool is Pool.EVALUATION else set()
        retention.add(one)
        assert all((one.pool is Pool.EVALUATION) == (one.trace_id in held_out) for one in retention)


def test_the_newest_stay_in_the_window() -> None:
    retention = Retention(LIMITS)
    for order in range(20):
        retention.add(kept(order))
    assert sorted(one.order for one in retention if one.pool is Pool.WINDOW) == [15, 16, 17, 18, 19]


def test_the_newest_of_each_cluster_stay_held_out() -> None:
    retention = Retention(LIMITS)
    for order in range(10):
        retention.add(kept(order, cluster="old", pool=Pool.EVALUATION))
    for order in range(10, 20):
        retention.add(kept(order, cluster="new", pool=Pool.EVALUATION))
    assert sorted(one.order for one in retention) == [9, 19]


@pytest.mark.attack(
    boundary="traces",
    attack="a flood of new traffic",
    outcome="older kinds of traffic keep their share of replay",
)
def test_a_flood_of_new_traffic_leaves_old_traffic_its_share() -> None:
    retention = Retention(ReplayLimits(window_bytes=50, reservoir_bytes=400, evaluation_bytes=0))
    for order in range(100):
        retention.add(kept(order, cluster="old"))
    for order in range(100, 5000):
        retention.add(kept(order, cluster="new"))
    shares = [one.cluster for one in retention if one.pool is Pool.RESERVOIR]
    assert shares.count("old") == shares.count("new") == 20


def test_any_number_of_outliers_leaves_kinds_their_share() -> None:
    retention = Retention(ReplayLimits(window_bytes=50, reservoir_bytes=2000, evaluation_bytes=2000))
    for order in range(8000):
        cluster = "ab"[order % 2] if order % 4 else f"outlier {order}"
        retention.add(kept(order, cluster=cluster, pool=Pool.EVALUATION if order % 8 > 3 else Pool.WINDOW))
    for pool in (Pool.RESERVOIR, Pool.EVALUATION):
        kinds = Counter(one.cluster for one in retention if one.pool is pool and one.cluster in {"a", "b"})
        assert min(kinds["a"], kinds["b"]) >= 50
        assert retention.num_bytes(pool) == 2000


def test_the_newest_outliers_stay_held_out() -> None:
    retention = Retention(ReplayLimits(window_bytes=0, reservoir_bytes=0, evaluation_bytes=1000))
    for order in range(500):
        retention.add(kept(order, cluster=f"outlier {order}", pool=Pool.EVALUATION))
    assert sum(one.order >= 500 - (100 - MAX_KINDS) for one in retention) == 100 - MAX_KINDS


def test_a_reservoir_is_a_uniform_sample_of_all_that_left_the_window() -> None:
    retention = Retention(ReplayLimits(window_bytes=0, reservoir_bytes=4000, evaluation_bytes=0))
    for order in range(4000):
        retention.add(kept(order))
    ages = [one.order / 4000 for one in retention]
    assert len(ages) == 400
    # A uniform variable has mean 1/2 and deviation 0.289; of 400 draws the mean has deviation 0.0144.
    assert abs(statistics.mean(ages) - 0.5) < 0.06
    assert abs(statistics.pstdev(ages) - 0.289) < 0.04


def test_the_same_samples_stay_after_a_restart() -> None:
    whole = Retention(LIMITS)
    for order in range(200):
        whole.add(kept(order))
    first = Retention(LIMITS)
    for order in range(90):
        first.add(kept(order))
    second = Retention(LIMITS, list(first))
    for order in range(90, 200):
        second.add(kept(order))
    assert {one.trace_id for one in second} == {one.trace_id for one in whole}


def test_a_sample_larger_than_the_window_is_not_kept() -> None:
    retention = Retention(LIMITS)
    changes = retention.add(kept(1, num_bytes=1000))
    assert changes.dropped == [kept(1).trace_id]
    assert list(retention) == []


def test_a_tenant_with_more_than_its_share_of_a_full_pool_makes_room_first() -> None:
    retention = Retention(replace(LIMITS, max_tenant_share=0.5))
    for order in range(4):
        retention.add(replace(kept(order, pool=Pool.EVALUATION, num_bytes=5), tenant=str(order % 2)))
    assert retention.num_bytes(Pool.EVALUATION) == 20, "while there is room, everybody may use it"
    dropped = []
    for order in range(4, 30):
        dropped += retention.add(replace(kept(order, pool=Pool.EVALUATION, num_bytes=5), tenant="x")).dropped

    assert Counter(one.tenant for one in retention) == {"0": 1, "1": 1, "x": 2}
    assert len(dropped) == 26
    newest = max(one.order for one in retention if one.tenant == "x")
    assert newest == 29, "of its own samples, the oldest leave"


def test_alone_a_tenant_has_it_all() -> None:
    retention = Retention(replace(LIMITS, max_tenant_share=0.1))
    for order in range(9):
        retention.add(replace(kept(order), tenant="x"))

    assert (retention.num_bytes(Pool.WINDOW), retention.num_bytes(Pool.RESERVOIR)) == (50, 40)


@pytest.mark.parametrize("pool", [Pool.RESERVOIR, Pool.EVALUATION])
def test_one_sample_of_a_second_tenant_takes_no_rare_kind_from_the_first(pool: Pool) -> None:
    limits = ReplayLimits(window_bytes=0, reservoir_bytes=400, evaluation_bytes=400, max_tenant_share=0.5)
    retention = Retention(limits)
    retention.add(replace(kept(0, cluster="health check", pool=pool), tenant="probe"))
    for order in range(1, 2000):
        cluster = "rare" if order < 20 else "usual"
        retention.add(replace(kept(order, cluster=cluster, pool=pool), tenant="x"))

    kinds = Counter(one.cluster for one in retention)
    assert kinds == {"health check": 1, "rare": 19, "usual": 20}


def test_what_an_absent_tenant_has_left_stays_no_longer_than_that_of_nobody() -> None:
    retention = Retention(ReplayLimits(window_bytes=100, reservoir_bytes=100, evaluation_bytes=0, max_tenant_share=0.5))
    for order in range(10):
        retention.add(replace(kept(order), tenant="renamed"))
    for order in range(10, 600):
        retention.add(replace(kept(order), tenant="new name"))
    pools = Counter((one.tenant, one.pool) for one in retention)
    assert pools["renamed", Pool.WINDOW] == 5, "it may come back"
    later_ms = PRESENT.days * 24 * 3_600_000 + 1
    for order in range(600, 1200):
        retention.add(replace(kept(order), tenant="new name", finished_ms=later_ms))

    assert {one.tenant for one in retention if one.pool is Pool.WINDOW} == {"new name"}
    assert sum(one.tenant == "renamed" for one in retention) < 3, "a uniform sample of 1,200 requests"


def test_a_third_tenant_keeps_its_share_from_one_with_a_new_name() -> None:
    retention = Retention(ReplayLimits(window_bytes=100, reservoir_bytes=0, evaluation_bytes=0, max_tenant_share=0.5))
    later_ms = PRESENT.days * 24 * 3_600_000 + 1
    for order in range(10):
        retention.add(replace(kept(order), tenant="renamed"))
    for order in range(10, 14):
        retention.add(replace(kept(order), tenant="small", finished_ms=later_ms))
    for order in range(14, 100):
        retention.add(replace(kept(order), tenant="new name", finished_ms=later_ms))

    assert Counter(one.tenant for one in retention) == {"small": 4, "new name": 6}


def test_discarded_samples_leave_nothing_behind() -> None:
    retention = Retention(replace(LIMITS, max_tenant_share=0.5))
    entries = [replace(kept(order, cluster="ab"[order % 2]), tenant=str(order % 3)) for order in range(9)]
    for entry in entries:
        retention.add(entry)

    retention.discard([entry.trace_id for entry in (*entries, *entries)])

    assert list(retention) == []
    assert not retention.clusters
    assert [(retention.num_bytes(pool), retention.num_samples(pool)) for pool in Pool] == [(0, 0)] * 3
    assert retention.add(kept(20)).dropped == []


@given(ARRIVALS, st.sampled_from([0.25, 0.5, 1.0]))
def test_no_place_exceeds_its_bytes_whoever_fills_it(arrivals: list[tuple[str, Pool, int]], share: float) -> None:
    retention = Retention(replace(LIMITS, max_tenant_share=share))
    for order, (tenant, pool, num_bytes) in enumerate(arrivals):
        retention.add(replace(kept(order, pool=pool, num_bytes=num_bytes), tenant=tenant))
    for pool, most in ((Pool.WINDOW, 50), (Pool.RESERVOIR, 40), (Pool.EVALUATION, 20)):
        assert retention.num_bytes(pool) == sum(one.num_bytes for one in retention if one.pool is pool) <= most
