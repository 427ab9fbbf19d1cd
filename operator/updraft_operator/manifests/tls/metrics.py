"""TLS on the ports of metrics, where the installation asks for it. The registry uses its own certificate; the trainer and the
agents of servers have one for both. Nobody checks its name, because Prometheus and kubelets call pods by their address."""

from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import Manifest, OperatorConfig
from updraft_operator.manifests.tls.objects import CERT, KEY, secret_name

_VOLUME = "updraft-metrics-tls"
_FOLDER = "/etc/updraft/metrics-tls"


def port_name(config: OperatorConfig, rank: int = 0) -> str:
    """At most 15 characters. PodMonitors and `kubectl updraft` know by it which scheme a port speaks."""
    end = f"-{rank}" if rank else ""
    return f"tls-metrics{end}" if config.tls.is_on_for_metrics else f"metrics{end}"


def settings(config: OperatorConfig, prefix: str) -> dict[str, str]:
    """For a trainer or an agent."""
    if not config.tls.is_on_for_metrics:
        return {}
    files = {"CERT": CERT, "KEY": KEY}
    return {f"{prefix}_METRICS_TLS_{name}_FILE": f"{_FOLDER}/{entry}" for name, entry in files.items()}


def volumes(owner: AdaptiveSpeculator, config: OperatorConfig) -> list[dict[str, Any]]:
    if not config.tls.is_on_for_metrics:
        return []
    items = [{"key": entry, "path": entry} for entry in (CERT, KEY)]
    secret = {"secretName": secret_name(owner.metadata.name, names.METRICS), "items": items, "defaultMode": 0o440}
    return [{"name": _VOLUME, "secret": secret}]


def mounts(config: OperatorConfig) -> list[dict[str, Any]]:
    if not config.tls.is_on_for_metrics:
        return []
    return [{"name": _VOLUME, "mountPath": _FOLDER, "readOnly": True}]


def is_used(content: Manifest) -> bool:
    """Whether an object mounts that certificate, or has settings that name it."""
    return _FOLDER in str(content)
