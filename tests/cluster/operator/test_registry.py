"""With a real registry: the rollout's fields reach it, and its versions are objects that one can look at and wait for."""

import re

import pytest
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.registries import Shelf
from tests.cluster.operator.subject import Subject
from tests.support.checkpoints import draft
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names


@pytest.fixture(scope="module")
def settings(registry: RegistryProcess) -> dict[str, object]:
    return {"registry_address": registry.address}


@pytest.fixture
def connected(operator: Running, subject: Subject) -> Subject:
    """A speculator whose registry is heard, with nothing published."""
    subject.create(rollout={"strategy": "Immediate", "revisionHistoryLimit": 2})
    subject.wait_until_built()
    subject.run(names.REGISTRY)
    subject.wait_for("RegistryReady", "True", "Connected")
    return subject


def phases(subject: Subject) -> dict[str, str]:
    """Of the DraftVersions, by name without the speculator's."""
    return {
        each["metadata"]["name"].removeprefix(f"{subject.name}-"): each.get("status", {}).get("phase", "")
        for each in subject.all_of("DraftVersion")
        if each["spec"]["speculatorRef"]["name"] == subject.name
    }


def wait_for_phases(subject: Subject, **desired: str) -> None:
    try:
        wait_until(lambda: phases(subject) == desired, timeout_s=30)
    except TimeoutError:
        raise AssertionError(f"the phases are {phases(subject)}, not {desired}") from None


def publish(subject: Subject, shelf: Shelf, number: int) -> None:
    """One more version, until it has an object with a phase."""
    assert shelf.publish(number) == number
    wait_until(lambda: bool(phases(subject).get(f"v{number}")), what=f"the object of version {number}")


def test_the_rollout_of_the_spec_is_the_registrys_policy(connected: Subject, shelf: Shelf) -> None:
    assert shelf.state().policy.strategy == pb.STRATEGY_IMMEDIATE

    steps = [{"podsPercent": 25, "holdSeconds": 7}, {"podsPercent": 100, "holdSeconds": 9}]
    analysis = {"minSamples": 321, "onInconclusive": "Pause", "comparison": "Pods", "failureLimit": 0}
    connected.change(rollout={"strategy": "Canary", "steps": steps, "analysis": analysis, "autoRollback": False})

    wait_until(lambda: shelf.state().policy.strategy == pb.STRATEGY_CANARY, what="the new policy")
    policy = shelf.state().policy
    assert [(step.pods_percent, step.hold_seconds) for step in policy.steps] == [(25, 7), (100, 9)]
    assert (policy.analysis.min_samples, policy.analysis.failure_limit) == (321, 0)
    assert policy.analysis.on_inconclusive == pb.ON_INCONCLUSIVE_PAUSE
    assert policy.analysis.comparison == pb.COMPARISON_PODS
    assert (policy.auto_rollback, policy.revision_history_limit) == (False, 2)


