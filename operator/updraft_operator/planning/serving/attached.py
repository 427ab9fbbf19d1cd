"""Pods of somebody else's workload: what each of them lacks by its spec, and whether its agent reports a plugin.

Only facts that the API server or the registry has. Refused: questions to the pods, whose ports may be closed to the operator.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, EngineType
from updraft_operator.manifests import gpus
from updraft_operator.manifests.accounts import account
from updraft_operator.manifests.pod import USER
from updraft_operator.manifests.servers import attachment
from updraft_operator.planning.assessment import Assessment, false, true, unknown
from updraft_operator.planning.objects import Ref, redis_secrets
from updraft_operator.planning.observed import ConnectionState, Observed
from updraft_operator.planning.pods import AttachedPod, PodProblem, PodState

_ARGUMENTS = {EngineType.VLLM: ("--speculative-config", "-sc"), EngineType.SGLANG: ("--speculative-algorithm",)}
"""Spellings of the option for speculation. vLLM takes _ for -, and `--option.key value`."""

_TENSOR = ("--tensor-parallel-size", "--tp-size", "-tp", "--tp")
_OTHERS = ("--pipeline-parallel-size", "--pp-size", "-pp", "--pp", "--data-parallel-size", "--dp-size", "-dp", "--dp")

_WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
"""Label of the pods of a LeaderWorkerSet; leaders have 0."""

_GUESSED = ("EngineArgumentMissing", "ParallelismUnsupported", "ParallelismDiffers", "GPUMismatch")
"""Reasons by a pod's spec that its agent knows better: the server may have arguments that the spec does not show."""

REPORTED_S = 60.0
"""After this time, a ready server's agent has reported, and the registry's answer has come."""

_NAMED = 3
"""Pods that a message names; it counts the others."""


def attached_pod(body: Mapping[str, Any], owner: AdaptiveSpeculator, now_unix_s: float) -> AttachedPod:
    """A selected pod, as the API server returns it."""
    conditions = {entry["type"]: entry for entry in body.get("status", {}).get("conditions", ())}
    since = conditions.get("Ready", {}).get("lastTransitionTime")
    ready_s = now_unix_s - datetime.fromisoformat(since).timestamp() if since else REPORTED_S
    return AttachedPod(
        state=replace(PodState.of(body), part=names.SERVING),
        problem=next(_problems(body["spec"], owner), None),
        settings=(body["metadata"].get("annotations") or {}).get(names.SETTINGS, ""),
        is_ours=names.child(owner.metadata.name, names.SERVING) in map(_settings_of, _agents(body["spec"])),
        has_settled=ready_s >= REPORTED_S,
        redis_secrets=tuple(redis_secrets(_agents(body["spec"]))),
    )


def is_worker(body: Mapping[str, Any]) -> bool:
    """Whether it is a further pod of a server over several nodes. Only the leader has the API, and an agent beside it."""
    return str((body["metadata"].get("labels") or {}).get(_WORKER_INDEX, "0")) != "0"


def with_former_settings(observed: Observed) -> list[AttachedPod]:
    """The pods whose agents read other settings, or another address of Redis, than they would read now."""
    mark = _mark(observed)
    pods = [pod for pod in observed.attached.pods if pod.is_ours and not pod.state.is_finished]
    return [pod for pod in pods if mark and pod.settings.partition("-")[0] != mark.partition("-")[0]]


def attachment_of(observed: Observed) -> Iterator[Assessment]:
    """Whether Updraft works in all selected pods; the first thing that is missing, and in which."""
    selected = observed.speculator.spec.serving.attached
    if selected is None:
        return
    if observed.attached.problem:
        yield unknown("PodsNotListed", observed.attached.problem)
    pods = [pod for pod in observed.attached.pods if not (pod.state.is_ending or pod.state.is_finished)]
    if not pods:
        yield false("NoPods", f"no pod of the namespace has the labels {selected.selector.text}")
    reporting = {report.pod for report in observed.registry.pods}
    lacking = [pod for pod in pods if not (_is_guess(pod.problem) and pod.state.name in reporting)]
    for problem in dict.fromkeys(pod.problem for pod in lacking if pod.problem is not None):
        yield false(problem.reason, f"{_listed(pod for pod in lacking if pod.problem == problem)}: {problem.message}")
    yield from _reported(observed, pods)
    yield from _outdated(observed, pods)
    yield true("Attached", f"{len(pods)} pods report to the registry")


