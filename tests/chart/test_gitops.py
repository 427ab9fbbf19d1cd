"""What GitOps tools make of our statuses: kstatus as Flux and Helm 4 use it, and the Lua of docs/argocd as Argo CD runs it.

The statuses are the operator's own, of small worlds; the programs that answer are built from the tools' libraries. Argo CD's
own code is that of one version, so the scripts also run with no more than each version gives to them.
"""

import json
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from tests.chart.chart import CHECKOUT
from tests.chart.go_program import ARGOCD, GITOPS, GoProgram
from tests.support.manifests import speculator
from tests.support.observed import (
    NOW,
    as_child,
    connected,
    draft,
    draft_import,
    imported,
    observed,
    pod,
    ready_pods,
    version,
    workload,
)

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import crd, names
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.planning import imports, versions
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import ConnectionState, MissingSecret, Observed, Refusal, RegistryView
from updraft_operator.planning.plan import written
from updraft_operator.planning.status import status

Json = dict[str, Any]

CONFIG_MAP = CHECKOUT / "docs" / "argocd" / "argocd-cm.yaml"
AWAY = RegistryView(connection=ConnectionState.UNREACHABLE, problem="no answer")
HUNDRED = {"serving": {"replicas": 100}}


@pytest.fixture(scope="module", autouse=True)
def _is_built() -> None:
    for program in (GITOPS, ARGOCD):
        if not program.binary.exists():
            pytest.skip(f"{program.name}: not built; run `python -m tests.chart.go_program` (once; {program.lasts})")


def _asked(*questions: Mapping[str, Any], program: GoProgram = GITOPS) -> list[Json]:
    result = subprocess.run(
        [program.binary], input=json.dumps(questions), text=True, capture_output=True, check=True, timeout=60
    )
    answers: list[Json] = json.loads(result.stdout)
    assert [answer["error"] for answer in answers if "error" in answer] == []
    return answers


def _customization(what: str, kind: str) -> str:
    data = yaml.safe_load(CONFIG_MAP.read_text())["data"]
    return str(data[f"resource.customizations.{what}.updraft.dev_{kind}"])


def _told(content: Json) -> tuple[str, str]:
    """The verdicts of kstatus and of Argo CD."""
    kstatus, script = _asked(
        {"object": content}, {"object": content, "script": _customization("health", content["kind"])}
    )
    (argo,) = _asked({"object": content, "health": _customization("health", content["kind"])}, program=ARGOCD)
    if "deletionTimestamp" not in content["metadata"]:  # then Argo CD asks no script
        assert argo["health"] == script["value"]
    return kstatus["status"], argo["health"]["status"]


def _object(owner: AdaptiveSpeculator | DraftVersion | DraftImport, new_status: Json | None = None) -> Json:
    """As the API server returns it; without a status, with the default of the CRD."""
    kind = type(owner)
    return {
        "apiVersion": names.API_VERSION,
        "kind": kind.__name__,
        "metadata": written(owner.metadata),
        "spec": written(owner.spec),
        "status": new_status if new_status is not None else crd.schema(kind)["properties"]["status"]["default"],
    }


def _observed(spec: Json | None = None, *, reached: int | None = None, **more: Any) -> Observed:
    before = {} if reached is None else {"serving": {"reachedReplicas": reached}}
    return observed(spec, speculator=speculator(spec, status=before), **more)


def _after(seen: Observed) -> Json:
    """The resource with the status that the operator writes then."""
    return _object(seen.speculator, written(status(seen, NOW)))


def _pods(num_ready: int, num_others: int = 0, problem: str = "") -> tuple[Any, ...]:
    trouble = (problem, "it failed") if problem else None
    others = [pod(f"qwen-serving-x{number}", problem=trouble) for number in range(num_others)]
    return (*(pod(f"qwen-serving-{number}", is_ready=True) for number in range(num_ready)), *others)


def _refused(reason: str) -> Json:
    refusal = Refusal(ref=Ref("Deployment", "qwen-serving"), digest="", reason=reason, message="said the API server")
    return {"refusals": (refusal,)}


ROLLING = workload("Deployment", "serving", {"replicas": 2, "updatedReplicas": 1})

