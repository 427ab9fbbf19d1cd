"""The demand of a trainer is handed out whole, by traffic."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_registry.credits import EVEN_SHARE, FLOOR, HORIZON_S, averaged, distribute

TRAFFIC = st.dictionaries(st.text(max_size=3), st.floats(0.0, 1e6), min_size=1, max_size=40)


@given(demand=st.floats(FLOOR, 1e9), traffic=TRAFFIC)
def test_all_of_the_demand_is_handed_out_and_no_pod_is_left_out(demand: float, traffic: dict[str, float]) -> None:
    grants = distribute(demand, traffic)
    assert grants.keys() == traffic.keys()
    assert math.fsum(grants.values()) == pytest.approx(demand)
    assert min(grants.values()) >= 0.999 * EVEN_SHARE * demand / len(traffic)


@given(demand=st.floats(FLOOR, 1e9), traffic=TRAFFIC, leaving=st.randoms(use_true_random=False))
def test_what_a_pod_had_goes_to_the_others_when_it_leaves(demand: float, traffic: dict[str, float], leaving) -> None:  # type: ignore[no-untyped-def] # a Random
    stay = {pod: rate for pod, rate in traffic.items() if leaving.random() < 0.7} or traffic
    assert math.fsum(distribute(demand, stay).values()) == pytest.approx(
        math.fsum(distribute(demand, traffic).values())
    )


def test_a_pod_gets_its_share_of_the_traffic() -> None:
    grants = distribute(1000.0, {"a": 3000.0, "b": 1000.0, "idle": 0.0})
    assert grants == pytest.approx({"a": 900 * 0.75 + 100 / 3, "b": 900 * 0.25 + 100 / 3, "idle": 100 / 3})


def test_pods_without_traffic_so_far_get_equal_shares() -> None:
    assert distribute(1000.0, {"a": 0.0, "b": 0.0}) == pytest.approx({"a": 500.0, "b": 500.0})


@pytest.mark.parametrize("demand", [0.0, FLOOR / 2])
def test_a_trainer_that_can_use_nothing_still_gets_evidence(demand: float) -> None:
    assert distribute(demand, {"a": 1.0}) == {"a": FLOOR}


def test_nobody_is_granted_anything_without_pods() -> None:
    assert distribute(1000.0, {}) == {}


@pytest.mark.parametrize("every_s", [0.01, 2.0, 10.0])
def test_traffic_is_averaged_however_often_it_is_reported(every_s: float) -> None:
    rate = 0.0
    for _ in range(round(10 * HORIZON_S / every_s)):
        rate = averaged(rate, round(every_s * 1000), every_s)
    assert rate == pytest.approx(1000.0, rel=every_s / HORIZON_S)
    assert averaged(rate, 0, 3 * HORIZON_S) < 0.06 * rate
