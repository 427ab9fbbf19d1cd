"""The objects of TLS: the CAs that clients trust, the certificates of a registry and of a dedicated Redis, and the volumes that
pods mount them from.

People and pods read the CAs from a ConfigMap. A Secret has a server's certificate, and only that server mounts it. They have
the same names whoever signs, so pods do not differ.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import network
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.tls.terms import Certificate, CertificateOrder, TlsMode, is_due

CA, CERT, KEY = "ca.crt", "tls.crt", "tls.key"
"""Entries of a Secret with a certificate, as cert-manager names them."""

Certificates = Mapping[str, Certificate]
"""The certificates in the Secrets of servers, by part of the resource; none of a Secret without a valid one."""

CA_FOLDER = "/etc/updraft/ca"
CA_FILE = f"{CA_FOLDER}/{CA}"
SERVER_FOLDER = "/etc/updraft/tls"


def host(owner: AdaptiveSpeculator, part: str) -> str:
    """A server's name in DNS and in its certificate. With the namespace, because another one may have the same name."""
    return f"{names.child(owner.metadata.name, part)}.{owner.metadata.namespace}.svc"


def registry_host(owner: AdaptiveSpeculator) -> str:
    return host(owner, names.REGISTRY)


def registry_address(owner: AdaptiveSpeculator) -> str:
    return f"{registry_host(owner)}:{network.GRPC_PORT}"


def secret_name(speculator: str, part: str = names.REGISTRY) -> str:
    return names.child(speculator, f"{part}-tls")


def ca_name(speculator: str) -> str:
    return names.child(speculator, "ca")


def objects(
    owner: AdaptiveSpeculator, config: OperatorConfig, parts: Iterable[str] = (names.REGISTRY,)
) -> Iterator[Manifest]:
    """The ConfigMap with the CAs once they are known, and with cert-manager the requests for certificates of these servers."""
    if config.tls.mode is TlsMode.CERT_MANAGER:
        yield from (_request(owner, config, part) for part in parts)
    if config.tls.is_on and config.tls.authorities:
        data = {CA: config.tls.authorities}
        yield manifest(owner, "v1", "ConfigMap", ca_name(owner.metadata.name), names.REGISTRY, data=data)


def orders(
    owner: AdaptiveSpeculator, config: OperatorConfig, held: Certificates, parts: Iterable[str], now_s: float
) -> tuple[CertificateOrder, ...]:
    """The certificates of these servers to sign; none until there is a CA."""
    if not config.tls.can_sign:
        return ()
    due = (part for part in parts if is_due(held.get(part), host(owner, part), config.tls.authorities, now_s))
    name = owner.metadata.name
    return tuple(CertificateOrder(secret=secret_name(name, part), name=host(owner, part), part=part) for part in due)


def is_ready(owner: AdaptiveSpeculator, config: OperatorConfig, held: Certificates, part: str = names.REGISTRY) -> bool:
    """Whether the certificate in a server's Secret is one that its clients trust."""
    certificate = held.get(part)
    if certificate is None or not config.tls.authorities:
        return False
    if config.tls.mode is TlsMode.CERT_MANAGER:  # there may be CAs between, and other servers may have other CAs
        own = certificate.authorities.strip()
        is_trusted = bool(own) and own in config.tls.authorities
    else:
        is_trusted = certificate.is_signed and certificate.authorities == config.tls.authorities
    return is_trusted and host(owner, part) in certificate.names


def is_used(live: Mapping[str, Any]) -> bool:
    """Whether an object has volumes or settings of TLS."""
    return any(folder in str(live) for folder in (CA_FOLDER, SERVER_FOLDER))


def secret(owner: AdaptiveSpeculator, order: CertificateOrder, data: dict[str, str]) -> Manifest:
    """The Secret of an order; `data` has all three entries."""
    kind = {"type": "kubernetes.io/tls", "stringData": data}
    return manifest(owner, "v1", "Secret", order.secret, order.part, **kind)


def _request(owner: AdaptiveSpeculator, config: OperatorConfig, part: str) -> Manifest:
    issuer = config.tls.issuer
    assert issuer is not None, "checked by the settings"
    name = secret_name(owner.metadata.name, part)
    spec = {
        "secretName": name,
        "dnsNames": [host(owner, part)],
        "duration": f"{config.tls.lives.certificate_s:.0f}s",
        # Labelled as ours, so that it is no stranger's when the operator itself signs later.
        "secretTemplate": {"labels": names.labels(owner.metadata.name, part)},
        "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
        "usages": ["digital signature", "server auth"],
        "issuerRef": {"name": issuer.name, "kind": issuer.kind, "group": issuer.group},
    }
    return manifest(owner, names.CERT_MANAGER_API_VERSION, "Certificate", name, part, spec=spec)


def client_settings(config: OperatorConfig, prefix: str) -> dict[str, str]:
    """The setting of a client of the registry."""
    return {f"{prefix}_REGISTRY_CA_FILE": CA_FILE} if config.tls.is_on else {}


def client_arguments(config: OperatorConfig) -> list[str]:
    """The same for the command `updraft`."""
    return ["--ca-file", CA_FILE] if config.tls.is_on else []


def client_volumes(owner: AdaptiveSpeculator, config: OperatorConfig) -> list[dict[str, Any]]:
    """The kubelet renews the file when the ConfigMap changes."""
    if not config.tls.is_on:
        return []
    return [{"name": "updraft-ca", "configMap": {"name": ca_name(owner.metadata.name), "defaultMode": 0o444}}]


def client_mounts(config: OperatorConfig) -> list[dict[str, Any]]:
    return [{"name": "updraft-ca", "mountPath": CA_FOLDER, "readOnly": True}] if config.tls.is_on else []


def server_settings(config: OperatorConfig) -> dict[str, str]:
    files = {"CERT": CERT, "KEY": KEY} if config.tls.is_on else {}
    return {f"UPDRAFT_REGISTRY_TLS_{name}_FILE": f"{SERVER_FOLDER}/{entry}" for name, entry in files.items()}


def server_volumes(
    owner: AdaptiveSpeculator, config: OperatorConfig, part: str = names.REGISTRY
) -> list[dict[str, Any]]:
    if not config.tls.is_on:
        return []
    items = [{"key": entry, "path": entry} for entry in (CERT, KEY)]
    held = {"secretName": secret_name(owner.metadata.name, part), "items": items, "defaultMode": 0o440}
    return [{"name": "updraft-tls", "secret": held}]


def server_mounts(config: OperatorConfig) -> list[dict[str, Any]]:
    return [{"name": "updraft-tls", "mountPath": SERVER_FOLDER, "readOnly": True}] if config.tls.is_on else []
