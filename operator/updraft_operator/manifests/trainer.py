"""The trainer: one pod with one rank, or several ranks that train one draft together (`ranks`), and a volume per pod."""

from typing import Any

from kubernetes.utils.quantity import parse_quantity

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, Trainer
from updraft_operator.manifests import network, pod, ranks
from updraft_operator.manifests.gpus import with_devices
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.model import model
from updraft_operator.manifests.ranks import Kind
from updraft_operator.manifests.redis import (
    has_redis,
    redis_marks,
    redis_variables,
    retention,
    stream_namespace,
    stream_size,
)
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.tls import objects as tls

METRICS_PORT = 9092
"""Port of the first rank of a pod; each further one has the next port."""

GRACE_S = 120
"""How long a pod may take to end: for a save under way, and another one. Each takes up to 30 s for the draft of an 8B model."""


def default_kind(owner: AdaptiveSpeculator) -> Kind:
    """The kind for a new resource without LeaderWorkerSets."""
    return Kind.DEPLOYMENT if owner.spec.trainer.num_ranks == 1 else Kind.STATEFUL_SET


def objects(
    owner: AdaptiveSpeculator, config: OperatorConfig, *, kind: Kind | None = None, waits: bool = False
) -> list[Manifest]:
    """All objects of the part; none without traces to train on. A trainer that waits has no pod."""
    if not has_redis(owner, config):
        return []
    kind, values = kind or default_kind(owner), _settings(owner, config)
    template = _template(owner, config, values, kind)
    runs = not (owner.spec.suspend or owner.spec.trainer.suspend or waits)
    ingress = [network.from_anyone(*_metrics_ports(owner.spec.trainer).values())]
    if owner.spec.trainer.nodes > 1:
        ingress.append(network.from_part(owner, names.TRAINER))
    return [
        pod.settings(owner, names.TRAINER, values),
        network.policy(owner, names.TRAINER, ingress),
        *ranks.claims(owner, kind),
        *([_deployment(owner, template, runs=runs)] if kind is Kind.DEPLOYMENT else []),
        *([] if kind is Kind.DEPLOYMENT else ranks.objects(owner, kind, template, runs=runs)),
    ]


def _deployment(owner: AdaptiveSpeculator, template: dict[str, Any], *, runs: bool) -> Manifest:
    name, kind = owner.metadata.name, Kind.DEPLOYMENT
    content = {
        "replicas": int(runs),
        "strategy": {"type": "Recreate"},  # two trainers must not share a folder
        "selector": {"matchLabels": names.selector(name, names.TRAINER)},
        "template": template,
    }
    return manifest(owner, "apps/v1", kind.value, ranks.workload(name, kind), names.TRAINER, spec=content)


def _template(owner: AdaptiveSpeculator, config: OperatorConfig, values: dict[str, str], kind: Kind) -> dict[str, Any]:
    spec = owner.spec.trainer
    target = model(owner.spec.target_model, owner.spec.serving.model_cache, config.images, is_head_only=True)
    shares_memory = spec.ranks_per_pod > 1
    trainer = pod.container(
        "trainer",
        spec.image or config.images.trainer,
        config.images,
        spec.model_copy(update={"resources": _resources(spec)}),
        ports=[{"name": name, "containerPort": port} for name, port in _metrics_ports(spec).items()],
        envFrom=pod.from_settings(owner, names.TRAINER),
        env=[
            {"name": "UPDRAFT_TRAINER_MODEL", "value": target.path},
            _consumer(owner, kind),
            *redis_variables(owner, Role.READER, "UPDRAFT_TRAINER_REDIS_URL", config),
        ],
        volumeMounts=[
            *(pod.DATA, pod.TOKEN_MOUNT, *tls.client_mounts(config)),
            *([pod.SHM_MOUNT] if shares_memory else []),
            *target.mounts,
        ],
        **_process(owner, kind),
    )
    parts = pod.PodParts(
        containers=[trainer],
        init_containers=target.init_containers,
        volumes=[
            *target.volumes,
            *_data_volume(owner, kind),
            pod.token_volume(owner, "publish"),
            *tls.client_volumes(owner, config),
            *([pod.SHM] if shares_memory else []),
        ],
        settings={**values, **redis_marks(owner, Role.READER, config)},
        more={"terminationGracePeriodSeconds": GRACE_S},
    )
    return pod.template(owner, names.TRAINER, parts, spec, config.images)


