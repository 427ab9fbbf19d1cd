"""The trainer: one pod, and the volume that preserves its state across restarts."""

from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import network, pod
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.model import model
from updraft_operator.manifests.redis import has_redis, redis_marks, redis_variables, stream_size

METRICS_PORT = 9092


def objects(owner: AdaptiveSpeculator, config: OperatorConfig, *, waits: bool = False) -> list[Manifest]:
    """All objects of the part; none without traces to train on. A trainer that waits has no pod."""
    if not has_redis(owner, config):
        return []
    name, spec = owner.metadata.name, owner.spec.trainer
    values, claim = _settings(owner), names.child(name, names.TRAINER)
    content = {
        "replicas": 0 if owner.spec.suspend or spec.suspend or waits else 1,
        "strategy": {"type": "Recreate"},  # two trainers must not share a folder
        "selector": {"matchLabels": names.selector(name, names.TRAINER)},
        "template": _template(owner, config, values, spec.storage.claim_name or claim),
    }
    built = [
        pod.settings(owner, names.TRAINER, values),
        manifest(owner, "apps/v1", "Deployment", claim, names.TRAINER, spec=content),
        network.policy(owner, names.TRAINER, [network.from_anyone(METRICS_PORT)]),
    ]
    if spec.storage.claim_name is None:
        volume = pod.claim_spec(spec.storage)
        built.append(manifest(owner, "v1", "PersistentVolumeClaim", claim, names.TRAINER, spec=volume))
    return built


def _template(owner: AdaptiveSpeculator, config: OperatorConfig, values: dict[str, str], claim: str) -> dict[str, Any]:
    spec = owner.spec.trainer
    target = model(owner.spec.target_model, owner.spec.serving.model_cache, config.images, is_head_only=True)
    trainer = pod.container(
        "trainer",
        spec.image or config.images.trainer,
        config.images,
        spec,
        ports=[{"name": "metrics", "containerPort": METRICS_PORT}],
        envFrom=pod.from_settings(owner, names.TRAINER),
        env=[
            {"name": "UPDRAFT_TRAINER_MODEL", "value": target.path},
            *redis_variables(owner, "UPDRAFT_TRAINER_REDIS_URL", config),
        ],
        volumeMounts=[pod.DATA, pod.TOKEN_MOUNT, *target.mounts],
        **pod.probes("metrics", start_s=600, live_period_s=20),
    )
    parts = pod.PodParts(
        containers=[trainer],
        init_containers=target.init_containers,
        volumes=[
            *target.volumes,
            {"name": "data", "persistentVolumeClaim": {"claimName": claim}},
            pod.token_volume(owner, "publish"),
        ],
        settings={**values, **redis_marks(owner, config)},
    )
    return pod.template(owner, names.TRAINER, parts, spec, config.images)


def _settings(owner: AdaptiveSpeculator) -> dict[str, str]:
    name = owner.metadata.name
    chosen = pod.draft_sizes(owner, "UPDRAFT_TRAINER") | stream_size(owner, "UPDRAFT_TRAINER")
    return chosen | {
        "UPDRAFT_TRAINER_METRICS_HOST": "0.0.0.0",  # noqa: S104 - of a pod, behind a NetworkPolicy
        "UPDRAFT_TRAINER_METRICS_PORT": str(METRICS_PORT),
        "UPDRAFT_TRAINER_DATA_DIR": pod.DATA["mountPath"],
        "UPDRAFT_TRAINER_REGISTRY_ADDRESS": f"{names.child(name, names.REGISTRY)}:{network.GRPC_PORT}",
        "UPDRAFT_TRAINER_REGISTRY_TOKEN_FILE": f"{pod.ACCESS}/publish",
        "UPDRAFT_TRAINER_SPECULATOR": name,
        "UPDRAFT_TRAINER_NAMESPACE": owner.metadata.namespace,
        # A consumer name that outlives the pod, so that its pending traces are delivered to it again.
        "UPDRAFT_TRAINER_POD_NAME": names.child(name, names.TRAINER),
        "UPDRAFT_TRAINER_STREAM_SHARDS": str(owner.spec.traces.shards),
        "UPDRAFT_TRAINER_LOOKAHEAD": str(min(8, max(1, owner.spec.draft.lookahead))),
        "UPDRAFT_TRAINER_NICENESS": "0",  # Kubernetes already gives the container its share of the CPU
        "UPDRAFT_TRAINER_SCHEDULING": "normal",
    }
