"""Decisions of a person as fields of the resource."""

from typing import Any

import pytest
from tests.support import speculator_objects as objects

from updraft_chassis.errors import Conflict, NotFound
from updraft_cli.backends.decisions import PatchFields, patch_fields
from updraft_cli.backends.objects import draft, speculator, writers
from updraft_cli.backends.protocol import Verb
from updraft_cli.backends.speculators import Speculator

VERSIONS = tuple(
    draft(objects.version(number, phase, reason=reason), None)
    for number, phase, reason in (
        (1, "Superseded", "version 2 took over"),
        (2, "Stable", "it won"),
        (3, "RolledBack", "acceptance is down"),
        (4, "Canary", ""),
        (6, "Held", ""),
    )
)


def owner(**fields: Any) -> Speculator:
    return speculator(objects.speculator(**fields))


def pin(found: Speculator, number: int) -> PatchFields:
    return patch_fields(Verb.PIN, found, VERSIONS, number)


def promote(found: Speculator, number: int) -> PatchFields:
    return patch_fields(Verb.PROMOTE, found, VERSIONS, number)


def patch(verb: Verb, found: Speculator) -> PatchFields:
    return patch_fields(verb, found, VERSIONS, 0)


def test_a_pin_names_its_effect_and_the_command_that_ends_it() -> None:
    decision = pin(owner(), 1)
    assert (decision.field, decision.value, decision.is_change) == ("pinnedVersion", 1, True)
    assert decision.message == (
        "Version 1 is pinned for qwen: all pods load it now, without analysis and without a restart. Newer versions are"
        " held until `kubectl updraft draft unpin qwen -n team`."
    )


def test_a_pin_to_the_served_version_moves_nothing() -> None:
    assert "it serves already." in pin(owner(), 2).message


def test_a_pin_to_no_draft_needs_no_version() -> None:
    decision = pin(owner(), 0)
    assert decision.value == "NoDraft"
    assert decision.message.startswith("Pinned to no draft for qwen: ")
    assert not pin(owner(rollout={"pinnedVersion": "NoDraft"}), 0).is_change


def test_a_pin_to_an_unknown_version_is_refused_with_the_existing_ones() -> None:
    with pytest.raises(NotFound, match=r"qwen has no DraftVersion with the number 5; it has versions 1 to 4, 6"):
        pin(owner(), 5)
    with pytest.raises(NotFound, match="it has no version yet"):
        patch_fields(Verb.PIN, owner(), (), 1)


@pytest.mark.parametrize("decide", [pin, promote])
def test_a_version_that_lost_never_serves_again(decide: Any) -> None:
    with pytest.raises(Conflict, match="version 3 of qwen is rolled back and never serves again: acceptance is down"):
        decide(owner(), 3)


def test_unpinning_and_resuming_take_the_field_out_of_the_spec() -> None:
    assert patch(Verb.UNPIN, owner(rollout={"pinnedVersion": "NoDraft"})).value is None
    assert patch(Verb.RESUME, owner(rollout={"paused": True})).value is None


def test_a_decision_that_changes_nothing_sends_nothing() -> None:
    already = [
        pin(owner(rollout={"pinnedVersion": 1}), 1),
        patch(Verb.UNPIN, owner()),
        patch(Verb.PAUSE, owner(rollout={"paused": True})),
        patch(Verb.RESUME, owner()),
        promote(owner(), 2),
        promote(owner(rollout={"promotedVersion": 6}), 6),
    ]
    assert [decision.is_change for decision in already] == [False] * len(already)
    assert [decision.message for decision in already] == [
        "qwen is pinned to version 1 already; `kubectl updraft draft unpin qwen -n team` ends it.",
        "qwen is not pinned.",
        "The rollout of qwen is paused already; `kubectl updraft rollout resume qwen -n team` continues it.",
        "The rollout of qwen is not paused.",
        "Version 2 of qwen is stable already.",
        "Version 6 of qwen is being promoted already; it is held.",
    ]


def test_a_pause_names_its_effect_on_the_canary() -> None:
    status = {"versions": {"stable": 2, "candidate": 4, "latest": 6}}
    paused = patch(Verb.PAUSE, owner(status=status)).message
    assert paused.startswith("The rollout is paused for qwen: version 4 stays in canary on its pods")
    resumed = patch(Verb.RESUME, owner(status=status, rollout={"paused": True})).message
    assert resumed == "The rollout goes on for qwen: the canary of version 4 continues."


def test_only_a_version_that_waits_or_is_in_canary_can_be_promoted() -> None:
    for number in (4, 6):
        assert promote(owner(), number).value == number
    with pytest.raises(Conflict, match="version 1 of qwen is superseded, and only a version that waits"):
        promote(owner(), 1)


@pytest.mark.parametrize(("pinned", "text"), [(0, "no draft"), (2, "version 2")])
def test_nothing_is_promoted_beside_a_pin(pinned: int, text: str) -> None:
    with pytest.raises(
        Conflict, match=f"qwen is pinned to {text}: run `kubectl updraft draft unpin qwen -n team` first"
    ):
        promote(owner(rollout={"pinnedVersion": pinned}), 4)


def test_a_decision_about_a_suspended_speculator_takes_effect_later() -> None:
    assert patch(Verb.PAUSE, owner(suspend=True)).message.endswith("this takes effect once spec.suspend is false.")


def test_who_else_writes_a_field_is_read_from_the_managed_fields() -> None:
    content = objects.speculator()
    content["metadata"]["managedFields"] = [
        {"manager": "argocd-controller", "fieldsV1": {"f:spec": {"f:rollout": {"f:pinnedVersion": {}}}}},
        {"manager": "kubectl-updraft", "fieldsV1": {"f:spec": {"f:rollout": {"f:paused": {}}}}},
        {"manager": "updraft-operator", "fieldsV1": {"f:status": {}}},
    ]
    assert writers(content, "pinnedVersion") == ("argocd-controller",)
    assert writers(content, "promotedVersion") == ()
