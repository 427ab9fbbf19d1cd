"""The registry: one pod with a persistent volume, and a Service."""

from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import accounts, network, pod
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.tls import metrics
from updraft_operator.manifests.tls import objects as tls

METRICS_PORT = 9091

_KEY_SET = "https://kubernetes.default.svc/openid/v1/jwks"


def objects(owner: AdaptiveSpeculator, config: OperatorConfig) -> list[Manifest]:
    """All objects of the part."""
    values = _settings(owner, config)
    ingress = [network.from_own(owner, config.namespace, network.GRPC_PORT), network.for_metrics(config, METRICS_PORT)]
    return [
        pod.settings(owner, names.REGISTRY, values),
        _stateful_set(owner, config, values),
        _service(owner),
        network.policy(owner, names.REGISTRY, ingress),
    ]


def _settings(owner: AdaptiveSpeculator, config: OperatorConfig) -> dict[str, str]:
    values = {
        "UPDRAFT_REGISTRY_HOST": "0.0.0.0",  # noqa: S104 - of a pod, behind a NetworkPolicy
        "UPDRAFT_REGISTRY_PORT": str(network.GRPC_PORT),
        "UPDRAFT_REGISTRY_METRICS_PORT": str(METRICS_PORT),
        "UPDRAFT_REGISTRY_DATA_DIR": pod.DATA["mountPath"],
        "UPDRAFT_REGISTRY_ISSUER": config.issuer,
        "UPDRAFT_REGISTRY_AUDIENCE": accounts.audience(owner.metadata.namespace, owner.metadata.name),
        "UPDRAFT_REGISTRY_ACCOUNTS": accounts.roles(owner, config),
        "UPDRAFT_REGISTRY_KEY_SET": _KEY_SET,
        "UPDRAFT_REGISTRY_KEY_SET_TOKEN_FILE": f"{pod.KUBERNETES}/token",
        "UPDRAFT_REGISTRY_KEY_SET_CA_FILE": f"{pod.KUBERNETES}/ca.crt",
        **tls.server_settings(config),
        **({"UPDRAFT_REGISTRY_METRICS_TLS": "true"} if config.tls.is_on_for_metrics else {}),
    }
    if owner.spec.registry.bucket is not None:
        values["UPDRAFT_REGISTRY_STORE_URL"] = owner.spec.registry.bucket.url
    return values


def _stateful_set(owner: AdaptiveSpeculator, config: OperatorConfig, values: dict[str, str]) -> Manifest:
    name, spec = owner.metadata.name, owner.spec.registry
    bucket = spec.bucket.secret_ref if spec.bucket else None
    variables = pod.from_settings(owner, names.REGISTRY)
    registry = pod.container(
        "registry",
        spec.image or config.images.registry,
        config.images,
        spec,
        ports=[
            {"name": "grpc", "containerPort": network.GRPC_PORT},
            {"name": metrics.port_name(config), "containerPort": METRICS_PORT},
        ],
        envFrom=[*variables, *([{"secretRef": {"name": bucket.name}}] if bucket else [])],
        volumeMounts=[pod.DATA, pod.KUBERNETES_MOUNT, *tls.server_mounts(config)],
        **pod.probes(metrics.port_name(config), start_s=300, start_period_s=2, has_tls=config.tls.is_on_for_metrics),
    )
    volumes = [pod.kubernetes_volume(), *tls.server_volumes(owner, config)]
    if spec.storage.claim_name is not None:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": spec.storage.claim_name}})
    parts = pod.PodParts(containers=[registry], volumes=volumes, settings=values)
    content: dict[str, Any] = {
        "replicas": 1,
        "serviceName": names.child(name, names.REGISTRY),
        "podManagementPolicy": "Parallel",  # otherwise a pod that never gets ready is not replaced by a template that works
        "selector": {"matchLabels": names.selector(name, names.REGISTRY)},
        "template": pod.template(owner, names.REGISTRY, parts, spec, config.images),
        # Kubernetes deletes or retains the data with the resource, even if the operator is not running.
        "persistentVolumeClaimRetentionPolicy": {
            "whenDeleted": owner.spec.deletion_policy.value,
            "whenScaled": "Retain",
        },
    }
    if spec.storage.claim_name is None:
        content["volumeClaimTemplates"] = [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "data", "labels": names.selector(name, names.REGISTRY)},
                "spec": pod.claim_spec(spec.storage),
            }
        ]
    return manifest(owner, "apps/v1", "StatefulSet", names.child(name, names.REGISTRY), names.REGISTRY, spec=content)


def _service(owner: AdaptiveSpeculator) -> Manifest:
    name = owner.metadata.name
    content = {
        "selector": names.selector(name, names.REGISTRY),
        "ports": [{"name": "grpc", "port": network.GRPC_PORT, "targetPort": "grpc", "protocol": "TCP"}],
        # Pods can resolve it while it starts; its own error says more than a refused connection.
        "publishNotReadyAddresses": True,
    }
    return manifest(owner, "v1", "Service", names.child(name, names.REGISTRY), names.REGISTRY, spec=content)
