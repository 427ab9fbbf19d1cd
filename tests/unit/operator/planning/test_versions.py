"""Versions as objects: mirrors, and what became of each."""

from typing import Any

import pytest
from tests.support.observed import (
    NOW,
    connected,
    draft,
    observed,
    traffic,
    transition,
    version,
)

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api.draft_version import DraftVersion, DraftVersionStatus
from updraft_operator.planning import versions
from updraft_operator.planning.observed import ConnectionState, Observed, RegistryView, moment, phase_name
from updraft_operator.planning.plan import written
from updraft_rollouts.terms import Phase


def _statuses(observation: Observed) -> dict[str, DraftVersionStatus]:
    return {each.metadata.name: new for each, new in versions.statuses(observation, NOW)}


def _mirrors(observation: Observed) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in versions.mirrors(observation)}


def _conditions(status: DraftVersionStatus) -> dict[str, tuple[str, str]]:
    return {each.type: (each.status, each.reason) for each in status.conditions}


@pytest.mark.parametrize("number", pb.Phase.values()[1:])
def test_every_phase_of_the_wire_has_a_name(number: "pb.Phase.ValueType") -> None:
    assert pb.Phase.Name(number) == f"PHASE_{phase_name(number).name}"


def test_an_unknown_phase_is_pending() -> None:
    assert phase_name(pb.PHASE_UNSPECIFIED) is Phase.PENDING


def test_every_kept_version_without_an_object_gets_one() -> None:
    made = _mirrors(observed(registry=connected([version(1), version(2)]), drafts=(draft(1),)))
    spec = made["qwen-v2"]["spec"]
    assert made.keys() == {"qwen-v2"}
    assert (spec["version"], spec["source"], spec["parentVersion"]) == (2, "Trainer", 1)
    assert spec["training"] == {"samples": 1000, "firstTraceId": "first", "lastTraceId": "last"}
    assert spec["digest"].startswith("sha256:")
    assert DraftVersion.model_validate(made["qwen-v2"]).spec.retain is False


def test_a_retained_version_is_mirrored_as_one() -> None:
    (made,) = _mirrors(observed(registry=connected([version(1, retain=True)]))).values()
    assert made["spec"]["retain"] is True
    assert "parentVersion" not in made["spec"]


@pytest.mark.parametrize("connection", [ConnectionState.STARTING, ConnectionState.UNREACHABLE, ConnectionState.DENIED])
def test_nothing_is_made_or_deleted_while_the_registry_is_away(connection: ConnectionState) -> None:
    view = connected([version(1)])
    away = RegistryView(connection=connection, state=view.state, versions=view.versions)
    assert _mirrors(observed(registry=away)) == {}
    assert list(versions.outdated(observed(registry=away, drafts=(draft(9),)))) == []


def test_an_object_whose_version_is_gone_goes_too() -> None:
    drafts = (draft(1), draft(2))
    observation = observed(registry=connected([version(2)]), drafts=drafts)
    assert list(versions.outdated(observation)) == ["qwen-v1"]


@pytest.mark.parametrize(
    ("phase", "more", "expected"),
    [
        pytest.param(
            pb.PHASE_STABLE, {}, {"Loaded": ("True", "Loaded"), "Promoted": ("True", "Promoted")}, id="stable"
        ),
        pytest.param(
            pb.PHASE_CANARY, {}, {"Loaded": ("False", "NotServing"), "Promoted": ("False", "Canary")}, id="canary"
        ),
        pytest.param(
            pb.PHASE_SUPERSEDED,
            {"transitions": [transition(3, pb.PHASE_STABLE)]},
            {"Loaded": ("False", "NotServing"), "Promoted": ("True", "Promoted")},
            id="won once",
        ),
        pytest.param(
            pb.PHASE_SUPERSEDED,
            {},
            {"Loaded": ("False", "NotServing"), "Promoted": ("False", "Superseded")},
            id="never won",
        ),
        pytest.param(
            pb.PHASE_REJECTED, {}, {"Loaded": ("False", "NotServing"), "Promoted": ("False", "Rejected")}, id="rejected"
        ),
    ],
)
def test_conditions_of_a_version_follow_its_phase(phase: Any, more: Any, expected: dict[str, Any]) -> None:
    status = _statuses(observed(registry=connected([version(3, phase)], **more), drafts=(draft(3),)))["qwen-v3"]
    conditions = _conditions(status)
    assert conditions.items() >= expected.items()
    assert conditions["Verified"] == ("True", "DigestMatches")
    assert conditions["Evaluated"] == ("True", "HeldOutTraces")


def test_who_won_once_has_won_however_short_the_registrys_history_is() -> None:
    first = _statuses(
        observed(
            registry=connected([version(3, pb.PHASE_SUPERSEDED)], [transition(3, pb.PHASE_STABLE)]), drafts=(draft(3),)
        )
    )["qwen-v3"]
    later = _statuses(
        observed(registry=connected([version(3, pb.PHASE_SUPERSEDED)]), drafts=(draft(3, status=written(first)),))
    )["qwen-v3"]
    assert later == first


def test_a_version_without_an_evaluation_says_so() -> None:
    plain = version(3)
    plain.manifest.ClearField("evaluation")
    status = _statuses(observed(registry=connected([plain]), drafts=(draft(3),)))["qwen-v3"]
    assert _conditions(status)["Evaluated"] == ("Unknown", "NotEvaluated")


def test_the_history_of_a_version_is_its_changes_of_phase() -> None:
    moves = [
        transition(3, pb.PHASE_PENDING, at_s=1),
        transition(3, pb.PHASE_PENDING, from_phase=pb.PHASE_PENDING, at_s=2),
        transition(2, pb.PHASE_STABLE, at_s=3),
        transition(3, pb.PHASE_STABLE, at_s=4),
    ]
    status = _statuses(observed(registry=connected([version(3)], moves), drafts=(draft(3),)))["qwen-v3"]
    assert [(each.phase, each.time) for each in status.history] == [
        (Phase.PENDING, moment(1)),
        (Phase.STABLE, moment(4)),
    ]
    assert status.promoted_time == moment(4)


def test_only_the_last_twenty_changes_are_told() -> None:
    moves = [transition(3, pb.PHASE_HELD if n % 2 else pb.PHASE_CANARY, at_s=n) for n in range(1, 31)]
    status = _statuses(observed(registry=connected([version(3)], moves), drafts=(draft(3),)))["qwen-v3"]
    assert [each.time for each in status.history] == [moment(n) for n in range(11, 31)]


def test_pods_of_a_version_are_those_that_serve_it() -> None:
    pods = pb.Pods(connected=5, serving_stable=3, serving_candidate=1)
    kept = [version(2, pb.PHASE_SUPERSEDED), version(3), version(4, pb.PHASE_CANARY)]
    statuses = _statuses(observed(registry=connected(kept, pods=pods), drafts=(draft(2), draft(3), draft(4))))
    counted = {name: (each.pods.loaded, each.pods.target) for name, each in statuses.items() if each.pods}
    assert counted == {"qwen-v2": (0, 0), "qwen-v3": (3, 4), "qwen-v4": (1, None)}


def test_acceptance_that_was_measured_is_kept_when_nobody_serves_any_more() -> None:
    first = _statuses(observed(registry=connected([version(3)], traffic=[traffic(3, 2.5)]), drafts=(draft(3),)))[
        "qwen-v3"
    ]
    assert first.acceptance is not None
    assert first.acceptance.length == "2.50"
    later = _statuses(observed(registry=connected([version(3)]), drafts=(draft(3, status=written(first)),)))
    assert later["qwen-v3"].acceptance == first.acceptance