def _reported(observed: Observed, pods: list[AttachedPod]) -> Iterator[Assessment]:
    """The words of the agents about the plugins. A server that is not ready yet need not have connected."""
    view, reports = observed.registry, {report.pod: report for report in observed.registry.pods}
    before = next((each for each in observed.speculator.status.conditions if each.type == "Attached"), None)
    if not view.is_connected:
        if view.connection is ConnectionState.CONNECTING and before is not None:
            yield Assessment(before.status, before.reason, before.message)
        yield unknown("RegistryNotReady", "what agents report is not known without the registry")
        return
    ready = [pod for pod in pods if pod.state.is_ready]
    silent = [pod for pod in ready if pod.state.name not in reports]
    if late := [pod for pod in silent if pod.has_settled and view.has_all_pods]:
        why = "the server has not loaded the plugin, or its agent does not reach the registry"
        yield false("NotReporting", f"{_listed(late)}: {why}; see the log of container {attachment.AGENT}")
    for pod in ready:
        yield from _told(pod.state.name, reports.get(pod.state.name, pb.PodState()))
    if silent and before is not None and before.status == "True":
        yield Assessment(before.status, before.reason, before.message)
    if silent:
        yield unknown("PodsStarting", f"{_listed(silent)}: the agent has not reported yet")
    if len(ready) < len(pods):
        yield unknown("PodsStarting", f"{_listed(pod for pod in pods if pod not in ready)}: the server is not ready")


def _told(name: str, report: pb.PodState) -> Iterator[Assessment]:
    """An agent's words about its server. A problem without a refused version may end by itself."""
    if report.capture_problem:
        yield false("PluginProblem", f"{name}: {report.capture_problem}")
    if report.problem and report.waits_for_restart:
        yield false("RestartNeeded", f"{name}: {report.problem}")
    elif report.problem and report.refused:
        yield false("PluginProblem", f"{name}: {report.problem}")
    elif report.problem:
        yield unknown("DraftPending", f"{name}: {report.problem}")


def _outdated(observed: Observed, pods: list[AttachedPod]) -> Iterator[Assessment]:
    """Pods without the present additions. Agents with former settings may capture what they no longer should."""
    mark = _mark(observed)
    if not mark:
        return
    if old := [pod for pod in with_former_settings(observed) if pod in pods]:
        why = "their agents read former settings of traces or of Redis when they started"
        yield false("SettingsOutdated", f"{_listed(old)}: {why}; apply `kubectl updraft attach` again")
    if old := [pod for pod in pods if pod.settings != mark]:
        remedy = "apply `kubectl updraft attach` again when a restart suits you"
        yield true("Outdated", f"{_listed(old)}: attached with former images or arguments; {remedy}")


def _mark(observed: Observed) -> str:
    """The annotation that pods would get now; empty while nothing is described."""
    described = observed.children.get(Ref("ConfigMap", attachment.config_map(observed.name)))
    data = described.live().get("data") or {} if described is not None else {}
    return attachment.settings_mark(data) if attachment.POD in data else ""


def _is_guess(problem: PodProblem | None) -> bool:
    return problem is not None and problem.reason in _GUESSED


def _listed(pods: Iterable[AttachedPod]) -> str:
    found = sorted(pod.state.name for pod in pods)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"


def _problems(spec: Mapping[str, Any], owner: AdaptiveSpeculator) -> Iterator[PodProblem]:
    serving = owner.spec.serving
    assert serving.attached is not None
    containers = {each["name"]: each for each in spec["containers"]}
    server = containers.get(attachment.server_container(spec["containers"], serving.attached.container))
    if server is None:
        chosen = serving.attached.container
        why = (
            f"no container {chosen}"
            if chosen
            else "several containers, so name the server's in serving.attached.container"
        )
        yield PodProblem(reason="ContainerNotFound", message=f"it has {why}; it has {', '.join(containers)}")
        return
    yield from _missing(spec, server, owner)
    if (used := spec.get("serviceAccountName", "default")) != (expected := account(owner, names.SERVING)):
        problem = f"it runs as ServiceAccount {used}, but serving.attached.serviceAccountName is {expected}"
        yield PodProblem(reason="AccountDiffers", message=problem)
    yield from _unsupported(server, owner)
    yield from _port(server, owner)


