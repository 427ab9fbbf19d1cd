"""From pods' counters to observations: what counts, what does not, and when a slice ends."""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_registry.rollout.comparison import MAX_DOMAINS, OTHER, Evidence, PodTraffic, Slice, Trial, add_reports
from updraft_registry.rollout.traffic import NOTHING, Traffic

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


def pod_traffic(
    name: str, candidate: Traffic = NOTHING, baseline: Traffic = NOTHING, *, boot: str = "1", version: int = CANDIDATE
) -> PodTraffic:
    return PodTraffic(pod=name, boot=boot, version=version, traffic={CANDIDATE: candidate, BASELINE: baseline})


def report(evidence: Evidence, pods: Sequence[PodTraffic], now_s: float, *, directed: Collection[str] = ()) -> Evidence:
    return add_reports(
        evidence,
        pods,
        Trial(candidate=CANDIDATE, baseline=BASELINE, directed=directed),
        slice_ms=SLICE_MS,
        now_ms=round(1000 * now_s),
    )


def begun(*pods: PodTraffic) -> Evidence:
    """Evidence that has met these pods at time 0."""
    return report(Evidence.begin(0), pods, 0)


def test_a_slice_of_both_versions_becomes_one_observation() -> None:
    evidence = begun(pod_traffic("a"), pod_traffic("b"))
    evidence = report(evidence, [pod_traffic("a", served(10, 2.2, 0.03)), pod_traffic("b", NOTHING, served(40))], 30)
    assert evidence.slices == 1
    assert evidence.candidate_requests == 10
    assert evidence.acceptance.change.mean == pytest.approx(0.0953, abs=1e-3)  # log 1.1
    assert evidence.latency.change.mean == pytest.approx(0.405, abs=1e-3)  # log 1.5
    assert evidence.open == Slice(since_ms=30_000)


def test_what_a_pod_served_before_it_was_met_does_not_count() -> None:
    evidence = begun(pod_traffic("a", served(500), served(500)))
    evidence = report(evidence, [pod_traffic("a", served(501), served(501)), pod_traffic("new", served(300))], 1)
    assert evidence.open.both.candidate.requests == 1


def test_a_slice_stays_open_until_it_has_lasted_and_both_served_enough() -> None:
    evidence = begun(pod_traffic("a"))
    early = report(evidence, [pod_traffic("a", served(50), served(50))], 29.9)
    assert early.slices == 0
    few = report(evidence, [pod_traffic("a", served(7), served(50))], 31)
    assert few.slices == 0
    assert report(few, [pod_traffic("a", served(8), served(50))], 32).slices == 1


def test_a_slice_in_which_a_version_was_silent_begins_again() -> None:
    evidence = report(begun(pod_traffic("a")), [pod_traffic("a", NOTHING, served(50))], 30)
    assert evidence.slices == 0
    assert evidence.open == Slice(since_ms=30_000)


def test_looking_twice_at_the_same_reports_adds_nothing() -> None:
    pods = [pod_traffic("a", served(5), served(6))]
    once = report(begun(pod_traffic("a")), pods, 1)
    assert report(once, pods, 1) == once
    assert report(once, [pod_traffic("a", served(5), served(6))], 1) == once


def test_a_crash_is_a_failure_of_the_version_that_the_pod_held() -> None:
    evidence = begun(pod_traffic("a"), pod_traffic("b", version=BASELINE))
    evidence = report(evidence, [pod_traffic("a", boot="2"), pod_traffic("b", boot="2", version=BASELINE)], 1)
    assert (evidence.failures, evidence.baseline_failures, evidence.crashes) == (1, 1, {"a": 1})
    evidence = report(evidence, [pod_traffic("a", boot="2"), pod_traffic("b", boot="3")], 2)
    assert (evidence.failures, evidence.baseline_failures, evidence.crashes) == (1, 2, {"a": 1})


