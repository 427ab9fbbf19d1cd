"""A pod with a stock server, to which clients connect, and Updraft's agent as its sidecar (ADR 0064).

Both mount one volume at the same path. It contains the plugin's folder, the draft that the server starts with, the versions
that it loads by path, and the socket between the two. Each engine's module describes its `Server`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from updraft_artifacts.sizing import CapturedTraffic, usual
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, EngineType, Serving, Workload
from updraft_operator.manifests import api_keys, gpus, pod
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.model import ModelMount
from updraft_operator.manifests.redis import redis_variables
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.tls import metrics, port
from updraft_operator.manifests.tls import objects as tls

METRICS_PORT = 9093

PULL_S = 5
"""Longer than it takes until no Service routes to a terminating pod."""

FLUSH_S = 8
"""Time for the agent to flush traces after the server has stopped."""

_LOAD_S = 1800
"""Enough for a large model on a slow disk, if the spec says nothing."""

_SLACK_S = 600
"""For a pod to be scheduled and its image and model to be pulled: Kubernetes' own default for all of it."""

_FOLDER = f"{pod.DATA['mountPath']}/server"
PLUGIN, INITIAL_DRAFT, SOCKET = (f"{_FOLDER}/{name}" for name in ("plugin", "draft", "tap.sock"))

DRAFT_CONFIG = "UPDRAFT_INFERENCE_DRAFT_CONFIG"
_PREPARE = "prepare"

_MIB = 1024 * 1024

_PROCESS_BYTES = 768 * _MIB
"""Memory of the agent's process without rows and traces, mostly for torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A kind of stock server."""

    engine: EngineType
    image: str
    port: int
    health: str
    """Path that answers 200 as soon as the server takes requests, even during a swap."""
    command: Sequence[str]
    args: Sequence[str]
    """Without the spec's arguments, which follow and therefore override."""
    prepare_args: Sequence[str] = ()
    """Arguments of the init container, in addition to those for every engine."""
    agent_args: Sequence[str] = ()
    agent_variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """Prefix of the plugin's settings."""
        return f"UPDRAFT_{self.engine.word.upper()}"


def load_s(serving: Serving) -> int:
    """Seconds within which a container has to have loaded the model."""
    return serving.startup_seconds or _LOAD_S


def start_s(serving: Serving) -> int:
    """Seconds within which a pod has to be ready."""
    return load_s(serving) + _SLACK_S


def draft_config_of(pod_spec: Mapping[str, Any]) -> str:
    """The `draft_config` that `prepare` was given in this pod template."""
    variables = [
        variable
        for container in pod_spec.get("initContainers", ())
        if container["name"] == _PREPARE
        for variable in container.get("env", ())
        if variable["name"] == DRAFT_CONFIG
    ]
    return str(variables[0].get("value", "")) if variables else ""


def prepare(
    owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount, server: Server, draft_config: str
) -> dict[str, Any]:
    """The init container that writes the plugin's folder and the initial draft; existing files are kept.

    The draft has the sizes of the published one with this config.json; if that is empty, the sizes of the spec.
    """
    sizes = pod.draft_sizes(owner, "UPDRAFT_INFERENCE") | ({DRAFT_CONFIG: draft_config} if draft_config else {})
    return pod.container(
        _PREPARE,
        config.images.inference,
        config.images,
        Workload(),
        args=[
            *(f"prepare-{server.engine.word}", "--plugin-dir", PLUGIN, "--seed", INITIAL_DRAFT),
            *server.prepare_args,
        ],
        env=pod.variables({"UPDRAFT_INFERENCE_MODEL": target.path, **sizes}),
        volumeMounts=[pod.DATA, *target.mounts],
    )


