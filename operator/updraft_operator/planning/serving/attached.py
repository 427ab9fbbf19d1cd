"""Pods of somebody else's workload: what each of them lacks by its spec, and whether its agent reports a plugin.

Only facts that the API server or the registry has. Refused: questions to the pods, whose ports may be closed to the operator.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Engine
from updraft_operator.manifests import gpus
from updraft_operator.manifests.accounts import account
from updraft_operator.manifests.servers import attachment
from updraft_operator.planning.assessment import Assessment, false, true, unknown
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.pods import AttachedPod, PodProblem, PodState

_ARGUMENT = {Engine.VLLM: "--speculative-config", Engine.SGLANG: "--speculative-algorithm"}

_TENSOR = ("--tensor-parallel-size", "--tp-size", "-tp", "--tp")
_OTHERS = ("--pipeline-parallel-size", "--pp-size", "-pp", "--pp", "--data-parallel-size", "--dp-size", "-dp", "--dp")

_NAMED = 3
"""Pods that a message names; it counts the others."""


def attached_pod(body: Mapping[str, Any], owner: AdaptiveSpeculator) -> AttachedPod:
    """A selected pod, as the API server returns it."""
    problem = next(_problems(body["spec"], owner), None)
    marks = body["metadata"].get("annotations") or {}
    state = replace(PodState.of(body), part=names.SERVING)
    return AttachedPod(state=state, problem=problem, settings=marks.get(names.SETTINGS, ""))


def attachment_of(observed: Observed) -> Iterator[Assessment]:
    """Whether Updraft works in all selected pods; the first thing that is missing, and in which."""
    selected = observed.speculator.spec.serving.attached
    if selected is None:
        return
    pods = [pod for pod in observed.attached if not (pod.state.is_ending or pod.state.is_finished)]
    if not pods:
        yield false("NoPods", f"no pod of the namespace has the labels {selected.selector.text}")
    for problem in dict.fromkeys(pod.problem for pod in pods if pod.problem is not None):
        yield false(problem.reason, f"{_listed(pod for pod in pods if pod.problem == problem)}: {problem.message}")
    yield from _reported(observed, pods)
    mark = attachment.settings_mark(observed.speculator, observed.config)
    if old := [pod for pod in pods if pod.settings != mark]:
        remedy = "apply `kubectl updraft attach` again when a restart suits you"
        yield true("Outdated", f"{_listed(old)}: attached with former settings or images; {remedy}")
    yield true("Attached", f"{len(pods)} pods report to the registry")


def _reported(observed: Observed, pods: list[AttachedPod]) -> Iterator[Assessment]:
    """The words of the agents about the plugins. A server that is not ready yet need not have connected."""
    reports = {report.pod: report for report in observed.registry.pods}
    state, ready = observed.registry.state, [pod for pod in pods if pod.state.is_ready]
    if state is None or not observed.registry.is_connected:
        yield unknown("RegistryNotReady", "what agents report is not known without the registry")
        return
    if silent := [pod for pod in ready if pod.state.name not in reports]:
        why = "the server has not loaded the plugin, or its agent does not reach the registry"
        yield false("NotReporting", f"{_listed(silent)}: {why}; see the log of container {attachment.AGENT}")
    for pod in ready:
        if (problem := reports[pod.state.name].capture_problem) or (problem := reports[pod.state.name].problem):
            is_restart = reports[pod.state.name].waits_for_restart
            yield false("RestartNeeded" if is_restart else "PluginProblem", f"{pod.state.name}: {problem}")
    if len(ready) < len(pods):
        yield unknown("PodsStarting", f"{_listed(pod for pod in pods if pod not in ready)}: the server is not ready")


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


def _missing(spec: Mapping[str, Any], server: Mapping[str, Any], owner: AdaptiveSpeculator) -> Iterator[PodProblem]:
    agents = [
        each for each in (*spec.get("initContainers", ()), *spec["containers"]) if each["name"] == attachment.AGENT
    ]
    variables, engine = {each["name"] for each in server.get("env", ())}, owner.spec.engine
    if not agents:
        yield PodProblem(reason="NotInjected", message=f"it has no container {attachment.AGENT}")
        return
    own = names.child(owner.metadata.name, names.SERVING)
    settings = [each.get("configMapRef", {}).get("name") for each in agents[0].get("envFrom", ())]
    if own not in settings:
        yield PodProblem(reason="OtherSpeculator", message=f"its agent has the settings {settings}, not {own}")
    if engine.value not in agents[0].get("args", ()):
        yield PodProblem(
            reason="EngineDiffers", message=f"its agent is not for {engine.value}: {agents[0].get('args')}"
        )
    if (variable := f"UPDRAFT_{engine.value.upper()}_SOCKET") not in variables:
        yield PodProblem(reason="NotInjected", message=f"container {server['name']} has no variable {variable}")
    if not any(word.startswith(_ARGUMENT[engine]) for word in _words(server)):
        problem = f"container {server['name']} has no argument {_ARGUMENT[engine]}"
        yield PodProblem(reason="EngineArgumentMissing", message=problem)


def _unsupported(server: Mapping[str, Any], owner: AdaptiveSpeculator) -> Iterator[PodProblem]:
    words, expected = list(_words(server)), owner.spec.serving.tensor_parallel_size
    tensor = _size(words, _TENSOR)
    if any(_size(words, (option,)) > 1 for option in _OTHERS):
        problem = "its server has pipeline or data parallelism, which the plugin does not support"
        yield PodProblem(reason="ParallelismUnsupported", message=problem)
    if tensor > 1 and owner.spec.engine is Engine.VLLM:
        problem = f"its server has {tensor} tensor-parallel ranks; with vllm, the plugin supports one"
        yield PodProblem(reason="ParallelismUnsupported", message=problem)
    elif tensor != expected:
        problem = f"its server has {tensor} tensor-parallel ranks, but serving.tensorParallelSize is {expected}"
        yield PodProblem(reason="ParallelismDiffers", message=problem)
    num_gpus = gpus.num_gpus(server.get("resources", {}))
    if num_gpus and num_gpus < tensor:
        yield PodProblem(reason="GPUMismatch", message=f"its server has {tensor} ranks, but {num_gpus} GPUs")


def _words(server: Mapping[str, Any]) -> Iterator[str]:
    """The words of its command line, also of a shell's script; and of variables, with which some images add arguments."""
    given = [*server.get("command", ()), *server.get("args", ())]
    for text in (*given, *(str(each.get("value", "")) for each in server.get("env", ()))):
        yield from text.split()


def _size(words: list[str], options: tuple[str, ...]) -> int:
    """The number that the last of these options has; 1 without one."""
    found = 1
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        number = value or following
        if option in options and number.isdecimal():
            found = int(number)
    return found