def test_a_crash_of_a_pod_that_was_told_the_candidate_is_its_failure_whatever_the_pod_reported_last() -> None:
    evidence = begun(
        pod_traffic("a", version=BASELINE), pod_traffic("b", version=0), pod_traffic("c", version=BASELINE)
    )
    again = [pod_traffic(pod, version=BASELINE, boot="2") for pod in "abc"]
    evidence = report(evidence, again, 1, directed=("a", "b"))
    assert (evidence.failures, evidence.baseline_failures, evidence.crashes) == (2, 1, {"a": 1, "b": 1})


def test_a_pod_that_drained_did_not_crash() -> None:
    evidence = begun(replace(pod_traffic("a"), is_draining=True))
    assert report(evidence, [pod_traffic("a", boot="2")], 1, directed=["a"]).failures == 0


def test_a_pod_that_stays_away_before_it_comes_back_has_crashed_all_the_same() -> None:
    evidence = report(begun(pod_traffic("a")), [], 100)
    assert report(evidence, [pod_traffic("a", boot="2")], 200).failures == 1


def test_a_pod_that_is_gone_for_good_is_forgotten() -> None:
    evidence = report(begun(pod_traffic("a"), pod_traffic("b")), [pod_traffic("b")], 100)
    assert set(report(evidence, [pod_traffic("b")], 699).last_reports) == {"a", "b"}
    assert evidence.may_return("a")
    evidence = report(evidence, [pod_traffic("b")], 700)
    assert (set(evidence.last_reports), evidence.away) == ({"b"}, {})
    assert not evidence.may_return("a")


def test_a_pod_that_drained_and_went_does_not_come_back() -> None:
    evidence = report(begun(replace(pod_traffic("a"), is_draining=True)), [], 10)
    assert not evidence.may_return("a")


def test_what_a_pod_served_while_it_was_away_does_not_count() -> None:
    evidence = report(begun(pod_traffic("a")), [], 10)
    evidence = report(evidence, [pod_traffic("a", served(400), served(400))], 20)
    assert evidence.open.both.candidate.requests == 0
    assert report(evidence, [pod_traffic("a", served(401), served(400))], 21).open.both.candidate.requests == 1


def test_a_new_life_of_a_pod_counts_from_its_second_report_on() -> None:
    evidence = begun(pod_traffic("a", served(5), served(5)))
    evidence = report(evidence, [pod_traffic("a", served(3), served(3), boot="2")], 1)
    assert evidence.open.both.candidate == NOTHING
    assert report(evidence, [pod_traffic("a", served(4), served(3), boot="2")], 2).open.both.candidate == served(1)


def test_errors_are_failures_of_the_version_they_came_from() -> None:
    evidence = report(begun(pod_traffic("a")), [pod_traffic("a", served(1, errors=2), served(1, errors=9))], 1)
    assert (evidence.failures, evidence.baseline_failures) == (2, 9)


def test_counters_that_fall_within_one_life_are_left_out() -> None:
    evidence = report(begun(pod_traffic("a", served(50))), [pod_traffic("a", served(20))], 1)
    assert evidence.open.both.candidate == NOTHING
    assert evidence.failures == 0


def test_of_several_pods_none_fails_a_candidate_alone_and_two_do() -> None:
    trial = Trial(candidate=CANDIDATE, baseline=BASELINE, canary=["a", "b"], failure_limit=2)

    def failures(a: int, b: int, trial: Trial) -> int:
        sent = [pod_traffic("a", served(1, errors=a)), pod_traffic("b", served(1, errors=b))]
        evidence = begun(pod_traffic("a"), pod_traffic("b"))
        return add_reports(evidence, sent, trial, slice_ms=SLICE_MS, now_ms=1000).failures

    assert [failures(a, b, trial) for a, b in ((1000, 0), (0, 3), (1000, 1))] == [2, 2, 3]
    assert failures(1000, 0, replace(trial, canary=["a"])) == 1000, "a single pod is believed"


def test_a_clock_that_steps_back_only_makes_the_slice_longer() -> None:
    evidence = report(Evidence.begin(100_000), [pod_traffic("a")], 100)
    evidence = report(evidence, [pod_traffic("a", served(9), served(9))], 10)
    assert evidence.slices == 0
    assert report(evidence, [pod_traffic("a", served(9), served(9))], 40).slices == 1


