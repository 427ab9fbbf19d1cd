"""Changes that wait for the certificates of servers."""

from collections.abc import Collection, Iterator

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.tls import metrics
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import CertificateOrder, TlsMode
from updraft_operator.planning.assessment import Assessment, false
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.traces.places import tls_servers

_OF_PODS = ("Deployment", "StatefulSet", "LeaderWorkerSet", "ConfigMap")
"""Kinds with templates of pods, and with what pods read when they start."""


def is_held(new: Manifest, observed: Observed, orders: Collection[CertificateOrder]) -> bool:
    """Whether a change waits for a certificate of a server: pods of the new template could not start, and those that run
    can. New objects do not wait: their pods wait for what they mount.

    The CAs change once that certificate has been signed again, or else clients might distrust it.
    """
    target, config = Ref(new["kind"], new["metadata"]["name"]), observed.config
    child, cas = observed.children.get(target), Ref("ConfigMap", tls.ca_name(observed.name))
    if child is None or not config.tls.is_on or observed.is_preview or target.kind not in _OF_PODS:
        return False
    if target == cas:
        return bool(orders)
    needed = {part for part in (names.REGISTRY, names.REDIS) if target.name == names.child(observed.name, part)}
    if names.REDIS not in needed:
        if cas not in observed.children:
            return True
        if not tls.is_used(child.live()):
            needed.add(names.REGISTRY)
        if metrics.is_used(new):
            needed.add(names.METRICS)
    return not all(has_certificate(observed, part) for part in needed)


def has_certificate(observed: Observed, part: str = names.REGISTRY) -> bool:
    """Whether clients of this server trust the certificate in its Secret."""
    return tls.is_ready(observed.speculator, observed.config, observed.certificates, part)


def uncertified(observed: Observed) -> Iterator[Assessment]:
    """A dedicated Redis or ports of metrics for which pods wait. RegistryReady reports the registry's certificate."""
    for part in tls_servers(observed):
        if part != names.REGISTRY and not has_certificate(observed, part):
            yield false("NoCertificate", no_certificate(observed, part))


def no_certificate(observed: Observed, part: str = names.REGISTRY) -> str:
    """Why a server has no certificate yet."""
    name = tls.secret_name(observed.name, part)
    if observed.config.tls.mode is TlsMode.SELF_SIGNED:
        refused = [each.message for each in observed.refusals if each.ref == Ref("Secret", name)]
        problem = " ".join(refused) or observed.config.tls.problem or "it does not know its CA yet"
        return f"the operator has not signed one: {problem}"
    certificate = observed.certificates.get(part)
    if certificate is not None and not certificate.authorities:
        return f"Secret {name} has no entry ca.crt; choose an issuer that has a CA of its own"
    request = observed.children.get(Ref("Certificate", name))
    messages = [one.get("message", "") for one in request.status.get("conditions", ())] if request is not None else []
    return f"cert-manager has not signed Certificate {name}: {' '.join(messages) or 'it says no reason'}"