def _metrics_ports(trainer: Trainer) -> dict[str, int]:
    """By name, which the chart's PodMonitor knows."""
    further = {f"metrics-{rank}": METRICS_PORT + rank for rank in range(1, trainer.ranks_per_pod)}
    return {"metrics": METRICS_PORT, **further}


def _consumer(owner: AdaptiveSpeculator, kind: Kind) -> dict[str, Any]:
    """The consumer's name outlives the pod, so that its pending traces are delivered to it again."""
    if kind is Kind.DEPLOYMENT:
        return {"name": ranks.POD_NAME, "value": names.child(owner.metadata.name, names.TRAINER)}
    return {"name": ranks.POD_NAME, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}


def _process(owner: AdaptiveSpeculator, kind: Kind) -> dict[str, Any]:
    """Arguments and probes. Ranks that wait for another pod answer no probe, and a restart would not help them."""
    probes = pod.probes("metrics", start_s=600, live_period_s=20)
    if kind is Kind.DEPLOYMENT:
        return probes
    return {"args": ranks.arguments(owner, kind), "readinessProbe": probes["readinessProbe"]}


def _data_volume(owner: AdaptiveSpeculator, kind: Kind) -> list[dict[str, Any]]:
    """The volume, unless a claim template adds it to each pod."""
    claim = owner.spec.trainer.storage.claim_name
    if claim is None and kind is not Kind.DEPLOYMENT:
        return []
    own = names.claim(ranks.pods(owner.metadata.name, Kind.DEPLOYMENT, 1)[0])
    return [{"name": "data", "persistentVolumeClaim": {"claimName": claim or own}}]


def _resources(spec: Trainer) -> dict[str, Any]:
    """The spec's, with the accelerators of a pod."""
    if spec.accelerator is None:
        return spec.resources
    return with_devices(spec.resources, spec.accelerator.resource_name, spec.accelerator.per_pod)


def _settings(owner: AdaptiveSpeculator, config: OperatorConfig) -> dict[str, str]:
    name = owner.metadata.name
    chosen = pod.draft_sizes(owner, "UPDRAFT_TRAINER") | stream_size(owner, "UPDRAFT_TRAINER")
    chosen |= retention(owner, "UPDRAFT_TRAINER_RETENTION_SECONDS")
    return (
        chosen
        | _threads(owner.spec.trainer)
        | {
            "UPDRAFT_TRAINER_METRICS_HOST": "0.0.0.0",  # noqa: S104 - of a pod, behind a NetworkPolicy
            "UPDRAFT_TRAINER_METRICS_PORT": str(METRICS_PORT),
            "UPDRAFT_TRAINER_DATA_DIR": pod.DATA["mountPath"],
            "UPDRAFT_TRAINER_REGISTRY_ADDRESS": tls.registry_address(owner),
            "UPDRAFT_TRAINER_REGISTRY_TOKEN_FILE": f"{pod.ACCESS}/publish",
            **tls.client_settings(config, "UPDRAFT_TRAINER"),
            "UPDRAFT_TRAINER_SPECULATOR": name,
            "UPDRAFT_TRAINER_NAMESPACE": stream_namespace(owner, config),
            "UPDRAFT_TRAINER_STREAM_SHARDS": str(owner.spec.num_shards),
            "UPDRAFT_TRAINER_LOOKAHEAD": str(min(8, owner.spec.draft.lookahead)),
            # "cuda" refuses to start without a GPU: a trainer that was given one never falls back to the CPU unseen.
            "UPDRAFT_TRAINER_DEVICE": "cpu" if owner.spec.trainer.accelerator is None else "cuda",
            "UPDRAFT_TRAINER_NICENESS": "0",  # Kubernetes already gives the container its share of the CPU
            "UPDRAFT_TRAINER_SCHEDULING": "normal",
        }
    )


def _threads(spec: Trainer) -> dict[str, str]:
    """The threads of a rank: its share of the CPU limit. Without a limit, which another pod may need, it is one."""
    limits = spec.resources.get("limits")
    try:
        num_cpus = float(parse_quantity(limits["cpu"])) if isinstance(limits, dict) and "cpu" in limits else 0.0
        share = int(num_cpus / spec.ranks_per_pod)
    except (ValueError, OverflowError):  # the API server refuses the pod
        share = 0
    return {"UPDRAFT_TRAINER_NUM_THREADS": str(share)} if share > 1 else {}
