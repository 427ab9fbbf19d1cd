"""What a person may decide about a speculator, and what it comes to."""

from typing import Any

import pytest
from tests.support import speculator_objects as objects

from updraft_chassis.errors import Conflict, NotFound
from updraft_cli.backends.objects import Speculator, Version, speculator, version, writers
from updraft_cli.kubectl import decisions

VERSIONS = tuple(
    version(objects.version(number, phase, reason=reason))
    for number, phase, reason in (
        (1, "Superseded", "version 2 took over"),
        (2, "Stable", "it won"),
        (3, "RolledBack", "acceptance is down"),
        (4, "Canary", ""),
        (6, "Held", ""),
    )
)


def found(**fields: Any) -> Speculator:
    return speculator(objects.speculator(**fields))


def test_a_pin_says_what_follows_and_how_to_end_it() -> None:
    decision = decisions.pin(found(), VERSIONS, 1)
    assert (decision.field, decision.value, decision.is_change) == ("pinnedVersion", 1, True)
    assert decision.told == (
        "qwen is pinned to version 1. All pods load it now, without analysis and without a restart. Newer versions are"
        " held until `kubectl updraft unpin qwen -n team`."
    )


def test_a_pin_to_what_serves_moves_nothing() -> None:
    assert "It serves already, and stays." in decisions.pin(found(), VERSIONS, 2).told


def test_a_pin_to_no_draft_needs_no_version() -> None:
    decision = decisions.pin(found(), (), 0)
    assert decision.value == 0
    assert "pinned to no draft" in decision.told
    assert not decisions.pin(found(rollout={"pinnedVersion": 0}), (), 0).is_change


def test_a_pin_to_an_unknown_version_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(NotFound, match=r"qwen has no DraftVersion with the number 5; it has versions 1 to 4, 6"):
        decisions.pin(found(), VERSIONS, 5)
    with pytest.raises(NotFound, match="it has no version yet"):
        decisions.pin(found(), (version(objects.version(None, "Importing")),), 1)


@pytest.mark.parametrize("decide", [decisions.pin, decisions.promote])
def test_a_version_that_lost_is_never_served_again(decide: Any) -> None:
    with pytest.raises(
        Conflict, match="version 3 of qwen is rolled back and is never served again: acceptance is down"
    ):
        decide(found(), VERSIONS, 3)


def test_unpinning_and_resuming_take_the_field_out_of_the_spec() -> None:
    assert decisions.unpin(found(rollout={"pinnedVersion": 0})).value is None
    assert decisions.resume(found(rollout={"paused": True})).value is None


def test_what_is_so_already_is_said_and_sends_nothing() -> None:
    already = [
        decisions.pin(found(rollout={"pinnedVersion": 1}), VERSIONS, 1),
        decisions.unpin(found()),
        decisions.pause(found(rollout={"paused": True})),
        decisions.resume(found()),
        decisions.promote(found(), VERSIONS, 2),
        decisions.promote(found(rollout={"promotedVersion": 6}), VERSIONS, 6),
    ]
    assert [decision.is_change for decision in already] == [False] * len(already)
    assert [decision.told for decision in already] == [
        "qwen is pinned to version 1 already; `kubectl updraft unpin qwen -n team` ends it.",
        "qwen is not pinned.",
        "qwen is paused already; `kubectl updraft resume qwen -n team` goes on.",
        "qwen is not paused.",
        "Version 2 of qwen is stable already.",
        "Version 6 of qwen is to be promoted already; it is held.",
    ]


def test_a_pause_says_what_becomes_of_the_canary() -> None:
    status = {"versions": {"stable": 2, "candidate": 4, "latest": 6}}
    assert "Version 4 stays in canary on the pods that it has" in decisions.pause(found(status=status)).told
    assert "The canary of version 4 goes on" in decisions.resume(found(status=status, rollout={"paused": True})).told


def test_only_a_version_that_waits_or_is_in_canary_can_be_promoted() -> None:
    for number in (4, 6):
        assert decisions.promote(found(), VERSIONS, number).value == number
    with pytest.raises(Conflict, match="version 1 of qwen is superseded, and only one that waits"):
        decisions.promote(found(), VERSIONS, 1)


@pytest.mark.parametrize(("pinned", "said"), [(0, "no draft"), (2, "version 2")])
def test_nothing_is_promoted_beside_a_pin(pinned: int, said: str) -> None:
    with pytest.raises(Conflict, match=f"qwen is pinned to {said}: `kubectl updraft unpin qwen -n team` first"):
        decisions.promote(found(rollout={"pinnedVersion": pinned}), VERSIONS, 4)


def test_a_decision_about_what_is_suspended_says_that_it_counts_later() -> None:
    assert decisions.pause(found(suspend=True)).told.endswith("this counts once spec.suspend is false.")


def test_a_role_stands_for_the_version_that_has_it_now() -> None:
    assert decisions.numbered(found(), "previous") == 1
    assert decisions.numbered(found(), 7) == 7
    with pytest.raises(Conflict, match="qwen has no candidate version now"):
        decisions.numbered(found(), "candidate")


def test_who_else_writes_a_field_is_read_from_the_managed_fields() -> None:
    content = objects.speculator()
    content["metadata"]["managedFields"] = [
        {"manager": "argocd-controller", "fieldsV1": {"f:spec": {"f:rollout": {"f:pinnedVersion": {}}}}},
        {"manager": "kubectl-updraft", "fieldsV1": {"f:spec": {"f:rollout": {"f:paused": {}}}}},
        {"manager": "updraft-operator", "fieldsV1": {"f:status": {}}},
    ]
    assert writers(content, "pinnedVersion") == ("argocd-controller",)
    assert writers(content, "promotedVersion") == ()


def test_versions_without_a_number_are_no_versions_to_decide_on() -> None:
    importing: Version = version(objects.version(None, "Importing"))
    assert importing.number is None
    assert importing.source == "imported"
