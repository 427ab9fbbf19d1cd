"""Additions to the pods of somebody else's workload, and the ConfigMap that tells them to people, tools and admission policies.

The operator never changes these pods. It describes what is added to them: init containers, a native sidecar, volumes, and
variables and arguments of the server. Names begin with `updraft-`, because the rest of the pod is not ours. A container names
no user: it runs as the pod's, which may be the server's only way to read what the agent writes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, EngineType
from updraft_operator.manifests import pod
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, digest, manifest
from updraft_operator.manifests.model import ModelMount, model
from updraft_operator.manifests.redis import redis_marks
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.servers import server, sglang, vllm
from updraft_operator.manifests.servers.server import Server
from updraft_operator.manifests.tls import objects as tls

AGENT = "updraft-agent"
DRAFT_CONFIG = "draft-config"
"""Entry with the config.json whose sizes the initial draft has; missing: the sizes of the spec."""
POD, SERVER, CONTAINER = "pod", "server", "container"
"""Entries with the additions to a pod and to its server, as JSON, and the name of the server's container."""

_PREFIX = "updraft-"
_SERVER_NAMES = ("main", "vllm", "sglang", "engine")
"""Names of servers' containers in widespread charts; main is KServe's."""


def objects(
    owner: AdaptiveSpeculator, config: OperatorConfig, *, draft_config: str, settings: Mapping[str, str]
) -> list[Manifest]:
    """The agents' settings, and the description of what pods need."""
    addition = addition_of(owner, config, settings)
    data = {
        POD: json.dumps(addition, sort_keys=True),
        SERVER: json.dumps(server_addition(owner), sort_keys=True),
        CONTAINER: (owner.spec.serving.attached.container if owner.spec.serving.attached else None) or "",
        **({DRAFT_CONFIG: draft_config} if draft_config else {}),
    }
    name = config_map(owner.metadata.name)
    return [
        pod.settings(owner, names.SERVING, settings),
        manifest(owner, "v1", "ConfigMap", name, names.SERVING, data=data),
    ]


def config_map(speculator: str) -> str:
    return names.child(speculator, "attach")


def addition_of(owner: AdaptiveSpeculator, config: OperatorConfig, settings: Mapping[str, str]) -> dict[str, Any]:
    """Metadata and spec to merge into a pod; `server_addition` has those of its server.

    Agents read `settings` at start, so the annotation has a digest of them, and one of the other additions."""
    target = model(owner.spec.target_model, owner.spec.serving.model_cache, config.images, is_head_only=True)
    stock = _server(owner, config, target)
    agent = server.agent(owner, config, target, stock)
    prepare = server.prepare(owner, config, target, stock, "")
    prepare["env"] = [*prepare["env"], _optional_draft_config(owner)]
    # The pod then requests no more than with an agent alone: init containers run before it.
    resources = (owner.spec.serving.attached.resources if owner.spec.serving.attached else None) or agent["resources"]
    added = (*target.init_containers, prepare, {**agent, "name": "agent"})
    spec: dict[str, Any] = {
        "initContainers": [{**_added(each), "resources": resources} for each in added],
        "volumes": [_prefixed(each) for each in (*target.volumes, *_volumes(owner, config))],
    }
    if config.images.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in config.images.pull_secrets]
    read = digest({**settings, **redis_marks(owner, Role.WRITER, config)})
    return {
        "metadata": {
            "labels": {names.ATTACH: owner.metadata.name},
            "annotations": {names.SETTINGS: f"{read}-{digest({'spec': spec, 'server': server_addition(owner)})}"},
        },
        "spec": spec,
    }


def server_addition(owner: AdaptiveSpeculator) -> dict[str, Any]:
    """Variables, mounts and arguments of the server. PYTHONPATH goes before a path that it has already."""
    socket = f"UPDRAFT_{owner.spec.engine.type.word.upper()}_SOCKET"
    return {
        "env": pod.variables({"PYTHONPATH": server.PLUGIN, socket: server.SOCKET}),
        "volumeMounts": [_prefixed(pod.DATA)],
        "args": arguments(owner),
    }


