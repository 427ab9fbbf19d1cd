"""The inference pods: Deployment, Service, disruption budget and network policy; of attached pods, their settings only."""

from typing import Any, assert_never

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Capture, EngineType, Spec
from updraft_operator.manifests import api_keys, network, pod
from updraft_operator.manifests.gpus import num_devices, resources
from updraft_operator.manifests.manifest import Images, Manifest, OperatorConfig, manifest
from updraft_operator.manifests.model import ModelMount, model, served_name
from updraft_operator.manifests.redis import redis_marks, retention, stream_namespace, stream_size
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.servers import attachment, server, sglang, vllm
from updraft_operator.manifests.servers.server import Server
from updraft_operator.manifests.tls import metrics, port
from updraft_operator.manifests.tls import objects as tls

PORT = 8000
"""Port of the torch engine's process."""

_NONE = (0, "0%")


def objects(
    owner: AdaptiveSpeculator,
    config: OperatorConfig,
    *,
    sets_replicas: bool = True,
    draft_config: str = "",
    keeps_port: bool = False,
) -> list[Manifest]:
    """All objects of the part. Without `sets_replicas`, an autoscaler of the Deployment owns the number of pods. With
    `keeps_port`, the Service has also the port of pods that have to be replaced by ones with TLS, or without.

    `draft_config` applies to stock servers; see `server.prepare`.
    """
    name, spec = owner.metadata.name, owner.spec
    target = model(spec.target_model, spec.serving.model_cache, config.images)
    stock = _server(owner, config.images, target)
    values = _settings(owner, config, stock)
    if spec.serving.is_attached:
        return attachment.objects(owner, config, draft_config=draft_config, settings=values)
    parts = pod.PodParts(
        containers=[_torch(owner, config, target) if stock is None else server.container(owner, config, target, stock)],
        init_containers=[*target.init_containers, *_beside(owner, config, target, stock, draft_config)],
        volumes=[
            *target.volumes,
            {"name": "data", "emptyDir": {}},
            pod.token_volume(owner, "serve"),
            *tls.client_volumes(owner, config),
            *([] if stock is None else [pod.SHM, *metrics.volumes(owner, config)]),
            *api_keys.volumes(spec.serving),
            *port.volumes(spec.serving),
        ],
        settings={**values, **redis_marks(owner, Role.WRITER, config)},
        more={
            "terminationGracePeriodSeconds": spec.serving.termination_grace_period_seconds,
            "topologySpreadConstraints": [_spread(name)],
        },
    )
    content: dict[str, Any] = {
        "selector": {"matchLabels": names.selector(name, names.SERVING)},
        # Beyond the time that a pod may take to load its model, or each rollout of a large one would count as failed.
        "progressDeadlineSeconds": server.start_s(spec.serving),
        "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling_update(spec)},
        "template": pod.template(owner, names.SERVING, parts, spec.serving, config.images),
    }
    if spec.suspend:
        content["replicas"] = 0
    elif sets_replicas:
        content["replicas"] = spec.serving.replicas
    ingress = [network.from_anyone(PORT if stock is None else stock.port)]
    if stock is not None:
        ingress.append(network.for_metrics(config, server.METRICS_PORT))
    return [
        pod.settings(owner, names.SERVING, values),
        manifest(owner, "apps/v1", "Deployment", names.child(name, names.SERVING), names.SERVING, spec=content),
        service(owner, has_both=keeps_port),
        _budget(owner),
        network.policy(owner, names.SERVING, ingress),
    ]


def _server(owner: AdaptiveSpeculator, images: Images, target: ModelMount) -> Server | None:
    """The stock server of the pods; None for engine Torch, which serves clients itself."""
    engine = owner.spec.engine.type
    if engine is EngineType.TORCH:
        return None
    if engine is EngineType.SGLANG:
        return sglang.describe(owner, images, target)
    if engine is EngineType.VLLM:
        return vllm.describe(owner, images, target)
    assert_never(engine)


def _beside(
    owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount, stock: Server | None, draft_config: str
) -> list[dict[str, Any]]:
    """The containers that start before a server."""
    if stock is None:
        return []
    return [
        server.prepare(owner, config, target, stock, draft_config),
        server.agent(owner, config, target, stock),
    ]


def _settings(owner: AdaptiveSpeculator, config: OperatorConfig, stock: Server | None) -> dict[str, str]:
    """The settings of the Torch engine's process, or of a server's agent."""
    spec, name = owner.spec, owner.metadata.name
    return {
        "UPDRAFT_INFERENCE_HOST": "0.0.0.0",  # noqa: S104 - of a pod, behind a NetworkPolicy
        "UPDRAFT_INFERENCE_REGISTRY_ADDRESS": tls.registry_address(owner),
        "UPDRAFT_INFERENCE_REGISTRY_TOKEN_FILE": f"{pod.ACCESS}/serve",
        **tls.client_settings(config, "UPDRAFT_INFERENCE"),
        "UPDRAFT_INFERENCE_SPECULATOR": name,
        "UPDRAFT_INFERENCE_NAMESPACE": stream_namespace(owner, config),
        "UPDRAFT_INFERENCE_DATA_DIR": pod.DATA["mountPath"],
        "UPDRAFT_INFERENCE_CAPTURE_PAYLOAD_FRACTION": f"{spec.traces.payload_percent / 100:g}",
        "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": f"{spec.traces.evaluation_percent / 100:g}",
        "UPDRAFT_INFERENCE_STREAM_SHARDS": str(spec.num_shards),
        **({"UPDRAFT_INFERENCE_CAPTURE": "opt-in"} if spec.traces.capture is Capture.OPT_IN else {}),
        **stream_size(owner, "UPDRAFT_INFERENCE"),
        **retention(owner, "UPDRAFT_INFERENCE_CAPTURE_RETENTION_SECONDS"),
        **(_torch_settings(owner) if stock is None else _agent_settings(owner, config)),
    }


