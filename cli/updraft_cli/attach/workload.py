"""How a workload in a cluster is changed so that Updraft works in its pods. Pure.

The operator describes what pods need, in a ConfigMap; this module fits it to the workload: the server's container, its
arguments and its PYTHONPATH. Nothing of the workload's own is repeated, except a list that a patch can only replace as a whole.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from updraft_chassis.errors import InvalidInput

Json = dict[str, Any]

SUFFIX = "-attach"
"""End of the name of the operator's ConfigMap, after that of the AdaptiveSpeculator."""

USUAL_NAMES = ("main", "vllm", "sglang", "engine")
"""Names of servers' containers. A test checks that the operator takes the same."""

_ALIASES = {"--speculative-config": ("-sc", "--speculative_config")}
_CONFIG = "--config"
"""SGLang reads one such file only."""

_SHELLS = ("sh", "bash", "ash", "dash")
_KEYS = {"env": "name", "volumeMounts": "mountPath"}
"""Merge keys of lists in a container."""

_KSERVE_ARGUMENTS = "VLLM_ADDITIONAL_ARGS"
"""Variable with which KServe's templates add arguments to vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """The operator's description."""

    pod: Json
    """Metadata and spec to merge into a pod."""
    server: Json
    """Variables, mounts and arguments of the server."""
    container: str
    """Name of the server's container; empty: the only one, or one of the usual names."""

    @classmethod
    def of(cls, data: Mapping[str, str]) -> "Addition":
        """Read the data of the ConfigMap. Raises InvalidInput for that of another release."""
        try:
            return cls(pod=json.loads(data["pod"]), server=json.loads(data["server"]), container=data["container"])
        except (KeyError, ValueError) as error:
            problem = f"the operator's ConfigMap is not understood: {error}"
            raise InvalidInput(f"{problem}; use the kubectl plugin of the operator's release") from error

    @property
    def taken(self) -> tuple[str, ...]:
        """Options that the server must not have already."""
        option = _option(self.server["args"][0])
        return (option, *_ALIASES.get(option, ()), *((_CONFIG,) if _CONFIG in self.server["args"] else ()))


def patch(addition: Addition, workload: Json) -> Json:
    """The patch of a workload, for `kubectl patch`. Raises InvalidInput with what somebody has to change first."""
    path, template = _template(workload)
    change = _change(addition, template["spec"], is_replaced=not _is_built_in(workload))
    for name in reversed(path):
        change = {name: change}
    return change


def kustomization(addition: Addition, workload: Json) -> Json:
    """A kustomize component with that patch. Arguments are appended where that is possible: the workload may change its own."""
    metadata = {"name": workload["metadata"]["name"]}
    whole = {"apiVersion": workload["apiVersion"], "kind": workload["kind"], "metadata": metadata}
    change, operations = patch(addition, workload), list[Json]()
    if _is_built_in(workload):
        operations = _appended(addition, workload)
        for container in change["spec"]["template"]["spec"]["containers"]:
            container.pop("args", None)
    target = {"kind": workload["kind"], **metadata}
    patches = [{"target": target, "patch": _text({**whole, **change})}]
    if operations:
        patches.append({"target": target, "patch": _text(operations)})
    return {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", "patches": patches}


def warning(addition: Addition, workload: Json) -> str:
    """A sentence for people who are about to apply a patch; empty if there is nothing to check."""
    server = _server(addition, _template(workload)[1]["spec"])
    if any(each["name"] == "PYTHONPATH" for each in server.get("env", ())):
        return ""
    return (
        f"If the image of container {server['name']} or its envFrom sets PYTHONPATH, this patch replaces that path, and the"
        " server may not start. Then write its value into env first. `kubectl rollout undo` takes the patch back."
    )


def inference_service_config(addition: Addition, name: str) -> Json:
    """A LLMInferenceServiceConfig of KServe, to be named in the `baseRefs` of a service. KServe merges it by name.

    Raises InvalidInput for SGLang, whose arguments KServe's templates do not append."""
    if _option(addition.server["args"][0]) not in _ALIASES:
        raise InvalidInput("-o llmisvcconfig is for engine VLLM: KServe's templates append no arguments to SGLang")
    options = " ".join(_quoted(word) for word in addition.server["args"])
    variables = [*addition.server["env"], {"name": _KSERVE_ARGUMENTS, "value": options}]
    server = {"name": addition.container or "main", "env": variables, "volumeMounts": addition.server["volumeMounts"]}
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LLMInferenceServiceConfig",
        "metadata": {"name": f"{name}{SUFFIX}"},
        "spec": {
            "labels": addition.pod["metadata"]["labels"],
            "annotations": addition.pod["metadata"]["annotations"],
            "template": {**addition.pod["spec"], "containers": [server]},
        },
    }


def _is_built_in(workload: Json) -> bool:
    """Whether patches merge its lists by name; those of custom resources are replaced as a whole."""
    return str(workload["apiVersion"]).startswith("apps/")


def _template(workload: Json) -> tuple[tuple[str, ...], Json]:
    """The template of the pods with a server: of several nodes, that of the leader."""
    spec = workload["spec"]
    if "leaderWorkerTemplate" not in spec:
        return ("spec", "template"), spec["template"]
    groups = spec["leaderWorkerTemplate"]
    if not groups.get("leaderTemplate") and groups.get("size", 1) > 1:
        problem = "its leaders have the template of its workers, which have no server"
        raise InvalidInput(f"{problem}: give the LeaderWorkerSet a leaderTemplate")
    name = "leaderTemplate" if groups.get("leaderTemplate") else "workerTemplate"
    return ("spec", "leaderWorkerTemplate", name), groups[name]


