"""One NetworkPolicy per part, for incoming traffic.

Outgoing traffic is not restricted, except that of a dedicated Redis: models come from anywhere, and the user may choose the
Redis.
"""

from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest

GRPC_PORT = 50051


def policy(owner: AdaptiveSpeculator, part: str, ingress: list[dict[str, Any]], *, is_silent: bool = False) -> Manifest:
    """`is_silent`: the part makes no outgoing calls."""
    name = owner.metadata.name
    content: dict[str, Any] = {
        "podSelector": {"matchLabels": names.selector(name, part)},
        "policyTypes": ["Ingress"],
        "ingress": ingress,
    }
    if is_silent:
        content |= {"policyTypes": ["Ingress", "Egress"], "egress": []}
    return manifest(owner, "networking.k8s.io/v1", "NetworkPolicy", names.child(name, part), part, spec=content)


def from_anyone(*ports: int) -> dict[str, Any]:
    return {"ports": [_port(port) for port in ports]}


def for_metrics(config: OperatorConfig, *ports: int) -> dict[str, Any]:
    """Kubelets always may."""
    peers = {"from": [dict(peer) for peer in config.metrics_from]} if config.metrics_from else {}
    return {**peers, **from_anyone(*ports)}


def from_own(owner: AdaptiveSpeculator, operator_namespace: str, port: int) -> dict[str, Any]:
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": operator_namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "updraft-operator"}},
    }
    own = {"podSelector": {"matchLabels": {names.SPECULATOR: owner.metadata.name}}}
    attached = (
        [{"podSelector": {"matchLabels": {names.ATTACH: owner.metadata.name}}}]
        if owner.spec.serving.is_attached
        else []
    )
    return {"from": [own, *attached, operator], "ports": [_port(port)]}


def from_part(owner: AdaptiveSpeculator, part: str) -> dict[str, Any]:
    """All ports, for peers of a part: gloo and NCCL choose theirs."""
    return {"from": [{"podSelector": {"matchLabels": names.selector(owner.metadata.name, part)}}]}


def _port(number: int) -> dict[str, Any]:
    return {"port": number, "protocol": "TCP"}
