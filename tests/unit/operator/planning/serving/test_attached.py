"""Pods of another workload: every sentence about what one lacks, and what enough of them means."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.support.manifests import ATTACHED, CONFIG, one, speculator
from tests.support.observed import NOW, NOW_S, as_child, connected, observed, redis_urls

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.merge import merged
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.servers import attachment
from updraft_operator.planning.conditions import conditions
from updraft_operator.planning.objects import Child
from updraft_operator.planning.observed import ConnectionState, Observed, RegistryView
from updraft_operator.planning.plan import objects
from updraft_operator.planning.pods import Selection
from updraft_operator.planning.serving.attached import REPORTED_S, attached_pod
from updraft_operator.planning.status import status

READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
STARTING = {"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}]}


def injected(name: str = "vllm-0", pod_status: Mapping[str, Any] = READY, **spec: Any) -> dict[str, Any]:
    """A pod of a Deployment of somebody's, with all that it needs; `spec` changes parts of it."""
    owner = speculator(ATTACHED)
    addition = json.loads(_described(ATTACHED, CONFIG).live()["data"]["pod"])
    own = {"name": "server", "image": "vllm", **attachment.server_addition(owner)}
    body = {
        "metadata": {"name": name, "namespace": "team", "uid": name, "labels": {"app": "vllm"}},
        "spec": {"containers": [own], "serviceAccountName": "default"},
        "status": dict(pod_status),
    }
    whole = merged(merged(body, addition), {"spec": spec})
    assert isinstance(whole, dict)
    return whole


def report(name: str = "vllm-0", **fields: Any) -> pb.PodState:
    return pb.PodState(pod=name, engine="vllm/0.32.0", connected=True, **fields)


def seen(
    *bodies: Mapping[str, Any], reports: tuple[pb.PodState, ...] = (), spec: Any = ATTACHED, **more: Any
) -> Observed:
    owner = speculator(spec)
    attached = Selection(pods=tuple(attached_pod(body, owner, NOW_S) for body in bodies))
    registry, described = replace(connected(), pods=reports), _described(spec, more.get("config", CONFIG))
    given = {
        "registry": registry,
        "children": {described.ref: described},
        "attached": attached,
        "pods": attached.states,
        **more,
    }
    return observed(spec, **given)


def _described(spec: Any, config: OperatorConfig) -> Child:
    """The ConfigMap with what pods need."""
    return as_child(one(objects(observed(spec, config=config)), "ConfigMap", "qwen-attach"))


def verdict(observation: Observed, kind: str = "Attached") -> tuple[str, str, str]:
    found = conditions(observation)[kind]
    return found.status, found.reason, found.message


def test_a_pod_with_everything_whose_agent_reports_is_attached() -> None:
    observation = seen(injected(), reports=(report(),))

    assert verdict(observation) == ("True", "Attached", "1 pods report to the registry")
    assert verdict(observation, "Available")[:2] == ("True", "PodsReady")
    assert verdict(observation, "Ready")[:2] == ("True", "Ready")


SERVER = {"name": "server"}
LACKS: dict[str, tuple[dict[str, Any], str, str]] = {
    "an agent": ({"initContainers": None}, "NotInjected", "it has no container updraft-agent"),
    "the plugin's socket": (
        {"containers": [{**SERVER, "env": None}]},
        "NotInjected",
        "container server has no variable UPDRAFT_VLLM_SOCKET",
    ),
    "the argument": (
        {"containers": [{**SERVER, "args": ["--model", "qwen"]}]},
        "EngineArgumentMissing",
        "container server has no argument --speculative-config",
    ),
    "a known server": (
        {"containers": [{"name": "proxy"}]},
        "ContainerNotFound",
        "several containers, so name the server's in serving.attached.container; it has server, proxy",
    ),
    "its account": (
        {"serviceAccountName": "vllm"},
        "AccountDiffers",
        "it runs as ServiceAccount vllm, but serving.attached.serviceAccountName is default",
    ),
    "the engine": (
        {"initContainers": [{"name": "updraft-agent", "args": ["--engine", "sglang"]}]},
        "EngineDiffers",
        "its agent is not for vllm",
    ),
    "this speculator": (
        {"initContainers": [{"name": "updraft-agent", "envFrom": [{"configMapRef": {"name": "other-serving"}}]}]},
        "OtherSpeculator",
        "not qwen-serving",
    ),
    "its server's user": (
        {"containers": [{**SERVER, "securityContext": {"runAsUser": 1000}}]},
        "UserDiffers",
        "container server runs as user 1000, but its agent as 65532",
    ),
    "one rank": (
        {"containers": [{**SERVER, "command": ["vllm", "serve", "--tensor-parallel-size=2"]}]},
        "ParallelismDiffers",
        "its server has 2 tensor-parallel ranks, but engine.tensorParallelSize is 1",
    ),
    "one node": (
        {"containers": [{**SERVER, "command": ["vllm", "serve", "--nnodes", "2"]}]},
        "NodesUnsupported",
        "its server spans 2 nodes: requests are at most counted, rows not captured",
    ),
    "one replica": (
        {"containers": [{**SERVER, "command": ["sh", "-c", "exec vllm serve -dp 2"]}]},
        "ParallelismUnsupported",
        "its server has pipeline or data parallelism",
    ),
}


