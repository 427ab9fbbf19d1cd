"""What a plan tells: status, events, and the end of a resource."""

from dataclasses import replace
from datetime import timedelta

import pytest
from tests.support.manifests import speculator
from tests.support.observed import (
    NOW,
    NOW_S,
    as_child,
    connected,
    draft,
    draft_import,
    is_empty,
    observed,
    pod,
    ready_pods,
    settled,
    traffic,
    version,
    workload,
)

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.manifests.trainer import GRACE_S
from updraft_operator.planning import imports, versions
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed, RegistryView
from updraft_operator.planning.plan import Plan, make_plan, written
from updraft_operator.planning.status import status

UNTOLD = 500.0
"""A moment of the clock that only runs forward."""


def _plan(observation: Observed, *, now_s: float = UNTOLD) -> Plan:
    return make_plan(observation, now_unix_s=NOW_S, now_s=now_s)


def _told(observation: Observed) -> Observed:
    """The same world, once its status was written."""
    new = status(observation, NOW, _plan(observation).upgrade)
    owner = observation.speculator.model_copy(update={"status": new})
    return replace(observation, speculator=owner)


# Status and events


def _measured(length: float) -> RegistryView:
    return connected([version(3)], traffic=[traffic(3, length)], message=f"{length}")


def test_measurements_are_told_at_their_own_pace() -> None:
    observation = replace(_told(settled(registry=_measured(2.0))), registry=_measured(3.0))
    early = _plan(replace(observation, status_due_s=UNTOLD + 10.0))
    assert (early.status, early.again_s) == (None, 10.0)
    late = _plan(replace(observation, status_due_s=UNTOLD))
    assert late.status is not None
    assert late.status["acceptance"]["stable"] == "3.00"
    assert (late.events, late.again_s) == ((), None)


def test_news_are_told_at_once() -> None:
    observation = replace(_told(settled(registry=_measured(2.0))), pods=ready_pods(), status_due_s=UNTOLD + 10.0)
    assert _plan(observation).status is not None


def test_a_status_that_was_told_is_not_told_again() -> None:
    observation = _told(settled(registry=_measured(2.0), pods=ready_pods()))
    assert (_plan(observation).status, _plan(observation).again_s) == (None, None)


def test_the_first_conditions_are_no_events() -> None:
    made = _plan(settled())
    assert made.status is not None
    assert made.events == ()


def test_a_change_of_status_or_reason_is_one_event() -> None:
    before = _told(settled(registry=connected()))
    serving = pod(is_ready=True)
    reasons = {(each.reason, each.is_warning) for each in _plan(replace(before, pods=(serving,))).events}
    assert reasons == {("PodsReady", False), ("Ready", False)}
    troubled = replace(before, pods=(pod(problem=("OOMKilled", "x")),))
    assert {(each.reason, each.is_warning) for each in _plan(troubled).events} == {("OOMKilled", True)}
    assert _plan(_told(troubled)).events == ()


def test_another_message_alone_is_no_event() -> None:
    before = _told(settled(pods=(pod(problem=("OOMKilled", "x")),)))
    made = _plan(replace(before, pods=(pod(problem=("OOMKilled", "y")),)))
    assert made.status is not None
    assert made.events == ()


def test_pods_that_fetch_a_version_at_a_swap_are_no_event() -> None:
    serving = _told(settled(registry=_measured(2.0), pods=ready_pods()))
    fetching = replace(
        serving,
        registry=connected([version(4)], traffic=[traffic(4, 2.0)], pods=pb.Pods(connected=1, serving_stable=0)),
    )
    swapping = _plan(fetching)
    assert swapping.status is not None
    reasons = {each["type"]: each["reason"] for each in swapping.status["conditions"]}
    assert reasons["SpeculationEffective"] == "DraftNotLoaded"
    assert not [event for event in swapping.events if "SpeculationEffective" in event.message]
    swapped = replace(_told(fetching), registry=connected([version(4)], traffic=[traffic(4, 2.0)]))
    assert not [event for event in _plan(swapped).events if "SpeculationEffective" in event.message]


def test_suspension_is_no_warning() -> None:
    observation = _told(settled(registry=connected(), pods=ready_pods()))
    suspended = replace(
        observation, speculator=speculator({"suspend": True}, status=written(observation.speculator.status))
    )
    events = {each.reason: each.is_warning for each in _plan(suspended).events}
    assert events["Suspended"] is False