def arguments(owner: AdaptiveSpeculator) -> list[str]:
    """The server's arguments, each option with its value in one word."""
    lookahead = owner.spec.draft.lookahead
    if owner.spec.engine.type is EngineType.VLLM:
        return [f"--speculative-config={json.dumps(vllm.speculation(lookahead))}"]
    words = sglang.speculation(server.INITIAL_DRAFT, lookahead)
    return [*words, *(("--config", sglang.ADMIN_KEY) if _has_ranks(owner) else ())]


def server_container(containers: Iterable[Mapping[str, Any]], chosen: str | None) -> str:
    """The name of the server's container; empty if none has the chosen name, or if several may be it."""
    found = [str(each["name"]) for each in containers]
    if chosen is not None:
        return chosen if chosen in found else ""
    return found[0] if len(found) == 1 else next((name for name in _SERVER_NAMES if name in found), "")


def settings_mark(data: Mapping[str, str]) -> str:
    """The annotation that pods get with the description in a ConfigMap's data: digests of settings and of the rest."""
    return str(json.loads(data[POD])["metadata"]["annotations"][names.SETTINGS])


def _server(owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount) -> Server:
    if owner.spec.engine.type is EngineType.VLLM:
        return vllm.describe(owner, config.images, target)
    stock = sglang.describe(owner, config.images, target)
    if not _has_ranks(owner):
        return Server(engine=stock.engine, image="", port=0, health="", command=(), args=())
    return replace(stock, agent_args=("--attach", f"http://127.0.0.1:{port(owner)}"))


def port(owner: AdaptiveSpeculator) -> int | None:
    """The port at which agents call their server; None if they do not."""
    attached = owner.spec.serving.attached
    return (attached and attached.port) or sglang.PORT if _has_ranks(owner) else None


def _has_ranks(owner: AdaptiveSpeculator) -> bool:
    """Whether the agent calls the server, with its admin key: it swaps the drafts of several ranks so."""
    return owner.spec.engine.type is EngineType.SGLANG and owner.spec.engine.tensor_parallel_size > 1


def _volumes(owner: AdaptiveSpeculator, config: OperatorConfig) -> list[dict[str, Any]]:
    token = pod.token_volume(owner, "serve")
    # Without a group of the pod, only root could read the token in the mode that our own pods have.
    token["projected"] = {**token["projected"], "defaultMode": 0o444}
    trusted = [
        {**each, "configMap": {**each["configMap"], "optional": True}} for each in tls.client_volumes(owner, config)
    ]
    return [{"name": pod.DATA["name"], "emptyDir": {}}, token, *trusted, pod.TMP]


def _optional_draft_config(owner: AdaptiveSpeculator) -> dict[str, Any]:
    source = {"name": config_map(owner.metadata.name), "key": DRAFT_CONFIG, "optional": True}
    return {"name": server.DRAFT_CONFIG, "valueFrom": {"configMapKeyRef": source}}


def _prefixed(named: Mapping[str, Any]) -> dict[str, Any]:
    """A volume, or its mount. Those of TLS are called ours everywhere."""
    return {**named, "name": f"{_PREFIX}{named['name'].removeprefix(_PREFIX)}"}


def _added(container: Mapping[str, Any]) -> dict[str, Any]:
    """A container of ours for a pod of somebody else, which must start even if objects of ours are missing."""
    result = {
        **_prefixed(container),
        "volumeMounts": [_prefixed(mount) for mount in container["volumeMounts"]],
        "env": [_optional(variable) for variable in container["env"]],
    }
    if "envFrom" in container:
        result["envFrom"] = [
            {kind: {**source, "optional": True} for kind, source in each.items()} for each in container["envFrom"]
        ]
    if "ports" in container:
        result["ports"] = [_prefixed(port) for port in container["ports"]]
        probe = container["livenessProbe"]
        result["livenessProbe"] = {**probe, "httpGet": {**probe["httpGet"], "port": server.METRICS_PORT}}
    return result


def _optional(variable: Mapping[str, Any]) -> dict[str, Any]:
    source = variable.get("valueFrom", {})
    if "secretKeyRef" not in source:
        return dict(variable)
    return {**variable, "valueFrom": {"secretKeyRef": {**source["secretKeyRef"], "optional": True}}}