@pytest.mark.parametrize("lacks", LACKS)
def test_what_a_pod_lacks_is_named_with_the_pod(lacks: str) -> None:
    change, reason, words = LACKS[lacks]

    found = verdict(seen(injected(), injected("vllm-1", **change), reports=(report(),)))

    assert found[:2] == ("False", reason)
    assert found[2].startswith("vllm-1: ")
    assert words in found[2]


def test_several_ranks_of_vllm_are_attached_if_the_spec_has_as_many() -> None:
    spec = merged(ATTACHED, {"engine": {"tensorParallelSize": 2}})
    server = {**SERVER, "command": ["vllm", "serve", "--tensor-parallel-size=2"]}
    pod = injected(containers=[server])

    assert verdict(seen(pod, spec=spec, reports=(report(),)))[:2] == ("True", "Attached")


def test_a_server_with_other_ranks_than_the_spec_has_is_named_with_sglang() -> None:
    spec = merged(ATTACHED, {"engine": {"type": "SGLang", "tensorParallelSize": 2}})
    owner = speculator(spec)
    addition = json.loads(_described(spec, CONFIG).live()["data"]["pod"])
    own = {
        "name": "main",
        **attachment.server_addition(owner),
        "args": ["--tp", "4", *attachment.arguments(owner)],
        "resources": {"limits": {"nvidia.com/gpu": "4"}},
    }
    body = merged({"metadata": {"name": "sglang-0"}, "spec": {"containers": [own]}, "status": READY}, addition)

    assert verdict(seen(body, spec=spec))[:2] == ("False", "ParallelismDiffers")
    same = merged(body, {"spec": {"containers": [{**own, "args": ["--tp", "2", *attachment.arguments(owner)]}]}})
    assert verdict(seen(same, spec=spec, reports=(report("sglang-0"),)))[:2] == ("True", "Attached")
    elsewhere = [{**own, "args": ["--tp", "2", "--port=8000", *attachment.arguments(owner)]}]
    assert verdict(seen(merged(same, {"spec": {"containers": elsewhere}}), spec=spec))[:2] == ("False", "PortDiffers")
    one = {"name": "main", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    few = merged(same, {"spec": {"containers": [one]}})
    assert verdict(seen(few, spec=spec))[:2] == ("False", "GPUMismatch")


@pytest.mark.parametrize(
    "words", [["-sc", "{}"], ["--speculative_config={}"], ["--speculative-config.method", "eagle3"]]
)
def test_every_spelling_of_the_argument_counts(words: list[str]) -> None:
    assert verdict(seen(injected(containers=[{**SERVER, "args": words}])))[1] == "NotReporting"


def test_the_users_of_server_and_agent_may_be_the_pods_or_root() -> None:
    for context in ({"runAsUser": 1000}, {"runAsUser": 0}, {}):
        found = verdict(seen(injected(securityContext=context), reports=(report(),)))
        assert found[:2] == ("True", "Attached")


def test_pods_with_the_same_problem_share_a_sentence() -> None:
    pods = [injected(f"vllm-{number}", initContainers=None) for number in range(5)]

    assert verdict(seen(*pods))[2] == "vllm-0, vllm-1, vllm-2 and 2 more: it has no container updraft-agent"


def test_a_ready_server_whose_agent_says_nothing_has_no_plugin() -> None:
    status_, reason, message = verdict(seen(injected(), injected("vllm-1"), reports=(report(),)))

    assert (status_, reason) == ("False", "NotReporting")
    assert message.startswith("vllm-1: the server has not loaded the plugin")
    assert "container updraft-agent" in message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"capture_problem": "vLLM 0.31 has no hook"}, "PluginProblem"),
        ({"problem": "its target is a, but the drafts are for b", "refused": 3}, "PluginProblem"),
        ({"problem": "its shape is another", "waits_for_restart": 3}, "RestartNeeded"),
    ],
)
def test_what_an_agent_reports_is_told_in_its_words(fields: dict[str, Any], reason: str) -> None:
    (text,) = (value for value in fields.values() if isinstance(value, str))

    assert verdict(seen(injected(), reports=(report(**fields),))) == ("False", reason, f"vllm-0: {text}")