def test_a_version_that_changes_its_phase_is_one_event() -> None:
    observation = settled(registry=connected([version(3)]), drafts=(draft(3),))
    made = _plan(observation)
    ((target, told),) = made.draft_statuses
    (event,) = made.events
    assert (target, event.name, event.reason, event.is_warning) == (
        Ref("DraftVersion", "qwen-v3"),
        "qwen-v3",
        "Stable",
        False,
    )
    again = replace(observation, drafts=(draft(3, status=told),))
    assert (_plan(again).draft_statuses, _plan(again).events) == ((), ())
    lost = replace(again, registry=connected([version(3, pb.PHASE_ROLLED_BACK)]))
    assert [(each.reason, each.is_warning) for each in _plan(lost).events] == [("RolledBack", True)]


def test_an_import_that_fails_is_a_warning_and_one_event() -> None:
    mine = draft_import()
    content = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": imports.job_name(speculator(), mine)},
        "spec": {},
    }
    failed = {"conditions": [{"type": "Failed", "status": "True", "message": "404 Not Found"}]}
    job = as_child(content, status=failed)
    observation = settled(registry=connected(), imports=(mine,), children={job.ref: job})
    made = _plan(observation)
    (event,) = made.events
    assert (event.kind, event.name, event.reason, event.message, event.is_warning) == (
        *("DraftImport", "mine", "ImportFailed", "404 Not Found", True),
    )
    ((_, told),) = made.draft_statuses
    again = replace(observation, imports=(draft_import(status=told),))
    assert (_plan(again).draft_statuses, _plan(again).events) == ((), ())


def test_the_acceptance_of_a_version_is_told_with_the_speculators_own() -> None:
    observation = _told(settled(registry=_measured(2.0), drafts=(draft(3),)))
    statuses = {each.metadata.name: written(new) for each, new in versions.statuses(observation, NOW)}
    observation = replace(observation, drafts=(draft(3, status=statuses["qwen-v3"]),), registry=_measured(3.0))
    waiting = replace(observation, status_due_s=UNTOLD + 10.0)
    assert _plan(waiting).draft_statuses == ()
    ((_, new),) = _plan(_told(waiting)).draft_statuses
    assert new["acceptance"] == {"length": "3.00"}


# The end


@pytest.mark.parametrize(
    ("policy", "finalizers", "expected"),
    [
        ("Retain", [], ""),
        ("Delete", [], "add"),
        ("Delete", [names.FINALIZER], ""),
        ("Retain", [names.FINALIZER], "remove"),
        ("Retain", ["another"], ""),
    ],
)
def test_the_finalizer_is_there_where_something_has_to_be_removed(
    policy: str, finalizers: list[str], expected: str
) -> None:
    owner = speculator({"deletionPolicy": policy}, finalizers=finalizers)
    assert _plan(settled(speculator=owner)).finalizer == expected


def _deleted(policy: str, *, waited_s: float = 1.0, finalizers: tuple[str, ...] = (names.FINALIZER,)) -> Observed:
    at = (NOW - timedelta(seconds=waited_s)).isoformat()
    owner = speculator({"deletionPolicy": policy}, finalizers=list(finalizers), deletionTimestamp=at)
    return observed(speculator=owner, registry=connected([version(3)]))


def test_what_ends_is_only_cleaned_up() -> None:
    assert _plan(_deleted("Delete")) == Plan(finalizer="remove", cleans_up=True)
    assert _plan(_deleted("Retain")) == Plan(finalizer="remove")


def test_who_writes_traces_goes_before_the_traces() -> None:
    children = workload("Deployment", "serving", {"replicas": 1})
    ending = replace(_deleted("Delete"), children=children, ending_s=UNTOLD)
    assert _plan(ending) == Plan(delete=tuple(children), again_s=1.0, needs_plan=True)
    assert _plan(replace(ending, children={}, pods=(pod("serving"),))) == Plan(again_s=1.0, needs_plan=True)
    assert _plan(replace(ending, children={})).cleans_up


def test_a_deletion_without_our_finalizer_is_kubernetes_own_affair() -> None:
    assert is_empty(_plan(_deleted("Delete", finalizers=())))


def test_a_deletion_never_hangs_on_what_cannot_be_reached() -> None:
    tried = _deleted("Delete", waited_s=3600)  # nobody was here for an hour
    assert _plan(tried).cleans_up
    grace_s = GRACE_S  # the trainer's, which is longer than that of the serving pods
    tried = replace(tried, ending_s=UNTOLD - grace_s - 301, cleanup_s=300)
    assert _plan(replace(tried, cleanup_s=302)).cleans_up, "whoever has more patience sets more"
    made = _plan(tried)
    assert (made.finalizer, made.cleans_up) == ("remove", False)
    assert [(each.reason, each.is_warning) for each in made.events] == [("CleanupGivenUp", True)]
