"""The decisions that a page offers, and what it says before they are made."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.console import state

from updraft_cli.backends.protocol import Verb
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import Resource
from updraft_cli.ui.views.decisions import actions, confirmation, version_actions


def one(**changes: Any) -> SpeculatorSnapshot:
    return state(**changes).speculators[0]


def refusals(shown: SpeculatorSnapshot) -> dict[str, str]:
    return {action.label: action.refusal for action in actions(shown, "")}


def test_all_decisions_are_offered_while_a_canary_runs() -> None:
    assert refusals(one()) == {"Roll back to version 3": "", "Promote version 6": "", "Pin": "", "Pause": ""}


def test_a_pin_and_a_pause_offer_their_ends() -> None:
    assert refusals(one(pinned=3, paused=True)) == {
        "Roll back to version 3": "it is pinned to version 3 already",
        "Promote version 6": "version 3 is pinned; end the pin first",
        "Pin": "",
        "End the pin": "",
        "Resume": "",
    }


def test_what_cannot_be_done_has_its_reason() -> None:
    nothing = replace(one(stable=0, previous=0, candidate=0, trial=None), drafts=())
    assert refusals(nothing) == {
        "Roll back": "there is no previous version",
        "Promote": "no version waits or is in canary",
        "Pin": "there is no version yet",
        "Pause": "",
    }


def test_without_rights_every_button_has_the_reason() -> None:
    assert {action.refusal for action in actions(one(), "your role does not let you")} == {"your role does not let you"}


@pytest.mark.parametrize(
    ("number", "pin", "promote"),
    [
        (6, "", ""),
        (4, "", "version 4 is stable already"),
        (3, "", ""),
        (5, "version 5 is rejected and never serves again", "version 5 is rejected and never serves again"),
    ],
)
def test_a_version_offers_what_its_phase_allows(number: int, pin: str, promote: str) -> None:
    shown = one()
    draft = shown.draft(number)
    assert draft is not None
    assert [action.refusal for action in version_actions(shown, draft, "")] == [pin, promote]


def test_a_pin_says_what_will_happen() -> None:
    view = confirmation(one(), Verb.PIN, 3, "")
    assert view.title == "Pin a version for qwen: version 3"
    assert view.effects == (
        "Now version 4 serves.",
        "All pods load version 3 now, without analysis and without a restart. No request ends.",
        "The canary of version 6 ends.",
        "Newer versions are held until you end the pin.",
    )
    assert (view.version, view.versions, view.refusal) == (3, (), "")
    assert (
        "With no draft, all answers stay the same and come more slowly." in confirmation(one(), Verb.PIN, 0, "").effects
    )


def test_a_pin_without_a_version_offers_those_that_can_serve() -> None:
    view = confirmation(one(), Verb.PIN, None, "")
    assert [number for number, _ in view.versions] == [0, 6, 4, 3, 2, 1]
    assert view.version == 4


def test_a_version_that_is_not_there_is_refused() -> None:
    assert confirmation(one(), Verb.PIN, 99, "").refusal == "qwen has no version 99"


@pytest.mark.parametrize(
    ("verb", "changes", "effect"),
    [
        (Verb.UNPIN, {"pinned": 3}, "qwen is no longer pinned to version 3."),
        (Verb.PROMOTE, {}, "It takes over from version 4. Later versions are tried as usual."),
        (Verb.PAUSE, {}, "Version 6 stays in canary on its pods, and no new version is tried until you resume."),
        (Verb.PAUSE, {"candidate": 0}, "Version 4 keeps serving, and no new version is tried until you resume."),
        (Verb.RESUME, {"paused": True}, "The canary of version 6 continues."),
        (
            Verb.UNPIN,
            {"pinned": 3, "paused": True},
            "The last promoted version serves, and none is tried until you resume the rollout. No pod restarts.",
        ),
        (
            Verb.RESUME,
            {"pinned": 3, "paused": True},
            "The pause ends. qwen stays pinned to version 3, so newer versions are held until you end the pin.",
        ),
    ],
)
def test_every_decision_says_what_will_happen(verb: Verb, changes: dict[str, Any], effect: str) -> None:
    assert effect in confirmation(one(**changes), verb, None, "").effects


@pytest.mark.parametrize(
    ("verb", "changes", "refusal"),
    [
        (Verb.UNPIN, {}, "qwen is not pinned"),
        (Verb.PAUSE, {"paused": True}, "the rollout is paused already"),
        (Verb.RESUME, {}, "the rollout is not paused"),
        (Verb.PROMOTE, {"pinned": 3}, "version 3 is pinned; end the pin first"),
    ],
)
def test_a_decision_that_the_state_does_not_allow_is_refused(verb: Verb, changes: dict[str, Any], refusal: str) -> None:
    assert confirmation(one(**changes), verb, None, "").refusal == refusal


def test_with_nothing_to_promote_no_version_is_sent() -> None:
    nothing = replace(one(candidate=0, trial=None), drafts=())
    view = confirmation(nothing, Verb.PROMOTE, None, "")
    assert (view.version, view.refusal) == (None, "no version waits or is in canary")


def test_promote_means_the_version_in_canary_rather_than_a_newer_one_that_waits() -> None:
    shown = one()
    newer = replace(shown.drafts[0], version=7, phase="held")
    shown = replace(shown, drafts=(newer, *shown.drafts))
    assert "Promote version 6" in refusals(shown)
    assert confirmation(shown, Verb.PROMOTE, None, "").version == 6


def test_a_version_without_weights_is_not_offered_and_is_refused() -> None:
    shown = one()
    drafts = tuple(replace(draft, pruned=draft.version == 2) for draft in shown.drafts)
    shown = replace(shown, drafts=drafts)
    assert [number for number, _ in confirmation(shown, Verb.PIN, None, "").versions] == [0, 6, 4, 3, 1]
    assert confirmation(shown, Verb.PIN, 2, "").refusal == "the weights of version 2 are no longer kept"


def test_a_cluster_promotes_only_what_waits_and_only_without_a_pin() -> None:
    resource = Resource(
        target="smollm2",
        engine="torch",
        url="",
        is_suspended=False,
        is_current=True,
        is_reconciled=True,
        promoted=None,
        trainer_state="",
        last_published=None,
        last_failure=None,
        conditions=(),
    )
    superseded = confirmation(one(resource=resource), Verb.PROMOTE, 3, "").refusal
    assert superseded == "version 3 is superseded, and only one that waits or is in canary is promoted"
    pinned = confirmation(one(resource=resource, pinned=6), Verb.PROMOTE, 6, "").refusal
    assert pinned == "version 6 is pinned; end the pin first"
    assert not confirmation(one(pinned=6), Verb.PROMOTE, 6, "").refusal