def test_a_shift_of_the_traffic_while_the_share_grows_is_no_change() -> None:
    """Sums over all traffic would tell 1.68 against 1.90 here."""
    evidence = begun(pod_traffic("a"), pod_traffic("b"))
    evidence = report(evidence, [pod_traffic("a", served(10, 2.0)), pod_traffic("b", NOTHING, served(90, 2.0))], 30)
    after = [pod_traffic("a", served(10) + served(50, 1.6)), pod_traffic("b", NOTHING, served(90) + served(30, 1.6))]
    evidence = report(evidence, after, 60)
    assert evidence.slices == 2
    assert evidence.acceptance.change.mean == pytest.approx(0.0)


def test_an_engine_that_reports_no_latency_still_gives_acceptance() -> None:
    evidence = report(begun(pod_traffic("a")), [pod_traffic("a", served(9, latency_s=0.0), served(9))], 30)
    assert evidence.acceptance.change.count == 1
    assert evidence.latency.change.count == 0


def test_a_restart_keeps_the_closed_slices_and_opens_one_anew() -> None:
    before = report(begun(pod_traffic("a")), [pod_traffic("a", served(9, 2.5), served(9))], 30)
    before = report(before, [pod_traffic("a", served(11, 2.5), served(11))], 40)
    before = report(before, [pod_traffic("a", boot="2")], 41)
    assert before.crashes == {"a": 1}
    after = Evidence.from_json(before.to_json())
    assert after == replace(before, open=Slice(since_ms=0), last_reports={})
    after = report(after, [pod_traffic("a", served(80), served(80))], 55)
    assert after.open == Slice(since_ms=55_000)


def test_evidence_of_a_newer_registry_is_restored_without_what_this_one_does_not_know() -> None:
    before = report(begun(pod_traffic("a")), [pod_traffic("a", served(9, 2.5), served(9))], 30)
    newer = json.dumps(json.loads(before.to_json()) | {"a_later_field": [1, 2]})
    assert Evidence.from_json(newer) == Evidence.from_json(before.to_json())


def test_what_is_written_is_the_same_until_a_slice_ends_or_something_fails() -> None:
    evidence = begun(pod_traffic("a"))
    open_still = report(evidence, [pod_traffic("a", served(3), served(4))], 5)
    assert open_still.to_json() == evidence.to_json()
    assert report(open_still, [pod_traffic("a", boot="2")], 6).to_json() != evidence.to_json()


growths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(1.0, 4.0)), min_size=2, max_size=12)


def reports(growth: list[tuple[int, int, float]]) -> list[PodTraffic]:
    candidate = baseline = NOTHING
    result = [pod_traffic("a")]
    for candidate_requests, baseline_requests, length in growth:
        candidate += served(candidate_requests, length)
        baseline += served(baseline_requests, length)
        result.append(pod_traffic("a", candidate, baseline))
    return result


@given(growth=growths, kept=st.sets(st.integers(1, 11)))
def test_lost_reports_cost_nothing(growth: list[tuple[int, int, float]], kept: set[int]) -> None:
    sent = reports(growth)
    every = few = begun(sent[0])
    for second, latest in enumerate(sent):
        every = report(every, [latest], second)
        if second in kept or second == len(sent) - 1:
            few = report(few, [latest], second)
    assert few.open.both.candidate.requests == every.open.both.candidate.requests
    assert few.open.both.baseline.tokens == every.open.both.baseline.tokens
    assert report(few, [sent[-1]], 40).slices == report(every, [sent[-1]], 40).slices


@given(growth=growths)
def test_exchanging_the_versions_turns_the_change_around(growth: list[tuple[int, int, float]]) -> None:
    sent = reports(growth)
    one = begun(sent[0])
    turned = Trial(candidate=BASELINE, baseline=CANDIDATE)
    other = add_reports(one, [], turned, slice_ms=SLICE_MS, now_ms=0)
    other = replace(other, away={})
    one = report(one, [sent[-1]], 30)
    other = add_reports(other, [sent[-1]], turned, slice_ms=SLICE_MS, now_ms=30_000)
    assert one.slices == other.slices
    assert one.acceptance.change.mean == pytest.approx(-other.acceptance.change.mean)


