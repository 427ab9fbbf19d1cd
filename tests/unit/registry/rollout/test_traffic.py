"""Several pods together: one of them that lies changes little."""

import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_registry.rollout.traffic import NOTHING, Both, Traffic, alone, together

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
    change = known_change(both)
    assert change is not None
    return change


def known_change(both: Both) -> float | None:
    """The change of acceptance; None if the pods contradict each other."""
    candidate, baseline = both.candidate.acceptance_length, both.baseline.acceptance_length
    return None if candidate is None or baseline is None else candidate / baseline


def stays_within(told: float | None, honest: float) -> bool:
    """Unknown, or between no change and what the honest pod of two says."""
    low, high = sorted((1.0, honest / 2.0))
    return told is None or low - 0.01 <= told <= high + 0.01


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
    assert stays_within(known_change(together(candidates(served(honest), served(lie, steps=steps)))), honest)


@given(honest=lengths, lie=st.floats(1.0, 65.0))
def test_of_two_pods_that_serve_both_versions_each_is_compared_with_itself(honest: float, lie: float) -> None:
    """Their traffic may be as different as it likes."""
    pods = [
        Both(candidate=served(honest), baseline=served(2.0)),
        Both(candidate=served(lie), baseline=served(4.0)),
    ]
    assert stays_within(known_change(together(pods, is_paired=True)), honest)


def test_what_two_pods_contradict_each_other_about_is_unknown_and_the_rest_is_not() -> None:
    said = [served(1.8, latency_s=0.03), served(2.2, latency_s=0.03)]
    both = together(candidates(*said))
    assert known_change(both) is None
    assert both.candidate.requests == 200
    assert both.candidate.inter_token_latency_s == pytest.approx(0.03)


def observed(num_candidates: int, *, change: float = 0.0, spread: float = 0.1, is_skewed: bool = False) -> list[float]:
    """Log changes in 4,000 slices of 16 pods, of which so many serve the candidate."""
    chance, found = random.Random(7), list[float | None]()
    for _ in range(4000):
        lengths = [
            3.0 * (1.0 + spread * ((chance.expovariate(1.0) - 1.0) if is_skewed else chance.gauss(0.0, 1.0)))
            for _ in range(16)
        ]
        candidate, baseline = lengths[:num_candidates], lengths[num_candidates:]
        pods = [*(Both(candidate=served(math.exp(change) * one)) for one in candidate)]
        found.append(known_change(together([*pods, *(Both(baseline=served(one)) for one in baseline)])))
    return [math.log(one) for one in found if one is not None]


@pytest.mark.parametrize("num_candidates", [3, 5, 8, 13])
def test_equal_drafts_look_equal_although_a_few_pods_differ_much_from_the_others(num_candidates: int) -> None:
    """Without regard to the sizes, the middle one of 3 is below the mean of 11 by 0.6 % here."""
    assert fmean(observed(num_candidates, is_skewed=True)) == pytest.approx(0.0, abs=0.003)


def test_two_pods_show_most_of_a_change_that_is_smaller_than_their_noise_and_never_more() -> None:
    assert -0.030 <= fmean(observed(2, change=-0.03, spread=0.05)) <= -0.024


def test_pods_that_serve_both_versions_and_agree_show_the_whole_change() -> None:
    pods = [Both(candidate=served(1.1 * base), baseline=served(base)) for base in (2.0, 3.0, 4.0, 5.0)]
    for some in (pods[:2], pods[:3], pods):
        assert change(together(some, is_paired=True)) == pytest.approx(1.1, abs=0.01)


@given(st.lists(st.tuples(lengths, counts), min_size=3, max_size=12))
def test_without_a_baseline_the_candidate_is_what_most_pods_say(said: list[tuple[float, int]]) -> None:
    told = alone([NOTHING, *(served(length, steps) for length, steps in said)]).acceptance_length
    inner = sorted(length for length, _ in said)[1:-1]
    assert told is not None
    assert inner[0] - 0.02 <= told <= inner[-1] + 0.02


def test_without_a_baseline_two_pods_are_as_good_as_the_worse_one() -> None:
    assert alone([served(2.4), served(1.8)]).acceptance_length == pytest.approx(1.8)


def test_where_only_one_version_served_its_pods_count_whole_until_the_other_serves() -> None:
    both = together([Both(candidate=served(1.5)), Both(candidate=served(2.5))])
    assert both.baseline == NOTHING
    assert both.candidate.acceptance_length == pytest.approx(2.0)


def test_few_steps_are_not_rounded() -> None:
    few = [
        *(Both(candidate=served(3.0, steps=1)) for _ in range(3)),
        *(Both(baseline=served(3.0, steps=1)) for _ in range(9)),
    ]
    assert change(together(few)) == pytest.approx(1.0)


def test_an_idle_pod_does_not_hide_the_requests_of_the_other_one() -> None:
    assert together(candidates(served(2.0, steps=10), served(2.0, steps=5000))).candidate.requests == 501


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