def _change(addition: Addition, spec: Json, *, is_replaced: bool) -> Json:
    server = _server(addition, spec)
    changed: Json = {
        "name": server["name"],
        "env": _variables(addition, server),
        "volumeMounts": addition.server["volumeMounts"],
    }
    if ours := _arguments(addition, server):
        changed["args"] = [*_own_arguments(addition, server), *ours]
    user = {
        name: value
        for name, value in (server.get("securityContext") or {}).items()
        if name in ("runAsUser", "runAsGroup")
    }
    inits = [
        {**each, "securityContext": {**each["securityContext"], **user}}
        for each in addition.pod["spec"]["initContainers"]
    ]
    added = {**addition.pod["spec"], "initContainers": inits, "containers": [changed]}
    if is_replaced:
        added = {name: _merged(spec.get(name, ()), entries) for name, entries in added.items()}
    return {"metadata": addition.pod["metadata"], "spec": added}


def _merged(theirs: Sequence[Json], ours: Sequence[Json], key: str = "name") -> list[Json]:
    """Lists of objects, ours over theirs by a key; the lists in containers, too."""
    result = {each[key]: each for each in theirs}
    for each in ours:
        before = result.get(each[key], {})
        lists = {name: _merged(before.get(name, ()), each[name], _KEYS[name]) for name in _KEYS if name in each}
        result[each[key]] = {**before, **each, **(lists if before else {})}
    return list(result.values())


def _server(addition: Addition, spec: Json) -> Json:
    containers = {each["name"]: each for each in spec["containers"]}
    names = [addition.container] if addition.container else list(USUAL_NAMES)
    if len(containers) == 1 and not addition.container:
        names = list(containers)
    found = next((name for name in names if name in containers), "")
    if not found:
        missing = f"no container {addition.container}" if addition.container else "several containers"
        remedy = "name the server's in spec.serving.attached.container"
        raise InvalidInput(f"the workload has {missing}; {remedy}; it has {', '.join(containers)}")
    return dict(containers[found])


def _variables(addition: Addition, server: Json) -> list[Json]:
    """Ours, with the plugin's folder before the path that the server has."""
    theirs = next((each for each in server.get("env", ()) if each["name"] == "PYTHONPATH"), {"value": ""})
    if "value" not in theirs and "valueFrom" in theirs:
        problem = f"PYTHONPATH of container {server['name']} comes from elsewhere (valueFrom)"
        raise InvalidInput(
            f"{problem}: write its value into the workload, so that the plugin's folder can go before it"
        )
    return [_before(each, theirs.get("value", "")) for each in addition.server["env"]]


def _before(variable: Json, path: str) -> Json:
    if variable["name"] != "PYTHONPATH":
        return variable
    folders = [variable["value"], *(folder for folder in path.split(":") if folder not in ("", variable["value"]))]
    return {"name": "PYTHONPATH", "value": ":".join(folders)}


def _arguments(addition: Addition, server: Json) -> list[str]:
    """Ours; none if a script of the server has them already."""
    ours: list[str] = addition.server["args"]
    command = [*server.get("command", ()), *(server.get("args") or ())]
    if command and command[0].rpartition("/")[2] in _SHELLS:
        if _option(ours[0]) in " ".join(command):
            return []
        problem = f"container {server['name']} runs a script, to which nothing can be appended"
        raise InvalidInput(f"{problem}: add to its server's arguments: {' '.join(map(_quoted, ours))}")
    for word in (*server.get("command", ()), *_own_arguments(addition, server)):
        if _option(word) in addition.taken:
            problem = f"container {server['name']} has its own {_option(word)}"
            raise InvalidInput(f"{problem}; remove it, so that Updraft can add one")
    return ours


def _own_arguments(addition: Addition, server: Json) -> list[str]:
    """The server's, without those that an earlier patch of ours added, perhaps for another number of ranks."""
    ours, theirs = addition.server["args"], list(server.get("args") or ())
    folder = addition.server["volumeMounts"][0]["mountPath"]
    if not any(folder in word for word in theirs):
        return theirs
    lengths = {word: 1 if following.startswith("-") else 2 for word, following in pairwise([*ours, "-"])}
    lengths = {_option(word): length for word, length in lengths.items() if word.startswith("-")} | {_CONFIG: 2}
    kept: list[str] = []
    while theirs:
        option = _option(theirs[0])
        words = theirs[: 1 if "=" in theirs[0] else lengths.get(option, 1)]
        is_ours = option in lengths and (folder in " ".join(words) or option not in ("--speculative-config", _CONFIG))
        kept += [] if is_ours else words
        theirs = theirs[len(words) :]
    return kept


def _option(word: str) -> str:
    """An option's name, without its value or the key that it sets (`--option.key value`)."""
    return re.split("[=.]", word, maxsplit=1)[0]


def _appended(addition: Addition, workload: Json) -> list[Json]:
    """Operations of a JSON patch that append our arguments to the server's."""
    spec = workload["spec"]["template"]["spec"]
    server = _server(addition, spec)
    ours = _arguments(addition, server)
    path = f"/spec/template/spec/containers/{[each['name'] for each in spec['containers']].index(server['name'])}/args"
    if not ours:
        return []
    if not _own_arguments(addition, server):
        return [{"op": "add", "path": path, "value": ours}]
    return [{"op": "add", "path": f"{path}/-", "value": word} for word in ours]


def _quoted(word: str) -> str:
    """For a shell: JSON in an argument has double quotes and blanks."""
    return f"'{word}'" if set(word) & set(' "{}') else word


def _text(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=4096)
