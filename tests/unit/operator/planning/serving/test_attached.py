"""Pods of another workload: every sentence about what one lacks, and what enough of them means."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import ATTACHED, CONFIG, speculator
from tests.support.observed import NOW, connected, observed

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.manifests.merge import merged
from updraft_operator.manifests.servers import attachment
from updraft_operator.planning.conditions import conditions
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.serving.attached import attached_pod
from updraft_operator.planning.status import status

READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
STARTING = {"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}]}


def injected(name: str = "vllm-0", pod_status: Mapping[str, Any] = READY, **spec: Any) -> dict[str, Any]:
    """A pod of a Deployment of somebody's, with all that it needs; `spec` changes parts of it."""
    owner = speculator(ATTACHED)
    addition = deepcopy(attachment.addition_of(owner, CONFIG))
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
    pods = tuple(attached_pod(body, owner) for body in bodies)
    registry = replace(connected(), pods=reports)
    given = {"registry": registry, "attached": pods, "pods": tuple(pod.state for pod in pods), **more}
    return observed(spec, **given)


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
    "one rank": (
        {"containers": [{**SERVER, "command": ["vllm", "serve", "--tensor-parallel-size=2"]}]},
        "ParallelismUnsupported",
        "its server has 2 tensor-parallel ranks; with vllm, the plugin supports one",
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

    found = verdict(seen(injected(), injected("vllm-1", **change), reports=(report(), report("vllm-1"))))

    assert found[:2] == ("False", reason)
    assert found[2].startswith("vllm-1: ")
    assert words in found[2]


def test_a_server_with_other_ranks_than_the_spec_has_is_named_with_sglang() -> None:
    spec = merged(ATTACHED, {"engine": "sglang", "serving": {"tensorParallelSize": 2}})
    owner = speculator(spec)
    addition = deepcopy(attachment.addition_of(owner, CONFIG))
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
    one = {"name": "main", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    few = merged(same, {"spec": {"containers": [one]}})
    assert verdict(seen(few, spec=spec))[:2] == ("False", "GPUMismatch")


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
        ({"problem": "its target is a, but the drafts are for b"}, "PluginProblem"),
        ({"problem": "its shape is another", "waits_for_restart": 3}, "RestartNeeded"),
    ],
)
def test_what_an_agent_reports_is_told_in_its_words(fields: dict[str, Any], reason: str) -> None:
    (text,) = (value for value in fields.values() if isinstance(value, str))

    assert verdict(seen(injected(), reports=(report(**fields),))) == ("False", reason, f"vllm-0: {text}")


def test_a_pod_that_is_loading_is_not_expected_to_report() -> None:
    found = verdict(seen(injected(), injected("vllm-1", STARTING), reports=(report(),)))

    assert found == ("Unknown", "PodsStarting", "vllm-1: the server is not ready")


def test_without_the_registry_nobody_knows_what_agents_report() -> None:
    assert verdict(observed(ATTACHED, attached=seen(injected()).attached))[:2] == ("Unknown", "RegistryNotReady")


def test_pods_that_were_attached_with_other_images_work_and_are_named() -> None:
    newer = seen(injected(), reports=(report(),), config=_with_image("inference:2"))

    assert verdict(newer)[:2] == ("True", "Outdated")
    assert "vllm-0" in verdict(newer)[2]


def test_a_selector_that_selects_nothing_wakes_nobody() -> None:
    nothing = seen()

    assert verdict(nothing) == ("False", "NoPods", "no pod of the namespace has the labels app=vllm")
    assert verdict(nothing, "Available")[:2] == ("Unknown", "NoPods")
    assert verdict(nothing, "Ready")[:2] == ("False", "NoPods")
    ended = seen(injected(pod_status={"phase": "Succeeded"}))
    assert verdict(ended)[1] == "NoPods"


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
