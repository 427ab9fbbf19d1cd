"""What a person sees and can do with the two kinds: defaults, subresources, columns, selectors, words in a terminal."""

import json
import re

import pytest
import yaml
from tests.cluster.access import Api, ApiError
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crd.resources import DIGEST, Json, apply, create, over, resource
from tests.cluster.crds import collection
from tests.support.wait import wait_until
from tools.api_reference import EXAMPLES

from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.api.speculator import AdaptiveSpeculator

_LONG_AGO = "2020-01-01T00:00:00Z"

DEFAULTS = yaml.safe_load(
    """
    targetModel: {uri: hf://org/model}
    engine: {type: Torch, tensorParallelSize: 1}
    suspend: false
    deletionPolicy: Retain
    draft: {algorithm: EAGLE3, speculation: Enabled, lookahead: 3}
    serving:
      mode: Managed
      replicas: 1
      maxRunningRequests: 8
      terminationGracePeriodSeconds: 60
      disruptionBudget:
        maxUnavailable: 10%
    trainer: {suspend: false, nodes: 1, workload: Auto, storage: {size: 80Gi}}
    traces: {enabled: true, capture: All, payloadPercent: 100, evaluationPercent: 10}
    registry: {storage: {size: 20Gi}}
    updatePolicy: {mode: Automatic}
    rollout:
      strategy: Canary
      paused: false
      steps: [{podsPercent: 10, holdSeconds: 120}, {podsPercent: 50, holdSeconds: 120}]
      analysis:
        intervalSeconds: 30
        minSamples: 200
        failureLimit: 2
        maxAcceptanceRegressionPercent: 2
        maxDomainRegressionPercent: 5
        maxLatencyRegressionPercent: 5
        onInconclusive: Rollback
        dryRun: false
        comparison: Auto
        switchbackSeconds: 20
      autoRollback: true
      progressDeadlineSeconds: 900
      revisionHistoryLimit: 10
    """
)


PENDING: Json = {
    "conditions": [
        {
            "type": "Ready",
            "status": "Unknown",
            "reason": "Pending",
            "message": "waiting for the operator",
            "lastTransitionTime": "1970-01-01T00:00:00Z",
        }
    ]
}
"""The status before any operator has written one."""


def test_the_least_resource_comes_back_with_all_defaults(api: Api, namespace: str) -> None:
    stored = create(api, namespace, "asp", resource("asp"))

    assert stored["spec"] == DEFAULTS
    assert stored["status"] == PENDING


def test_the_least_import_waits_for_the_operator(api: Api, namespace: str) -> None:
    stored = create(api, namespace, "dimp", resource("dimp"))

    assert stored["spec"] == {"speculatorRef": {"name": "chat"}, "uri": "hf://org/draft"}
    assert stored["status"] == PENDING


@pytest.mark.parametrize(("kind", "field"), [("dver", "source"), ("dver", "version"), ("dimp", "uri")])
def test_an_object_without_its_draft_is_refused(kind: str, field: str, api: Api, namespace: str) -> None:
    content = resource(kind)
    del content["spec"][field]
    with pytest.raises(ApiError, match=rf"spec\.{field}: Required value"):
        create(api, namespace, kind, content)


def test_a_default_inside_is_filled_in_beside_what_was_written(api: Api, namespace: str) -> None:
    written: Json = {
        "serving": {"replicas": 3},
        "trainer": {"storage": {"storageClassName": "fast"}},
        "rollout": {"analysis": {"minSamples": 7}, "steps": [{"podsPercent": 100}]},
        "traces": {"redis": {"urlSecretRef": {"name": "redis"}}},
    }

    spec = create(api, namespace, "asp", resource("asp", **written))["spec"]

    assert spec["serving"] == {**DEFAULTS["serving"], "replicas": 3}
    assert spec["trainer"]["storage"] == {"size": "80Gi", "storageClassName": "fast"}
    assert spec["rollout"]["steps"] == [{"podsPercent": 100, "holdSeconds": 120}]
    assert spec["rollout"]["analysis"] == {**DEFAULTS["rollout"]["analysis"], "minSamples": 7}
    assert spec["traces"]["redis"]["urlSecretRef"] == {"name": "redis", "key": "url"}


