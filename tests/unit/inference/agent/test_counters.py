from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.requests import ended, step

from updraft_inference.agent.counters import LATENCY_BOUNDS_S, MAX_VERSIONS, Tallies, folded, usage, with_errors
from updraft_inference.engine import CountedRequest, CountedSteps, Drafter, FinishReason, VerifyStep


def steps(*accepted: int, version: int = 1) -> list[VerifyStep]:
    """Steps of two drafts each, one behind the other."""
    starts = [1]
    for count in accepted:
        starts.append(starts[-1] + count + 1)
    return [step(start, count, version=version) for start, count in zip(starts, accepted, strict=False)]


def test_acceptance_length_is_tokens_a_verify_step() -> None:
    served = usage(ended(*steps(0, 2, 1)))

    assert served.acceptance_length == pytest.approx(2.0)
    assert (served.verify_steps, served.proposed, served.accepted) == (3, 6, 3)
    assert (served.drafter, served.draft_version) == (Drafter.EAGLE3, 1)


def test_a_request_without_a_step_has_no_acceptance_length() -> None:
    served = usage(ended())

    assert served.acceptance_length is None
    assert (served.drafter, served.draft_version) == (Drafter.NONE, 0)


def test_the_drafter_is_who_proposed_most_also_when_the_last_step_had_none() -> None:
    assert usage(ended(step(1, 1), step(3, 0, k=0))).drafter is Drafter.EAGLE3


def test_counts_are_kept_by_version_and_position() -> None:
    tallies = folded({}, ended(*steps(0, 2, 1), step(7, 0, version=2)))

    assert tallies[1].accepted_by_position == [2, 1]
    assert tallies[1].proposed_by_position == [3, 3]
    assert (tallies[1].verify_steps, tallies[1].tokens) == (3, 6)
    assert tallies[2].verify_steps == 1


def test_a_mixed_chain_is_evidence_about_no_version_and_one_that_the_model_made_alone_is() -> None:
    mixed = replace(step(3, 2, version=4), drafter=Drafter.HYBRID, looked_up=(1,))
    request = ended(step(1, 1, version=4), mixed)
    tallies = folded({}, request)

    assert (tallies[4].verify_steps, tallies[4].tokens) == (1, 2)
    assert tallies[4].accepted_by_position == [1]
    assert (tallies[0].verify_steps, tallies[0].tokens) == (1, 3)
    assert tallies[4].requests_served == 1
    assert usage(request).draft_version == 4


def test_tokens_that_a_limit_cut_off_are_not_counted() -> None:
    tallies = folded({}, ended(*steps(2, 2), num_output=5))

    assert tallies[1].tokens == 4


def test_a_request_is_served_by_every_version_that_had_a_step_of_it() -> None:
    tallies = folded({}, ended(step(1, 1, version=1), step(3, 1, version=2), step(5, 1, version=2)))
    tallies = folded(tallies, ended(*steps(1, 1, version=2)))

    assert {version: tally.requests_served for version, tally in tallies.items()} == {1: 1, 2: 2}


def test_faults_are_counted_for_the_version_that_drafted_also_before_a_request_of_it_ended() -> None:
    tallies = with_errors(folded({}, ended(*steps(1, version=1))), 1, 2)
    tallies = with_errors(tallies, 7, 1)

    assert {version: tally.errors for version, tally in tallies.items()} == {1: 2, 7: 1}
    assert tallies[1].tokens == 2


def test_latency_is_a_steps_time_shared_by_its_tokens() -> None:
    tally = folded({}, ended(step(1, 1, duration_s=0.02)))[1]

    assert tally.inter_token_latency.counts[LATENCY_BOUNDS_S.index(0.01)] == 2
    assert tally.inter_token_latency.sum == pytest.approx(0.02)


def test_a_step_whose_tokens_were_all_cut_has_no_latency() -> None:
    tally = folded({}, ended(step(1, 0, duration_s=0.02), num_output=1))[1]

    assert tally.verify_steps == 1
    assert (sum(tally.inter_token_latency.counts), tally.inter_token_latency.sum) == (0, 0.0)


