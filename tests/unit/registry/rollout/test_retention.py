"""Whose weights are kept."""

from dataclasses import replace

from tests.support.versions import version

from updraft_registry.rollout.retention import evictable, versions_to_keep
from updraft_registry.rollout.version import DesiredState, Speculator, Version
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase


def speculator(*versions: Version, limit: int = 1, pinned: int | None = None) -> Speculator:
    return Speculator(
        name="default",
        desired=DesiredState(policy=RolloutPolicy(revision_history_limit=limit), pinned=pinned),
        versions=versions,
    )


def sized(limit: int, megabytes: int, *versions: Version) -> Speculator:
    """Versions of 10 MB each."""
    policy = RolloutPolicy(revision_history_limit=limit, revision_history_megabytes=megabytes)
    versions = tuple(replace(version, size_bytes=10_000_000) for version in versions)
    return Speculator(name="default", desired=DesiredState(policy=policy), versions=versions)


def superseded(*numbers: int) -> list[Version]:
    return [version(number, Phase.SUPERSEDED, proven_ms=0) for number in numbers]


def test_the_stable_version_and_the_one_before_it_stay_however_old_they_are() -> None:
    old = version(1, Phase.SUPERSEDED)
    kept = versions_to_keep(speculator(old, version(2, Phase.STABLE), *superseded(3, 4, 5)), ())
    assert kept >= {1, 2}
    assert 3 not in kept


def test_the_newest_stay_up_to_the_limit() -> None:
    assert versions_to_keep(speculator(*superseded(1, 2, 3, 4), limit=2), ()) - {0} == {3, 4}


def test_what_was_condemned_goes_and_takes_no_place_in_the_history() -> None:
    versions = [*superseded(1, 2), version(3, Phase.REJECTED), version(4, Phase.FAILED)]
    assert versions_to_keep(speculator(*versions, limit=2), ()) - {0} == {1, 2}


def test_what_is_pinned_retained_waiting_or_held_by_a_pod_stays() -> None:
    versions = [
        *superseded(1, 2),
        version(3, Phase.SUPERSEDED, proven_ms=0, is_retained=True),
        version(4, Phase.HELD),
        version(5, Phase.REJECTED),
        *superseded(6, 7),
    ]
    assert versions_to_keep(speculator(*versions, pinned=1), {5}) - {0} == {1, 3, 4, 5, 7}


def test_candidate_and_baseline_of_a_canary_stay() -> None:
    versions = [version(1, Phase.STABLE), version(2, Phase.CANARY), *superseded(3, 4, 5)]
    assert versions_to_keep(speculator(*versions), ()) >= {1, 2}


def test_the_newest_stay_as_far_as_their_bytes_fit_with_those_that_are_needed() -> None:
    versions = [*superseded(1, 2, 3, 4), version(5, Phase.STABLE)]
    assert versions_to_keep(sized(4, 30, *versions), ()) - {0} == {3, 4, 5}
    assert versions_to_keep(sized(4, 39, *versions), ()) - {0} == {3, 4, 5}
    assert versions_to_keep(sized(4, 0, *versions), ()) - {0} == {2, 3, 4, 5}


def test_needed_versions_stay_beyond_the_bytes() -> None:
    versions = [version(1, Phase.SUPERSEDED), *superseded(2, 3), version(4, Phase.STABLE)]
    assert versions_to_keep(sized(4, 1, *versions), {2}) - {0} == {1, 2, 4}


def test_a_full_volume_may_lose_the_history_and_nothing_that_is_needed() -> None:
    versions = [*superseded(1, 2), version(3, Phase.HELD), version(4, Phase.SUPERSEDED), version(5, Phase.STABLE)]
    assert [version.number for version in evictable(sized(9, 0, *versions), {2})] == [1]