def test_the_models_read_what_the_api_server_stores_as_what_was_written(api: Api, namespace: str) -> None:
    written = resource("asp", trainer={"storage": {"storageClassName": "fast"}}, rollout={"pinnedVersion": "NoDraft"})
    stored = create(api, namespace, "asp", written)
    version, imported = (create(api, namespace, kind, resource(kind)) for kind in ("dver", "dimp"))

    assert AdaptiveSpeculator.model_validate(stored).spec == AdaptiveSpeculator.model_validate(written).spec
    assert DraftVersion.model_validate(version).spec == DraftVersion.model_validate(resource("dver")).spec
    assert DraftImport.model_validate(imported).spec == DraftImport.model_validate(resource("dimp")).spec


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_examples_of_the_reference_are_applied_as_they_stand(
    kind: str, kubernetes: ControlPlane, namespace: str
) -> None:
    said = kubernetes.kubectl("apply", f"--namespace={namespace}", "-f", "-", stdin=yaml.safe_dump(EXAMPLES[kind]))
    assert said.strip().endswith("created")


def test_unknown_fields_are_refused_to_kubectl_and_dropped_for_others(
    kubernetes: ControlPlane, api: Api, namespace: str
) -> None:
    unknown = resource("asp", serving={"replica": 3})

    assert create(api, namespace, "asp", unknown)["spec"]["serving"] == DEFAULTS["serving"]
    with pytest.raises(AssertionError, match=r'unknown field "spec\.serving\.replica"'):
        kubernetes.kubectl("apply", f"--namespace={namespace}", "-f", "-", stdin=json.dumps(unknown))


def test_parts_of_pods_are_kept_as_they_are(api: Api, namespace: str) -> None:
    said: Json = {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}},
        "env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        "podTemplate": {"spec": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}},
    }
    for part in ("serving", "trainer", "registry"):
        stored = create(api, namespace, "asp", resource("asp", f"with-{part}", **{part: said}))
        assert over(stored["spec"][part], said) == stored["spec"][part]


def test_spec_and_status_are_written_apart(api: Api, namespace: str) -> None:
    path = f"{collection(namespace, names.SPECULATORS)}/chat"
    created = create(api, namespace, "asp", {**resource("asp"), "status": {"versions": {"stable": 1}}})
    assert created["status"] == PENDING

    written = api.patch(f"{path}/status", {"spec": {"suspend": True}, "status": {"versions": {"stable": 2}}})
    assert (written["spec"]["suspend"], written["status"]) == (False, {**PENDING, "versions": {"stable": 2}})
    assert written["metadata"]["generation"] == 1

    changed = api.patch(path, {"spec": {"suspend": True}, "status": {"versions": {"stable": 3}}})
    assert (changed["spec"]["suspend"], changed["status"]) == (True, {**PENDING, "versions": {"stable": 2}})
    assert changed["metadata"]["generation"] == 2


def test_a_condition_that_says_too_little_is_refused(api: Api, namespace: str) -> None:
    create(api, namespace, "asp", resource("asp"))
    path = f"{collection(namespace, names.SPECULATORS)}/chat/status"
    whole = _condition("Ready", "True", "Ready", "all well")

    assert api.patch(path, {"status": {"conditions": [whole]}})["status"]["conditions"] == [whole]
    for field, wrong in (("status", "Yes"), ("reason", "with spaces"), ("reason", ""), ("lastTransitionTime", "now")):
        with pytest.raises(ApiError, match=rf"status\.conditions\[0\]\.{field}"):
            api.patch(path, {"status": {"conditions": [{**whole, field: wrong}]}})
    with pytest.raises(ApiError, match="Duplicate value"):
        api.patch(path, {"status": {"conditions": [whole, whole]}})


def test_a_phase_of_a_newer_operator_is_stored(api: Api, namespace: str) -> None:
    create(api, namespace, "dver", resource("dver"))
    path = f"{collection(namespace, names.DRAFT_VERSIONS)}/chat/status"
    assert api.patch(path, {"status": {"phase": "Shadow"}})["status"]["phase"] == "Shadow"


def test_kubectl_scale_and_autoscalers_find_replicas_and_selector(
    kubernetes: ControlPlane, api: Api, namespace: str
) -> None:
    create(api, namespace, "asp", resource("asp"))
    path = f"{collection(namespace, names.SPECULATORS)}/chat"
    selector = "updraft.dev/speculator=chat,app.kubernetes.io/component=serving"
    api.patch(f"{path}/status", {"status": {"serving": {"replicas": 2, "selector": selector}}})

    kubernetes.kubectl("scale", "asp/chat", "--replicas=5", f"--namespace={namespace}")

    scale = api.get(f"{path}/scale")
    assert (scale["spec"], scale["status"]) == ({"replicas": 5}, {"replicas": 2, "selector": selector})
    assert api.get(path)["spec"] == {**DEFAULTS, "serving": {**DEFAULTS["serving"], "replicas": 5}}


