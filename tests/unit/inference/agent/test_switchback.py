import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft.fleet.v1 import fleet_pb2
from updraft_inference.agent.switchback import MIN_SLICE_S, Slice, current

A, B = 7, 9
START_S = 1_700_000_000


def plan(slice_seconds: int = 20) -> fleet_pb2.Switchback:
    return fleet_pb2.Switchback(version_a=A, version_b=B, slice_seconds=slice_seconds, start_unix_ms=1000 * START_S)


@pytest.mark.parametrize(
    ("since_s", "version", "left_s"),
    [
        pytest.param(0.0, A, 20.0, id="at the start"),
        pytest.param(19.999, A, 0.001, id="just before a change"),
        pytest.param(20.0, B, 20.0, id="at a change"),
        pytest.param(30.5, B, 9.5, id="in the second slice"),
        pytest.param(40.0, A, 20.0, id="back again"),
        pytest.param(20.0 * 1001 + 5, B, 15.0, id="long after"),
        pytest.param(-1.0, B, 1.0, id="on a clock that is behind"),
    ],
)
def test_slices_alternate_from_the_start(since_s: float, version: int, left_s: float) -> None:
    now = current(plan(), START_S + since_s)

    assert now.version == version
    assert now.left_s == pytest.approx(left_s)


@pytest.mark.parametrize("slice_seconds", [0, 1, 2])
def test_no_plan_makes_a_pod_swap_all_the_time(slice_seconds: int) -> None:
    assert current(plan(slice_seconds), START_S) == Slice(version=A, left_s=float(MIN_SLICE_S))


times = st.floats(-1e6, 1e9).map(lambda since_s: START_S + since_s)


@given(times, st.integers(0, 2**32 - 1))
def test_the_version_stays_to_the_end_of_its_slice_and_is_then_the_other(now_s: float, slice_seconds: int) -> None:
    now = current(plan(slice_seconds), now_s)

    assert 0 < now.left_s <= max(MIN_SLICE_S, slice_seconds)
    # Milliseconds: a float of seconds since 1970 is exact to a fraction of a microsecond.
    assert current(plan(slice_seconds), now_s + now.left_s - 0.0015).version in (now.version, A + B - now.version)
    then = current(plan(slice_seconds), now_s + now.left_s + 0.0015)
    assert then.version == A + B - now.version


@given(times)
def test_a_plan_replayed_is_the_same_plan(now_s: float) -> None:
    assert current(plan(), now_s) == current(plan(), now_s)
    assert current(plan(), now_s).version == current(plan(), now_s + 40).version