def agent(owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount, server: Server) -> dict[str, Any]:
    """The agent, a native sidecar: it starts before the server and stops after it.

    It has no readiness probe, because the pod would be ready only if the agent is. It has no startup probe, because the server
    would not start until the probe succeeds.
    """
    has_tls = config.tls.is_on_for_metrics and not owner.spec.serving.is_attached
    name = metrics.port_name(config) if has_tls else "metrics"
    own = {
        f"UPDRAFT_INFERENCE_{server.engine.word.upper()}_SOCKET": SOCKET,
        "UPDRAFT_INFERENCE_INITIAL_DRAFT": INITIAL_DRAFT,
        **server.agent_variables,
    }
    return pod.container(
        "inference",
        config.images.inference,
        config.images,
        Workload(resources={"requests": {"cpu": "500m", "memory": _agent_memory()}}),
        restartPolicy="Always",
        args=["--engine", server.engine.word, *server.agent_args],
        ports=[{"name": name, "containerPort": METRICS_PORT}],
        envFrom=pod.from_settings(owner, names.SERVING),
        env=[*process_variables(owner, config, target), *pod.variables(own)],
        volumeMounts=[
            *(pod.DATA, pod.TOKEN_MOUNT, *tls.client_mounts(config)),
            *(metrics.mounts(config) if has_tls else ()),
            *target.mounts,
        ],
        livenessProbe={
            **pod.http_probe("/healthz", name, period_s=10, failures=6, has_tls=has_tls),
            "initialDelaySeconds": 60,  # it imports torch and reads the target's fingerprint before it listens
        },
    )


def container(owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount, server: Server) -> dict[str, Any]:
    """The server, with the resources, variables and arguments of the spec."""
    engine, serving = owner.spec.engine, owner.spec.serving
    given, python_path = _python_path(serving)
    own = {
        "PYTHONPATH": python_path,
        f"{server.prefix}_SOCKET": SOCKET,
        "HOME": "/tmp",  # noqa: S108 - of the container: kernels are compiled into caches below it
        "USER": "nonroot",  # torch names a cache after it, and the image has no user with this ID
        **api_keys.variables(serving, server.prefix),
    }
    has_tls, port_name = port.has_tls(serving), port.scheme(serving)
    health = pod.http_probe(server.health, port_name, period_s=5, failures=2, has_tls=has_tls)
    made = pod.container(
        "engine",
        engine.image or server.image,
        config.images,
        given.model_copy(update={"resources": gpus.resources(owner.spec)}),
        command=list(server.command),
        args=[*server.args, *port.arguments(serving), *engine.args],
        ports=[{"name": port_name, "containerPort": server.port}],
        env=pod.variables(own),
        volumeMounts=[
            *(pod.DATA, pod.SHM_MOUNT),
            *target.mounts,
            *api_keys.mounts(serving),
            *port.mounts(serving),
        ],
        startupProbe=_startup_probe(serving, server),
        readinessProbe=health,
        livenessProbe={**health, "periodSeconds": 10, "failureThreshold": 6},
        lifecycle={"preStop": {"sleep": {"seconds": PULL_S}}},
    )
    made["securityContext"] = {**made["securityContext"], "readOnlyRootFilesystem": False}
    return made


def process_variables(owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount) -> list[dict[str, Any]]:
    """Variables of every inference process that cannot be in its ConfigMap."""
    return [
        {"name": "UPDRAFT_INFERENCE_MODEL", "value": target.path},
        {"name": "UPDRAFT_INFERENCE_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        *redis_variables(owner, Role.WRITER, "UPDRAFT_INFERENCE_REDIS_URL", config),
    ]


def _startup_probe(serving: Serving, server: Server) -> dict[str, Any]:
    period_s = 10
    failures = math.ceil(load_s(serving) / period_s)
    if serving.api_keys_secret_ref is not None:
        return api_keys.probe(server.port, port.scheme(serving), period_s=period_s, failures=failures)
    name, has_tls = port.scheme(serving), port.has_tls(serving)
    return pod.http_probe(server.health, name, period_s=period_s, failures=failures, has_tls=has_tls)


def _python_path(serving: Serving) -> tuple[Serving, str]:
    """The spec without its PYTHONPATH, and the plugin's folder followed by that path.

    A PYTHONPATH with valueFrom stays in the spec and overrides ours. The agent then reports that the plugin is missing.
    """
    theirs = [each for each in serving.env if each["name"] == "PYTHONPATH" and "value" in each]
    others = [each for each in serving.env if each not in theirs]
    path = ":".join([PLUGIN, *(str(each["value"]) for each in theirs if each["value"])])
    return serving.model_copy(update={"env": others}), path


def _agent_memory() -> str:
    """A request without a limit: an agent that is killed for its memory would make its pod unready."""
    sizes = usual(CapturedTraffic(engine="vllm"))
    return f"{math.ceil((_PROCESS_BYTES + sizes.running.amount + sizes.queue.amount) / _MIB)}Mi"
