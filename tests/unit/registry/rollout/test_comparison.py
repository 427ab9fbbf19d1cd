"""From pods' counters to observations: what counts, what does not, and when a slice ends."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_registry.rollout.comparison import NOTHING, Evidence, Seen, Slice, Traffic, Trial, observe

CANDIDATE, BASELINE = 8, 7
SLICE_MS = 30_000


def served(requests: int, acceptance_length: float = 2.0, latency_s: float = 0.02, errors: int = 0) -> Traffic:
    return Traffic(
        requests=requests,
        verify_steps=100 * requests,
        tokens=round(100 * requests * acceptance_length),
        latency_s=latency_s * 100 * requests,
        latency_tokens=100 * requests,
        errors=errors,
    )


def seen(
    pod: str, candidate: Traffic = NOTHING, baseline: Traffic = NOTHING, *, boot: str = "1", version: int = CANDIDATE
) -> Seen:
    return Seen(pod=pod, boot=boot, version=version, traffic={CANDIDATE: candidate, BASELINE: baseline})


def look(evidence: Evidence, pods: Sequence[Seen], now_s: float, *, told: Collection[str] = ()) -> Evidence:
    return observe(
        evidence,
        pods,
        Trial(candidate=CANDIDATE, baseline=BASELINE, told=told),
        slice_ms=SLICE_MS,
        now_ms=round(1000 * now_s),
    )


def begun(*pods: Seen) -> Evidence:
    """Evidence that has met these pods at time 0."""
    return look(Evidence.begin(0), pods, 0)


def test_a_slice_of_both_versions_becomes_one_observation() -> None:
    evidence = begun(seen("a"), seen("b"))
    evidence = look(evidence, [seen("a", served(10, 2.2, 0.03)), seen("b", NOTHING, served(40))], 30)
    assert evidence.slices == 1
    assert evidence.candidate_requests == 10
    assert evidence.acceptance.change.mean == pytest.approx(0.0953, abs=1e-3)  # log 1.1
    assert evidence.latency.change.mean == pytest.approx(0.405, abs=1e-3)  # log 1.5
    assert evidence.open == Slice(since_ms=30_000)


def test_what_a_pod_served_before_it_was_met_does_not_count() -> None:
    evidence = begun(seen("a", served(500), served(500)))
    evidence = look(evidence, [seen("a", served(501), served(501)), seen("new", served(300))], 1)
    assert evidence.open.candidate.requests == 1


def test_a_slice_stays_open_until_it_has_lasted_and_both_served_enough() -> None:
    evidence = begun(seen("a"))
    early = look(evidence, [seen("a", served(50), served(50))], 29.9)
    assert early.slices == 0
    few = look(evidence, [seen("a", served(7), served(50))], 31)
    assert few.slices == 0
    assert look(few, [seen("a", served(8), served(50))], 32).slices == 1


def test_a_slice_in_which_a_version_was_silent_begins_again() -> None:
    evidence = look(begun(seen("a")), [seen("a", NOTHING, served(50))], 30)
    assert evidence.slices == 0
    assert evidence.open == Slice(since_ms=30_000)


def test_looking_twice_at_the_same_reports_adds_nothing() -> None:
    pods = [seen("a", served(5), served(6))]
    once = look(begun(seen("a")), pods, 1)
    assert look(once, pods, 1) == once
    assert look(once, [seen("a", served(5), served(6))], 1) == once


def test_a_crash_is_a_failure_of_the_version_that_the_pod_held() -> None:
    evidence = begun(seen("a"), seen("b", version=BASELINE))
    evidence = look(evidence, [seen("a", boot="2"), seen("b", boot="2", version=BASELINE)], 1)
    assert (evidence.failures, evidence.baseline_failures, evidence.crashes) == (1, 1, {"a": 1})
    evidence = look(evidence, [seen("a", boot="2"), seen("b", boot="3")], 2)
    assert (evidence.failures, evidence.baseline_failures, evidence.crashes) == (1, 2, {"a": 1})


def test_a_crash_of_a_pod_that_was_told_the_candidate_is_its_failure_whatever_the_pod_reported_last() -> None:
    evidence = begun(seen("a", version=BASELINE), seen("b", version=0), seen("c", version=BASELINE))
    again = [seen(pod, version=BASELINE, boot="2") for pod in "abc"]
    evidence = look(evidence, again, 1, told=("a", "b"))
    assert (evidence.failures, evidence.baseline_failures, evidence.crashes) == (2, 1, {"a": 1, "b": 1})


def test_a_pod_that_drained_did_not_crash() -> None:
    evidence = begun(replace(seen("a"), is_draining=True))
    assert look(evidence, [seen("a", boot="2")], 1, told=["a"]).failures == 0


def test_a_pod_that_stays_away_before_it_comes_back_has_crashed_all_the_same() -> None:
    evidence = look(begun(seen("a")), [], 100)
    assert look(evidence, [seen("a", boot="2")], 200).failures == 1


def test_a_pod_that_is_gone_for_good_is_forgotten() -> None:
    evidence = look(begun(seen("a"), seen("b")), [seen("b")], 100)
    assert set(look(evidence, [seen("b")], 699).marks) == {"a", "b"}
    assert evidence.may_return("a")
    evidence = look(evidence, [seen("b")], 700)
    assert (set(evidence.marks), evidence.away) == ({"b"}, {})
    assert not evidence.may_return("a")


def test_a_pod_that_drained_and_went_does_not_come_back() -> None:
    evidence = look(begun(replace(seen("a"), is_draining=True)), [], 10)
    assert not evidence.may_return("a")


def test_what_a_pod_served_while_it_was_away_does_not_count() -> None:
    evidence = look(begun(seen("a")), [], 10)
    evidence = look(evidence, [seen("a", served(400), served(400))], 20)
    assert evidence.open.candidate.requests == 0
    assert look(evidence, [seen("a", served(401), served(400))], 21).open.candidate.requests == 1


def test_a_new_life_of_a_pod_counts_from_its_second_report_on() -> None:
    evidence = begun(seen("a", served(5), served(5)))
    evidence = look(evidence, [seen("a", served(3), served(3), boot="2")], 1)
    assert evidence.open.candidate == NOTHING
    assert look(evidence, [seen("a", served(4), served(3), boot="2")], 2).open.candidate == served(1)


def test_errors_are_failures_of_the_version_they_came_from() -> None:
    evidence = look(begun(seen("a")), [seen("a", served(1, errors=2), served(1, errors=9))], 1)
    assert (evidence.failures, evidence.baseline_failures) == (2, 9)


def test_counters_that_fall_within_one_life_are_left_out() -> None:
    evidence = look(begun(seen("a", served(50))), [seen("a", served(20))], 1)
    assert evidence.open.candidate == NOTHING
    assert evidence.failures == 0


def test_a_clock_that_steps_back_only_makes_the_slice_longer() -> None:
    evidence = look(Evidence.begin(100_000), [seen("a")], 100)
    evidence = look(evidence, [seen("a", served(9), served(9))], 10)
    assert evidence.slices == 0
    assert look(evidence, [seen("a", served(9), served(9))], 40).slices == 1


def test_a_shift_of_the_traffic_while_the_share_grows_is_no_change() -> None:
    """Sums over all traffic would tell 1.68 against 1.90 here."""
    evidence = begun(seen("a"), seen("b"))
    evidence = look(evidence, [seen("a", served(10, 2.0)), seen("b", NOTHING, served(90, 2.0))], 30)
    after = [seen("a", served(10) + served(50, 1.6)), seen("b", NOTHING, served(90) + served(30, 1.6))]
    evidence = look(evidence, after, 60)
    assert evidence.slices == 2
    assert evidence.acceptance.change.mean == pytest.approx(0.0)


def test_an_engine_that_reports_no_latency_still_gives_acceptance() -> None:
    evidence = look(begun(seen("a")), [seen("a", served(9, latency_s=0.0), served(9))], 30)
    assert evidence.acceptance.change.count == 1
    assert evidence.latency.change.count == 0


def test_a_restart_keeps_the_closed_slices_and_opens_one_anew() -> None:
    before = look(begun(seen("a")), [seen("a", served(9, 2.5), served(9))], 30)
    before = look(before, [seen("a", served(11, 2.5), served(11))], 40)
    before = look(before, [seen("a", boot="2")], 41)
    assert before.crashes == {"a": 1}
    after = Evidence.from_json(before.to_json())
    assert after == replace(before, open=Slice(since_ms=0), marks={})
    after = look(after, [seen("a", served(80), served(80))], 55)
    assert after.open == Slice(since_ms=55_000)


def test_what_is_written_is_the_same_until_a_slice_ends_or_something_fails() -> None:
    evidence = begun(seen("a"))
    open_still = look(evidence, [seen("a", served(3), served(4))], 5)
    assert open_still.to_json() == evidence.to_json()
    assert look(open_still, [seen("a", boot="2")], 6).to_json() != evidence.to_json()


growths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(1.0, 4.0)), min_size=2, max_size=12)


def reports(growth: list[tuple[int, int, float]]) -> list[Seen]:
    candidate = baseline = NOTHING
    result = [seen("a")]
    for candidate_requests, baseline_requests, length in growth:
        candidate += served(candidate_requests, length)
        baseline += served(baseline_requests, length)
        result.append(seen("a", candidate, baseline))
    return result


@given(growth=growths, kept=st.sets(st.integers(1, 11)))
def test_lost_reports_cost_nothing(growth: list[tuple[int, int, float]], kept: set[int]) -> None:
    told = reports(growth)
    every = few = begun(told[0])
    for second, report in enumerate(told):
        every = look(every, [report], second)
        if second in kept or second == len(told) - 1:
            few = look(few, [report], second)
    assert few.open.candidate.requests == every.open.candidate.requests
    assert few.open.baseline.tokens == every.open.baseline.tokens
    assert look(few, [told[-1]], 40).slices == look(every, [told[-1]], 40).slices


@given(growth=growths)
def test_exchanging_the_versions_turns_the_change_around(growth: list[tuple[int, int, float]]) -> None:
    told = reports(growth)
    one = begun(told[0])
    turned = Trial(candidate=BASELINE, baseline=CANDIDATE)
    other = observe(one, [], turned, slice_ms=SLICE_MS, now_ms=0)
    other = replace(other, away={})
    one = look(one, [told[-1]], 30)
    other = observe(other, [told[-1]], turned, slice_ms=SLICE_MS, now_ms=30_000)
    assert one.slices == other.slices
    assert one.acceptance.change.mean == pytest.approx(-other.acceptance.change.mean)