def test_versions_are_found_by_speculator_and_by_phase(kubernetes: ControlPlane, api: Api, namespace: str) -> None:
    for speculator, number, phase in (("chat", 1, "Stable"), ("chat", 2, "Canary"), ("code", 1, "Stable")):
        _version(api, namespace, speculator, number, {"phase": phase})

    def found(selector: str) -> list[str]:
        words = ("get", "dver", f"--namespace={namespace}", f"--field-selector={selector}", "-o", "name")
        return [line.rpartition("/")[2] for line in kubernetes.kubectl(*words).splitlines()]

    assert found("spec.speculatorRef.name=chat") == ["chat-v1", "chat-v2"]
    assert found("status.phase=Stable") == ["chat-v1", "code-v1"]
    assert found("spec.speculatorRef.name=chat,status.phase!=Stable") == ["chat-v2"]


def test_a_fresh_resource_has_a_line_without_holes_in_it(kubernetes: ControlPlane, api: Api, namespace: str) -> None:
    create(api, namespace, "asp", resource("asp"))
    table = kubernetes.kubectl("get", "asp", f"--namespace={namespace}").splitlines()
    assert table[0].split() == [
        "NAME",
        "READY",
        "REASON",
        "STABLE",
        "CANDIDATE",
        "ACCEPT-LEN",
        "DESIRED",
        "PODS",
        "AGE",
    ]
    assert table[1].startswith("chat ")


def test_the_columns_say_how_it_stands(kubernetes: ControlPlane, api: Api, namespace: str) -> None:
    _speculator_with_a_canary(api, namespace)
    parent = {"parentVersion": 41, "digest": DIGEST}
    status: Json = {
        "phase": "Canary",
        "reason": "better so far",
        "pods": {"loaded": 1, "target": 2},
        "acceptance": {"length": "3.58"},
    }
    _version(api, namespace, "chat", 43, status, **parent)
    create(api, namespace, "dimp", resource("dimp", "mine"))

    line = "adaptivespeculator.updraft.dev/chat False InsufficientGPU 41 43 3.41 8 7 AGE"
    assert _table(kubernetes, namespace, "asp,dver,dimp") == [
        "NAME READY REASON STABLE CANDIDATE ACCEPT-LEN DESIRED PODS AGE",
        line,
        "NAME SPECULATOR VERSION PHASE LOADED TARGET ACCEPT-LEN AGE",
        "draftversion.updraft.dev/chat-v43 chat 43 Canary 1 2 3.58 AGE",
        "NAME SPECULATOR READY REASON VERSION AGE",
        "draftimport.updraft.dev/mine chat Unknown Pending AGE",
    ]
    assert _table(kubernetes, namespace, "asp,dver", "-o", "wide") == [
        "NAME READY REASON STABLE CANDIDATE ACCEPT-LEN DESIRED PODS AGE ROLLOUT UPDATED PINNED ADAPTING TARGET-MODEL MESSAGE",
        f"{line} Canary 6 41 TracesStalled hf://org/model 1 of 8 pods waits for a GPU",
        "NAME SPECULATOR VERSION PHASE LOADED TARGET ACCEPT-LEN AGE REASON PARENT DIGEST SOURCE IMPORT",
        f"draftversion.updraft.dev/chat-v43 chat 43 Canary 1 2 3.58 AGE better so far 41 {DIGEST} Trainer",
    ]


def test_short_names_and_the_category_find_them(kubernetes: ControlPlane, api: Api, namespace: str) -> None:
    create(api, namespace, "asp", resource("asp"))
    create(api, namespace, "dver", resource("dver", "chat-v1"))
    create(api, namespace, "dimp", resource("dimp", "mine"))

    def listed(word: str) -> list[str]:
        return kubernetes.kubectl("get", word, f"--namespace={namespace}", "-o", "name").split()

    speculators, versions = ["adaptivespeculator.updraft.dev/chat"], ["draftversion.updraft.dev/chat-v1"]
    imports = ["draftimport.updraft.dev/mine"]
    assert listed("asp") == listed("adaptivespeculators") == listed("adaptivespeculator") == speculators
    assert listed("dver") == listed("draftversions") == listed("draftversion") == versions
    assert listed("dimp") == listed("draftimports") == listed("draftimport") == imports
    assert listed("speculation") == speculators + imports + versions