def test_a_draft_that_an_agent_fetches_again_is_no_problem_of_the_plugin() -> None:
    found = verdict(seen(injected(), reports=(report(problem="version 3 is not fetched yet"),)))

    assert found == ("Unknown", "DraftPending", "vllm-0: version 3 is not fetched yet")


@pytest.mark.parametrize("lacks", ["the argument", "one rank", "one replica"])
def test_an_agent_that_reports_knows_better_than_the_pods_spec(lacks: str) -> None:
    change, _, _ = LACKS[lacks]

    assert verdict(seen(injected(**change), reports=(report(),)))[:2] == ("True", "Attached")


def _ready_since(age_s: float) -> dict[str, Any]:
    since = datetime.fromtimestamp(NOW_S - age_s, UTC).isoformat()
    return {"phase": "Running", "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": since}]}


def _before(status_: str, reason: str) -> Any:
    at = NOW.isoformat()
    kept = {"type": "Attached", "status": status_, "reason": reason, "message": "as before", "lastTransitionTime": at}
    return speculator(ATTACHED, status={"conditions": [kept]})


def test_a_pod_that_has_just_become_ready_has_time_to_report() -> None:
    new, late = (injected("vllm-1", _ready_since(age_s)) for age_s in (REPORTED_S - 1, REPORTED_S + 1))

    for owner, found in (
        (speculator(ATTACHED), ("Unknown", "PodsStarting")),
        (_before("True", "Attached"), ("True", "Attached")),
        (_before("False", "NotInjected"), ("Unknown", "PodsStarting")),
    ):
        assert verdict(seen(injected(), new, reports=(report(),), speculator=owner))[:2] == found
    assert verdict(seen(injected(), late, reports=(report(),), speculator=_before("True", "Attached")))[:2] == (
        "False",
        "NotReporting",
    )


def test_agents_have_time_to_connect_again_to_a_registry_that_restarted() -> None:
    registry = replace(connected(), has_all_pods=False)

    assert verdict(seen(injected(), registry=registry, speculator=_before("True", "Attached")))[0] == "True"


def test_an_operator_that_has_just_started_keeps_what_is_said_about_the_pods() -> None:
    connecting = RegistryView(connection=ConnectionState.CONNECTING)

    for status_, reason in (("True", "Attached"), ("False", "NotReporting")):
        found = verdict(seen(injected(), registry=connecting, speculator=_before(status_, reason)))
        assert found == (status_, reason, "as before")


def test_a_pod_that_is_loading_is_not_expected_to_report() -> None:
    found = verdict(seen(injected(), injected("vllm-1", STARTING), reports=(report(),)))

    assert found == ("Unknown", "PodsStarting", "vllm-1: the server is not ready")


def test_without_the_registry_nobody_knows_what_agents_report() -> None:
    assert verdict(observed(ATTACHED, attached=seen(injected()).attached))[:2] == ("Unknown", "RegistryNotReady")


def test_pods_that_were_attached_with_other_images_work_and_are_named() -> None:
    newer = seen(injected(), reports=(report(),), config=_with_image("inference:2"))

    assert verdict(newer)[:2] == ("True", "Outdated")
    assert "vllm-0" in verdict(newer)[2]


