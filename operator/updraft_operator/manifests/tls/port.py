"""TLS on the port of clients, with a certificate from a Secret that the spec names: the kubelet renews its files, and each
server reads them again at its next handshake."""

from typing import Any

from updraft_operator.api.speculator import AdaptiveSpeculator, Serving
from updraft_operator.manifests.tls.objects import CERT, KEY

_VOLUME = "serving-tls"
_FOLDER = "/etc/updraft/serving-tls"
_CERT_FILE, _KEY_FILE = f"{_FOLDER}/{CERT}", f"{_FOLDER}/{KEY}"


def has_tls(serving: Serving) -> bool:
    return serving.tls_secret_ref is not None


def scheme(serving: Serving) -> str:
    """Also the name of the port, for the Service and the PodMonitor."""
    return "https" if has_tls(serving) else "http"


def of_service(*, has_tls: bool) -> dict[str, Any]:
    name, number = ("https", 443) if has_tls else ("http", 80)
    return {"name": name, "port": number, "targetPort": name, "protocol": "TCP"}


def url(owner: AdaptiveSpeculator) -> str:
    """The address for clients in the cluster."""
    return f"{scheme(owner.spec.serving)}://{owner.metadata.name}.{owner.metadata.namespace}.svc/v1"


def volumes(serving: Serving) -> list[dict[str, Any]]:
    ref = serving.tls_secret_ref
    if ref is None:
        return []
    items = [{"key": entry, "path": entry} for entry in (CERT, KEY)]
    return [{"name": _VOLUME, "secret": {"secretName": ref.name, "items": items, "defaultMode": 0o440}}]


def mounts(serving: Serving) -> list[dict[str, Any]]:
    return [{"name": _VOLUME, "mountPath": _FOLDER, "readOnly": True}] if has_tls(serving) else []


def settings(serving: Serving) -> dict[str, str]:
    """For the torch engine."""
    if not has_tls(serving):
        return {}
    return {"UPDRAFT_INFERENCE_TLS_CERT_FILE": _CERT_FILE, "UPDRAFT_INFERENCE_TLS_KEY_FILE": _KEY_FILE}


def arguments(serving: Serving) -> tuple[str, ...]:
    """For SGLang and vLLM, whose options are the same."""
    return ("--ssl-certfile", _CERT_FILE, "--ssl-keyfile", _KEY_FILE) if has_tls(serving) else ()