def _agent_settings(owner: AdaptiveSpeculator, config: OperatorConfig) -> dict[str, str]:
    """Agents of attached pods serve their metrics without TLS, because those pods have to start without our objects."""
    encrypted = {} if owner.spec.serving.is_attached else metrics.settings(config, "UPDRAFT_INFERENCE")
    return {"UPDRAFT_INFERENCE_METRICS_PORT": str(server.METRICS_PORT), **encrypted}


def _torch_settings(owner: AdaptiveSpeculator) -> dict[str, str]:
    spec, serving = owner.spec, owner.spec.serving
    grace_s = serving.termination_grace_period_seconds
    values = {
        "UPDRAFT_INFERENCE_PORT": str(PORT),
        "UPDRAFT_INFERENCE_SERVED_MODEL_NAME": served_name(spec.target_model),
        "UPDRAFT_INFERENCE_NUM_SLOTS": str(serving.max_running_requests),
        "UPDRAFT_INFERENCE_DRAIN_SECONDS": str(max(1, grace_s - server.PULL_S - 5)),
        "UPDRAFT_INFERENCE_LOOKAHEAD": str(spec.draft.lookahead if spec.draft.is_speculating else 0),
        **api_keys.variables(serving, "UPDRAFT_INFERENCE"),
        **port.settings(serving),
    }
    if serving.max_context_tokens is not None:
        values["UPDRAFT_INFERENCE_MAX_CONTEXT"] = str(serving.max_context_tokens)
    if not spec.draft.is_speculating:
        values["UPDRAFT_INFERENCE_DRAFTER"] = "none"
    if num_devices(spec):
        values["UPDRAFT_INFERENCE_DEVICE"] = "cuda"  # without a GPU that works, the engine then refuses to start
    return values


def _torch(owner: AdaptiveSpeculator, config: OperatorConfig, target: ModelMount) -> dict[str, Any]:
    """The one container of engine Torch."""
    spec, serving = owner.spec, owner.spec.serving
    return pod.container(
        "inference",
        spec.engine.image or config.images.inference,
        config.images,
        serving.model_copy(update={"resources": resources(spec)}),
        ports=[{"name": port.scheme(serving), "containerPort": PORT}],
        envFrom=pod.from_settings(owner, names.SERVING),
        env=server.process_variables(owner, config, target),
        volumeMounts=[
            *(pod.DATA, pod.TOKEN_MOUNT, *tls.client_mounts(config)),
            *target.mounts,
            *api_keys.mounts(serving),
            *port.mounts(serving),
        ],
        # The server answers probes concurrently with decoding, so a swap between two steps fails none.
        **pod.probes(port.scheme(serving), start_s=server.load_s(serving), has_tls=port.has_tls(serving)),
        lifecycle={"preStop": {"sleep": {"seconds": server.PULL_S}}},
    )


def _rolling_update(spec: Spec) -> dict[str, Any]:
    """A spare GPU is rare, so a pod on GPUs is deleted before its successor is created."""
    serving = spec.serving
    surge, unavailable = serving.rolling_update.max_surge, serving.rolling_update.max_unavailable
    if surge is None:
        is_on_cpus = spec.engine.type is EngineType.TORCH and not num_devices(spec)
        surge = 1 if is_on_cpus or unavailable in _NONE else 0
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


def service(owner: AdaptiveSpeculator, *, has_both: bool = False) -> Manifest:
    """With `has_both`, one port for pods with TLS and one for those without: Kubernetes finds pods by the name of theirs."""
    name, speaks_tls = owner.metadata.name, port.has_tls(owner.spec.serving)
    content = {
        "selector": names.selector(name, names.SERVING),
        "ports": [
            port.of_service(has_tls=kind) for kind in ([speaks_tls, not speaks_tls] if has_both else [speaks_tls])
        ],
    }
    return manifest(owner, "v1", "Service", name, names.SERVING, spec=content)


def _budget(owner: AdaptiveSpeculator) -> Manifest:
    name = owner.metadata.name
    content = {
        "maxUnavailable": owner.spec.serving.disruption_budget.max_unavailable,
        "selector": {"matchLabels": names.selector(name, names.SERVING)},
        # A pod that is not ready serves no requests, and must not block the draining of a node.
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    budget = names.child(name, names.SERVING)
    return manifest(owner, "policy/v1", "PodDisruptionBudget", budget, names.SERVING, spec=content)