def _missing(spec: Mapping[str, Any], server: Mapping[str, Any], owner: AdaptiveSpeculator) -> Iterator[PodProblem]:
    agents = _agents(spec)
    variables, engine = {each["name"] for each in server.get("env", ())}, owner.spec.engine.type
    if not agents:
        yield PodProblem(reason="NotInjected", message=f"it has no container {attachment.AGENT}")
        return
    if (settings := _settings_of(agents[0])) != (own := names.child(owner.metadata.name, names.SERVING)):
        yield PodProblem(
            reason="OtherSpeculator", message=f"its agent has the settings {settings or 'of nobody'}, not {own}"
        )
    if engine.word not in agents[0].get("args", ()):
        yield PodProblem(reason="EngineDiffers", message=f"its agent is not for {engine.word}: {agents[0].get('args')}")
    if (variable := f"UPDRAFT_{engine.word.upper()}_SOCKET") not in variables:
        yield PodProblem(reason="NotInjected", message=f"container {server['name']} has no variable {variable}")
    if not any(re.split("[=.]", word)[0].replace("_", "-") in _ARGUMENTS[engine] for word in _words(server)):
        problem = f"container {server['name']} has no argument {_ARGUMENTS[engine][0]}"
        yield PodProblem(reason="EngineArgumentMissing", message=problem)
    if (theirs := _user(spec, server)) and theirs != (ours := _user(spec, agents[0]) or USER):
        problem = f"container {server['name']} runs as user {theirs}, but its agent as {ours}"
        yield PodProblem(reason="UserDiffers", message=f"{problem}, so that they cannot share files")


def _agents(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in (*spec.get("initContainers", ()), *spec["containers"]) if each["name"] == attachment.AGENT]


def _user(spec: Mapping[str, Any], container: Mapping[str, Any]) -> int:
    """The user that its container runs as; 0 for root, who may read everything, and if only the image says it."""
    contexts = [each.get("securityContext") or {} for each in (container, spec)]
    return next((int(context["runAsUser"]) for context in contexts if "runAsUser" in context), 0)


def _settings_of(agent: Mapping[str, Any]) -> str:
    """The ConfigMap with an agent's settings; empty without one."""
    found = (each["configMapRef"]["name"] for each in agent.get("envFrom", ()) if "configMapRef" in each)
    return next(found, "")


def _unsupported(server: Mapping[str, Any], owner: AdaptiveSpeculator) -> Iterator[PodProblem]:
    words, expected = list(_words(server)), owner.spec.engine.tensor_parallel_size
    tensor = _size(words, _TENSOR)
    if any(_size(words, (option,)) > 1 for option in _OTHERS):
        problem = "its server has pipeline or data parallelism, which the plugin does not support"
        yield PodProblem(reason="ParallelismUnsupported", message=problem)
    if (nodes := _size(words, ("--nnodes",))) > 1:
        problem = (
            f"its server spans {nodes} nodes: requests are at most counted, rows not captured and drafts not swapped"
        )
        yield PodProblem(reason="NodesUnsupported", message=problem)
    if tensor != expected:
        problem = f"its server has {tensor} tensor-parallel ranks, but engine.tensorParallelSize is {expected}"
        yield PodProblem(reason="ParallelismDiffers", message=problem)
    num_gpus = gpus.num_gpus(server.get("resources", {}))
    if num_gpus and num_gpus < tensor:
        yield PodProblem(reason="GPUMismatch", message=f"its server has {tensor} ranks, but {num_gpus} GPUs")


def _port(server: Mapping[str, Any], owner: AdaptiveSpeculator) -> Iterator[PodProblem]:
    called = attachment.port(owner)
    if called is not None and (used := _size(list(_words(server)), ("--port",), otherwise=called)) != called:
        problem = f"its server has --port {used}, but serving.attached.port is {called}"
        yield PodProblem(reason="PortDiffers", message=problem)


def _words(server: Mapping[str, Any]) -> Iterator[str]:
    """The words of its command line, also of a shell's script; and of variables, with which some images add arguments."""
    given = [*server.get("command", ()), *server.get("args", ())]
    for text in (*given, *(str(each.get("value", "")) for each in server.get("env", ()))):
        yield from text.split()


def _size(words: list[str], options: tuple[str, ...], *, otherwise: int = 1) -> int:
    """The number that the last of these options has."""
    found = otherwise
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        number = value or following
        if option in options and number.isdecimal():
            found = int(number)
    return found