@pytest.mark.parametrize(
    "change", [{"traces": {"capture": "OptIn"}}, {"traces": {"retention": "1d"}}, {"traces": {"shards": 2}}]
)
def test_agents_that_read_former_settings_are_a_problem(change: dict[str, Any]) -> None:
    """They go on with what they read at start: a change of capture is a promise to the people whose requests these are."""
    found = verdict(seen(injected(), reports=(report(),), spec=merged(ATTACHED, change)))

    assert found[:2] == ("False", "SettingsOutdated")
    assert found[2].startswith("vllm-0: ")


def test_agents_with_a_former_password_of_redis_are_a_problem() -> None:
    mended = observed(ATTACHED, redis_urls=redis_urls(passwords=dict.fromkeys(Role, 32 * "2c")))
    described = as_child(one(objects(mended), "ConfigMap", "qwen-attach"))

    assert verdict(seen(injected(), reports=(report(),), children={described.ref: described}))[1] == "SettingsOutdated"


def test_a_selector_that_selects_nothing_wakes_nobody() -> None:
    nothing = seen()

    assert verdict(nothing) == ("False", "NoPods", "no pod of the namespace has the labels app=vllm")
    assert verdict(nothing, "Available")[:2] == ("Unknown", "NoPods")
    assert verdict(nothing, "Ready")[:2] == ("False", "NoPods")
    ended = seen(injected(pod_status={"phase": "Succeeded"}))
    assert verdict(ended)[1] == "NoPods"


def test_pods_without_an_agent_of_this_speculator_are_neither_its_replicas_nor_ready_for_it() -> None:
    other = injected(initContainers=[{"name": "updraft-agent", "envFrom": [{"configMapRef": {"name": "b-serving"}}]}])
    for bodies in ((injected(initContainers=None),), (other,)):
        observation = seen(*bodies)
        assert verdict(observation, "Available")[:2] == ("Unknown", "NotInjected")
        assert verdict(observation, "Ready")[:2] == ("False", "NotInjected")
        serving = status(observation, NOW).serving
        assert serving is not None
        assert (serving.replicas, serving.ready_replicas) == (0, 0)


def test_a_workload_that_comes_back_from_zero_pods_loads_its_model_and_misses_none() -> None:
    none = status(seen(speculator=speculator(ATTACHED, status={"serving": {"reachedReplicas": 2}})), NOW).serving
    assert none is not None
    back = speculator(ATTACHED, status={"serving": none.model_dump(by_alias=True)})

    assert none.reached_replicas is None
    assert verdict(seen(injected(pod_status=STARTING), speculator=back), "Available")[:2] == ("False", "ModelLoading")


def test_pods_that_cannot_be_listed_are_unknown() -> None:
    refused = seen(attached=Selection(problem="pods is forbidden"), pods=())

    for kind in ("Attached", "Available"):
        assert verdict(refused, kind) == ("Unknown", "PodsNotListed", "pods is forbidden")
    before = speculator(ATTACHED, status={"serving": {"reachedReplicas": 2}})
    kept = status(replace(refused, speculator=before), NOW).serving
    assert kept is not None
    assert kept.reached_replicas == 2


def test_as_many_pods_as_there_are_should_be_ready_but_for_the_budget() -> None:
    pods = [injected(f"vllm-{number}", READY if number else STARTING) for number in range(3)]
    before = {"serving": {"reachedReplicas": 3}}
    some = seen(*pods, speculator=speculator(ATTACHED, status=before))
    none = seen(
        *(injected(f"vllm-{number}", STARTING) for number in range(3)), speculator=speculator(ATTACHED, status=before)
    )

    assert verdict(some, "Available") == ("True", "PodsReady", "2 of 3 pods are ready")
    assert verdict(some, "FullyScaled")[:2] == ("False", "PodsMissing")
    assert verdict(none, "Available")[:2] == ("False", "PodsMissing")


def test_the_status_has_the_workloads_pods_and_no_address_of_ours() -> None:
    serving = status(seen(injected(), injected("vllm-1", STARTING)), NOW).serving

    assert serving is not None
    assert (serving.replicas, serving.ready_replicas, serving.selector, serving.url) == (2, 1, "app=vllm", None)


def _with_image(image: str) -> Any:
    return replace(CONFIG, images=replace(CONFIG.images, inference=image))