def by_domain(name: str, domains: dict[str, tuple[Traffic, Traffic]]) -> PodTraffic:
    """A pod whose traffic is that of these domains, of candidate and baseline."""
    candidate = sum((both[0] for both in domains.values()), NOTHING)
    baseline = sum((both[1] for both in domains.values()), NOTHING)
    return replace(
        pod_traffic(name, candidate, baseline),
        domains={
            CANDIDATE: {domain: both[0] for domain, both in domains.items()},
            BASELINE: {domain: both[1] for domain, both in domains.items()},
        },
    )


def test_each_domain_of_a_slice_becomes_an_observation_of_its_own() -> None:
    evidence = begun(pod_traffic("a"), pod_traffic("b"))
    pods = [
        by_domain("a", {"sql": (served(10, 1.8), served(10)), "chat": (served(10, 2.2), served(10))}),
        by_domain("b", {"sql": (served(10, 1.8), served(10))}),
    ]
    evidence = report(evidence, pods, 30)
    changes = {name: domain.acceptance.change for name, domain in evidence.domains.items()}
    assert {name: (change.count, round(change.mean, 3)) for name, change in changes.items()} == {
        "sql": (1, -0.105),  # log 0.9
        "chat": (1, 0.095),  # log 1.1
    }


def test_a_domain_with_few_requests_waits_for_more_over_several_slices() -> None:
    evidence = begun(pod_traffic("a"))
    for slices in (1, 2, 3):
        pod = by_domain(
            "a", {"rare": (served(3 * slices), served(5 * slices)), "chat": (served(20 * slices), served(20 * slices))}
        )
        evidence = report(evidence, [pod], 30 * slices)
        assert evidence.domains["rare"].acceptance.change.count == (slices == 3)
    assert evidence.domains["chat"].acceptance.change.count == 3
    assert evidence.domains["rare"].requests == 24


def test_a_domain_whose_counters_began_again_in_the_pod_counts_from_its_next_report() -> None:
    evidence = begun(by_domain("a", {"sql": (served(100), served(100))}))
    evidence = report(evidence, [by_domain("a", {"sql": (served(9), served(9))})], 10)
    assert evidence.open.pods["a"].domains["sql"].candidate == NOTHING
    evidence = report(evidence, [by_domain("a", {"sql": (served(12), served(12))})], 20)
    assert evidence.open.pods["a"].domains["sql"].candidate == served(3)


def test_of_many_domains_the_largest_are_compared_and_the_rest_of_a_pods_traffic_is_not_one() -> None:
    domains = {f"d{n}": (served(8 + n), served(8 + n)) for n in range(MAX_DOMAINS + 8)}
    evidence = report(begun(pod_traffic("a")), [by_domain("a", domains | {OTHER: (served(999), served(999))})], 30)
    assert set(evidence.domains) == {f"d{n}" for n in range(8, MAX_DOMAINS + 8)}


def test_the_evidence_of_domains_survives_a_restart() -> None:
    evidence = begun(pod_traffic("a"))
    pod = by_domain("a", {"sql": (served(10), served(10)), "rare": (served(1), served(1))})
    before = report(evidence, [pod], 30)
    assert Evidence.from_json(before.to_json()).domains == before.domains


def test_without_a_baseline_a_candidate_is_compared_with_one_token_per_step() -> None:
    trial = Trial(candidate=CANDIDATE, baseline=0)
    evidence = add_reports(Evidence.begin(0), [pod_traffic("a")], trial, slice_ms=SLICE_MS, now_ms=0)
    few = add_reports(evidence, [pod_traffic("a", served(7, 1.5))], trial, slice_ms=SLICE_MS, now_ms=SLICE_MS)
    assert few.slices == 0
    some = add_reports(few, [pod_traffic("a", served(10, 1.5))], trial, slice_ms=SLICE_MS, now_ms=SLICE_MS)
    assert (some.slices, some.candidate_requests, some.latency.change.count) == (1, 10, 0)
    assert some.acceptance.change.mean == pytest.approx(0.405, abs=1e-3)  # log 1.5
