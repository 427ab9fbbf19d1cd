"""What pods say together: one of them that lies changes little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_registry.rollout.traffic import NOTHING, Both, Traffic, together

lengths = st.floats(1.0, 5.0)
counts = st.integers(100, 10_000)


def served(length: float, steps: int = 1000, latency_s: float = 0.02) -> Traffic:
    tokens = round(steps * length)
    return Traffic(
        requests=steps // 10,
        verify_steps=steps,
        tokens=tokens,
        latency_s=latency_s * tokens,
        latency_tokens=tokens,
    )


def candidates(*served_by: Traffic) -> list[Both]:
    """Pods with the candidate, and as many with the baseline, whose acceptance length is 2."""
    return [
        *(Both(candidate=traffic) for traffic in served_by),
        *(Both(baseline=served(2.0)) for _ in served_by),
    ]


def change(both: Both) -> float:
    candidate, baseline = both.candidate.acceptance_length, both.baseline.acceptance_length
    assert candidate is not None
    assert baseline is not None
    return candidate / baseline


def test_a_single_pod_is_believed() -> None:
    both = Both(candidate=served(2.2, steps=50), baseline=served(2.0, steps=500, latency_s=0.03))
    assert together([both]) == both


@given(
    honest=st.lists(lengths, min_size=2, max_size=12),
    lie=st.floats(1.0, 65.0),
    steps=st.integers(1, 10**12),
    where=st.integers(0, 12),
)
def test_of_three_pods_and_more_a_liar_stays_within_what_the_honest_ones_say(
    honest: list[float], lie: float, steps: int, where: int
) -> None:
    said = [served(length) for length in honest]
    said.insert(where, served(lie, steps=steps))

    told = together(candidates(*said)).candidate.acceptance_length

    assert told is not None
    assert min(honest) - 0.01 <= told <= max(honest) + 0.01


@given(honest=lengths, lie=st.floats(1.0, 65.0), steps=st.integers(1, 10**12))
def test_of_two_pods_a_liar_makes_no_change_larger_and_turns_none_around(honest: float, lie: float, steps: int) -> None:
    told = change(together(candidates(served(honest), served(lie, steps=steps))))
    low, high = sorted((1.0, honest / 2.0))
    assert low - 0.01 <= told <= high + 0.01


@given(honest=lengths, lie=st.floats(1.0, 65.0))
def test_of_two_pods_that_serve_both_versions_each_is_compared_with_itself(honest: float, lie: float) -> None:
    """Their traffic may be as different as it likes."""
    pods = [
        Both(candidate=served(honest), baseline=served(2.0)),
        Both(candidate=served(lie), baseline=served(4.0)),
    ]
    told = change(together(pods, is_paired=True))
    low, high = sorted((1.0, honest / 2.0))
    assert low - 0.01 <= told <= high + 0.01


def test_pods_that_serve_both_versions_and_agree_show_the_whole_change() -> None:
    pods = [Both(candidate=served(1.1 * base), baseline=served(base)) for base in (2.0, 3.0, 4.0, 5.0)]
    for some in (pods[:2], pods[:3], pods):
        assert change(together(some, is_paired=True)) == pytest.approx(1.1, abs=0.01)


@given(st.lists(st.tuples(lengths, counts), min_size=3, max_size=12))
def test_without_a_baseline_the_candidate_is_what_most_pods_say(said: list[tuple[float, int]]) -> None:
    both = together([Both(candidate=served(length, steps)) for length, steps in said])
    inner = sorted(length for length, _ in said)[1:-1]
    assert both.baseline == NOTHING
    assert both.candidate.acceptance_length is not None
    assert inner[0] - 0.02 <= both.candidate.acceptance_length <= inner[-1] + 0.02


@given(latency_s=st.floats(1e-6, 100.0))
def test_a_pod_that_claims_another_latency_is_left_out(latency_s: float) -> None:
    said = [*(served(2.0, latency_s=0.02) for _ in range(3)), served(2.0, latency_s=latency_s)]
    both = together(candidates(*said))
    assert both.candidate.inter_token_latency_s == pytest.approx(0.02)


def test_claimed_requests_count_for_no_more_than_twice_those_of_the_median_pod() -> None:
    said = [served(2.0), served(2.0), served(2.0, steps=10**9)]
    assert together(candidates(*said)).candidate.requests == 400


def test_pods_without_traffic_say_nothing() -> None:
    one = Both(candidate=served(2.2), baseline=served(2.0))
    assert together([Both(), one, Both(), Both()]) == one
    assert together([]) == Both()