def test_versions_are_objects_with_phases_history_and_conditions(
    operator: Running, connected: Subject, shelf: Shelf
) -> None:
    publish(connected, shelf, 1)
    publish(connected, shelf, 2)
    wait_for_phases(connected, v1="Superseded", v2="Stable")

    second = connected.get("DraftVersion", f"{connected.name}-v2")
    assert second["spec"]["source"] == "Trainer"
    assert second["spec"]["parentVersion"] == 1
    assert second["spec"]["digest"] == draft(seed=2).digest
    assert second["spec"]["training"] == {"samples": 200, "firstTraceId": "a", "lastTraceId": "b"}
    (owner,) = second["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("AdaptiveSpeculator", connected.get()["metadata"]["uid"])
    told = connected.get("DraftVersion", f"{connected.name}-v1")["status"]
    assert [moment["phase"] for moment in told["history"]][-2:] == ["Stable", "Superseded"]
    assert all(moment["actor"] and moment["time"] for moment in told["history"])
    operator.cluster.kubectl(
        *("wait", "--for=condition=Promoted", f"dver/{connected.name}-v2", "-n", connected.namespace, "--timeout=20s")
    )
    status = connected.get()["status"]
    assert status["versions"] == {"stable": 2, "previous": 1, "latest": 2}
    assert connected.condition("Progressing") == ("True", "Complete")


def test_a_table_of_both_kinds_reads_well(operator: Running, connected: Subject, shelf: Shelf) -> None:
    publish(connected, shelf, 1)
    publish(connected, shelf, 2)
    wait_for_phases(connected, v1="Superseded", v2="Stable")
    wait_until(lambda: connected.get()["status"]["versions"].get("stable") == 2, what="the status")

    text = operator.cluster.kubectl("get", "asp,dver", "-n", connected.namespace)

    words = [line.replace(connected.name, "chat").split() for line in text.splitlines() if line]
    assert all(re.fullmatch(r"AGE|(\d+m)?\d+s", line[-1]) for line in words)
    assert [line[:-1] for line in words] == [line.split() for line in TABLE.strip().splitlines()]


# Without the last column, which is a time; an empty cell is no word.
TABLE = """
NAME                                READY  REASON        STABLE  CANDIDATE  ACCEPT-LEN  DESIRED  PODS
adaptivespeculator.updraft.dev/chat False  ModelLoading  2                              1        0
NAME                                SPECULATOR  VERSION  PHASE       LOADED  TARGET  ACCEPT-LEN
draftversion.updraft.dev/chat-v1    chat        1        Superseded  0       0
draftversion.updraft.dev/chat-v2    chat        2        Stable      0       0
"""


def test_a_pin_and_its_end_reach_the_registry(connected: Subject, shelf: Shelf) -> None:
    publish(connected, shelf, 1)
    publish(connected, shelf, 2)

    connected.change(rollout={"pinnedVersion": 1})
    wait_for_phases(connected, v1="Stable", v2="Superseded")
    assert shelf.state().pinned == 1
    connected.wait_for("Progressing", "False", "Pinned")
    publish(connected, shelf, 3)
    assert phases(connected)["v3"] == "Held"

    connected.change(rollout={"pinnedVersion": "NoDraft"})
    wait_until(lambda: shelf.state().HasField("pinned") and shelf.state().pinned == 0, what="no draft")
    connected.change(rollout={"pinnedVersion": None})
    wait_until(lambda: not shelf.state().HasField("pinned"), what="the end of the pin")


def test_a_pin_to_an_unknown_version_is_said_and_changes_nothing(
    operator: Running, connected: Subject, shelf: Shelf
) -> None:
    publish(connected, shelf, 1)

    connected.change(rollout={"pinnedVersion": 9})

    message = connected.wait_for("Accepted", "False", "VersionNotFound")
    assert message == "spec.rollout.pinnedVersion is 9, but the registry has no such version: it has 1"
    assert connected.condition("Ready") == ("False", "VersionNotFound")
    operator.wait_for_listings(1)
    assert (shelf.state().stable, shelf.state().HasField("pinned")) == (1, False)
    connected.change(rollout={"pinnedVersion": None})
    connected.wait_for("Accepted", "True", "SpecAccepted")


def test_a_pause_and_its_end_reach_the_registry(connected: Subject, shelf: Shelf) -> None:
    publish(connected, shelf, 1)
    connected.change(rollout={"paused": True})
    wait_until(lambda: shelf.state().paused, what="the pause")
    connected.wait_for("Progressing", "False", "Paused")

    connected.change(rollout={"paused": False})
    wait_until(lambda: not shelf.state().paused, what="its end")


def test_a_manual_rollout_waits_for_a_promotion(connected: Subject, shelf: Shelf) -> None:
    connected.change(rollout={"strategy": "Manual"})
    wait_until(lambda: shelf.state().policy.strategy == pb.STRATEGY_MANUAL, what="the policy")
    publish(connected, shelf, 1)
    assert "promotedVersion" in connected.wait_for("Progressing", "False", "Waiting")
    connected.change(rollout={"promotedVersion": 1})
    wait_for_phases(connected, v1="Stable")
    publish(connected, shelf, 2)
    assert "promotedVersion" in connected.wait_for("Progressing", "False", "Waiting")

    connected.change(rollout={"promotedVersion": 2})

    wait_for_phases(connected, v1="Superseded", v2="Stable")


def test_a_wish_to_retain_reaches_the_registry(connected: Subject, shelf: Shelf) -> None:
    publish(connected, shelf, 1)
    path = connected.path("DraftVersion", f"{connected.name}-v1")

    connected.api.patch(path, {"spec": {"retain": True}})
    wait_until(lambda: shelf.versions()[1].retain, what="the wish to retain")

    connected.api.patch(path, {"spec": {"retain": False}})
    wait_until(lambda: not shelf.versions()[1].retain, what="the end of it")


def test_an_object_that_somebody_deleted_is_made_again(connected: Subject, shelf: Shelf) -> None:
    publish(connected, shelf, 1)
    path = connected.path("DraftVersion", f"{connected.name}-v1")
    uid = connected.api.get(path)["metadata"]["uid"]

    connected.api.delete(path)

    wait_for_phases(connected, v1="Stable")
    assert connected.api.get(path)["metadata"]["uid"] != uid


def test_a_registry_that_is_away_costs_no_version(
    operator: Running, registry: RegistryProcess, connected: Subject, shelf: Shelf
) -> None:
    publish(connected, shelf, 1)
    publish(connected, shelf, 2)
    wait_for_phases(connected, v1="Superseded", v2="Stable")
    since, status = requests.now(), connected.get()["status"]["versions"]

    registry.kill()
    try:
        message = connected.wait_for("RegistryReady", "False", "Unreachable")
        assert registry.address in message
        operator.wait_for_listings(1)
        assert connected.get()["status"]["versions"] == status
    finally:
        registry.start()

    connected.wait_for("RegistryReady", "True", "Connected")
    wait_for_phases(connected, v1="Superseded", v2="Stable")
    deleted = [
        each for each in requests.writes(operator.cluster, operator.account.user, since) if each.verb == "delete"
    ]
    assert not [
        each for each in deleted if each.resource == names.DRAFT_VERSIONS and each.namespace == connected.namespace
    ]


def test_the_object_of_a_version_goes_when_the_registry_no_longer_keeps_it(connected: Subject, shelf: Shelf) -> None:
    publish(connected, shelf, 1)
    connected.api.patch(connected.path("DraftVersion", f"{connected.name}-v1"), {"spec": {"retain": True}})
    wait_until(lambda: shelf.versions()[1].retain, what="the wish to retain")

    for number in (2, 3, 4):  # two are kept, and the one that is retained
        publish(connected, shelf, number)

    # A registry deletes nothing in its first minute, and the operator lists its versions every half minute.
    wait_until(lambda: phases(connected).keys() == {"v1", "v3", "v4"}, timeout_s=120, what="the end of v2's object")
    assert {number for number, version in shelf.versions().items() if not version.pruned} == {1, 3, 4}
