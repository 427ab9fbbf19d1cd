"""The inference pods: Deployment, Service, disruption budget and network policy."""

from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Engine, Serving, Workload
from updraft_operator.manifests import network, pod, sglang
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.model import ModelMount, model, served_name
from updraft_operator.manifests.redis import redis_marks, redis_variables, stream_size

PORT = 8000

_NONE = (0, "0%")

_PULL_S = 5
"""Longer than it takes until no Service routes to a terminating pod."""

_REFUSE_S = 2
"""Longer than an agent takes from its SIGTERM until it has forwarded its last accepted request to the server."""

_LOAD_S = 1800
"""Enough for a large model on a slow disk."""


def objects(
    owner: AdaptiveSpeculator, config: OperatorConfig, *, sets_replicas: bool = True, draft_config: str = ""
) -> list[Manifest]:
    """All objects of the part. Without `sets_replicas`, an autoscaler of the Deployment owns the number of pods.

    `draft_config` is for engine SGLang; see `sglang.prepare`.
    """
    name, spec = owner.metadata.name, owner.spec
    values = _settings(owner)
    target = model(spec.target_model, spec.serving.model_cache, config.images)
    is_torch = spec.engine is Engine.TORCH
    containers = _torch(owner, config, target) if is_torch else _sglang(owner, config, target)
    template = pod.template(
        owner,
        names.SERVING,
        pod.PodParts(
            containers=containers,
            init_containers=[
                *target.init_containers,
                *([] if is_torch else [sglang.prepare(owner, config, target, draft_config)]),
            ],
            volumes=[
                *target.volumes,
                {"name": "data", "emptyDir": {}},
                pod.token_volume(owner, "serve"),
                *([] if is_torch else [pod.SHM]),
            ],
            settings={**values, **redis_marks(owner, config)},
            more={
                "terminationGracePeriodSeconds": spec.serving.termination_grace_period_seconds,
                "topologySpreadConstraints": [_spread(name)],
            },
        ),
        spec.serving,
        config.images,
    )
    content: dict[str, Any] = {
        "selector": {"matchLabels": names.selector(name, names.SERVING)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling_update(spec.engine, spec.serving)},
        "template": template,
    }
    if spec.suspend:
        content["replicas"] = 0
    elif sets_replicas:
        content["replicas"] = spec.serving.replicas
    return [
        pod.settings(owner, names.SERVING, values),
        manifest(owner, "apps/v1", "Deployment", names.child(name, names.SERVING), names.SERVING, spec=content),
        _service(owner),
        _budget(owner),
        network.policy(owner, names.SERVING, [network.from_anyone(PORT)]),
    ]


def _settings(owner: AdaptiveSpeculator) -> dict[str, str]:
    spec, name = owner.spec, owner.metadata.name
    grace_s = spec.serving.termination_grace_period_seconds
    values = {
        "UPDRAFT_INFERENCE_HOST": "0.0.0.0",  # noqa: S104 - of a pod, behind a NetworkPolicy
        "UPDRAFT_INFERENCE_PORT": str(PORT),
        "UPDRAFT_INFERENCE_SERVED_MODEL_NAME": served_name(spec.target_model),
        "UPDRAFT_INFERENCE_NUM_SLOTS": str(spec.serving.max_running_requests),
        "UPDRAFT_INFERENCE_DRAIN_SECONDS": str(max(1, grace_s - _PULL_S - 5)),
        "UPDRAFT_INFERENCE_LOOKAHEAD": str(spec.draft.lookahead),
        "UPDRAFT_INFERENCE_REGISTRY_ADDRESS": f"{names.child(name, names.REGISTRY)}:{network.GRPC_PORT}",
        "UPDRAFT_INFERENCE_REGISTRY_TOKEN_FILE": f"{pod.ACCESS}/serve",
        "UPDRAFT_INFERENCE_SPECULATOR": name,
        "UPDRAFT_INFERENCE_NAMESPACE": owner.metadata.namespace,
        "UPDRAFT_INFERENCE_DATA_DIR": pod.DATA["mountPath"],
        "UPDRAFT_INFERENCE_CAPTURE_PAYLOAD_FRACTION": f"{spec.traces.payload_percent / 100:g}",
        "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": f"{spec.traces.evaluation_percent / 100:g}",
        "UPDRAFT_INFERENCE_STREAM_SHARDS": str(spec.num_shards),
    }
    if spec.serving.max_context_tokens is not None:
        values["UPDRAFT_INFERENCE_MAX_CONTEXT"] = str(spec.serving.max_context_tokens)
    values |= stream_size(owner, "UPDRAFT_INFERENCE")
    if spec.draft.lookahead == 0:
        values["UPDRAFT_INFERENCE_DRAFTER"] = "none"
    return values


def _torch(owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount) -> list[dict[str, Any]]:
    serving = owner.spec.serving
    return [_inference(owner, config, target, serving.image, serving)]


def _sglang(owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount) -> list[dict[str, Any]]:
    """A stock SGLang server, and the agent container that clients reach it through."""
    agent = _inference(owner, config, target, None, Serving())
    agent["args"] = ["--engine", "sglang", "--attach", f"http://127.0.0.1:{sglang.PORT}"]
    agent["env"] += sglang.admin_key_variables(owner.spec.serving)
    return [sglang.engine(owner, config, target, load_s=_LOAD_S, stop_s=_PULL_S + _REFUSE_S), agent]


def _inference(
    owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount, image: str | None, workload: Workload
) -> dict[str, Any]:
    """The container that clients, the registry and Redis talk to, for both engines."""
    return pod.container(
        "inference",
        image or config.images.inference,
        config.images,
        workload,
        ports=[{"name": "http", "containerPort": PORT}],
        envFrom=pod.from_settings(owner, names.SERVING),
        env=[
            {"name": "UPDRAFT_INFERENCE_MODEL", "value": target.path},
            {"name": "UPDRAFT_INFERENCE_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            *redis_variables(owner, "UPDRAFT_INFERENCE_REDIS_URL", config),
        ],
        volumeMounts=[pod.DATA, pod.TOKEN_MOUNT, *target.mounts],
        # The server answers probes concurrently with decoding, so a swap between two steps fails none.
        **pod.probes("http", start_s=_LOAD_S),
        lifecycle={"preStop": {"sleep": {"seconds": _PULL_S}}},
    )


def _rolling_update(engine: Engine, serving: Serving) -> dict[str, Any]:
    """With an engine on GPUs there is no spare GPU: a pod is deleted before its successor is created."""
    surge, unavailable = serving.rolling_update.max_surge, serving.rolling_update.max_unavailable
    if surge is None:
        surge = 1 if engine is Engine.TORCH or unavailable in _NONE else 0
    if unavailable is None:
        unavailable = 1 if surge in _NONE else 0
    return {"maxSurge": surge, "maxUnavailable": unavailable}


def _spread(name: str) -> dict[str, Any]:
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": names.selector(name, names.SERVING)},
    }


def _service(owner: AdaptiveSpeculator) -> Manifest:
    name = owner.metadata.name
    content = {
        "selector": names.selector(name, names.SERVING),
        "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
    }
    return manifest(owner, "v1", "Service", name, names.SERVING, spec=content)


def _budget(owner: AdaptiveSpeculator) -> Manifest:
    name = owner.metadata.name
    content = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": names.selector(name, names.SERVING)},
        # A pod that is not ready serves no requests, and must not block the draining of a node.
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    budget = names.child(name, names.SERVING)
    return manifest(owner, "policy/v1", "PodDisruptionBudget", budget, names.SERVING, spec=content)