def test_versions_not_served_for_long_are_forgotten() -> None:
    tallies = folded({}, ended(step(1, 0, version=1)))
    for version in range(2, MAX_VERSIONS + 1):
        tallies = folded(tallies, ended(step(1, 0, version=version)))

    tallies = folded(tallies, ended(step(1, 0, version=1)))
    tallies = folded(tallies, ended(step(1, 0, version=MAX_VERSIONS + 1)))

    assert set(tallies) == {1, *range(3, MAX_VERSIONS + 2)}


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6))
def test_the_wire_carries_consistent_and_growing_sums(requests: list[list[int]]) -> None:
    history: list[Tallies] = [{}]
    for accepted in requests:
        history.append(folded(history[-1], ended(*steps(*accepted))))

    for counters in history[-1].values():
        assert sum(counters.inter_token_latency.counts) == counters.tokens
        assert counters.proposed == sum(counters.proposed_by_position)
        assert len(counters.inter_token_latency.counts) == len(counters.inter_token_latency.bounds) + 1
        assert counters.tokens == counters.verify_steps + sum(counters.accepted_by_position)
    for before, after in pairwise(history):
        assert all(after[version].tokens >= tally.tokens for version, tally in before.items())


@given(st.lists(st.tuples(st.sampled_from([Drafter.EAGLE3, Drafter.NGRAM]), st.integers(1, 2), st.integers(0, 3))))
def test_sums_are_those_of_each_step_whatever_drafters_and_versions_follow_each_other(
    kinds: list[tuple[Drafter, int, int]],
) -> None:
    made = [
        replace(step(1, accepted, k=3, version=version, duration_s=0.5), drafter=drafter)
        for drafter, version, accepted in kinds
    ]
    sums = {(one.drafter, one.draft_version): one for one in ended(*made, num_output=3).sums}
    assert list(sums) == list(dict.fromkeys((one.drafter, one.draft_version) for one in made))
    for kind, found in sums.items():
        alike = [one for one in made if (one.drafter, one.draft_version) == kind]
        assert found.verify_steps == len(alike)
        assert found.tokens.tolist() == [min(one.emitted, 2) for one in alike]
        assert found.seconds.tolist() == [0.5] * len(alike)
        assert found.proposed == (len(alike),) * 3
        assert list(found.accepted) == [n for p in range(3) if (n := sum(one.accepted > p for one in alike))]


def test_tokens_of_steps_whose_time_is_not_known_have_no_latency() -> None:
    sums = CountedSteps(draft_version=3, verify_steps=2, proposed=(2,), accepted=(2,), tokens=4, duration_s=0.0)
    timed = replace(sums, duration_s=0.08)
    counted = CountedRequest(reason=FinishReason.STOP, num_prompt=2, num_output=5, sums=(sums, timed), duration_s=1.0)

    tally = folded({}, counted)[3]

    assert (tally.verify_steps, tally.tokens) == (4, 8)
    latency = tally.inter_token_latency
    assert (sum(latency.counts), latency.counts[LATENCY_BOUNDS_S.index(0.02)], latency.sum) == (4, 4, 0.08)


def test_a_request_that_is_only_counted_counts_each_draft_for_itself() -> None:
    sums = (
        CountedSteps(draft_version=3, verify_steps=2, proposed=(2, 2), accepted=(2, 1), tokens=5, duration_s=0.5),
        CountedSteps(draft_version=4, verify_steps=1, proposed=(1, 1), accepted=(0, 0), tokens=1, duration_s=0.1),
    )
    counted = CountedRequest(reason=FinishReason.STOP, num_prompt=2, num_output=7, sums=sums, duration_s=1.0)

    tallies = folded({}, counted, domain="sql", domains={"sql"})

    assert [(one.version, one.verify_steps, one.tokens, one.proposed) for one in tallies.values()] == [
        (3, 2, 5, 4),
        (4, 1, 1, 2),
    ]
    assert [one.requests_served for one in tallies.values()] == [1, 1]
    assert tallies[3].inter_token_latency.sum == 0.5
    assert [entry.domain for entry in tallies[3].domains] == ["sql"]
    used = usage(counted)
    assert (used.draft_version, used.verify_steps, used.proposed, used.accepted) == (4, 3, 6, 3)
