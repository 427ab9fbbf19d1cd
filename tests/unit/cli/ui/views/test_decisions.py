"""The decisions that a page offers, and what it says before they are made."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.console import state

from updraft_cli.backends.protocol import Verb
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.ui.views.decisions import actions, confirmation, version_actions


def one(**changes: Any) -> SpeculatorSnapshot:
    return state(**changes).speculators[0]


def refusals(shown: SpeculatorSnapshot) -> dict[str, str]:
    return {action.label: action.refusal for action in actions(shown, "")}


def test_all_decisions_are_offered_while_a_canary_runs() -> None:
    assert refusals(one()) == {"Roll back to version 3": "", "Promote": "", "Pin": "", "Pause": ""}


def test_a_pin_and_a_pause_offer_their_ends() -> None:
    assert refusals(one(pinned=3, paused=True)) == {
        "Roll back to version 3": "it is pinned to version 3 already",
        "Promote": "",
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
        (4, "", "version 4 is stable, and only one that waits or is in canary is promoted"),
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
    ],
)
def test_every_decision_says_what_will_happen(verb: Verb, changes: dict[str, Any], effect: str) -> None:
    assert effect in confirmation(one(**changes), verb, None, "").effects