def test_kubectl_wait_sees_a_condition(kubernetes: ControlPlane, api: Api, namespace: str) -> None:
    create(api, namespace, "asp", resource("asp"))
    path = f"{collection(namespace, names.SPECULATORS)}/chat/status"
    api.patch(path, {"status": {"conditions": [_condition("Ready", "True", "Ready", "")]}})

    said = kubernetes.kubectl("wait", "--for=condition=Ready", "asp/chat", f"--namespace={namespace}", "--timeout=20s")

    assert said.strip() == "adaptivespeculator.updraft.dev/chat condition met"


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("asp", "A target model, served with a draft model that is trained continuously on its traffic."),
        ("asp.spec.targetModel.uri", "Location of the model in Hugging Face layout: hf://ORG/NAME"),
        ("asp.spec.engine.type", "ENUM: Torch SGLang VLLM"),
        ("asp.spec.deletionPolicy", "the traces outlive this resource; a new one of the same name continues with them"),
        ("asp.spec.rollout.pinnedVersion", "Serve exactly this version now, without analysis"),
        ("asp.spec.rollout.steps.holdSeconds", "Minimum time before the next step."),
        (
            "asp.spec.serving.podTemplate",
            "such as nodeSelector or sidecars, merged over the operator's.",
        ),
        ("asp.status.serving.updatedReplicas", "Pods whose engines report the stable version."),
        ("dimp.status.version", "Number of the version in the registry, once it is imported."),
        ("dver.spec.retain", "Keep the weights regardless of revisionHistoryLimit."),
        ("dver.status.phase", "Phase in the registry: Pending, Held, Canary"),
    ],
)
def test_kubectl_explains_a_field(field: str, words: str, kubernetes: ControlPlane) -> None:
    def explained() -> str:
        try:
            text = kubernetes.kubectl("explain", field)
        except AssertionError:  # the words are published a moment after the resource
            return ""
        return re.sub(r"[\s,]+", " ", text)

    wait_until(lambda: re.sub(r"[\s,]+", " ", words) in explained(), what=f"words about {field}")


def test_the_same_applied_twice_changes_nothing(api: Api, namespace: str) -> None:
    apply(api, namespace, "asp", resource("asp"))
    # The default status is stored with the first write after the creation, which is the operator's.
    api.patch(f"{collection(namespace, names.SPECULATORS)}/chat/status", {"status": {"versions": {"stable": 1}}})
    first = apply(api, namespace, "asp", resource("asp"))
    second = apply(api, namespace, "asp", resource("asp"))

    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


def _speculator_with_a_canary(api: Api, namespace: str) -> None:
    create(api, namespace, "asp", resource("asp", rollout={"pinnedVersion": 41}))
    status: Json = {
        "versions": {"stable": 41, "candidate": 43},
        "rollout": {"phase": "Canary", "version": 43},
        "serving": {"replicas": 8, "desiredReplicas": 8, "readyReplicas": 7, "updatedReplicas": 6},
        "acceptance": {"stable": "3.41", "candidate": "3.58"},
        "conditions": [
            _condition("Ready", "False", "InsufficientGPU", "1 of 8 pods waits for a GPU"),
            _condition("Adapting", "False", "TracesStalled", "no trace for 10 minutes"),
        ],
    }
    api.patch(f"{collection(namespace, names.SPECULATORS)}/chat/status", {"status": status})


def _version(api: Api, namespace: str, speculator: str, number: int, status: Json, **spec: object) -> None:
    name = names.draft_version(speculator, number)
    spec |= {"speculatorRef": {"name": speculator}, "version": number}
    create(api, namespace, "dver", resource("dver", name, **spec))
    api.patch(f"{collection(namespace, names.DRAFT_VERSIONS)}/{name}/status", {"status": status})


def _condition(kind: str, status: str, reason: str, message: str) -> Json:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": _LONG_AGO}


def _table(kubernetes: ControlPlane, namespace: str, *words: str) -> list[str]:
    """The lines of `kubectl get` with single spaces and without how old things are."""
    text = kubernetes.kubectl("get", *words, f"--namespace={namespace}")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return [re.sub(r" \d+m?\d*s\b", " AGE", line) for line in lines]