WORLDS = {
    "the model is loaded for the first time": (_observed(pods=_pods(0, 1)), "InProgress", "Progressing"),
    "all pods are ready": (_observed(pods=_pods(1), registry=connected([version(3)])), "Current", "Healthy"),
    "the first pods of many": (_observed(HUNDRED, pods=_pods(95, 5)), "InProgress", "Progressing"),
    "98 of 100 pods": (_observed(HUNDRED, reached=100, pods=_pods(98, 2, "OOMKilled")), "Current", "Healthy"),
    "89 of 100 pods": (_observed(HUNDRED, reached=100, pods=_pods(89, 11, "OOMKilled")), "InProgress", "Degraded"),
    "a scale-up": (_observed(HUNDRED, reached=2, pods=_pods(2, 98)), "InProgress", "Progressing"),
    "a changed template": (_observed(reached=1, pods=_pods(2), children=ROLLING), "InProgress", "Progressing"),
    "a pod that crashes": (_observed(reached=1, pods=_pods(0, 1, "CrashLoopBackOff")), "InProgress", "Degraded"),
    "no free GPU yet": (_observed(pods=_pods(0, 1, "InsufficientGPU")), "InProgress", "Progressing"),
    "a spec that the API server refuses": (
        _observed(pods=_pods(1), **_refused("InvalidPodTemplate")),
        "Failed",
        "Degraded",
    ),
    "a Secret that another tool brings": (
        _observed(missing_secrets=(MissingSecret("hub"),)),
        "InProgress",
        "Progressing",
    ),
    "suspended": (_observed({"suspend": True}), "Current", "Suspended"),
    "no replicas": (_observed({"serving": {"replicas": 0}}), "Current", "Suspended"),
    "no registry": (_observed(reached=1, pods=_pods(1), registry=AWAY), "Current", "Healthy"),
    "no trainer": (_observed(pods=ready_pods()[:1], registry=connected()), "Current", "Healthy"),
    "a canary that waits for a person": (
        _observed(
            pods=_pods(1), registry=connected([version(3), version(4, pb.PHASE_CANARY)], message="promote or reject it")
        ),
        "Current",
        "Healthy",
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_tools_see_what_clients_see(name: str) -> None:
    seen, kstatus, argo = WORLDS[name]
    assert _told(_after(seen)) == (kstatus, argo)


@pytest.mark.parametrize("owner", [speculator(), draft(3), draft_import()], ids=lambda owner: type(owner).__name__)
def test_an_object_that_no_operator_has_seen_is_in_progress(
    owner: AdaptiveSpeculator | DraftVersion | DraftImport,
) -> None:
    assert _told(_object(owner)) == ("InProgress", "Progressing")


def test_a_change_that_the_operator_has_not_seen_is_in_progress() -> None:
    content = _after(WORLDS["all pods are ready"][0])
    content["metadata"]["generation"] += 1
    assert _told(content) == ("InProgress", "Progressing")


def test_a_resource_that_is_deleted_is_terminating() -> None:
    content = _after(WORLDS["all pods are ready"][0])
    content["metadata"]["deletionTimestamp"] = "2026-11-25T12:00:00Z"
    assert _told(content) == ("Terminating", "Progressing")


def test_a_failure_names_its_cause() -> None:
    content = _after(WORLDS["a spec that the API server refuses"][0])
    kstatus, argo = _asked(
        {"object": content}, {"object": content, "script": _customization("health", "AdaptiveSpeculator")}
    )
    assert kstatus["message"] == argo["value"]["message"] == "said the API server"


FAILED_JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": imports.job_name(speculator(), draft_import()), "namespace": "team"},
    "spec": {},
}
FAILED = {"conditions": [{"type": "Failed", "status": "True", "message": "no such repository"}]}
JOB = as_child(FAILED_JOB, status=FAILED)

DRAFTS = {
    "an import that waits": (_observed(imports=(draft_import(),)), "InProgress", "Progressing"),
    "an import that runs": (_observed(imports=(draft_import(),), registry=connected()), "InProgress", "Progressing"),
    "an import that failed": (_observed(imports=(draft_import(),), children={JOB.ref: JOB}), "Failed", "Degraded"),
    "an import that is done": (_observed(imports=(draft_import(status=imported(3)),)), "Current", "Healthy"),
    "a version that serves": (_observed(drafts=(draft(3),), registry=connected([version(3)])), "Current", "Healthy"),
    "a version that lost": (
        _observed(drafts=(draft(3),), registry=connected([version(3, pb.PHASE_REJECTED)])),
        "Current",
        "Healthy",
    ),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_tools_see_what_became_of_a_draft(name: str) -> None:
    seen, kstatus, argo = DRAFTS[name]
    contents = [
        *(_object(draft, written(new)) for draft, new in versions.statuses(seen, NOW)),
        *(_object(one, written(new)) for one, new in imports.statuses(seen, NOW)),
    ]
    assert [_told(content) for content in contents] == [(kstatus, argo)]


def test_a_version_of_a_person_without_a_speculator_has_failed() -> None:
    told = versions.orphaned(draft(3), NOW)
    assert told is not None
    assert _told(_object(draft(3), written(told))) == ("Failed", "Degraded")


def _actions(content: Json) -> dict[str, bool]:
    """Names of Argo CD's actions, and whether one can be chosen."""
    actions = yaml.safe_load(_customization("actions", content["kind"]))
    (found,) = _asked({"object": content, "script": actions["discovery.lua"]})
    assert found["value"].keys() == {definition["name"] for definition in actions["definitions"]}
    (argo,) = _asked({"object": content, "actions": _customization("actions", content["kind"])}, program=ARGOCD)
    offered = {each["name"]: not each.get("disabled", False) for each in argo["actions"]}
    assert offered == {name: not told["disabled"] for name, told in found["value"].items()}
    return offered


def _acted(content: Json, action: str, parameters: dict[str, str] | None = None) -> Json:
    """The spec after an action."""
    actions = yaml.safe_load(_customization("actions", content["kind"]))
    (script,) = (each["action.lua"] for each in actions["definitions"] if each["name"] == action)
    (answer,) = _asked({"object": content, "script": script, "parameters": parameters})
    question = {"object": content, "actions": _customization("actions", content["kind"])}
    (argo,) = _asked({**question, "action": action, "parameters": parameters}, program=ARGOCD)
    spec: Json = argo["changed"][0]["spec"]
    assert _without_empty(spec) == _without_empty(answer["value"]["spec"])
    return spec


def _without_empty(value: Any) -> Any:
    """Lua cannot tell an empty object from an empty list; Argo CD looks at the object of before."""
    if not isinstance(value, dict):
        return value
    parts = {name: _without_empty(part) for name, part in value.items()}
    return {name: part for name, part in parts.items() if part not in ({}, [])}


def _speculator(rollout: Json, **roles: int) -> Json:
    new_status = {"observedGeneration": 1, "versions": roles, "conditions": []}
    return _object(speculator({"rollout": rollout}), new_status)


@pytest.mark.parametrize(
    ("action", "rollout", "field", "value"),
    [
        ("pause", {}, "paused", True),
        ("resume", {"paused": True}, "paused", False),
        ("promote", {}, "promotedVersion", 5),
        ("roll-back", {}, "pinnedVersion", 3),
        ("pin", {}, "pinnedVersion", 4),
        ("unpin", {"pinnedVersion": 3}, "pinnedVersion", None),
    ],
)
def test_an_action_changes_its_field_of_the_rollout_and_nothing_else(
    action: str, rollout: Json, field: str, value: object
) -> None:
    content = _speculator(rollout, stable=4, candidate=5, previous=3, latest=5)
    assert _actions(content)[action]
    after, before = _acted(content, action), content["spec"]
    assert after["rollout"].pop(field, None) == value
    before["rollout"].pop(field, None)
    assert after == before


def test_actions_that_would_do_nothing_cannot_be_chosen() -> None:
    alone = _actions(_speculator({}, stable=1, latest=1))
    assert alone == {
        "pause": True,
        "resume": False,
        "promote": False,
        "roll-back": False,
        "pin": True,
        "unpin": False,
    }
    new = _actions(_object(speculator()))
    assert {name for name, can in new.items() if can} == {"pause"}
    pinned = _actions(_speculator({"pinnedVersion": 3, "paused": True}, stable=3, previous=3, latest=5))
    assert {name for name, can in pinned.items() if can} == {"resume", "pin", "unpin"}


@pytest.mark.parametrize(
    ("parameters", "version"),
    [(None, 4), ({}, 4), ({"version": ""}, 4), ({"version": "2"}, 2), ({"version": "NoDraft"}, "NoDraft")],
)
def test_any_version_can_be_pinned_where_argo_cd_has_parameters(
    parameters: dict[str, str] | None, version: int | str
) -> None:
    content = _speculator({}, stable=4, latest=5)
    assert _acted(content, "pin", parameters)["rollout"]["pinnedVersion"] == version


def test_a_version_that_is_no_number_is_refused_in_a_sentence() -> None:
    with pytest.raises(AssertionError, match="version must be a number or NoDraft: newest"):
        _acted(_speculator({}, stable=4, latest=5), "pin", {"version": "newest"})


def test_a_draft_is_retained_and_released() -> None:
    kept = _object(draft(3, retain=True))
    assert _actions(_object(draft(3))) == {"retain": True, "release": False}
    assert _actions(kept) == {"retain": False, "release": True}
    assert _acted(_object(draft(3)), "retain")["retain"] is True
    assert _acted(kept, "release")["retain"] is False
